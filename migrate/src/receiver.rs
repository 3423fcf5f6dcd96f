//! Receives a migration from streams: what goes on at the destination is a [`Reception`].

use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::VolatileSlice;

use crate::joint::{Joint, keep_the_door};
use crate::newcomers::GREETING;
use crate::patience::{LINGER, TICK, silent_after, within};
use crate::report::Received;
use crate::threads::{self, Finally};
use crate::wire::{Inlet, MAX_CHANNELS, Message, Outlet, Patience, Payload};
use crate::{
    CancelToken, Clock, Destination, Error, Listener, Outcomes, Peer, Reception, Result, Stream,
};

/// How long the source may take to say that it has heard that the guest runs. It runs meanwhile.
const HEARD: Duration = Duration::from_secs(2);

/// What a receiver shall be like.
#[derive(Clone, Debug)]
pub struct ReceiverOptions {
    /// How long the source may be silent. 30 s.
    pub io_timeout: Duration,
    /// Calls it off.
    pub cancel: CancelToken,
    /// Times it. The real clock.
    pub clock: Clock,
    /// Where outcomes are remembered; share it with what answers later connections.
    pub outcomes: Outcomes,
}

impl Default for ReceiverOptions {
    fn default() -> Self {
        Self {
            io_timeout: Duration::from_secs(30),
            cancel: CancelToken::new(),
            clock: Clock::real(),
            outcomes: Outcomes::default(),
        }
    }
}

/// Receives a migration.
pub struct Receiver<'a> {
    destination: &'a mut dyn Destination,
    options: ReceiverOptions,
}

impl<'a> Receiver<'a> {
    /// Prepares to receive into `destination`.
    #[must_use]
    pub fn new(destination: &'a mut dyn Destination, options: ReceiverOptions) -> Self {
        Self {
            destination,
            options,
        }
    }

    /// Receives from the first connection that brings a migration, and from those that join it; answers those that ask
    /// for an outcome, and goes on listening after those that bring neither (a probe of the port, another release).
    /// Another migration that comes meanwhile is refused.
    ///
    /// # Errors
    /// [`Error::Io`] of the listener: no migration has begun.
    pub fn listen(self, listener: &Listener) -> Result<Received> {
        loop {
            let again = Receiver::new(&mut *self.destination, self.options.clone());
            match again.listen_until(listener, None)? {
                Some(received) if received.asked.is_none() || !listener.is_socket() => {
                    return Ok(received);
                }
                _ => {}
            }
        }
    }

    /// As [`Receiver::listen`], and what it hears first: a migration, or a question ([`Received::asked`]), which has been
    /// answered. `None` when neither has come by `end`.
    ///
    /// # Errors
    /// As there.
    pub fn listen_until(
        self,
        listener: &Listener,
        end: Option<Instant>,
    ) -> Result<Option<Received>> {
        loop {
            let stream = match listener.accept_until(&self.options.cancel, end) {
                Ok(Some(stream)) => stream,
                Ok(None) => return Ok(None),
                Err(error @ Error::Cancelled) => {
                    let mut report = Received::nothing();
                    report.fail(error);
                    return Ok(Some(report));
                }
                Err(error) => return Err(error),
            };
            let again = Receiver::new(&mut *self.destination, self.options.clone());
            let received = again.receive(stream, Some(listener));
            match &received.error {
                Some(Error::Cancelled | Error::OnlyQuery) => return Ok(Some(received)),
                Some(error) if received.migration_id.is_none() && listener.is_socket() => {
                    if error.is_of_a_qemu() {
                        tracing::warn!(%error, "hung up on a connection");
                    } else {
                        tracing::info!(%error, "a connection without a migration");
                    }
                }
                _ => return Ok(Some(received)),
            }
        }
    }

    /// Receives from `stream` alone, which is closed afterwards. Errors are in the report.
    #[must_use]
    pub fn run(self, stream: Stream) -> Received {
        self.receive(stream, None)
    }

    fn receive(self, stream: Stream, listener: Option<&Listener>) -> Received {
        let listener = listener.filter(|listener| listener.is_socket());
        let mut peer = match StreamPeer::open(stream, &self.options) {
            Ok(peer) => peer,
            Err(error) => {
                let mut report = Received::nothing();
                report.fail(error);
                return report;
            }
        };
        let most = listener.map_or(1, |_| MAX_CHANNELS);
        let mut reception = Reception::new(self.destination, self.options.clone()).up_to(most);
        let joint = Joint::new(reception.landing(), self.options.clone());
        // All other connections have ended before the reception does.
        let ended = thread::scope(|scope| {
            let joint = &joint;
            // Whoever waits at the door is let go of, though the destination panics.
            let _over = Finally(|| joint.end());
            peer.frames(&mut reception, joint, |id| {
                if let Some(listener) = listener {
                    let door = move || keep_the_door(scope, listener, id, joint);
                    if let Err(error) = threads::start(scope, door) {
                        joint.fail(0, error);
                    }
                }
            })
        });
        let report = reception.end(ended, &mut peer);
        peer.outlet.stream().linger(LINGER);
        report
    }
}

/// The source at the other end of a stream.
pub(crate) struct StreamPeer<'o> {
    pub(crate) inlet: Inlet,
    outlet: Outlet,
    options: &'o ReceiverOptions,
}

impl<'o> StreamPeer<'o> {
    pub(crate) fn open(stream: Stream, options: &'o ReceiverOptions) -> Result<Self> {
        stream.set_timeouts(Some(TICK), Some(TICK))?;
        Ok(Self {
            inlet: Inlet::new(stream.try_clone()?),
            outlet: Outlet::new(stream),
            options,
        })
    }

    /// Frames, until the guest runs and the source has heard of it, if it does. `begun` is called once, when the
    /// migration has.
    fn frames(
        &mut self,
        reception: &mut Reception<'_>,
        joint: &Joint,
        begun: impl FnOnce(crate::MigrationId),
    ) -> Result<()> {
        let mut begun = Some(begun);
        loop {
            let doing = reception.doing();
            let io_timeout = self.options.io_timeout;
            let silent = patience(self.options, doing, io_timeout);
            let running = reception.is_running();
            // A stranger, and a source whose guest runs here, get so much time, however much they say in it.
            let limit = match reception.id() {
                None => Some(GREETING),
                Some(_) => running.then_some(HEARD),
            };
            let limit = limit.map(|limit| within(doing, limit.min(io_timeout)));
            let patience = |after| {
                if !running {
                    joint.check()?;
                }
                if let Some(limit) = &limit {
                    limit(after)?;
                }
                silent(after)
            };
            let (header, message) = self.inlet.receive(doing, &patience)?;
            if !running {
                joint.check()?;
            }
            if reception.frame(&header, message, self)? {
                return Ok(());
            }
            if let Some(id) = reception.id()
                && let Some(begun) = begun.take()
            {
                begun(id);
            }
        }
    }
}

impl StreamPeer<'_> {
    /// Says why there is nothing for whoever this is, and hangs up.
    pub(crate) fn refuse(&mut self, reason: &str) -> Result<()> {
        self.answer(&Message::Refused(reason.into()))?;
        self.outlet.stream().linger(Duration::ZERO);
        Ok(())
    }
}

impl Peer for StreamPeer<'_> {
    fn pages(&mut self, pieces: &[VolatileSlice<'_>]) -> Result<()> {
        self.inlet.pages(
            pieces,
            &patience(self.options, "receiving pages", self.options.io_timeout),
        )
    }

    fn bytes(&mut self, length: u32) -> Result<Vec<u8>> {
        self.inlet.bytes(
            length,
            &patience(self.options, "receiving a payload", self.options.io_timeout),
        )
    }

    fn takes_descriptors(&self) -> bool {
        self.inlet.takes_descriptors()
    }

    fn descriptor(&mut self) -> Option<OwnedFd> {
        self.inlet.take_descriptor()
    }

    fn answer(&mut self, message: &Message) -> Result<()> {
        let refusing = silent_after("refusing", LINGER);
        let answering = patience(
            self.options,
            "answering the source",
            self.options.io_timeout,
        );
        let patience: Patience<'_> = match message {
            // The last word is said even by an end that was called off.
            Message::Refused(_) => &refusing,
            _ => &answering,
        };
        self.outlet.send(message, &Payload::None, patience)?;
        Ok(())
    }

    fn listens(&self) -> bool {
        // Behind half a frame nothing can be said.
        self.outlet.whole && !self.outlet.stream().is_file()
    }
}

fn patience<'o>(
    options: &'o ReceiverOptions,
    during: &'static str,
    limit: Duration,
) -> impl Fn(Duration) -> Result<()> + use<'o> {
    move |after| {
        if options.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        if after >= limit {
            return Err(Error::Silent { during, after });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patience::drip;
    use crate::wire::{Hello, VERSION};
    use crate::{MigrationId, NewMemory};
    use gleaner_bitmap::{BlockInfo, Layout, PAGE_SIZE};

    /// One that nothing may come to.
    struct Nobody;

    impl Destination for Nobody {
        fn add_block(&mut self, _: &BlockInfo) -> Result<NewMemory> {
            unreachable!("a block came")
        }

        fn remove_block(&mut self, _: &BlockInfo) -> Result<()> {
            unreachable!("a block went")
        }

        fn layout(&mut self, _: &Layout) -> Result<()> {
            unreachable!("a layout came")
        }

        fn ready(&mut self, _: Vec<u8>) -> Result<()> {
            unreachable!("a state came")
        }

        fn run(&mut self) -> Result<()> {
            unreachable!("a guest came")
        }

        fn abort(&mut self) {}
    }

    #[test]
    fn a_greeting_that_comes_byte_by_byte_takes_no_longer_than_it_may() {
        let peer = drip::peer(&Message::Hello(Hello {
            version: VERSION,
            id: MigrationId([1; 16]),
            name: "a source".into(),
            page_size: PAGE_SIZE,
            channels: 1,
            local: false,
        }));
        let options = ReceiverOptions {
            io_timeout: drip::LIMIT,
            ..ReceiverOptions::default()
        };
        let received = Receiver::new(&mut Nobody, options).run(peer.into());
        assert!(matches!(received.error, Some(Error::Silent { .. })));
        assert_eq!(received.migration_id, None);
    }
}
