//! Values as bytes. The only file of this package that knows which encoder is used.

use serde::{Serialize, de::DeserializeOwned};

const fn config<const LIMIT: usize>() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<LIMIT>()
}

/// Encodes a value into at most `LIMIT` bytes.
pub fn encode<const LIMIT: usize>(value: &impl Serialize) -> Result<Vec<u8>, String> {
    bincode::serde::encode_to_vec(value, config::<LIMIT>()).map_err(|e| e.to_string())
}

/// Decodes a value that came from elsewhere, and takes nothing that has bytes left over. Whatever the bytes say, texts come
/// to no more than `LIMIT` bytes. Lists come to four times that, as an entry may be longer in memory than what counts
/// against the limit, and lists double as they grow; and a list's length is believed up to 1 MiB, whatever the limit.
pub fn decode<const LIMIT: usize, T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let (value, used) =
        bincode::serde::decode_from_slice(bytes, config::<LIMIT>()).map_err(|e| e.to_string())?;
    if used == bytes.len() {
        Ok(value)
    } else {
        Err(format!("{} bytes after its end", bytes.len() - used))
    }
}
