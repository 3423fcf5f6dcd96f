//! What compresses.

use serde::{Deserialize, Serialize};

/// What page contents are compressed with. Its order is that of the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compress {
    /// Nothing: pages go straight out of guest memory.
    #[default]
    None,
    /// LZ4, for links of some Gbit/s.
    Lz4,
    /// Zstandard at its fastest, for slower ones.
    Zstd,
}

impl Compress {
    /// Its name, for messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "nothing",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}
