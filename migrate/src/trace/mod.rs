//! Traces: which pages a guest dirtied by when, in a file that a plan can be made from.
//!
//! ```text
//! magic "gleantrc" | version u16 | shift u8 | CRC-32 u32 | frame | frame | ...        (numbers are little-endian)
//! frame:   length of the body, varint, 1 to 64 Mi | body | CRC-32 of the body, u32
//! body:    0 | pages, varint | name, UTF-8, up to 255 bytes              a RAM block is there from now on
//!          1 | microseconds since the record before, varint | runs       dirtied since then
//! run:     2 * gap + 0                   one page, gap pages after the end of the run before
//!          2 * gap + 1 | pages - 2       that many pages
//! varint:  seven bits a byte, the low ones first; the high bit says that more come
//! ```
//!
//! What is kept: the name and size of each block, and, for each interval between two records, which of the pages that are
//! [followed](Followed) were dirtied in it. What is lost: when within an interval, how often, and the other pages. Of a
//! guest up to 16 GiB each page is followed, unless its writer chose otherwise; of a larger one a page out of each group of
//! 2, 4, 8, ..., which stands for its group. So an hour of 1 TiB takes tens of megabytes, and what is counted in it is off
//! by about one over the root of the followed pages that were counted.
//!
//! A record is whole when it is in the file. A trace whose writer was killed can be read up to its last whole record, and
//! says that it was [cut](Trace::cut); what is damaged otherwise is refused.

mod followed;
mod reader;
mod recorder;
mod runs;
mod varint;
mod writer;

#[cfg(test)]
mod tests;

pub use followed::Followed;
pub(crate) use followed::scatter;
pub use reader::{Trace, TraceRecord, TracedBlock};
pub use recorder::Recorder;
pub use runs::TraceRuns;
pub use writer::TraceWriter;

/// What a trace begins with.
const MAGIC: [u8; 8] = *b"gleantrc";
/// The version that is written, and the newest that is read.
const VERSION: u16 = 1;
/// Magic, version, shift, checksum.
const HEADER: usize = 8 + 2 + 1 + 4;
/// Bytes of a body at most.
const MOST_BODY: u64 = 64 << 20;
/// RAM blocks at most.
const MOST_BLOCKS: usize = 4096;
/// Bytes of a block's name at most.
const MOST_NAME: usize = 255;
/// Pages that are followed at most: a bitmap of them is 8 MiB.
const MOST_FOLLOWED: u64 = 1 << 26;
/// Bytes that are read at most.
const MOST_BYTES: u64 = 1 << 30;

/// A body that tells of a block.
const BLOCK: u8 = 0;
/// A body that tells what was dirtied.
const DIRTIED: u8 = 1;
