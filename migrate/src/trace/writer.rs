//! Writes a trace, a record at a time.

use std::io::Write;
use std::time::Duration;

use gleaner_bitmap::{PageBitmap, PageRange};

use super::{
    BLOCK, DIRTIED, Followed, MAGIC, MOST_BLOCKS, MOST_BODY, MOST_FOLLOWED, MOST_NAME, VERSION,
    runs, varint,
};
use crate::{Error, Result};

/// Writes a trace. What it is killed in the middle of, a reader leaves out.
///
/// ```
/// # use gleaner_migrate::{Trace, TraceWriter, Followed};
/// # use gleaner_bitmap::PageRange;
/// # use std::time::Duration;
/// # fn main() -> gleaner_migrate::Result<()> {
/// let mut file = Vec::new();
/// let mut writer = TraceWriter::new(&mut file, Followed::ALL)?;
/// let ram = writer.block("ram", 1 << 18)?;
/// writer.dirtied(ram, PageRange::new(100, 50));
/// writer.record(Duration::from_millis(100))?;
/// assert_eq!(Trace::read(&file[..])?.total_pages(), 1 << 18);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct TraceWriter<W> {
    out: W,
    followed: Followed,
    blocks: Vec<Place>,
    /// What goes into the next record.
    dirty: PageBitmap,
    /// Microseconds.
    last: u64,
}

/// Where a block's followed pages are.
#[derive(Clone, Copy, Debug)]
struct Place {
    first: u64,
    pages: u64,
}

impl<W: Write> TraceWriter<W> {
    /// Begins a trace.
    ///
    /// # Errors
    /// [`Error::Io`] when it can't be written.
    pub fn new(mut out: W, followed: Followed) -> Result<Self> {
        let mut header = MAGIC.to_vec();
        header.extend(VERSION.to_le_bytes());
        header.push(followed.shift());
        header.extend(crc32fast::hash(&header).to_le_bytes());
        write(&mut out, &header)?;
        Ok(Self {
            out,
            followed,
            blocks: Vec::new(),
            dirty: PageBitmap::new(0),
            last: 0,
        })
    }

    /// A RAM block is there from now on; returns its number, by which its pages are told. What of it is dirty says
    /// [`TraceWriter::dirtied`] alone. A name longer than 255 bytes is cut.
    ///
    /// # Errors
    /// [`Error::TooLong`] with more than 4096 blocks, or more than 2^26 followed pages; [`Error::Io`] when it can't be
    /// written.
    pub fn block(&mut self, name: &str, pages: u64) -> Result<usize> {
        let place = Place {
            first: self.dirty.pages(),
            pages,
        };
        let followed = place.first + self.followed.count(pages);
        for (what, length, cap) in [
            (
                "a trace's number of RAM blocks",
                self.blocks.len() as u64 + 1,
                MOST_BLOCKS as u64,
            ),
            (
                "a trace's number of followed pages",
                followed,
                MOST_FOLLOWED,
            ),
        ] {
            if length > cap {
                return Err(Error::TooLong { what, length, cap });
            }
        }
        let mut body = vec![BLOCK];
        varint::put(&mut body, pages);
        body.extend(shortened(name).as_bytes());
        self.frame(&body)?;
        let mut dirty = PageBitmap::new(followed);
        let before = PageRange::new(0, place.first);
        dirty.or_words_at(before, self.dirty.words(), 0)?;
        self.dirty = dirty;
        self.blocks.push(place);
        Ok(self.blocks.len() - 1)
    }

    /// These pages were dirtied since the record before.
    ///
    /// # Panics
    /// When there is no such block, or it has no such pages.
    pub fn dirtied(&mut self, block: usize, range: PageRange) {
        let place = self.blocks[block];
        assert!(
            range.end() <= place.pages,
            "pages {range:?} of {}",
            place.pages
        );
        self.groups(block, self.followed.among(range, place.pages));
    }

    /// As [`TraceWriter::dirtied`], by groups.
    pub(crate) fn groups(&mut self, block: usize, groups: PageRange) {
        let first = self.blocks[block].first + groups.first;
        self.dirty.set_range(PageRange::new(first, groups.pages));
    }

    /// Writes what was dirtied until `at`, a time since the trace began, in microseconds. An interval takes one at least.
    ///
    /// # Errors
    /// [`Error::Io`] when it can't be written: the trace ends with the record before, then.
    pub fn record(&mut self, at: Duration) -> Result<()> {
        let now = u64::try_from(at.as_micros()).unwrap_or(u64::MAX);
        let now = now.max(self.last.saturating_add(1));
        let mut body = vec![DIRTIED];
        varint::put(&mut body, now - self.last);
        runs::put(&mut body, self.dirty.runs());
        self.frame(&body)?;
        self.last = now;
        self.dirty.clear();
        Ok(())
    }

    /// What it was written to. What was dirtied since the last record is not in it.
    pub fn into_inner(self) -> W {
        self.out
    }

    fn frame(&mut self, body: &[u8]) -> Result<()> {
        let length = body.len() as u64;
        if length > MOST_BODY {
            return Err(Error::TooLong {
                what: "a record of a trace",
                length,
                cap: MOST_BODY,
            });
        }
        let mut frame = Vec::with_capacity(body.len() + 16);
        varint::put(&mut frame, length);
        frame.extend(body);
        frame.extend(crc32fast::hash(body).to_le_bytes());
        // In one piece, so that a killed writer leaves half a record as rarely as can be.
        write(&mut self.out, &frame)
    }
}

fn shortened(name: &str) -> &str {
    let end = (0..=name.len().min(MOST_NAME)).rfind(|end| name.is_char_boundary(*end));
    &name[..end.unwrap_or(0)]
}

fn write(out: &mut impl Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).map_err(|cause| Error::Io {
        what: "write the trace".into(),
        cause,
    })
}
