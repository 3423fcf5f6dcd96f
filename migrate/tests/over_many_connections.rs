//! Pages that go over several connections arrive as if they had gone over one.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

mod common;

use std::thread;

use common::*;
use gleaner_bitmap::{BlockId, BlockInfo, Extent, Generation};
use gleaner_migrate::wire::{
    Adopted, Extents, HEADER_LEN, Header, Hello, Join, LayoutBody, Message, VERSION,
};
use gleaner_migrate::*;

fn with_channels(channels: u16) -> SenderOptions {
    SenderOptions {
        channels,
        ..options()
    }
}

/// The guest writes here and there at each of the first harvests, and blocks come and go.
fn busy(guest: &mut Guest, harvest: u32) {
    if harvest > 6 {
        return;
    }
    let ram = guest.id("ram");
    let n = u64::from(harvest);
    for page in 0..900 {
        let page = page * 7 + n * 13;
        match page % 5 {
            0 => guest.zero(ram, page),
            _ => guest.write(ram, page, u8::try_from(n).unwrap() + 1),
        }
    }
    match harvest {
        2 => {
            let more = guest.add_block("more", 3000);
            (0..3000)
                .step_by(2)
                .for_each(|page| guest.write(more, page, 9));
        }
        4 => guest.remove_block("more"),
        5 => {
            let again = guest.add_block("more", 500);
            guest.write(again, 499, 7);
        }
        _ => {}
    }
}

#[test]
fn memory_is_the_same_whatever_their_number_and_kind() {
    let dir = tempfile::tempdir().unwrap();
    let unix = format!("unix:{}", dir.path().join("s").display());
    for address in [unix.as_str(), "tcp:127.0.0.1:0"] {
        for channels in [1, 2, 4, 64] {
            for used in [None, Some(0xee)] {
                let source = ToySource::scripted(20_000, busy);
                let place = used.map_or_else(ToyDestination::default, ToyDestination::used);
                let (report, received) = migrate_to(
                    &address.parse().unwrap(),
                    &source,
                    &place,
                    with_channels(channels),
                );
                let case = format!("{channels} connections, {address}, used: {used:?}");
                assert_eq!(
                    report.status,
                    Status::Completed,
                    "{:?} {case}",
                    report.reason
                );
                assert_eq!(received.status, Status::Completed, "{case}");
                assert_same(&source, &place);
                assert!(
                    source.guest().no_leases() && !received.may_be_asked,
                    "{case}"
                );
                assert_eq!(received.pages, report.pages_sent, "{case}");
                assert_eq!(
                    received.zero_pages == report.zero_pages,
                    used.is_some(),
                    "{case}: zeros are told where there may be anything else"
                );
            }
        }
    }
}

#[test]
fn more_connections_than_can_be_are_refused_before_anything_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("guest");
    for (address, channels, most) in [
        (format!("file:{}", file.display()), 2, "takes one"),
        ("unix:/nowhere".into(), 65, "1 to 64"),
        ("unix:/nowhere".into(), 0, "1 to 64"),
    ] {
        let source = ToySource::new(10);
        let report = Sender::new(&mut source.clone(), with_channels(channels))
            .run_to(&Connector::new(address.parse().unwrap()));
        assert_eq!(report.status, Status::Failed);
        let reason = report.reason.unwrap();
        assert!(
            reason.contains(most) && reason.contains(&address),
            "{reason}"
        );
        assert!(source.guest().running);
    }
    assert!(!file.exists());
}

/// A connection that a test speaks over by itself.
struct Raw {
    stream: std::os::unix::net::UnixStream,
    sequence: u64,
}

impl Raw {
    fn to(path: &std::path::Path) -> Self {
        let stream = std::os::unix::net::UnixStream::connect(path).unwrap();
        Self {
            stream,
            sequence: 0,
        }
    }

    fn say(&mut self, message: &Message, payload: &[u8]) {
        use std::io::Write;
        let metadata = message.encode().unwrap();
        let length = payload.len() as u64;
        let header = Header::encode(message.kind(), self.sequence, &metadata, length).unwrap();
        self.sequence += 1;
        let bytes = [&header[..], &metadata, payload].concat();
        self.stream.write_all(&bytes).unwrap();
    }

    fn hear(&mut self) -> Message {
        use std::io::Read;
        let mut header = [0; HEADER_LEN];
        self.stream.read_exact(&mut header).unwrap();
        let parsed = Header::parse(&header).unwrap();
        let mut metadata = vec![0; parsed.metadata as usize];
        self.stream.read_exact(&mut metadata).unwrap();
        Message::decode(parsed.kind, &metadata).unwrap()
    }
}

const ID: MigrationId = MigrationId([7; 16]);

fn join(id: MigrationId, channel: u16) -> Message {
    Message::Join(Join { id, channel })
}

/// Speaks to a receiver as a source would that breaks the rules; what became of it there.
fn spoken(speak: impl FnOnce(&mut Raw, &std::path::Path)) -> (Received, ToyDestination) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
    let place = ToyDestination::default();
    let mut there = place.clone();
    let receiving = thread::spawn(move || {
        Receiver::new(&mut there, receiver_options())
            .listen(&listener)
            .unwrap()
    });
    let mut lead = Raw::to(&path);
    let hello = Hello {
        version: VERSION,
        id: ID,
        name: "peer".into(),
        page_size: 4096,
        channels: 3,
        local: false,
    };
    lead.say(&Message::Hello(hello), &[]);
    assert_eq!(lead.hear(), Message::Welcome(VERSION));
    speak(&mut lead, &path);
    drop(lead);
    (receiving.join().unwrap(), place)
}

fn layout(lead: &mut Raw) {
    let layout = LayoutBody {
        generation: Generation(1),
        blocks: vec![BlockInfo {
            id: BlockId(3),
            name: "ram".into(),
            pages: 10,
        }],
        slots: vec![],
    };
    lead.say(&Message::Layout(layout), &[]);
    let adopted = Adopted {
        generation: Generation(1),
        zero: vec![BlockId(3)],
    };
    assert_eq!(lead.hear(), Message::Adopted(adopted));
}

#[test]
fn only_connections_of_the_migration_are_taken_and_each_once() {
    let (received, _) = spoken(|lead, path| {
        for (stray, reason) in [
            (join(MigrationId([8; 16]), 1), "no migration"),
            (join(ID, 0), "no migration"),
            (join(ID, 64), "no migration"),
            (
                Message::Hello(Hello {
                    version: VERSION,
                    id: MigrationId([9; 16]),
                    name: "another agent".into(),
                    page_size: 4096,
                    channels: 1,
                    local: false,
                }),
                "is receiving a guest",
            ),
            (Message::Go, "is receiving a guest"),
        ] {
            let mut peer = Raw::to(path);
            peer.say(&stray, &[]);
            match peer.hear() {
                Message::Refused(why) => assert!(why.contains(reason), "{why}"),
                other => panic!("{stray:?} was answered with {other:?}"),
            }
        }
        let mut first = Raw::to(path);
        first.say(&join(ID, 1), &[]);
        assert_eq!(first.hear(), Message::Welcome(VERSION));
        let mut twice = Raw::to(path);
        twice.say(&join(ID, 1), &[]);
        assert!(matches!(twice.hear(), Message::Refused(_)));
        let mut question = Raw::to(path);
        question.say(&Message::Query(ID), &[]);
        assert_eq!(question.hear(), Message::Outcome(Outcome::Pending));
        layout(lead);
    });
    assert_eq!(received.migration_id, Some(ID));
}

#[test]
fn what_goes_wrong_on_any_connection_ends_the_migration_and_is_said_on_the_first() {
    let pages = |block, first| {
        Message::Pages(Extents {
            generation: Generation(1),
            extents: vec![Extent::new(BlockId(block), first, 1)],
        })
    };
    for (bad, reason) in [
        (pages(4, 0), "block #4"),
        (pages(3, 10), "do not lie inside"),
        (Message::Go, "only pages were to come"),
        (join(ID, 2), "only pages were to come"),
    ] {
        let (received, place) = spoken(|lead, path| {
            layout(lead);
            let mut other = Raw::to(path);
            other.say(&join(ID, 2), &[]);
            assert_eq!(other.hear(), Message::Welcome(VERSION));
            other.say(&pages(3, 5), &[7; 4096]);
            other.say(&Message::Sync, &[]);
            assert_eq!(other.hear(), Message::Applied(2));
            let payload: &[u8] = if matches!(bad, Message::Pages(_)) {
                &[1; 4096]
            } else {
                &[]
            };
            other.say(&bad, payload);
            match lead.hear() {
                Message::Refused(why) => {
                    assert!(
                        why.contains("connection 2") && why.contains(reason),
                        "{why}"
                    );
                }
                other => panic!("{other:?}"),
            }
        });
        assert_eq!(received.status, Status::Failed);
        assert!(place.place().aborted);
    }
}

/// A proxy to the receiver whose connection of this number, in order of their coming, breaks after so many bytes.
fn breaking(dir: &std::path::Path, number: usize, fault: Fault) -> (Address, Address) {
    let [near, far] = ["near", "far"].map(|name| Address::Unix(dir.join(name)));
    let listener = Listener::bind(&near).unwrap();
    let to = far.clone();
    thread::spawn(move || {
        for n in 0.. {
            let Ok(from) = listener.accept() else { return };
            let Ok(to) = connect(&to) else { return };
            let faults = [
                if n == number { fault } else { Fault::default() },
                Fault::default(),
            ];
            carry(from, to, faults);
        }
    });
    (near, far)
}

#[test]
fn what_fails_at_the_source_is_what_is_told() {
    let dir = tempfile::tempdir().unwrap();
    for call in ["lease", "ack"] {
        // More than one lease: others are under way when it fails.
        let source = ToySource::new(30_000);
        (0..30_000).for_each(|page| source.guest().write(BlockId(0), page, 5));
        source.guest().failing = Some(call);
        let place = ToyDestination::default();
        let address = Address::Unix(dir.path().join(call));
        let (report, received) = migrate_to(&address, &source, &place, with_channels(3));
        assert_eq!(report.status, Status::Failed);
        let reason = report.reason.unwrap();
        assert_eq!(reason, format!("source: {call} does not work"));
        assert!(received.reason.unwrap().contains(&reason));
    }
}

#[test]
fn any_connection_that_breaks_leaves_the_guest_at_the_source_and_nothing_lost() {
    for number in 0..3 {
        for cut in [0, 20, 100, 5000, 700_000, 3_900_000] {
            let dir = tempfile::tempdir().unwrap();
            let fault = Fault {
                cut: Some(cut),
                ..Fault::default()
            };
            let (near, far) = breaking(dir.path(), number, fault);
            let source = ToySource::new(3000);
            (0..3000).for_each(|page| source.guest().write(BlockId(0), page, 5));
            let place = ToyDestination::default();
            let listener = Listener::bind(&far).unwrap();
            let mut there = place.clone();
            let cancel = CancelToken::new();
            let receiver = ReceiverOptions {
                cancel: cancel.clone(),
                ..receiver_options()
            };
            let receiving =
                thread::spawn(move || Receiver::new(&mut there, receiver).listen(&listener));
            let report =
                Sender::new(&mut source.clone(), with_channels(3)).run_to(&Connector::new(near));
            let case = format!("connection {number} after {cut} bytes: {:?}", report.reason);
            assert_eq!(report.status, Status::Failed, "{case}");
            assert!(
                source.guest().running && source.guest().no_leases(),
                "{case}"
            );
            cancel.cancel();
            receiving.join().unwrap().unwrap();
            assert!(!place.place().running, "{case}");
            assert_what_differs_is_dirty(&source, &place);
            // And again, with everything dirty.
            source.guest().touch();
            let again = ToyDestination::default();
            let (report, _) = migrate_to(
                &Address::Unix(dir.path().join("again")),
                &source,
                &again,
                with_channels(3),
            );
            assert_eq!(report.status, Status::Completed);
            assert_same(&source, &again);
        }
    }
}

/// The next connection, which has said what it wants.
fn greeted(listener: &std::os::unix::net::UnixListener) -> Raw {
    let mut raw = Raw {
        stream: listener.accept().unwrap().0,
        sequence: 0,
    };
    raw.hear();
    raw
}

#[test]
fn a_destination_that_ends_while_connections_join_is_quoted() {
    let welcome = Message::Welcome(VERSION);
    for (said, why) in [
        (Some("no room here"), "no room here"),
        (None, "connection 2: the stream ended"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let source = ToySource::new(10);
        let report = thread::scope(|scope| {
            scope.spawn(|| {
                let mut lead = greeted(&listener);
                lead.say(&welcome, &[]);
                let mut second = greeted(&listener);
                second.say(&welcome, &[]);
                let third = greeted(&listener);
                if let Some(said) = said {
                    lead.say(&Message::Refused(said.into()), &[]);
                }
                drop(third);
            });
            Sender::new(&mut source.clone(), with_channels(3))
                .run_to(&Connector::new(Address::Unix(path)))
        });
        assert_eq!(report.status, Status::Failed);
        let reason = report.reason.unwrap();
        assert!(reason.contains(why), "{reason}");
        assert!(source.guest().running);
    }
}

/// Cancels a migration whose destination has welcomed so many of three connections and says nothing more, and then
/// looks at the connections.
fn called_off(welcomed: usize, look: impl FnOnce(Vec<Raw>) + Send) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let source = ToySource::new(100);
    let options = with_channels(3);
    let cancel = options.cancel.clone();
    let report = thread::scope(|scope| {
        scope.spawn(move || {
            let greet = |number| {
                let mut raw = greeted(&listener);
                if number < welcomed {
                    raw.say(&Message::Welcome(VERSION), &[]);
                }
                let limit = Some(std::time::Duration::from_secs(30));
                raw.stream.set_read_timeout(limit).unwrap();
                raw
            };
            let all = (0..3).map(greet).collect();
            cancel.cancel();
            look(all);
        });
        let to = Connector::new(Address::Unix(path));
        Sender::new(&mut source.clone(), options).run_to(&to)
    });
    assert_eq!(report.status, Status::Cancelled, "{:?}", report.reason);
    assert!(source.guest().running);
}

fn hear_the_end(raw: &mut Raw) {
    std::io::Read::read_to_end(&mut raw.stream, &mut Vec::new()).unwrap();
}

/// A host that has vanished keeps nobody waiting once for each connection.
#[test]
fn all_further_connections_end_at_once_when_the_other_end_says_nothing() {
    called_off(3, |mut all| {
        hear_the_end(&mut all[2]);
        // The one before has not been given up before the last one was ended.
        all[1].say(&Message::Refused("late".into()), &[]);
    });
}

#[test]
fn a_connection_that_was_never_welcome_is_ended_too() {
    called_off(2, |mut all| hear_the_end(&mut all[2]));
}
