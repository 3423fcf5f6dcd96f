//! Sources that may be in doubt of how a migration ended here.
//!
//! A source that was told READY and has heard nothing since keeps its guest stopped until it has asked. So a destination
//! stays for its question, whatever else comes meanwhile.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use gleaner_migrate::{CancelToken, Error, Listener, MigrationId, Outcome, Outcomes, serve_query};

/// How long a question is awaited.
const DOUBT: Duration = Duration::from_secs(600);
/// How long a peer may take to ask.
const QUERY_PATIENCE: Duration = Duration::from_secs(2);
/// Before the next try, after one that failed: an error that stays, such as too many open files, must not keep a core busy.
pub const RETRY: Duration = Duration::from_millis(500);

/// Migrations that have ended here, and until when their sources' questions are awaited.
#[derive(Default)]
pub struct Doubts(BTreeMap<MigrationId, Instant>);

impl Doubts {
    /// The source of a migration may not have heard how it ended.
    pub fn begin(&mut self, id: MigrationId) {
        self.0.insert(id, Instant::now() + DOUBT);
    }

    /// A source has been told. Whether it was the last one that is awaited.
    pub fn settled(&mut self, id: MigrationId) -> bool {
        self.0.remove(&id).is_some() && self.0.is_empty()
    }

    /// So long they are awaited; `None` when there is none.
    pub fn end(&self) -> Option<Instant> {
        self.0.values().max().copied()
    }

    /// Says what is awaited.
    pub fn say(awaited: &str) {
        note!(
            "gleaner: the source may be in doubt of this: awaiting {awaited} for {} s, Ctrl-C ends it",
            DOUBT.as_secs()
        );
    }

    /// Answers until all have asked, or their time is over. No guest is taken meanwhile.
    pub fn wait_out(mut self, listener: &Listener, outcomes: &Outcomes, cancel: &CancelToken) {
        if let Some(end) = self.end() {
            answer_until(listener, outcomes, cancel, Some(end), |id| self.settled(id));
        }
    }
}

/// Answers sources that are in doubt, until it is cancelled.
pub fn answer(listener: &Listener, outcomes: &Outcomes, cancel: &CancelToken) {
    answer_until(listener, outcomes, cancel, None, |_| false);
}

/// Answers until `end`, or until a source that has been told was the last one.
fn answer_until(
    listener: &Listener,
    outcomes: &Outcomes,
    cancel: &CancelToken,
    end: Option<Instant>,
    mut last: impl FnMut(MigrationId) -> bool,
) {
    if !listener.is_socket() {
        return;
    }
    loop {
        let answered = match listener.accept_until(cancel, end) {
            Ok(Some(stream)) => serve_query(stream, outcomes, QUERY_PATIENCE),
            Ok(None) | Err(Error::Cancelled) => return,
            Err(error) => {
                std::thread::sleep(RETRY);
                Err(error)
            }
        };
        match answered {
            Ok((id, Outcome::Running | Outcome::Refused)) if last(id) => return,
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "query"),
        }
    }
}
