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
//! | 1 | Hello | version, migration id, name of the source, page size | |
//! | 2 | Layout | generation, blocks, slots | |
//! | 3 | Pages | generation, extents | their contents, in this order |
//! | 4 | Zeros | generation, extents | |
//! | 5 | Sync | | |
//! | 6 | State | generation, crc32 of the payload | opaque |
//! | 7 | Go | | |
//! | 8 | Cancel | reason | |
//! | 9 | Query | migration id | |
//! | 65 | Welcome | version | |
//! | 66 | Applied | sequence of the Sync it answers | |
//! | 67 | Ready | | |
//! | 68 | Running | | |
//! | 69 | Refused | reason | |
//! | 70 | Outcome | outcome | |
//!
//! Metadata is bincode 2 in its standard configuration (variable-length integers, little-endian). Kinds from 64 on go
//! from the destination to the source. A Query stands alone on a connection of its own.

mod codec;
mod header;
mod message;
mod pipe;

pub use header::{HEADER_LEN, Header, Kind, MAX_METADATA, MAX_PAYLOAD};
pub use message::{
    Extents, Hello, LayoutBody, MAX_BLOCKS, MAX_EXTENTS, MAX_NAME, MAX_REASON, Message, StateBody,
    VERSION,
};
pub(crate) use pipe::{Inlet, Outlet};
pub use pipe::{Patience, Payload};
