//! What goes to standard output and standard error.

use std::io::Write;

use serde::Serialize;
use serde_json::json;

/// Where a command says what. With JSON, standard output gets one object and nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    pub json: bool,
}

impl Output {
    /// The command's one result.
    pub fn result(self, object: &impl Serialize, text: impl FnOnce() -> String) {
        if self.json {
            match serde_json::to_string(object) {
                Ok(line) => say(&line),
                Err(error) => eprintln!("gleaner: the result can't be written as JSON: {error}"),
            }
        } else {
            say(&text());
        }
    }

    /// The command ended before it had a result.
    pub fn ended(self, status: &str, reason: &str) {
        eprintln!("gleaner: {reason}");
        if self.json {
            say(&json!({"status": status, "reason": reason}).to_string());
        }
    }
}

/// A line on standard output. Whoever reads it may have seen enough and be gone.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
