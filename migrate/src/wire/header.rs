//! The fixed head of each frame.

use crate::{Error, Result};

/// Bytes in a header.
pub const HEADER_LEN: usize = 28;
/// Most bytes of metadata that any frame may have; most kinds may have far fewer.
pub const MAX_METADATA: u32 = 4 << 20;
/// Most bytes of payload.
pub const MAX_PAYLOAD: u32 = 64 << 20;

/// Most digests in a frame.
pub const MAX_DIGESTS: u32 = 1024;

pub(crate) const MAGIC: [u8; MAGIC_LEN] = *b"GLNR";
/// Bytes that every frame begins with.
pub(super) const MAGIC_LEN: usize = 4;
const VERSION: u16 = super::VERSION;
/// Where the checksum stands: after all it covers of the header.
const CRC_AT: usize = 24;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $metadata:expr, $payload:expr;)*) => {
        /// What a frame is.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Kind { $($(#[$doc])* $name = $number,)* }

        impl Kind {
            /// Every kind.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Its name, for messages.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// Most bytes of metadata and of payload.
            #[must_use]
            pub const fn caps(self) -> (u32, u32) {
                match self { $(Self::$name => ($metadata, $payload),)* }
            }

            const fn from_number(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

/// A reason of the greatest length and its own length.
const REASON: u32 = 4096 + 8;
/// The greatest number of extents at their greatest length.
const EXTENTS: u32 = 4096 * 27 + 32;
/// The greatest number of packed pages, each an extent by itself, at their greatest length.
const PACKED: u32 = 256 * (27 + 4) + 64;
/// Their contents.
const PACKED_CONTENTS: u32 = 256 * 4096;
/// The greatest number of blocks at the greatest length of an id.
const BLOCKS: u32 = 8192 * 9 + 32;

kinds! {
    /// Opens a migration.
    Hello = 1, 512, 0;
    /// Blocks and slots.
    Layout = 2, MAX_METADATA, 0;
    /// Page contents.
    Pages = 3, EXTENTS, MAX_PAYLOAD;
    /// Pages that hold nothing but zeros.
    Zeros = 4, EXTENTS, 0;
    /// Asks for Applied.
    Sync = 5, 0, 0;
    /// State of devices and vCPUs.
    State = 6, 32, MAX_PAYLOAD;
    /// The destination may run.
    Go = 7, 0, 0;
    /// The source ends the migration.
    Cancel = 8, REASON, 0;
    /// Asks what became of a migration.
    Query = 9, 32, 0;
    /// Opens a further connection of a migration.
    Join = 10, 32, 0;
    /// The source knows that the guest runs at the destination.
    Heard = 11, 0, 0;
    /// Page contents, compressed or as what has changed.
    Packed = 12, PACKED, PACKED_CONTENTS;
    /// Digests of pages, which the destination compares with its own.
    Digests = 13, EXTENTS, 8 * MAX_DIGESTS;
    /// The memory of a block, whose descriptor goes along.
    Memory = 14, 32, 0;
    /// Answers Hello.
    Welcome = 65, 32, 0;
    /// All before a Sync is in memory.
    Applied = 66, 32, 0;
    /// Everything is built; Go is awaited.
    Ready = 67, 0, 0;
    /// The guest runs.
    Running = 68, 0, 0;
    /// The destination ends the migration; it doesn't run the guest.
    Refused = 69, REASON, 0;
    /// Answers Query.
    Outcome = 70, 32, 0;
    /// Answers Layout.
    Adopted = 71, BLOCKS, 0;
}

impl Kind {
    pub(super) fn check_metadata(self, length: u64) -> Result<()> {
        over("frame metadata (bytes)", length, self.caps().0)
    }

    pub(super) fn check_payload(self, length: u64) -> Result<()> {
        over("frame payload (bytes)", length, self.caps().1)
    }
}

fn over(what: &'static str, length: u64, cap: u32) -> Result<()> {
    let cap = u64::from(cap);
    if length > cap {
        return Err(Error::TooLong { what, length, cap });
    }
    Ok(())
}

/// The head of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// Its number, from 0, in its direction.
    pub sequence: u64,
    /// Bytes of metadata.
    pub metadata: u32,
    /// Bytes of payload.
    pub payload: u32,
    /// Checksum as transmitted; see [`Header::check`].
    pub crc: u32,
}

impl Header {
    /// The bytes of a header for `metadata`, checksum included.
    ///
    /// # Errors
    /// [`Error::TooLong`] when metadata or payload are over their cap.
    pub fn encode(
        kind: Kind,
        sequence: u64,
        metadata: &[u8],
        payload: u64,
    ) -> Result<[u8; HEADER_LEN]> {
        kind.check_metadata(metadata.len() as u64)?;
        kind.check_payload(payload)?;
        // Both are under caps that are u32 themselves.
        let length = u32::try_from(metadata.len()).unwrap_or(MAX_METADATA);
        let payload = u32::try_from(payload).unwrap_or(MAX_PAYLOAD);
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = kind as u8;
        bytes[8..16].copy_from_slice(&sequence.to_le_bytes());
        bytes[16..20].copy_from_slice(&length.to_le_bytes());
        bytes[20..24].copy_from_slice(&payload.to_le_bytes());
        let crc = checksum(&bytes, metadata);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        Ok(bytes)
    }

    /// Whether the first [`MAGIC_LEN`] bytes are how a frame begins.
    pub(super) fn check_magic(bytes: &[u8; HEADER_LEN]) -> Result<()> {
        let [m0, m1, m2, m3, ..] = *bytes;
        let found = [m0, m1, m2, m3];
        if found != MAGIC {
            return Err(Error::Magic { found });
        }
        Ok(())
    }

    /// Reads a header. Its lengths are within the caps of its kind; that its checksum fits must be asked with
    /// [`Header::check`] when the metadata is here.
    ///
    /// # Errors
    /// [`Error::Magic`], [`Error::Version`], [`Error::Kind`], [`Error::Flags`], [`Error::TooLong`].
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self> {
        Self::check_magic(bytes)?;
        let [_, _, _, _, v0, v1, kind, flags, rest @ ..] = *bytes;
        let version = u16::from_le_bytes([v0, v1]);
        if version != VERSION {
            return Err(Error::Version { found: version });
        }
        let kind = Kind::from_number(kind).ok_or(Error::Kind { found: kind })?;
        if flags != 0 {
            return Err(Error::Flags { found: flags });
        }
        let [s @ .., l0, l1, l2, l3, p0, p1, p2, p3, c0, c1, c2, c3] = rest;
        let header = Self {
            kind,
            sequence: u64::from_le_bytes(s),
            metadata: u32::from_le_bytes([l0, l1, l2, l3]),
            payload: u32::from_le_bytes([p0, p1, p2, p3]),
            crc: u32::from_le_bytes([c0, c1, c2, c3]),
        };
        kind.check_metadata(header.metadata.into())?;
        kind.check_payload(header.payload.into())?;
        Ok(header)
    }

    /// Checks the checksum over the header's bytes and the metadata.
    ///
    /// # Errors
    /// [`Error::Checksum`].
    pub fn check(&self, bytes: &[u8; HEADER_LEN], metadata: &[u8]) -> Result<()> {
        if checksum(bytes, metadata) == self.crc {
            Ok(())
        } else {
            Err(Error::Checksum { what: "frame" })
        }
    }
}

fn checksum(header: &[u8; HEADER_LEN], metadata: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header[..CRC_AT]);
    crc.update(metadata);
    crc.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_keep_their_numbers() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_number(*kind as u8), Some(*kind));
        }
        assert_eq!(Kind::from_number(0), None);
    }

    #[test]
    fn the_bytes_are_as_drawn() {
        let bytes = Header::encode(Kind::Layout, 0x0102, b"xyz", 0).unwrap();
        assert_eq!(bytes[..8], *b"GLNR\x01\x00\x02\x00");
        assert_eq!(
            bytes[8..24],
            [2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]
        );
        let mut covered = bytes[..24].to_vec();
        covered.extend(b"xyz");
        assert_eq!(bytes[24..], crc32fast::hash(&covered).to_le_bytes());
        let header = Header::parse(&bytes).unwrap();
        assert_eq!((header.kind, header.sequence), (Kind::Layout, 0x0102));
        header.check(&bytes, b"xyz").unwrap();
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = Header::encode(Kind::Pages, 77, b"metadata", 8192).unwrap();
        for bit in 0..HEADER_LEN * 8 {
            let mut bytes = good;
            bytes[bit / 8] ^= 1 << (bit % 8);
            let verdict = Header::parse(&bytes).and_then(|h| h.check(&bytes, b"metadata"));
            assert!(verdict.is_err(), "bit {bit}");
        }
    }

    #[test]
    fn lengths_over_the_cap_of_the_kind_are_refused() {
        assert!(Header::encode(Kind::Pages, 0, &[], u64::from(MAX_PAYLOAD) + 1).is_err());
        assert!(Header::encode(Kind::Go, 0, b"x", 0).is_err());
        let mut bytes = Header::encode(Kind::Pages, 0, &[], 0).unwrap();
        bytes[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(Header::parse(&bytes), Err(Error::TooLong { .. })));
    }
}
