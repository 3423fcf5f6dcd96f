//! What became of a migration, and how a source in doubt learns of it.
//!
//! A source that has let go of its guest and hears nothing can't know whether the guest runs. The destination remembers,
//! by migration id; the source asks again on a new connection:
//!
//! ```text
//! source in doubt --Query{id}--> destination
//!                 <--Outcome---- Running: complete   Refused: resume   Pending, Unknown: still in doubt
//! ```

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::patience::{LINGER, TICK, within};
use crate::wire::{Inlet, Message, Outlet, Payload};
use crate::{Address, Connector, Error, Result, Source, Status, Stream};

/// Names one attempt to migrate, at both ends. Never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct MigrationId(pub [u8; 16]);

impl MigrationId {
    /// A random one.
    ///
    /// # Errors
    /// [`Error::Io`] when the system has no random numbers.
    pub fn random() -> Result<Self> {
        let mut bytes = [0; 16];
        File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(&mut bytes))
            .map_err(|cause| Error::io("read /dev/urandom", cause))?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for MigrationId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::Address {
            text: text.escape_default().take(64).collect(),
            problem: "a migration id is 32 hexadecimal digits",
        };
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(bad());
        }
        u128::from_str_radix(text, 16)
            .map(|id| Self(id.to_be_bytes()))
            .map_err(|_| bad())
    }
}

/// What a destination knows of a migration.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest runs at the destination.
    Running,
    /// It doesn't, and never will under this id.
    Refused,
    /// Not decided: ask again.
    Pending,
    /// The destination has never heard of it, or has forgotten. Proves nothing.
    Unknown,
}

/// The outcomes that a destination remembers, shared between its connections.
#[derive(Clone, Debug, Default)]
pub struct Outcomes(Arc<Mutex<VecDeque<Known>>>);

/// A migration that is remembered.
#[derive(Debug)]
struct Known {
    id: MigrationId,
    outcome: Outcome,
    /// Its source was told READY, and may ask. Otherwise it knows that it has its guest.
    may_be_asked: bool,
}

impl Outcomes {
    /// As many are remembered; of more, those are forgotten first whose source has no reason to ask, then refused ones,
    /// which leaves their source in doubt but harms nobody.
    const KEPT: usize = 1024;

    fn lock(&self) -> MutexGuard<'_, VecDeque<Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of `id`.
    #[must_use]
    pub fn get(&self, id: MigrationId) -> Outcome {
        let known = self.lock();
        known
            .iter()
            .find(|known| known.id == id)
            .map_or(Outcome::Unknown, |known| known.outcome)
    }

    /// Remembers a migration that begins.
    ///
    /// # Errors
    /// [`Error::IdUsed`]: a second migration under one id would make the answer ambiguous.
    pub(crate) fn begin(&self, id: MigrationId) -> Result<()> {
        let mut known = self.lock();
        if known.iter().any(|other| other.id == id) {
            return Err(Error::IdUsed { id });
        }
        if known.len() >= Self::KEPT {
            let refused = |known: &Known| known.outcome == Outcome::Refused;
            let needless = |known: &Known| refused(known) && !known.may_be_asked;
            let oldest = known.iter().position(needless);
            let oldest = oldest.or_else(|| known.iter().position(refused));
            known.remove(oldest.unwrap_or(0));
        }
        known.push_back(Known {
            id,
            outcome: Outcome::Pending,
            may_be_asked: false,
        });
        Ok(())
    }

    /// The source of a migration is told READY.
    pub(crate) fn may_be_asked(&self, id: MigrationId) {
        self.change(id, |known| known.may_be_asked = true);
    }

    pub(crate) fn set(&self, id: MigrationId, outcome: Outcome) {
        self.change(id, |known| known.outcome = outcome);
    }

    fn change(&self, id: MigrationId, change: impl FnOnce(&mut Known)) {
        if let Some(known) = self.lock().iter_mut().find(|known| known.id == id) {
            change(known);
        }
    }
}

/// Asks the destination, on a new connection, what became of a migration, waiting at most `timeout` for its answer. One
/// that has not decided yet, because it has not noticed that the source's connection is gone, is asked again.
///
/// # Errors
/// [`Error::Address`] for a file, which can't answer and is left as it is; those of [`Connector::connect`];
/// [`Error::Io`], [`Error::Silent`], [`Error::Closed`] or what is wrong with the answer: nothing is known then.
pub fn query(to: &Connector, id: MigrationId, timeout: Duration) -> Result<Outcome> {
    // Before connecting, which empties a file: it may hold the only copy of the guest.
    if let address @ Address::File(_) = to.address() {
        return Err(file(address));
    }
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match ask(to.connect()?, id, left)? {
            Outcome::Pending if left > AGAIN => std::thread::sleep(AGAIN),
            outcome => return Ok(outcome),
        }
    }
}

/// Between two questions.
const AGAIN: Duration = Duration::from_millis(100);

fn file(address: &impl fmt::Display) -> Error {
    Error::Address {
        text: address.to_string(),
        problem: "a file can't be asked what became of a migration",
    }
}

/// As [`query`], on a connection of its own that is open already.
///
/// # Errors
/// As [`query`].
pub fn ask(stream: Stream, id: MigrationId, timeout: Duration) -> Result<Outcome> {
    if stream.is_file() {
        return Err(file(&"file"));
    }
    stream.set_timeouts(Some(TICK), Some(TICK))?;
    let patience = within("awaiting the outcome", timeout);
    let mut inlet = Inlet::new(stream.try_clone()?);
    Outlet::new(stream).send(&Message::Query(id), &Payload::None, &patience)?;
    match inlet.receive("awaiting the outcome", &patience)?.1 {
        Message::Outcome(outcome) => Ok(outcome),
        Message::Refused(reason) => Err(Error::Refused { reason }),
        other => Err(Error::OutOfState {
            kind: other.kind().name(),
            phase: "an outcome was awaited",
        }),
    }
}

/// Answers a connection that asks for an outcome within `timeout`: what it asked for, and what it was told. A migration that begins on it is refused: this end has had its guest.
///
/// # Errors
/// What is wrong with the connection or the question; the question was not answered then.
pub fn serve_query(
    stream: Stream,
    outcomes: &Outcomes,
    timeout: Duration,
) -> Result<(MigrationId, Outcome)> {
    stream.set_timeouts(Some(TICK), Some(TICK))?;
    let patience = within("awaiting a question", timeout);
    let mut inlet = Inlet::new(stream.try_clone()?);
    let mut outlet = Outlet::new(stream);
    match inlet.receive("awaiting a question", &patience)?.1 {
        Message::Query(id) => {
            let outcome = outcomes.get(id);
            outlet.send(&Message::Outcome(outcome), &Payload::None, &patience)?;
            Ok((id, outcome))
        }
        other => {
            let reason = "this destination takes no further guest: start another one".to_owned();
            outlet.send(&Message::Refused(reason), &Payload::None, &patience)?;
            outlet.stream().linger(timeout.min(LINGER));
            Err(Error::OutOfState {
                kind: other.kind().name(),
                phase: "only questions for outcomes were awaited",
            })
        }
    }
}

/// Ends a doubt at the source: completes it, resumes it, or leaves it as it is.
///
/// # Errors
/// What the source says; ask and resolve again then.
pub fn resolve(source: &mut dyn Source, outcome: Outcome) -> Result<Status> {
    match outcome {
        Outcome::Running => source.complete().map(|()| Status::Completed),
        Outcome::Refused => source.resume().map(|()| Status::Failed),
        Outcome::Pending | Outcome::Unknown => Ok(Status::InDoubt),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patience::drip;

    #[test]
    fn a_question_that_comes_byte_by_byte_takes_no_longer_than_it_may() {
        let peer = drip::peer(&Message::Query(MigrationId([1; 16])));
        let answered = serve_query(peer.into(), &Outcomes::default(), drip::LIMIT);
        assert!(matches!(answered, Err(Error::Silent { .. })));
    }

    #[test]
    fn an_answer_that_comes_byte_by_byte_takes_no_longer_than_it_may() {
        let peer = drip::peer(&Message::Outcome(Outcome::Running));
        let told = ask(peer.into(), MigrationId([1; 16]), drip::LIMIT);
        assert!(matches!(told, Err(Error::Silent { .. })));
    }

    #[test]
    fn an_id_reads_back() {
        let id = MigrationId::random().unwrap();
        assert_eq!(id.to_string().parse::<MigrationId>().unwrap(), id);
        assert!("+1".repeat(16).parse::<MigrationId>().is_err());
        assert!("ä".repeat(16).parse::<MigrationId>().is_err());
    }

    #[test]
    fn a_file_is_not_asked_and_keeps_what_it_holds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("guest");
        std::fs::write(&path, "memory").unwrap();
        let id = MigrationId([1; 16]);
        let limit = Duration::from_secs(1);
        assert!(query(&Connector::new(Address::File(path.clone())), id, limit).is_err());
        let open = File::options().append(true).open(&path).unwrap();
        assert!(ask(Stream::File(open), id, limit).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"memory");
    }

    #[test]
    fn an_id_serves_once_and_refusals_are_forgotten_first() {
        let outcomes = Outcomes::default();
        let id = |n: usize| MigrationId((n as u128).to_be_bytes());
        outcomes.begin(id(0)).unwrap();
        assert!(matches!(outcomes.begin(id(0)), Err(Error::IdUsed { .. })));
        outcomes.set(id(0), Outcome::Running);
        outcomes.begin(id(5000)).unwrap();
        outcomes.may_be_asked(id(5000));
        outcomes.set(id(5000), Outcome::Refused);
        for n in 1..=Outcomes::KEPT {
            outcomes.begin(id(n)).unwrap();
            outcomes.set(id(n), Outcome::Refused);
        }
        assert_eq!(outcomes.get(id(0)), Outcome::Running);
        // Whoever is in doubt learns of it, however many strangers come meanwhile.
        assert_eq!(outcomes.get(id(5000)), Outcome::Refused);
        assert_eq!(outcomes.get(id(1)), Outcome::Unknown);
        assert_eq!(outcomes.get(id(2)), Outcome::Unknown);
        assert_eq!(outcomes.get(id(3)), Outcome::Refused);
    }
}
