//! Metadata to bytes and back. The only place that knows bincode.

use serde::{Serialize, de::DeserializeOwned};

use super::header::{Kind, MAX_METADATA};
use crate::{Error, Result};

fn unusable(kind: Kind, detail: impl ToString) -> Error {
    Error::Metadata {
        kind: kind.name(),
        detail: detail.to_string(),
    }
}

pub(super) fn encode<T: Serialize>(kind: Kind, value: &T) -> Result<Vec<u8>> {
    let bytes = bincode::serde::encode_to_vec(value, bincode::config::standard())
        .map_err(|e| unusable(kind, e))?;
    kind.check_metadata(bytes.len() as u64)?;
    Ok(bytes)
}

/// The decoder's limit counts what it was asked to allocate, so a length in the bytes can't ask for more than the cap.
pub(super) fn decode<T: DeserializeOwned>(kind: Kind, bytes: &[u8]) -> Result<T> {
    const LIMIT: usize = MAX_METADATA as usize;
    let config = bincode::config::standard().with_limit::<LIMIT>();
    let (value, used) =
        bincode::serde::decode_from_slice(bytes, config).map_err(|e| unusable(kind, e))?;
    if used == bytes.len() {
        Ok(value)
    } else {
        Err(unusable(kind, "there are bytes after its end"))
    }
}
