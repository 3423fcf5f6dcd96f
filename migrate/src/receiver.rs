//! Receives a migration from a stream: what goes on at the destination is a [`Reception`].

use std::time::Duration;

use vm_memory::VolatileSlice;

use crate::patience::{LINGER, TICK, silent_after};
use crate::report::Received;
use crate::wire::{Inlet, Message, Outlet, Patience, Payload};
use crate::{
    CancelToken, Clock, Destination, Error, Listener, Outcomes, Peer, Reception, Result, Stream,
};

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

    /// Receives from the first connection that brings a migration; answers those that ask for an outcome, and goes on
    /// listening after those that bring neither (a probe of the port, another release).
    ///
    /// # Errors
    /// [`Error::Io`] of the listener: no migration has begun.
    pub fn listen(self, listener: &Listener) -> Result<Received> {
        loop {
            let stream = match listener.accept_until(&self.options.cancel, None) {
                Ok(Some(stream)) => stream,
                Ok(None) => continue,
                Err(error @ Error::Cancelled) => {
                    let mut report = Received::nothing();
                    report.fail(error);
                    return Ok(report);
                }
                Err(error) => return Err(error),
            };
            let again = Receiver::new(&mut *self.destination, self.options.clone());
            let received = again.run(stream);
            match &received.error {
                Some(Error::Cancelled) => return Ok(received),
                Some(error) if received.migration_id.is_none() && listener.is_socket() => {
                    tracing::info!(%error, "a connection without a migration");
                }
                _ => return Ok(received),
            }
        }
    }

    /// Receives from `stream`, which is closed afterwards. Errors are in the report.
    #[must_use]
    pub fn run(self, stream: Stream) -> Received {
        let mut peer = match StreamPeer::open(stream, &self.options) {
            Ok(peer) => peer,
            Err(error) => {
                let mut report = Received::nothing();
                report.fail(error);
                return report;
            }
        };
        let mut reception = Reception::new(self.destination, self.options.clone());
        let ended = peer.frames(&mut reception);
        let report = reception.end(ended, &mut peer);
        peer.outlet.stream().linger(LINGER);
        report
    }
}

/// The source at the other end of a stream.
struct StreamPeer<'o> {
    inlet: Inlet,
    outlet: Outlet,
    options: &'o ReceiverOptions,
}

impl<'o> StreamPeer<'o> {
    fn open(stream: Stream, options: &'o ReceiverOptions) -> Result<Self> {
        stream.set_timeouts(Some(TICK), Some(TICK))?;
        Ok(Self {
            inlet: Inlet::new(stream.try_clone()?),
            outlet: Outlet::new(stream),
            options,
        })
    }

    /// Frames, until the guest runs.
    fn frames(&mut self, reception: &mut Reception<'_>) -> Result<()> {
        loop {
            let doing = reception.doing();
            let (header, message) = self.inlet.receive(doing, &patience(self.options, doing))?;
            if reception.frame(&header, message, self)? {
                return Ok(());
            }
        }
    }
}

impl Peer for StreamPeer<'_> {
    fn pages(&mut self, pieces: &[VolatileSlice<'_>]) -> Result<()> {
        self.inlet
            .pages(pieces, &patience(self.options, "receiving pages"))
    }

    fn bytes(&mut self, length: u32) -> Result<Vec<u8>> {
        self.inlet
            .bytes(length, &patience(self.options, "receiving the state"))
    }

    fn answer(&mut self, message: &Message) -> Result<()> {
        let refusing = silent_after("refusing", LINGER);
        let answering = patience(self.options, "answering the source");
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
) -> impl Fn(Duration) -> Result<()> + use<'o> {
    move |after| {
        if options.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        if after >= options.io_timeout {
            return Err(Error::Silent { during, after });
        }
        Ok(())
    }
}
