//! What `--trace` records of a migration: JSON lines, each written as it happens.
//!
//! | `kind` | when | fields |
//! |---|---|---|
//! | `start` | first | `trace` (the version of this format, 1), `gleaner` (release), `migration_id`, `page_size` (bytes), `downtime_limit_ms`, `timeout_ms` and `bandwidth_limit` (bytes a second), each null without one, `channels` |
//! | `round` | after each round | those of a [`Progress`]; `remaining_pages` were dirtied in `dirty_ms`, a point of the dirty curve; `curve` is the fit through the latest points: `factor * seconds^power` pages, off by `deviation` (natural logarithm) |
//! | `sample` | of `--dry-run`, in place of rounds | `dirty_pages` were dirtied in `dirty_ms` |
//! | `end` | last, unless the process was killed | those of a [`Report`] but for its rounds, or of a rehearsal |
//!
//! Times end in `_ms`, rates are by the second; a bound that is not known, has no end, or is over a year, is null,
//! and `told` has it in words.
//!
//! Beside it, in `FILE.pages`, is which pages were dirtied by when: a [trace](gleaner_migrate::trace) for `gleaner plan`.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gleaner_migrate::{Clock, MigrationId, Progress, Recorder, Report, SenderOptions, Source};
use serde::Serialize;
use serde_json::{Value, json};

use crate::PAGE_SIZE;

/// A trace under way. Clones write to the same file.
#[derive(Clone)]
pub struct Trace(Arc<Mutex<Written>>);

struct Written {
    path: PathBuf,
    /// None after a failure: a trace with a gap would tell of another migration.
    file: Option<File>,
}

impl Trace {
    /// Opens the file, and empties it.
    pub fn create(path: &Path) -> Result<Self, String> {
        let file = File::create(path)
            .map_err(|error| format!("can't write the trace {}: {error}", path.display()))?;
        Ok(Self(Arc::new(Mutex::new(Written {
            path: path.to_owned(),
            file: Some(file),
        }))))
    }

    /// Opens the file beside it, for the pages that the guest dirties, and empties it.
    pub fn pages(&self) -> Result<File, String> {
        let path = pages_beside(&self.written().path);
        File::create(&path)
            .map_err(|error| format!("can't write the trace {}: {error}", path.display()))
    }

    /// A migration begins.
    pub fn start(&self, id: MigrationId, options: &SenderOptions) {
        let millis = |time: std::time::Duration| time.as_secs_f64() * 1e3;
        let start = json!({
            "trace": 1,
            "gleaner": env!("CARGO_PKG_VERSION"),
            "migration_id": id.to_string(),
            "page_size": PAGE_SIZE,
            "downtime_limit_ms": millis(options.tuning.downtime_limit()),
            "timeout_ms": options.timeout.map(millis),
            "bandwidth_limit": options.tuning.bandwidth_limit(),
            "channels": options.channels,
        });
        self.line("start", &start);
    }

    /// A round is over.
    pub fn round(&self, progress: &Progress) {
        self.line("round", progress);
    }

    /// The migration is over.
    pub fn end(&self, report: &Report) {
        let mut end = json!(report);
        if let Value::Object(fields) = &mut end {
            fields.remove("progress");
        }
        self.line("end", &end);
    }

    /// A line of this kind. A failure ends the trace, not the migration.
    pub fn line(&self, kind: &str, fields: &impl Serialize) {
        let mut line = json!({"kind": kind});
        if let (Value::Object(line), Value::Object(fields)) = (&mut line, json!(fields)) {
            line.extend(fields);
        }
        let mut written = self.written();
        let Some(file) = &mut written.file else {
            return;
        };
        if let Err(error) = file.write_all(format!("{line}\n").as_bytes()) {
            note!(
                "gleaner: the trace {} ends here: {error}",
                written.path.display()
            );
            written.file = None;
        }
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the pages are that were dirtied in the migration of a trace.
pub fn pages_beside(path: &Path) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(".pages");
    path.into()
}

/// Runs a migration and writes to `pages`, if there is such a file, what the guest dirties meanwhile. A failure ends the
/// trace, not the migration.
pub fn recording(
    source: &mut dyn Source,
    pages: Option<File>,
    clock: &Clock,
    migrate: impl FnOnce(&mut dyn Source) -> Report,
) -> Report {
    let Some(pages) = pages else {
        return migrate(source);
    };
    let mut recorder = Recorder::new(source, pages, clock.clone());
    let report = migrate(&mut recorder);
    recorder.end();
    if let Some(failure) = recorder.failure() {
        note!("gleaner: the trace of dirtied pages ends early: {failure}");
    }
    report
}
