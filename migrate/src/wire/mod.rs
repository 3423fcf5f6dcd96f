//! The native stream, version 1.
//!
//! Each direction is a row of frames, numbered from 0. Numbers are little-endian.
//!
//! ```text
//! byte  0        4         6      7       8            16          20         24       28
//!       | magic  | version | kind | flags | sequence   | metadata  | payload  | crc32  | metadata ... | payload ... |
//!       | "GLNR" | u16: 1  | u8   | u8: 0 | u64        | u32 bytes | u32 bytes| u32    |
//!       |<--------------- covered by crc32 ------------------------------------>|        |<- and this ->|
//! ```
//!
//! The checksum never covers page contents: the guest changes them while they are sent. The payload of a State frame,
//! which doesn't change, has a checksum of its own in the metadata.
//!
//! | kind | frame | metadata | payload |
//! |---|---|---|---|
//! | 1 | Hello | version, migration id, name of the source, page size, number of connections, whether it is local | |
//! | 2 | Layout | generation, blocks, slots | |
//! | 3 | Pages | generation, extents | their contents, in this order |
//! | 4 | Zeros | generation, extents | |
//! | 5 | Sync | | |
//! | 6 | State | generation, crc32 of the payload | opaque |
//! | 7 | Go | | |
//! | 8 | Cancel | reason | |
//! | 9 | Query | migration id | |
//! | 10 | Join | migration id, number of the connection | |
//! | 11 | Heard | | |
//! | 12 | Packed | generation, extents, codec, how each page is encoded | the encodings, compressed |
//! | 13 | Digests | generation, extents | xxh3 (64 bits) of each of their pages, in this order |
//! | 14 | Memory | generation, block, offset in the file whose descriptor goes along | |
//! | 65 | Welcome | version | |
//! | 66 | Applied | sequence of the Sync it answers | |
//! | 67 | Ready | | |
//! | 68 | Running | | |
//! | 69 | Refused | reason | |
//! | 70 | Outcome | outcome | |
//! | 71 | Adopted | generation, blocks that are known to be zero | |
//!
//! Metadata is bincode 2 in its standard configuration (variable-length integers, little-endian). Kinds from 64 on go
//! from the destination to the source. A Query stands alone on a connection of its own.
//!
//! # Several connections
//!
//! The first connection opens with Hello, which says how many there will be; each further one with Join, once Hello has
//! been answered. Pages, Packed, Zeros, Digests and Sync may go over any of them, everything else over the first alone. A
//! Sync answers for its own connection. Nothing is under way on any connection while a Layout or a State is: every Sync
//! of every connection is answered before, and pages of the new layout follow its Adopted. The generation in each frame
//! of pages is that of the last Layout, so a frame that breaks this is refused.
//!
//! # Packed pages
//!
//! A page of a Packed frame travels whole or as a delta: what has changed of it since it came last. A delta is taken only
//! for a page whose contents came in this migration, and not as zeros after that. All encodings of a frame together are
//! compressed by its codec, each frame by itself.
//!
//! # Memory that is handed over
//!
//! A local migration has one connection, a Unix socket. It has no Pages, Packed, Zeros and Digests. When its last Layout has been
//! adopted, a Memory comes for each of its blocks, then State: no Layout any more. A descriptor goes along with the first
//! byte of its Memory frame (`SCM_RIGHTS`).

mod codec;
mod header;
mod message;
mod packed;
mod pipe;

pub(crate) use header::MAGIC;
pub use header::{HEADER_LEN, Header, Kind, MAX_DIGESTS, MAX_METADATA, MAX_PAYLOAD};
pub use message::{
    Adopted, Extents, Hello, Join, LayoutBody, MAX_BLOCKS, MAX_CHANNELS, MAX_EXTENTS, MAX_NAME,
    MAX_REASON, MemoryBody, Message, StateBody, VERSION,
};
pub use packed::{Encoding, MAX_DELTA, MAX_PACKED_PAGES, PackedBody};
pub(crate) use pipe::{Inlet, Outlet, read, read_pieces, read_some, write, write_pieces};
pub use pipe::{Patience, Payload};
