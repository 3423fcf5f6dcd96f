//! The commands there are.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};

use super::monitor::Monitor;
use super::request::{Refusal, Request, arguments};
use super::{limit, migration, rate, run, settings, statistics};

/// The command that begins a conversation.
pub(super) const NEGOTIATE: &str = "qmp_capabilities";
/// The command that ends the VMM.
pub(super) const QUIT: &str = "quit";

type Command = fn(&Arc<Monitor>, Value) -> Result<Value, Refusal>;

const COMMANDS: [(&str, Command); 19] = [
    (NEGOTIATE, |_, value| negotiate(value).map(|()| json!({}))),
    ("query-version", |_, value| none(value).map(|()| version())),
    ("query-commands", |_, value| none(value).map(|()| names())),
    ("query-status", run::query),
    ("stop", run::stop),
    ("cont", run::cont),
    // Whoever said it has the answer before it is done.
    (QUIT, |_, value| none(value).map(|()| json!({}))),
    ("calc-dirty-rate", rate::calc),
    ("query-dirty-rate", rate::query),
    ("set-vcpu-dirty-limit", limit::set),
    ("cancel-vcpu-dirty-limit", limit::cancel),
    ("query-vcpu-dirty-limit", limit::query),
    ("migrate", migration::migrate),
    ("migrate_cancel", migration::cancel),
    ("query-migrate", statistics::query),
    ("migrate-set-parameters", settings::set_parameters),
    ("query-migrate-parameters", settings::query_parameters),
    ("migrate-set-capabilities", settings::set_capabilities),
    ("query-migrate-capabilities", settings::query_capabilities),
];

/// What a client hears first.
pub(super) fn greeting() -> Value {
    json!({"QMP": {"version": version(), "capabilities": []}})
}

/// The QEMU whose words these are, and who speaks them.
fn version() -> Value {
    json!({
        "qemu": {"major": 7, "minor": 2, "micro": 0},
        "package": concat!("gleaner ", env!("CARGO_PKG_VERSION")),
    })
}

fn names() -> Value {
    let name = |(name, _): &(&str, Command)| json!({"name": name});
    COMMANDS.iter().map(name).collect()
}

/// A command without arguments.
pub(super) fn none(value: Value) -> Result<(), Refusal> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Nothing {}
    arguments(value).map(|Nothing {}| ())
}

/// Takes what a client wants of the conversation: nothing of what may be wanted is there.
pub(super) fn negotiate(value: Value) -> Result<(), Refusal> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Negotiate {
        #[serde(default)]
        enable: Vec<String>,
    }
    let asked: Negotiate = arguments(value)?;
    match asked.enable.first() {
        Some(name) => Err(format!("capability '{name}' is not offered").into()),
        None => Ok(()),
    }
}

pub(super) fn execute(monitor: &Arc<Monitor>, request: Request) -> Result<Value, Refusal> {
    let found = COMMANDS.iter().find(|(name, _)| *name == request.execute);
    match found {
        Some((_, command)) => command(monitor, request.arguments),
        None => {
            let text = format!(
                "there is no command '{}': see 'query-commands'",
                request.execute
            );
            Err(Refusal::no_command(text))
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_head_of_the_module_names_every_command() {
        let head = include_str!("mod.rs");
        for (name, _) in super::COMMANDS {
            assert!(head.contains(&format!("`{name}`")), "{name}");
        }
    }
}
