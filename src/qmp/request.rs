//! What a client asks, and what it is refused with.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// Why a command is refused: nothing has changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Refusal {
    class: &'static str,
    desc: String,
}

impl Refusal {
    /// Of a command that there is not, or not now.
    pub(super) fn no_command(desc: impl Into<String>) -> Self {
        Self {
            class: "CommandNotFound",
            desc: desc.into(),
        }
    }

    /// As it is answered.
    pub(super) fn answer(&self) -> Value {
        json!({"error": {"class": self.class, "desc": self.desc}})
    }
}

impl From<&str> for Refusal {
    fn from(desc: &str) -> Self {
        desc.to_owned().into()
    }
}

impl From<String> for Refusal {
    fn from(desc: String) -> Self {
        Self {
            class: "GenericError",
            desc,
        }
    }
}

impl From<crate::Error> for Refusal {
    fn from(error: crate::Error) -> Self {
        error.to_string().into()
    }
}

/// A command, to be executed.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Request {
    pub(super) execute: String,
    pub(super) arguments: Value,
}

impl Request {
    /// Of what a client wrote. With it, or with why it is none, the id that its answer has to bear.
    pub(super) fn of(value: Value) -> (Option<Value>, Result<Self, Refusal>) {
        let Value::Object(mut members) = value else {
            return (None, Err("a command has to be a JSON object".into()));
        };
        let id = members.remove("id");
        (id, Self::from_members(members))
    }

    fn from_members(mut members: Map<String, Value>) -> Result<Self, Refusal> {
        let arguments = match members.remove("arguments") {
            None => json!({}),
            Some(arguments @ Value::Object(_)) => arguments,
            Some(_) => return Err("member 'arguments' has to be an object".into()),
        };
        let execute = match members.remove("execute") {
            Some(Value::String(execute)) => execute,
            Some(_) => return Err("member 'execute' has to be a string".into()),
            None if members.contains_key("exec-oob") => {
                return Err("commands out of band were not negotiated".into());
            }
            None => return Err("member 'execute' is missing".into()),
        };
        if let Some(name) = members.keys().next() {
            return Err(format!("member '{name}' is unexpected").into());
        }
        Ok(Self { execute, arguments })
    }
}

/// The arguments of a command.
pub(super) fn arguments<T: DeserializeOwned>(arguments: Value) -> Result<T, Refusal> {
    serde_json::from_value(arguments).map_err(|error| format!("arguments: {error}").into())
}
