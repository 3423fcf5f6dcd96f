//! Reads a trace, and trusts nothing in it.

use std::io::{self, BufRead, BufReader, Read};
use std::ops::Range;

use super::{
    BLOCK, DIRTIED, Followed, HEADER, MAGIC, MOST_BLOCKS, MOST_BODY, MOST_BYTES, MOST_FOLLOWED,
    MOST_NAME, TraceRuns, VERSION, varint,
};
use crate::{Error, Result};

/// A trace in memory: about as large as its file.
#[derive(Clone, Debug)]
pub struct Trace {
    followed: Followed,
    blocks: Vec<TracedBlock>,
    records: Vec<TraceRecord>,
    /// Runs of all records, as they are in the file.
    runs: Vec<u8>,
    followed_pages: u64,
    cut: Option<u64>,
}

/// A RAM block that a trace tells of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TracedBlock {
    /// Its name.
    pub name: String,
    /// Its size in pages.
    pub pages: u64,
}

/// What was dirtied in an interval.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TraceRecord {
    /// Its end, in microseconds since the trace began. It began where the record before ended.
    pub until: u64,
    /// Followed pages that were dirtied in it.
    pub pages: u64,
    runs: Range<usize>,
}

impl Trace {
    /// Reads a trace to its end, or up to its last whole record.
    ///
    /// # Errors
    /// [`Error::NotATrace`], [`Error::TraceVersion`]; [`Error::DamagedTrace`] when something in it can't be;
    /// [`Error::TooLong`] over a cap (1 GiB in all); [`Error::Io`].
    pub fn read(file: impl Read) -> Result<Self> {
        let mut reader = Reader {
            file: BufReader::new(file),
            at: 0,
        };
        let mut trace = Self {
            followed: reader.header()?,
            blocks: Vec::new(),
            records: Vec::new(),
            runs: Vec::new(),
            followed_pages: 0,
            cut: None,
        };
        loop {
            let at = reader.at;
            let damaged = |problem| Error::DamagedTrace { at, problem };
            match reader.frame()? {
                Frame::End => return Ok(trace),
                Frame::Cut => {
                    trace.cut = Some(at);
                    return Ok(trace);
                }
                Frame::Body(body) => trace.take(&body).map_err(damaged)?,
                Frame::Bad(problem) => return Err(damaged(problem)),
            }
            if reader.at > MOST_BYTES {
                return Err(Error::TooLong {
                    what: "a trace, in bytes,",
                    length: reader.at,
                    cap: MOST_BYTES,
                });
            }
        }
    }

    fn take(&mut self, body: &[u8]) -> Checked {
        match body.split_first() {
            Some((&BLOCK, rest)) => self.take_block(rest),
            Some((&DIRTIED, rest)) => self.take_record(rest),
            _ => Err("a record of an unknown kind"),
        }
    }

    fn take_block(&mut self, mut body: &[u8]) -> Checked {
        let pages = varint::take(&mut body).ok_or("a block without a size")?;
        if body.len() > MOST_NAME {
            return Err("a block's name of more than 255 bytes");
        }
        let name = std::str::from_utf8(body).map_err(|_| "a block's name that is no UTF-8")?;
        if self.blocks.len() == MOST_BLOCKS {
            return Err("more than 4096 RAM blocks");
        }
        let total = self.total_pages().checked_add(pages);
        let followed = self.followed_pages + self.followed.count(pages);
        if total.is_none_or(|total| total > 1 << 52) || followed > MOST_FOLLOWED {
            return Err("more memory than a trace can tell of");
        }
        self.followed_pages = followed;
        self.blocks.push(TracedBlock {
            name: name.to_owned(),
            pages,
        });
        Ok(())
    }

    fn take_record(&mut self, mut body: &[u8]) -> Checked {
        let passed = varint::take(&mut body).filter(|passed| *passed > 0);
        let passed = passed.ok_or("a record without a time")?;
        // Sums and products of times stay exact as f64.
        let until = self
            .microseconds()
            .checked_add(passed)
            .filter(|until| *until < 1 << 52);
        let until = until.ok_or("a time after more than a hundred years")?;
        let pages = TraceRuns::new(body).check(self.followed_pages);
        let pages = pages.ok_or("pages that no block has")?;
        let first = self.runs.len();
        self.runs.extend(body);
        self.records.push(TraceRecord {
            until,
            pages,
            runs: first..self.runs.len(),
        });
        Ok(())
    }

    /// Which pages it follows.
    #[must_use]
    pub const fn followed(&self) -> Followed {
        self.followed
    }

    /// How many pages it follows.
    #[must_use]
    pub const fn followed_pages(&self) -> u64 {
        self.followed_pages
    }

    /// The guest's RAM blocks.
    #[must_use]
    pub fn blocks(&self) -> &[TracedBlock] {
        &self.blocks
    }

    /// Pages that the guest has.
    #[must_use]
    pub fn total_pages(&self) -> u64 {
        self.blocks.iter().map(|block| block.pages).sum()
    }

    /// All records, in order of time.
    #[must_use]
    pub fn records(&self) -> &[TraceRecord] {
        &self.records
    }

    /// What was dirtied in the interval of one of its records.
    #[must_use]
    pub fn runs(&self, record: &TraceRecord) -> TraceRuns<'_> {
        TraceRuns::new(self.runs.get(record.runs.clone()).unwrap_or_default())
    }

    /// How long it is, in microseconds.
    #[must_use]
    pub fn microseconds(&self) -> u64 {
        self.records.last().map_or(0, |last| last.until)
    }

    /// Where in its file, in bytes, a record begins that is not whole: its writer was killed, or the file was cut.
    #[must_use]
    pub const fn cut(&self) -> Option<u64> {
        self.cut
    }
}

/// Or what is wrong.
type Checked = std::result::Result<(), &'static str>;

enum Frame {
    End,
    Cut,
    Body(Vec<u8>),
    Bad(&'static str),
}

struct Reader<R> {
    file: BufReader<R>,
    at: u64,
}

impl<R: Read> Reader<R> {
    fn header(&mut self) -> Result<Followed> {
        let header = self.bytes(HEADER as u64)?;
        if !header.starts_with(&MAGIC) {
            return Err(Error::NotATrace);
        }
        let damaged = |problem| Error::DamagedTrace { at: 0, problem };
        let [.., low, high, shift, a, b, c, d] = header[..] else {
            return Err(damaged("it ends within its header"));
        };
        if header.len() < HEADER {
            return Err(damaged("it ends within its header"));
        }
        // Before the checksum: of a newer version it may be another.
        let found = u16::from_le_bytes([low, high]);
        if found != VERSION {
            return Err(Error::TraceVersion {
                found,
                newest: VERSION,
            });
        }
        if crc32fast::hash(&header[..HEADER - 4]) != u32::from_le_bytes([a, b, c, d]) {
            return Err(damaged("the checksum of its header does not fit"));
        }
        Followed::one_of(shift).ok_or(damaged("it follows too few pages"))
    }

    fn frame(&mut self) -> Result<Frame> {
        if self.file.fill_buf().map_err(unreadable)?.is_empty() {
            return Ok(Frame::End);
        }
        let mut length = Vec::new();
        loop {
            match self.bytes(1)?[..] {
                [byte] => length.push(byte),
                _ => return Ok(Frame::Cut),
            }
            if length.last().is_some_and(|byte| byte & 0x80 == 0) || length.len() == 10 {
                break;
            }
        }
        let length = match varint::take(&mut &length[..]) {
            Some(length @ 1..=MOST_BODY) => length,
            _ => return Ok(Frame::Bad("a record of an impossible length")),
        };
        let mut body = self.bytes(length + 4)?;
        if (body.len() as u64) < length + 4 {
            return Ok(Frame::Cut);
        }
        let crc = body.split_off(body.len() - 4);
        if crc != crc32fast::hash(&body).to_le_bytes() {
            return Ok(Frame::Bad("the checksum of a record does not fit"));
        }
        Ok(Frame::Body(body))
    }

    /// So many bytes, or what there is. Memory is taken as they come, not as they are announced.
    fn bytes(&mut self, count: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let there = (&mut self.file).take(count).read_to_end(&mut bytes);
        self.at += there.map_err(unreadable)? as u64;
        Ok(bytes)
    }
}

fn unreadable(cause: io::Error) -> Error {
    Error::Io {
        what: "read the trace".into(),
        cause,
    }
}
