//! LZ4 and Zstandard. The only place that knows their libraries.

use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};
use zstd::bulk;

use super::Compress;
use crate::{Error, Result};

/// Of zstd: its fastest that is not a trade of nearly all of the ratio.
const LEVEL: i32 = 1;

/// Compresses what one connection sends.
pub(super) enum Compressor {
    Lz4(CompressTable),
    Zstd(Box<bulk::Compressor<'static>>),
}

impl Compressor {
    pub(super) fn new(codec: Compress) -> Result<Self> {
        match codec {
            Compress::Zstd => bulk::Compressor::new(LEVEL)
                .map(|zstd| Self::Zstd(Box::new(zstd)))
                .map_err(|cause| Error::io("begin to compress", cause)),
            _ => Ok(Self::Lz4(CompressTable::large())),
        }
    }

    pub(super) const fn codec(&self) -> Compress {
        match self {
            Self::Lz4(_) => Compress::Lz4,
            Self::Zstd(_) => Compress::Zstd,
        }
    }

    /// Compresses `from` to the start of `to`, which grows as needed; the length, unless it is over `most`.
    pub(super) fn compress(&mut self, from: &[u8], to: &mut Vec<u8>, most: usize) -> Option<usize> {
        let room = match self {
            Self::Lz4(_) => get_maximum_output_size(from.len()),
            Self::Zstd(_) => most,
        };
        if to.len() < room {
            to.resize(room, 0);
        }
        let to = &mut to[..room];
        let length = match self {
            Self::Lz4(table) => compress_into_with_table(from, to, table).ok(),
            // It ends early where there is no room for more.
            Self::Zstd(zstd) => zstd.compress_to_buffer(from, to).ok(),
        };
        length.filter(|length| *length <= most)
    }
}

/// Expands what comes over one connection.
#[derive(Default)]
pub(super) struct Expander {
    zstd: Option<bulk::Decompressor<'static>>,
}

impl Expander {
    /// Fails where what `codec` has packed can't be expanded.
    pub(super) fn prepare(&mut self, codec: Compress) -> Result<()> {
        if codec == Compress::Zstd && self.zstd.is_none() {
            let zstd = bulk::Decompressor::new();
            self.zstd = Some(zstd.map_err(|cause| Error::io("begin to decompress", cause))?);
        }
        Ok(())
    }

    /// Expands `from` to all of `to`. It writes nowhere else and takes no memory for it, whatever `from` is.
    pub(super) fn expand(&mut self, codec: Compress, from: &[u8], to: &mut [u8]) -> Result<()> {
        self.prepare(codec)?;
        let length = match (codec, &mut self.zstd) {
            (Compress::Zstd, Some(zstd)) => zstd.decompress_to_buffer(from, to).ok(),
            _ => decompress_into(from, to).ok(),
        };
        if length == Some(to.len()) {
            Ok(())
        } else {
            Err(Error::Packed {
                problem: "what was compressed is not as long as described, or damaged",
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CODECS: [Compress; 2] = [Compress::Lz4, Compress::Zstd];

    #[test]
    fn nothing_expands_beyond_the_announced_length() {
        for codec in CODECS {
            let zeros = vec![0u8; 64 << 20];
            let mut bomb = Vec::new();
            let mut compressor = Compressor::new(codec).unwrap();
            let length = compressor.compress(&zeros, &mut bomb, 1 << 20).unwrap();
            // What stands behind the announced length is a neighbour's.
            let mut memory = vec![7u8; 8192 + 4096];
            let (to, behind) = memory.split_at_mut(8192);
            let expanded = Expander::default().expand(codec, &bomb[..length], to);
            assert!(matches!(expanded, Err(Error::Packed { .. })), "{codec:?}");
            assert!(behind.iter().all(|byte| *byte == 7), "{codec:?}");
        }
    }

    proptest! {
        #[test]
        fn what_was_compressed_expands_to_itself_and_to_no_other_length(
            words in proptest::collection::vec(0u8..40, 1..20_000),
        ) {
            for codec in CODECS {
                let mut packed = Vec::new();
                let length = Compressor::new(codec)
                    .unwrap()
                    .compress(&words, &mut packed, words.len() + 1000)
                    .unwrap();
                let mut expander = Expander::default();
                for more in [0, 1] {
                    let mut found = vec![0; words.len() + more];
                    let expanded = expander.expand(codec, &packed[..length], &mut found);
                    prop_assert_eq!(expanded.is_ok(), more == 0);
                    prop_assert!(more == 1 || found == words);
                }
                let mut short = vec![0; words.len() - 1];
                prop_assert!(expander.expand(codec, &packed[..length], &mut short).is_err());
            }
        }

        #[test]
        fn any_bytes_expand_or_are_refused(
            bytes in proptest::collection::vec(any::<u8>(), 0..3000),
            length in 0usize..9000,
        ) {
            for codec in CODECS {
                let _ = Expander::default().expand(codec, &bytes, &mut vec![0; length]);
            }
        }

        /// Bytes that begin as they should go further into the decoder.
        #[test]
        fn damaged_bytes_expand_or_are_refused(
            words in proptest::collection::vec(0u8..9, 100..9000),
            hits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..9),
        ) {
            for codec in CODECS {
                let mut packed = Vec::new();
                let most = words.len() + 1000;
                let length = Compressor::new(codec).unwrap().compress(&words, &mut packed, most);
                packed.truncate(length.unwrap());
                for (at, byte) in &hits {
                    let at = at.index(packed.len());
                    packed[at] = *byte;
                }
                let _ = Expander::default().expand(codec, &packed, &mut vec![0; words.len()]);
            }
        }
    }
}
