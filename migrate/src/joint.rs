//! Further connections of a migration that is being received.

use std::net::Shutdown;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::Duration;

use crate::landing::Landing;
use crate::newcomers::GREETING;
use crate::pack::Unpacker;
use crate::patience::within;
use crate::receiver::StreamPeer;
use crate::threads::{self, Finally, panic_met};
use crate::wire::{Join, MAX_CHANNELS, Message, VERSION};
use crate::{
    CancelToken, Error, Listener, MigrationId, Outcome, Peer, ReceiverOptions, Result, Stream,
};

/// What the connections of one migration share, besides the memory that they write to.
///
/// Any connection's failure ends the migration: the first one leads, finds the failure by [`Joint::check`] and says so to
/// the source.
pub(crate) struct Joint {
    landing: Arc<Landing>,
    options: ReceiverOptions,
    /// No more connections are taken.
    over: CancelToken,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Connections that joined, by their numbers.
    joined: Vec<(u16, Stream)>,
    failed: Option<Error>,
    over: bool,
}

impl Joint {
    pub(crate) fn new(landing: Arc<Landing>, options: ReceiverOptions) -> Self {
        Self {
            landing,
            options,
            over: CancelToken::new(),
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails when another connection has.
    pub(crate) fn check(&self) -> Result<()> {
        self.lock().failed.take().map_or(Ok(()), Err)
    }

    /// Fails when no more pages are awaited.
    fn open(&self) -> Result<()> {
        if self.over.is_cancelled() {
            return Err(Error::Cancelled);
        }
        Ok(())
    }

    /// Ends all further connections.
    pub(crate) fn end(&self) {
        let mut state = self.lock();
        state.over = true;
        self.over.cancel();
        for (_, stream) in &state.joined {
            stream.shutdown(Shutdown::Both);
        }
    }

    /// Takes a connection in, unless its number is taken or it is too late.
    fn admit(&self, number: u16, stream: Stream) -> bool {
        let mut state = self.lock();
        let fits = (1..MAX_CHANNELS).contains(&number);
        if state.over || !fits || state.joined.iter().any(|(taken, _)| *taken == number) {
            return false;
        }
        state.joined.push((number, stream));
        true
    }

    pub(crate) fn fail(&self, number: u16, error: Error) {
        let mut state = self.lock();
        // What comes after the last page, or because of the end, is none.
        if !state.over && !self.landing.is_closed() {
            state.failed.get_or_insert(Error::Connection {
                number: number.into(),
                cause: Box::new(error),
            });
        }
    }
}

/// Takes connections that join the migration `id`, each with a thread of its own; answers questions and refuses whatever
/// else comes. Until the migration is over.
pub(crate) fn keep_the_door<'scope>(
    scope: &'scope Scope<'scope, '_>,
    listener: &Listener,
    id: MigrationId,
    joint: &'scope Joint,
) {
    loop {
        match listener.accept_until(&joint.over, None) {
            Ok(Some(stream)) => {
                if let Err(error) = greet(scope, stream, id, joint) {
                    tracing::info!(%error, "a connection that is not of the migration");
                }
            }
            Ok(None) => {}
            Err(Error::Cancelled) => return,
            Err(error) => {
                // Too many open files, say. The source hears of it when its connection is not taken.
                tracing::warn!(%error, "the listening socket");
                joint.options.clock.sleep(RETRY);
            }
        }
    }
}

/// Between two tries to accept a connection.
const RETRY: Duration = Duration::from_millis(50);

fn greet<'scope>(
    scope: &'scope Scope<'scope, '_>,
    stream: Stream,
    id: MigrationId,
    joint: &'scope Joint,
) -> Result<()> {
    let handle = stream.try_clone()?;
    let mut peer = StreamPeer::open(stream, &joint.options)?;
    let limit = joint.options.io_timeout.min(GREETING);
    let begun = within("awaiting a greeting", limit);
    let waits = |after| joint.open().and_then(|()| begun(after));
    match peer.inlet.receive("awaiting a greeting", &waits)?.1 {
        Message::Join(Join { id: of, channel }) if of == id && joint.admit(channel, handle) => {
            let work = move || {
                let _fails = Finally(|| {
                    if let Some(error) = panic_met() {
                        joint.fail(channel, error);
                    }
                });
                let welcome = peer.answer(&Message::Welcome(VERSION));
                if let Err(error) = welcome.and_then(|()| carry(&mut peer, joint)) {
                    joint.fail(channel, error);
                }
            };
            if let Err(error) = threads::start(scope, work) {
                joint.fail(channel, error);
            }
            Ok(())
        }
        Message::Query(asked) => {
            let outcome: Outcome = joint.options.outcomes.get(asked);
            peer.answer(&Message::Outcome(outcome))
        }
        other => {
            let reason = match other {
                Message::Join(_) => "this connection is of no migration that is under way here",
                _ => "this destination is receiving a guest: start another one",
            };
            peer.refuse(reason)
        }
    }
}

/// The frames of a connection that has joined.
fn carry(peer: &mut StreamPeer<'_>, joint: &Joint) -> Result<()> {
    let mut unpacker = Unpacker::default();
    loop {
        // The first connection keeps the time: it hears from the source in every round.
        let (header, message) = peer.inlet.receive("awaiting pages", &|_| joint.open())?;
        joint
            .landing
            .frame(&header, &message, peer, &mut unpacker)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patience::drip;

    #[test]
    fn who_joins_byte_by_byte_takes_no_longer_than_he_may() {
        let options = ReceiverOptions {
            io_timeout: drip::LIMIT,
            ..ReceiverOptions::default()
        };
        let joint = Joint::new(Arc::default(), options);
        let id = MigrationId([1; 16]);
        let peer = drip::peer(&Message::Join(Join { id, channel: 1 }));
        std::thread::scope(|scope| {
            let greeted = greet(scope, peer.into(), id, &joint);
            joint.end();
            assert!(matches!(greeted, Err(Error::Silent { .. })));
        });
    }
}
