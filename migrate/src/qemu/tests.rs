//! What a QEMU gets on several connections, read as it comes.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use gleaner_bitmap::{BlockId, BlockInfo, Extent, Generation, PageRange};

use super::channel::TOGETHER;
use super::*;
use crate::CancelToken;
use crate::wire::{Extents, Hello, LayoutBody, Message, Payload, VERSION};
use crate::{Channel, Connector, MappedMemory, MigrationId, PageMemory};

const BLOCK: BlockId = BlockId(7);
const LONG: Duration = Duration::from_secs(30);
const PING: &[u8] = b"\x08\0\x02\0\x04\0\0\0";

/// The other end of a migration over two connections of multifd and the main one.
struct There {
    lanes: Vec<QemuChannel>,
    main: UnixStream,
    multifd: Vec<UnixStream>,
    sync: MultifdSync,
}

fn get(mut from: &UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

impl There {
    /// A migration whose blocks are known: one of 8 pages.
    fn opened(sync: MultifdSync) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let to = Connector::new(crate::Address::Unix(path));
        let options = QemuOptions {
            sync,
            ..QemuOptions::default()
        };
        let lanes = open(&to, 2, &options, &CancelToken::new()).unwrap();
        let mut accepted = listener.incoming().map(Result::unwrap);
        let main = accepted.next().unwrap();
        assert_eq!(get(&main, 8), b"QEVM\0\0\0\x03");
        let multifd: Vec<_> = accepted.take(2).collect();
        for (number, line) in (0u8..).zip(&multifd) {
            assert_eq!(get(line, 64), packet::hello(number));
        }
        for stream in [&main, &multifd[0], &multifd[1]] {
            stream.set_read_timeout(Some(LONG)).unwrap();
        }
        let mut there = Self {
            lanes,
            main,
            multifd,
            sync,
        };
        there.open();
        there
    }

    fn open(&mut self) {
        self.send(
            0,
            &Message::Hello(Hello {
                version: VERSION,
                id: MigrationId([1; 16]),
                name: String::new(),
                page_size: 4096,
                channels: 2,
                local: false,
            }),
        );
        self.gets(&[b"\x07\0\0\0\x04none\x08\0\x01\0\0", PING, b"\x01"]);
        self.answers(1);
        assert_eq!(self.answer(0), Message::Welcome(VERSION));
        self.send(
            0,
            &Message::Layout(LayoutBody {
                generation: Generation(1),
                blocks: vec![BlockInfo::new(BLOCK, "ram", 8 * 4096).unwrap()],
                slots: Vec::new(),
            }),
        );
        self.gets(&[
            b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x80\x04\x03ram\0\0\0\0\0\0\x80\0",
        ]);
        self.gets_sync(2);
        self.answers(2);
        assert!(matches!(self.answer(0), Message::Adopted(_)));
    }

    fn send(&mut self, lane: usize, message: &Message) -> u64 {
        let lane = &mut self.lanes[lane];
        lane.send(message, &Payload::None, &|_| Ok(())).unwrap()
    }

    /// A lane sends a page, which arrives on its connection.
    fn sends_page(&mut self, lane: usize, page: u64) {
        let memory = MappedMemory::anonymous(1).unwrap();
        let piece = [memory.slice(PageRange::new(0, 1)).unwrap()];
        let pages = Message::Pages(Extents {
            generation: Generation(1),
            extents: vec![Extent::new(BLOCK, page, 1)],
        });
        let payload = Payload::Pages(&piece);
        self.lanes[lane]
            .send(&pages, &payload, &|_| Ok(()))
            .unwrap();
        let got = get(&self.multifd[lane], 1344 + 4096);
        assert_eq!(got[8..24], *b"\0\0\0\0\0\0\0\x80\0\0\0\x01\0\0\x10\0");
        assert_eq!(got[320..328], (page * 4096).to_be_bytes());
    }

    fn flush(&mut self, lane: usize) {
        self.lanes[lane].flush(&|_| Ok(())).unwrap();
    }

    /// The answer that a lane gets: a thread hears them, so it may take a moment.
    fn answer(&mut self, lane: usize) -> Message {
        let answer = self.lanes[lane].answer(LONG).unwrap();
        answer.expect("an answer")
    }

    /// Whether a lane has none, of what has been heard.
    fn has_none(&mut self, lane: usize) -> bool {
        self.lanes[lane].answer(Duration::ZERO).unwrap().is_none()
    }

    /// What has come on the main connection.
    fn gets(&self, parts: &[&[u8]]) {
        let expected = parts.concat();
        assert_eq!(get(&self.main, expected.len()), expected);
    }

    /// A full sync has come: on every connection, and at the end of a section of the main one.
    fn gets_sync(&self, ping: u8) {
        for line in &self.multifd {
            let got = get(line, 1344);
            assert_eq!(got[8..24], *b"\0\0\0\x01\0\0\0\x80\0\0\0\0\0\0\0\0");
        }
        let flush: &[u8] = match self.sync {
            MultifdSync::Section => b"",
            MultifdSync::Flush => b"\0\0\0\0\0\0\x02\0",
        };
        let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
        self.gets(&[flush, end, PING, &[ping]]);
    }

    fn answers(&mut self, ping: u8) {
        let pong = [0, 2, 0, 4, 0, 0, 0, ping];
        self.main.write_all(&pong).unwrap();
    }
}

#[test]
fn pages_are_applied_by_a_full_sync_that_began_behind_them() {
    for sync in [MultifdSync::Section, MultifdSync::Flush] {
        let mut there = There::opened(sync);
        there.sends_page(1, 3);
        let first = there.send(1, &Message::Sync);
        let question = there.send(0, &Message::Sync);
        there.flush(0);
        there.gets(&[b"\x02\0\0\0\x02"]);
        there.gets_sync(3);
        // Behind the SYNC of its connection, and before the answer to it.
        there.sends_page(1, 4);
        let second = there.send(1, &Message::Sync);
        there.answers(3);
        assert_eq!(there.answer(0), Message::Applied(question));
        assert_eq!(there.answer(1), Message::Applied(first));
        assert!(there.has_none(1));
        there.flush(1);
        there.gets(&[b"\x02\0\0\0\x02"]);
        there.gets_sync(4);
        assert!(there.has_none(1));
        there.answers(4);
        assert_eq!(there.answer(1), Message::Applied(second));
    }
}

#[test]
fn zeros_go_over_the_main_connection_and_wait_for_it() {
    let mut there = There::opened(MultifdSync::Flush);
    let zeros = Message::Zeros(Extents {
        generation: Generation(1),
        extents: vec![Extent::new(BLOCK, 5, 2)],
    });
    there.send(1, &zeros);
    let applied = there.send(1, &Message::Sync);
    there.gets(&[
        b"\x02\0\0\0\x02\0\0\0\0\0\0\x50\x02\x03ram\0",
        b"\0\0\0\0\0\0\x60\x22\0",
    ]);
    assert!(there.has_none(1));
    there.flush(1);
    there.gets_sync(3);
    there.answers(3);
    assert_eq!(there.answer(1), Message::Applied(applied));
}

#[test]
fn a_full_sync_is_shared_and_begins_before_a_lane_has_to_wait() {
    let mut there = There::opened(MultifdSync::Flush);
    there.sends_page(0, 0);
    let others = there.send(0, &Message::Sync);
    let syncs: Vec<u64> = (1..=TOGETHER as u64)
        .map(|page| {
            there.sends_page(1, page);
            there.send(1, &Message::Sync)
        })
        .collect();
    there.gets(&[b"\x02\0\0\0\x02"]);
    there.gets_sync(3);
    // Nothing is left to be asked.
    there.flush(0);
    there.flush(1);
    there.answers(3);
    assert_eq!(there.answer(0), Message::Applied(others));
    for sync in syncs {
        assert_eq!(there.answer(1), Message::Applied(sync));
    }
    there.send(0, &Message::Go);
    for line in &there.multifd {
        assert_eq!(get(line, 1344)[8..12], *b"\0\0\0\x01");
    }
    there.gets(&[
        b"\x03\0\0\0\x02\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02",
        b"\0\x06\0\0\0\x02{}",
    ]);
    assert!(there.has_none(0));
}

#[test]
fn a_unix_socket_holds_more_than_by_default() {
    let room = |socket: &UnixStream| rustix::net::sockopt::socket_send_buffer_size(socket).unwrap();
    let plain = room(&UnixStream::pair().unwrap().0);
    let there = There::opened(MultifdSync::Flush);
    let peer = &there.lanes[0].peer;
    let mut seen = 0;
    peer.each(|stream| {
        let crate::Stream::Unix(socket) = stream else {
            panic!("{stream:?}");
        };
        assert!(room(socket) > plain);
        seen += 1;
        Ok(())
    })
    .unwrap();
    assert_eq!(seen, 3);
}
