//! A lane's end of the connections to a QEMU.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::sockopt;

use super::answers::{Answers, Awaited};
use super::line::Line;
use super::peer::Peer;
use super::{MultifdSync, QemuOptions, packet, record};
use crate::lane::MAX_IN_FLIGHT;
use crate::patience::{LINGER, TICK, silent_after};
use crate::wire::{Adopted, Message, Patience, Payload, VERSION};
use crate::{CancelToken, Channel, Connector, Error, Result, Stream};

/// Bytes that a Unix socket holds, if the system allows it: so many that either end can work on while the other looks for
/// zeros, or waits for a core. The default is half of it.
const ROOM: usize = 400 << 10;

/// Syncs of a lane that may be unanswered where pages go over several connections: a full sync holds up all of them, so it
/// has to be rare.
const UNANSWERED: usize = 8;
/// Syncs that a lane lets come together before it asks for a full one. With those before known to be applied it needn't wait
/// for it at once.
pub(super) const TOGETHER: usize = 6;
/// How long a QEMU may be silent at first before the user is told.
const SILENCE: Duration = Duration::from_secs(2);

/// Speaks with a QEMU as a lane does with any destination.
pub(crate) struct QemuChannel {
    pub(super) peer: Arc<Peer>,
    /// Number of its connection of multifd; 0 leads.
    number: usize,
    /// Number of the next message.
    sequence: u64,
    /// The full sync after which all that came since the last Sync is known to be applied.
    applied_by: u32,
    /// Answers that are due, and what of QEMU's stands for them.
    due: VecDeque<(Awaited, Message)>,
    /// How far the migration has come, apart from pages.
    phase: Phase,
    /// Since when the answer to the greeting is awaited, until that has been told to take long.
    greeted: Option<Instant>,
    reader: Option<Reader>,
}

/// The thread that hears the answers, on the main connection. Dropped, it ends both.
struct Reader {
    main: Stream,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.main.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What was said last, besides pages, by the lane that leads.
enum Phase {
    Greeting,
    Blocks,
    End,
}

/// Opens a migration over `channels` connections of multifd and the main one. The lane that leads comes first.
pub(crate) fn open(
    to: &Connector,
    channels: u16,
    options: &QemuOptions,
    cancel: &CancelToken,
) -> Result<Vec<QemuChannel>> {
    // QEMU knows the main one by what it begins with, or by its coming first.
    let (main, reader, answers) = begin(to.connect_until(cancel)?)?;
    let mut multifd = Vec::new();
    for number in 1..=channels {
        let line = join(to, number, cancel).map_err(|cause| match cause {
            Error::Cancelled => cause,
            cause => Error::Multifd {
                number,
                channels,
                cause: Box::new(cause),
            },
        })?;
        multifd.push(line);
    }
    let peer = Arc::new(Peer::new(main, multifd, answers, options.clone()));
    let mut channels: Vec<_> = (0..channels.into())
        .map(|number| QemuChannel::new(&peer, number))
        .collect();
    channels[0].reader = reader;
    Ok(channels)
}

type Begun = (Line, Option<Reader>, Option<Arc<Answers>>);

/// Sets a connection up for writing.
fn prepare(stream: &Stream) -> Result<()> {
    stream.set_timeouts(None, Some(TICK))?;
    // TCP finds its own measure, unless it is told.
    if let Stream::Unix(socket) = stream {
        sockopt::set_socket_send_buffer_size(socket, ROOM)
            .map_err(|errno| Error::io("set the send buffer of a socket", errno.into()))?;
    }
    Ok(())
}

/// Opens the main connection.
fn begin(stream: Stream) -> Result<Begun> {
    prepare(&stream)?;
    let (mut reader, mut answers) = (None, None);
    if !stream.is_file() {
        let heard = Arc::<Answers>::default();
        reader = Some(Reader {
            main: stream.try_clone()?,
            thread: Some(heard.follow(stream.try_clone()?)?),
        });
        answers = Some(heard);
    }
    let mut line = Line::new(stream);
    let mut header = Vec::new();
    record::put_header(&mut header);
    line.put(&header, &silent_after("opening the stream", LINGER))?;
    Ok((line, reader, answers))
}

/// Opens a connection of multifd, counted from 1 on.
fn join(to: &Connector, number: u16, cancel: &CancelToken) -> Result<Line> {
    let stream = to.connect_until(cancel)?;
    prepare(&stream)?;
    let mut line = Line::new(stream);
    // At most MAX_CHANNELS.
    let hello = packet::hello(u8::try_from(number - 1).unwrap_or(u8::MAX));
    line.put(&hello, &silent_after("joining the stream", LINGER))?;
    Ok(line)
}

impl QemuChannel {
    /// Opens a migration over one stream.
    pub(crate) fn over(stream: Stream, options: &QemuOptions) -> Result<Self> {
        let (main, reader, answers) = begin(stream)?;
        let peer = Peer::new(main, Vec::new(), answers, options.clone());
        let mut channel = Self::new(&Arc::new(peer), 0);
        channel.reader = reader;
        Ok(channel)
    }

    fn new(peer: &Arc<Peer>, number: usize) -> Self {
        Self {
            peer: Arc::clone(peer),
            number,
            sequence: 0,
            applied_by: 0,
            due: VecDeque::new(),
            phase: Phase::Greeting,
            greeted: None,
            reader: None,
        }
    }

    /// As the pages of a lane go.
    fn pages(
        &self,
        message: &Message,
        payload: &Payload<'_>,
        patience: Patience<'_>,
    ) -> Result<u32> {
        match (message, payload) {
            (Message::Pages(pages), Payload::Pages(pieces)) if self.peer.channels() == 0 => {
                self.peer.pages(pages, pieces, patience)
            }
            (Message::Pages(pages), Payload::Pages(pieces)) => {
                self.peer.packets(self.number, pages, pieces, patience)
            }
            (Message::Zeros(pages), _) => self.peer.zeros(pages, patience),
            (other, _) => Err(Error::NotInFormat {
                what: other.kind().name(),
            }),
        }
    }

    /// A QEMU that awaits more connections says nothing, and it takes long until that is an error.
    fn tell_of_silence(&mut self) {
        if let Some(since) = self.greeted.take_if(|since| since.elapsed() >= SILENCE) {
            let advice = self.advice().unwrap_or_default();
            let seconds = since.elapsed().as_secs();
            tracing::warn!("the QEMU has said nothing for {seconds} s: {advice}");
        }
    }

    /// Whether a full sync has to come before somebody may wait for the answers that are due.
    fn put_off(&self) -> impl DoubleEndedIterator<Item = u32> {
        let asked = self.peer.asked();
        self.due
            .iter()
            .filter_map(move |(awaited, _)| match awaited {
                Awaited::Pong(ping) => Some(*ping).filter(|ping| *ping > asked),
                Awaited::Shut | Awaited::Nothing => None,
            })
    }
}

impl Channel for QemuChannel {
    fn send(
        &mut self,
        message: &Message,
        payload: &Payload<'_>,
        patience: Patience<'_>,
    ) -> Result<u64> {
        let sequence = self.sequence;
        let due = match message {
            Message::Hello(_) => {
                let ping = self.peer.greet(patience)?;
                self.greeted = Some(Instant::now());
                Some((Awaited::Pong(ping), Message::Welcome(VERSION)))
            }
            Message::Layout(layout) => {
                if matches!(self.phase, Phase::Greeting) {
                    self.phase = Phase::Blocks;
                }
                let adopted = Adopted {
                    generation: layout.generation,
                    // Nobody says so, and memory that was used before has to come out exact.
                    zero: Vec::new(),
                };
                let ping = self.peer.adopt(layout.clone(), patience)?;
                Some((Awaited::Pong(ping), Message::Adopted(adopted)))
            }
            Message::Sync => {
                // One that stands alone asks how long an answer takes.
                let after = match std::mem::take(&mut self.applied_by) {
                    0 => self.peer.asked() + 1,
                    after => after,
                };
                Some((Awaited::Pong(after), Message::Applied(sequence)))
            }
            Message::State(_) => {
                let ping = self.peer.asked() + 1;
                self.peer.sync(ping, patience)?;
                Some((Awaited::Pong(ping), Message::Ready))
            }
            Message::Go => {
                self.phase = Phase::End;
                self.peer.end(patience)?;
                Some((Awaited::Shut, Message::Running))
            }
            pages => {
                let after = self.pages(pages, payload, patience)?;
                self.applied_by = self.applied_by.max(after);
                None
            }
        };
        self.sequence += 1;
        self.due.extend(due.filter(|_| self.is_answered()));
        let together = match self.peer.channels() {
            0 => 1,
            _ => TOGETHER,
        };
        if self.put_off().count() >= together {
            self.flush(patience)?;
        }
        Ok(sequence)
    }

    fn flush(&mut self, patience: Patience<'_>) -> Result<()> {
        match self.put_off().next_back() {
            Some(ping) => self.peer.sync(ping, patience),
            None => Ok(()),
        }
    }

    fn answer(&mut self, wait: Duration) -> Result<Option<Message>> {
        let Some(answers) = &self.peer.answers else {
            return Ok(None);
        };
        let awaited = self.due.front().map_or(Awaited::Nothing, |due| due.0);
        if !answers.wait(awaited, wait)? {
            self.tell_of_silence();
            return Ok(None);
        }
        self.greeted = None;
        Ok(self.due.pop_front().map(|(_, answer)| answer))
    }

    fn is_answered(&self) -> bool {
        self.peer.answers.is_some()
    }

    fn most_unanswered(&self) -> usize {
        match self.peer.channels() {
            0 => MAX_IN_FLIGHT,
            _ => UNANSWERED,
        }
    }

    fn advice(&self) -> Option<String> {
        if !self.is_answered() {
            return None;
        }
        let version = match self.peer.options.sync {
            MultifdSync::Section => "before 8.1",
            MultifdSync::Flush => "8.1 or later",
        };
        let (machine, blocks) = (&self.peer.options.machine, self.peer.describe_blocks());
        Some(match (&self.phase, self.peer.channels()) {
            (Phase::Greeting, 0) => format!(
                "expected there is a QEMU with -incoming, of the machine \"{machine}\", without the capability multifd; \
                 its standard error says more"
            ),
            (Phase::Greeting, channels) => format!(
                "expected there is a QEMU with -incoming, of the machine \"{machine}\", with the capability multifd and \
                 multifd-channels {channels}; its standard error says more"
            ),
            (Phase::Blocks, _) if self.peer.has_pages() => {
                "the QEMU's standard error may say more".into()
            }
            (Phase::Blocks, 0) => format!(
                "the QEMU has to have the RAM blocks {blocks}; its standard error says more"
            ),
            (Phase::Blocks, channels) => format!(
                "the QEMU has to be of version {version}, with the RAM blocks {blocks}, the capability multifd and \
                 multifd-channels {channels}; its standard error says more"
            ),
            (Phase::End, _) => {
                "look at the QEMU: where its query-migrate says completed, the guest's memory is there".into()
            }
        })
    }

    /// Never: what may follow a failure or a success has no words in QEMU's stream.
    fn is_whole(&self) -> bool {
        false
    }

    fn bytes(&self) -> u64 {
        let own = self.peer.bytes(self.number);
        match self.number {
            0 => own + self.peer.main_bytes(),
            _ => own,
        }
    }

    fn sync(&self) -> Result<()> {
        self.peer.each(Stream::sync)
    }

    /// The lane that leads ends all connections.
    fn close(&mut self) {
        if let Some(reader) = self.reader.take() {
            let _ = self.peer.each(|stream| {
                stream.shutdown(Shutdown::Both);
                Ok(())
            });
            drop(reader);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_other_end_hears_of_a_main_connection_that_nobody_joins() {
        let (near, mut far) = UnixStream::pair().unwrap();
        drop(begin(near.into()).unwrap());
        let mut said = Vec::new();
        far.read_to_end(&mut said).unwrap();
        assert_eq!(said, b"QEVM\0\0\0\x03");
    }
}
