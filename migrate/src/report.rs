//! How a migration went.

use serde::Serialize;

use crate::policy::{Bounds, Curve, Forecast, Verdict, some_milliseconds};
use crate::{Error, MigrationId, Throttle};

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

impl Status {
    /// Of a migration that ended with this error while it was sure where the guest runs.
    pub(crate) const fn after(error: &Error) -> Self {
        match error {
            Error::Cancelled | Error::CalledOff { .. } => Self::Cancelled,
            _ => Self::Failed,
        }
    }
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
    /// Time since the migration began, in milliseconds.
    pub elapsed_ms: f64,
    /// Pages dirty after it.
    pub remaining_pages: u64,
    /// Pages that the guest has: the most that were ever dirty.
    pub total_pages: u64,
    /// Bytes of page contents a second, in the latest rounds.
    pub rate_bytes_per_second: f64,
    /// Time in which they were dirtied, in milliseconds: from the harvest before to the one after.
    pub dirty_ms: f64,
    /// Time that the harvest after it took, in milliseconds.
    pub harvest_ms: f64,
    /// Time from a question to its answer over the stream, in milliseconds.
    pub round_trip_ms: f64,
    /// What the guest dirties in a given time, after this round and those before.
    pub curve: Option<Curve>,
    /// Pages dirtied a second while it lasted.
    pub dirty_pages_per_second: f64,
    /// The downtime that a switchover now would cost, in milliseconds, when it can be told.
    #[serde(serialize_with = "some_milliseconds")]
    pub forecast_downtime_ms: Option<Bounds>,
    /// The time from start to end if it goes on like this, in milliseconds, when it can be told; infinite: it does not end by
    /// itself. JSON has null for that, and for what is over a year.
    #[serde(serialize_with = "some_milliseconds")]
    pub forecast_total_ms: Option<Bounds>,
    /// What slowed the guest down while it lasted.
    pub throttle: Throttle,
    /// What comes next.
    pub decision: Verdict,
    /// Why.
    pub reason: String,
}

/// Parts of a downtime, in milliseconds, one after the other.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct DowntimeParts {
    /// Stopping the guest.
    pub stop: f64,
    /// Saving its state.
    pub state: f64,
    /// The last harvest.
    pub harvest: f64,
    /// Sending what it found, until that was applied.
    pub send: f64,
    /// Comparing all pages, where that was asked for.
    pub verify: f64,
    /// Sending the state, until the destination was READY.
    pub ready: f64,
    /// Letting go of the guest, until it was RUNNING there.
    pub go: f64,
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
    /// Memory is handed over on this host, and none of it sent.
    pub local: bool,
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
    /// What it was made of, when the guest has moved.
    pub downtime_parts_ms: Option<DowntimeParts>,
    /// Pages that the destination has compared with the source's; 0 unless that was asked for.
    pub verified_pages: u64,
    /// Time that comparing took, in milliseconds; it is part of the downtime.
    pub verify_ms: f64,
    /// What it was expected to be when the guest was stopped, in milliseconds.
    #[serde(serialize_with = "some_milliseconds")]
    pub forecast_downtime_ms: Option<Bounds>,
    /// By how many milliseconds it was longer than likely then, without the time that comparing took; less than 0: shorter.
    pub forecast_error_ms: Option<f64>,
    /// What slowed the guest down in the end.
    pub throttle: Throttle,
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
            local: false,
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
            downtime_parts_ms: None,
            forecast_downtime_ms: None,
            forecast_error_ms: None,
            throttle: Throttle::Off,
            transactions: 0,
            first_round_bytes_per_second: 0.0,
            progress: Vec::new(),
        }
    }

    /// The guest is stopped next, and this is expected.
    pub(crate) fn foretold(&mut self, forecast: Option<&Forecast>) {
        self.forecast_downtime_ms = forecast.map(|forecast| forecast.downtime.times(1e3));
    }

    /// The guest runs again, after so many milliseconds.
    pub(crate) fn became(&mut self, downtime_ms: f64) {
        self.downtime_ms = downtime_ms;
        let forecast = self.forecast_downtime_ms;
        let expected = |forecast: Bounds| forecast.likely + self.verify_ms;
        self.forecast_error_ms = forecast.map(|forecast| downtime_ms - expected(forecast));
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
    /// Memory is handed over on this host, and none of it comes.
    pub local: bool,
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
    /// No migration: it was only asked what became of this one, and has answered.
    #[serde(skip)]
    pub asked: Option<MigrationId>,
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
            local: false,
            blocks: 0,
            pages: 0,
            zero_pages: 0,
            layouts: 0,
            total_ms: 0.0,
            may_be_asked: false,
            asked: None,
        }
    }

    /// It failed before anything came.
    #[must_use]
    pub fn unbegun(reason: String) -> Self {
        Self {
            status: Status::Failed,
            reason: Some(reason),
            ..Self::nothing()
        }
    }

    /// It ended with this error.
    pub(crate) fn fail(&mut self, error: Error) {
        self.status = Status::after(&error);
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
