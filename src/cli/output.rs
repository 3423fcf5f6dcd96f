//! What goes to standard output and standard error.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::Path;

use serde::Serialize;
use serde_json::json;

/// A line on standard error. One that can't be written is lost, and not the command: the log of a guest may be on a full disk.
macro_rules! note {
    ($($line:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($line)*);
    }};
}

/// Where a command says what. With JSON, standard output gets one object and nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    pub json: bool,
}

impl Output {
    /// The command's one result. Whether it could be told; if not, standard error has why.
    pub fn result(self, object: &impl Serialize, text: impl FnOnce() -> String) -> bool {
        if !self.json {
            return say(&text());
        }
        match serde_json::to_string(object) {
            Ok(line) => say(&line),
            Err(error) => {
                note!("gleaner: the result can't be written as JSON: {error}");
                false
            }
        }
    }

    /// The command ended before it had a result.
    pub fn ended(self, status: &str, reason: &str) {
        note!("gleaner: {reason}");
        if self.json {
            say(&json!({"status": status, "reason": reason}).to_string());
        }
    }
}

/// A line on standard output. Whoever reads it may have seen enough and be gone.
fn say(line: &str) -> bool {
    match writeln!(std::io::stdout(), "{line}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            note!("gleaner: the result can't be written to standard output: {error}");
            false
        }
        _ => true,
    }
}

/// Asks before what takes long whether a file can be written in the end. Where there was none there is an empty one then. What is
/// no file, as a pipe, is not asked.
pub fn expect_to_write(path: &Path) -> Result<(), String> {
    if fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        return Ok(());
    }
    let mut options = OpenOptions::new();
    let opened = options.write(true).create(true).truncate(false).open(path);
    opened.map(drop).map_err(|error| cannot_write(path, &error))
}

/// Why a file was not written.
pub fn cannot_write(path: &Path, error: &std::io::Error) -> String {
    format!("can't write {}: {error}", path.display())
}
