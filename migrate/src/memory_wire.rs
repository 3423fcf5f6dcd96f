//! A wire without a system: sender and receiver in one thread, faults at any frame, time as a [`Clock`](crate::Clock) tells it.

use std::os::fd::OwnedFd;
use std::time::Duration;

use vm_memory::VolatileSlice;

use crate::line::{Break, Line, Share, Way};
use crate::wire::{HEADER_LEN, Header, Message, Patience, Payload};
use crate::{Channel, Destination, Error, Peer, Received, ReceiverOptions, Reception, Result};

/// A [`Channel`] that hands each frame to a [`Reception`] as it is sent. Frames are encoded and decoded as on a stream;
/// pages are copied from memory to memory. Everything takes place in the sender's thread and in an order that depends
/// on nothing else, so a run with [`Clock::stopped`](crate::Clock::stopped) at both ends can be repeated exactly.
///
/// ```no_run
/// # use gleaner_migrate::*;
/// # fn example(source: &mut dyn Source, destination: &mut dyn Destination, id: MigrationId) {
/// let clock = Clock::stopped();
/// let there = ReceiverOptions { clock: clock.clone(), ..ReceiverOptions::default() };
/// let here = SenderOptions { clock, ..SenderOptions::new(id) };
/// let mut wire = MemoryWire::new(destination, there)
///     .break_at(Break { way: Way::Back, frame: 3, cut: Cut::Half, silent: false });
/// let report = Sender::new(source, here).run_over(&mut wire);
/// let received = wire.end();
/// # }
/// ```
pub struct MemoryWire<'a> {
    line: Line<'a>,
    end: End<'a>,
}

/// The destination's end.
enum End<'a> {
    Open(Box<Reception<'a>>),
    Ended(Received),
}

impl<'a> MemoryWire<'a> {
    /// A wire to `destination`, without latency, as fast as can be. Its clock is the one of the options; the sender
    /// must have the same.
    #[must_use]
    pub fn new(destination: &'a mut dyn Destination, options: ReceiverOptions) -> Self {
        Self {
            line: Line::new(&options),
            end: End::Open(Box::new(Reception::new(destination, options))),
        }
    }

    /// The time that a frame takes from end to end. The destination acts at once and its answers come two latencies
    /// later.
    #[must_use]
    pub fn latency(mut self, latency: Duration) -> Self {
        self.line.latency = latency;
        self
    }

    /// How long each answer takes beyond the latency. Answers never overtake each other.
    #[must_use]
    pub fn delay(mut self, delay: impl FnMut(&Message) -> Duration + 'a) -> Self {
        self.line.delay = Some(Box::new(delay));
        self
    }

    /// Bytes a second, at least 1, from the source. Answers are too short to count.
    #[must_use]
    pub fn bandwidth(mut self, bandwidth: u64) -> Self {
        self.line.bandwidth = Some(bandwidth.max(1));
        self
    }

    /// Breaks it there, if it comes to that.
    #[must_use]
    pub fn break_at(mut self, breaks: Break) -> Self {
        self.line.breaks = Some(breaks);
        self
    }

    /// Calls `watch` before each frame: the guest may write, a user cancel, time pass.
    #[must_use]
    pub fn watch(mut self, watch: impl FnMut(Way, &Message) + 'a) -> Self {
        self.line.watch = Some(Box::new(watch));
        self
    }

    /// Frames sent so far in one direction, a broken one included if its sender believes that it went.
    #[must_use]
    pub fn frames(&self, way: Way) -> u64 {
        self.line.frames[way as usize]
    }

    /// How it went at the destination. Where the migration has not ended, nothing more comes and it gives up.
    #[must_use]
    pub fn end(mut self) -> Received {
        self.give_up();
        match self.end {
            End::Ended(received) => received,
            End::Open(_) => Received::nothing(), // not reached: it has given up
        }
    }

    /// The destination learns that nothing more will come.
    fn give_up(&mut self) {
        self.line.broken = true;
        if let End::Open(reception) = &self.end {
            let error = self.line.lost(reception.doing());
            self.finish(Err(error));
        }
    }

    fn finish(&mut self, ended: Result<()>) {
        let nothing = End::Ended(Received::nothing());
        if let End::Open(reception) = std::mem::replace(&mut self.end, nothing) {
            let mut peer = Delivery {
                line: &mut self.line,
                payload: Bytes::of(&[], 0),
                descriptor: None,
            };
            self.end = End::Ended(reception.end(ended, &mut peer));
        }
    }

    /// Hands over a frame whose head is there, and `length` bytes of its payload.
    fn deliver(&mut self, frame: &Frame, payload: &Payload<'_>, length: u64) {
        let End::Open(reception) = &mut self.end else {
            return; // It has ended and reads on, so that its last words are heard.
        };
        // Memory that can be read like a guest's, for a payload that is none.
        let mut copy;
        let own;
        let pieces = match payload {
            Payload::None | Payload::Descriptor(_) => &[][..],
            Payload::Bytes(bytes) => {
                copy = bytes.to_vec();
                own = [VolatileSlice::from(&mut copy[..])];
                &own
            }
            Payload::Pages(pieces) => pieces,
        };
        let mut peer = Delivery {
            line: &mut self.line,
            payload: Bytes::of(pieces, length),
            descriptor: match payload {
                Payload::Descriptor(fd) => fd.try_clone_to_owned().ok(),
                _ => None,
            },
        };
        let taken = frame
            .decode()
            .and_then(|(header, message)| reception.frame(&header, message, &mut peer));
        match taken {
            Ok(false) => {}
            Ok(true) => self.finish(Ok(())),
            Err(error) => self.finish(Err(error)),
        }
    }
}

impl Channel for MemoryWire<'_> {
    fn send(
        &mut self,
        message: &Message,
        payload: &Payload<'_>,
        _patience: Patience<'_>,
    ) -> Result<u64> {
        let line = &mut self.line;
        let sequence = line.frames[Way::Forth as usize];
        let frame = Frame::encode(message, sequence, payload.bytes())?;
        let share = line.next(Way::Forth, message);
        if share.is_ok() {
            let head = HEADER_LEN as u64 + frame.metadata.len() as u64;
            let length = head + payload.bytes();
            line.bytes += length;
            if let Some(bandwidth) = line.bandwidth {
                let time = Duration::from_secs_f64(length as f64 / bandwidth as f64);
                line.clock.sleep(time);
            }
            let arriving = match share {
                Ok(Share::All) => length,
                Ok(Share::Half) => length / 2,
                Ok(Share::Nothing) | Err(_) => 0,
            };
            if let Some(rest) = arriving.checked_sub(head) {
                self.deliver(&frame, payload, rest);
            }
        }
        if self.line.broken {
            self.close();
        }
        share.map(|_| sequence)
    }

    fn answer(&mut self, wait: Duration) -> Result<Option<Message>> {
        let clock = &self.line.clock;
        let left = match self.line.answers.front() {
            Some((there, _)) => clock.until(*there),
            None if matches!(self.end, End::Ended(_)) && !self.line.mute => {
                return Err(Error::Closed {
                    during: "awaiting an answer",
                });
            }
            None => Duration::MAX,
        };
        clock.sleep(left.min(wait));
        if left > wait {
            return Ok(None);
        }
        Ok(self.line.answers.pop_front().map(|(_, answer)| answer))
    }

    fn is_answered(&self) -> bool {
        true
    }

    fn takes_descriptors(&self) -> bool {
        true
    }

    fn is_whole(&self) -> bool {
        true
    }

    fn bytes(&self) -> u64 {
        self.line.bytes
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn close(&mut self) {
        if !self.line.mute {
            self.give_up();
        }
    }
}

/// A frame without its payload, as it travels.
struct Frame {
    header: [u8; HEADER_LEN],
    metadata: Vec<u8>,
}

impl Frame {
    fn encode(message: &Message, sequence: u64, payload: u64) -> Result<Self> {
        let metadata = message.encode()?;
        let header = Header::encode(message.kind(), sequence, &metadata, payload)?;
        Ok(Self { header, metadata })
    }

    fn decode(&self) -> Result<(Header, Message)> {
        let header = Header::parse(&self.header)?;
        header.check(&self.header, &self.metadata)?;
        Ok((header, Message::decode(header.kind, &self.metadata)?))
    }
}

/// A frame that the destination takes, and the way back.
struct Delivery<'f, 'a> {
    line: &'f mut Line<'a>,
    payload: Bytes<'f>,
    descriptor: Option<OwnedFd>,
}

impl Peer for Delivery<'_, '_> {
    fn pages(&mut self, pieces: &[VolatileSlice<'_>]) -> Result<()> {
        let mut pieces = pieces.iter();
        if pieces.all(|piece| self.payload.fill(*piece)) {
            Ok(())
        } else {
            Err(self.line.lost("reading pages"))
        }
    }

    fn bytes(&mut self, length: u32) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length as usize];
        if self.payload.fill(VolatileSlice::from(&mut bytes[..])) {
            Ok(bytes)
        } else {
            Err(self.line.lost("reading a payload"))
        }
    }

    fn takes_descriptors(&self) -> bool {
        true
    }

    fn descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptor.take()
    }

    fn answer(&mut self, message: &Message) -> Result<()> {
        let line = &mut *self.line;
        let sequence = line.frames[Way::Back as usize];
        let (_, answer) = Frame::encode(message, sequence, 0)?.decode()?;
        if let Share::All = line.next(Way::Back, message)? {
            let delay = line.delay.as_mut().map_or(Duration::ZERO, |of| of(&answer));
            let there = line.clock.now() + 2 * line.latency + delay;
            let before = line.answers.back().map_or(there, |(before, _)| *before);
            line.answers.push_back((there.max(before), answer));
        }
        Ok(())
    }

    fn listens(&self) -> bool {
        true
    }
}

/// Bytes of a payload that are still to be read.
struct Bytes<'f> {
    pieces: &'f [VolatileSlice<'f>],
    /// What was read of the first piece.
    done: usize,
    /// Bytes that get through.
    left: u64,
}

impl<'f> Bytes<'f> {
    const fn of(pieces: &'f [VolatileSlice<'f>], left: u64) -> Self {
        Self {
            pieces,
            done: 0,
            left,
        }
    }

    /// Copies into `to` as much as gets through; whether that is all of it.
    fn fill(&mut self, to: VolatileSlice<'_>) -> bool {
        let mut filled = 0;
        while filled < to.len() {
            let [piece, rest @ ..] = self.pieces else {
                return false;
            };
            if self.done == piece.len() {
                (self.pieces, self.done) = (rest, 0);
                continue;
            }
            let left = usize::try_from(self.left).unwrap_or(usize::MAX);
            let count = (piece.len() - self.done).min(to.len() - filled).min(left);
            let (Ok(from), Ok(to)) = (piece.subslice(self.done, count), to.subslice(filled, count))
            else {
                return false; // not reached: both are at least as long
            };
            if count == 0 {
                return false;
            }
            from.copy_to_volatile_slice(to);
            filled += count;
            self.done += count;
            self.left -= count as u64;
        }
        true
    }
}
