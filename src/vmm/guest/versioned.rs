//! A vCPU's state as bytes: a version, then the fields.

use serde::{Serialize, de::DeserializeOwned};

use super::{GuestError, Result};
use crate::codec;

/// In at most `LIMIT` bytes, apart from the version.
pub(super) fn encode<const LIMIT: usize>(version: u32, value: &impl Serialize) -> Result<Vec<u8>> {
    let mut bytes = version.to_le_bytes().to_vec();
    bytes.extend(codec::encode::<LIMIT>(value).map_err(malformed)?);
    Ok(bytes)
}

/// The bytes may come from a peer.
pub(super) fn decode<const LIMIT: usize, T: DeserializeOwned>(
    expected: u32,
    bytes: &[u8],
) -> Result<T> {
    let (version, fields) = bytes
        .split_first_chunk()
        .ok_or_else(|| malformed("it ends within its version"))?;
    let found = u32::from_le_bytes(*version);
    if found != expected {
        return Err(GuestError::StateVersion { found, expected });
    }
    codec::decode::<LIMIT, _>(fields).map_err(malformed)
}

pub(super) fn malformed(what: impl ToString) -> GuestError {
    GuestError::StateMalformed {
        what: what.to_string(),
    }
}
