//! How a migration went.

use serde::Serialize;

use crate::policy::Verdict;
use crate::{Error, MigrationId};

/// How a migration ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// The guest runs at the destination (or is in the file, for whoever reads it).
    Completed,
    /// The guest runs on at the source.
    Failed,
    /// The guest runs on at the source, as the user wished.
    Cancelled,
    /// The guest is stopped at the source and may run at the destination: see [`query`](crate::query).
    InDoubt,
}

/// One round, as it ended.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Progress {
    /// Its number, from 1.
    pub round: u32,
    /// Pages sent with their contents.
    pub pages_sent: u64,
    /// Pages of zeros, those included that the destination needn't be told of.
    pub zero_pages: u64,
    /// Bytes written to the stream.
    pub bytes: u64,
    /// Time it took, in milliseconds.
    pub duration_ms: f64,
    /// Pages dirty after it.
    pub remaining_pages: u64,
    /// Bytes of page contents a second.
    pub rate_bytes_per_second: f64,
    /// Pages dirtied a second while it lasted.
    pub dirty_pages_per_second: f64,
    /// The downtime that a switchover now would cost, in milliseconds, when it can be told.
    pub forecast_downtime_ms: Option<f64>,
    /// What comes next.
    pub decision: Verdict,
    /// Why.
    pub reason: String,
}

/// How a migration went, at the source.
#[derive(Debug, Serialize)]
pub struct Report {
    /// How it ended.
    pub status: Status,
    /// Why, unless completed without anything to say.
    pub reason: Option<String>,
    /// The error behind the reason.
    #[serde(skip)]
    pub error: Option<Error>,
    /// Names the attempt, for [`query`](crate::query).
    #[serde(serialize_with = "as_text")]
    pub migration_id: MigrationId,
    /// Rounds, the last one with the guest stopped included.
    pub rounds: u32,
    /// Pages sent with their contents.
    pub pages_sent: u64,
    /// Pages of zeros, those included that the destination needn't be told of.
    pub zero_pages: u64,
    /// Bytes written to the stream.
    pub bytes_on_wire: u64,
    /// Pages, of those sent with contents, that went as what had changed of them.
    pub pages_delta: u64,
    /// Bytes of page contents that packing has left out: pages sent come to so many bytes more than those on the wire.
    pub bytes_saved: u64,
    /// Time from start to end, in milliseconds.
    pub total_ms: f64,
    /// Time in which the guest ran nowhere, in milliseconds; 0 when it was never stopped.
    pub downtime_ms: f64,
    /// Pages that the destination has compared with the source's; 0 unless that was asked for.
    pub verified_pages: u64,
    /// Time that comparing took, in milliseconds; it is part of the downtime.
    pub verify_ms: f64,
    /// Slot transactions while it lasted.
    pub transactions: u64,
    /// Bytes of page contents a second in the first round, 0 when there was none.
    pub first_round_bytes_per_second: f64,
    /// The rounds. Of very many, some early ones are left out.
    pub progress: Vec<Progress>,
}

impl Report {
    /// Of the attempt `migration_id`, which has sent nothing yet.
    #[must_use]
    pub const fn new(migration_id: MigrationId) -> Self {
        Self {
            status: Status::Completed,
            reason: None,
            error: None,
            migration_id,
            rounds: 0,
            pages_sent: 0,
            zero_pages: 0,
            bytes_on_wire: 0,
            pages_delta: 0,
            bytes_saved: 0,
            total_ms: 0.0,
            downtime_ms: 0.0,
            verified_pages: 0,
            verify_ms: 0.0,
            transactions: 0,
            first_round_bytes_per_second: 0.0,
            progress: Vec::new(),
        }
    }
}

/// How a migration went, at the destination.
#[derive(Debug, Serialize)]
pub struct Received {
    /// How it ended. Never in doubt at this end; the guest runs here when completed.
    pub status: Status,
    /// Why, unless completed.
    pub reason: Option<String>,
    /// The error behind the reason.
    #[serde(skip)]
    pub error: Option<Error>,
    /// Names the attempt, once the source has said it.
    #[serde(serialize_with = "as_optional_text")]
    pub migration_id: Option<MigrationId>,
    /// Names the source.
    pub source: String,
    /// RAM blocks at the end.
    pub blocks: u64,
    /// Pages that came with their contents.
    pub pages: u64,
    /// Pages that came as zeros.
    pub zero_pages: u64,
    /// Layouts that came.
    pub layouts: u64,
    /// Time from the first byte to the end, in milliseconds.
    pub total_ms: f64,
    /// The source was told READY, and may not have heard the end: it may ask, see [`serve_query`](crate::serve_query).
    #[serde(skip)]
    pub may_be_asked: bool,
}

impl Received {
    /// Nothing has come yet.
    pub(crate) const fn nothing() -> Self {
        Self {
            status: Status::Completed,
            reason: None,
            error: None,
            migration_id: None,
            source: String::new(),
            blocks: 0,
            pages: 0,
            zero_pages: 0,
            layouts: 0,
            total_ms: 0.0,
            may_be_asked: false,
        }
    }

    /// It ended with this error.
    pub(crate) fn fail(&mut self, error: Error) {
        self.status = match error {
            Error::Cancelled | Error::CalledOff { .. } => Status::Cancelled,
            _ => Status::Failed,
        };
        self.reason = Some(error.to_string());
        self.error = Some(error);
    }
}

fn as_text<S: serde::Serializer>(id: &MigrationId, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(id)
}

fn as_optional_text<S: serde::Serializer>(
    id: &Option<MigrationId>,
    to: S,
) -> Result<S::Ok, S::Error> {
    match id {
        Some(id) => to.collect_str(id),
        None => to.serialize_none(),
    }
}
