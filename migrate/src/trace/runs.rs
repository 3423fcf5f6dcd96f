//! Runs of followed pages, as a record has them.

use gleaner_bitmap::PageRange;

use super::varint;

/// Appends runs, which are in order and do not overlap.
pub(super) fn put(out: &mut Vec<u8>, runs: impl Iterator<Item = PageRange>) {
    let mut end = 0;
    for run in runs {
        let gap = run.first - end;
        end = run.end();
        match run.pages {
            1 => varint::put(out, gap << 1),
            pages => {
                varint::put(out, gap << 1 | 1);
                varint::put(out, pages - 2);
            }
        }
    }
}

/// Runs of followed pages, by their numbers, in order.
#[derive(Clone, Debug)]
pub struct TraceRuns<'a> {
    bytes: &'a [u8],
    end: u64,
}

impl<'a> TraceRuns<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, end: 0 }
    }

    /// Whether all runs can be read and lie below `followed`; how many pages they are.
    pub(super) fn check(mut self, followed: u64) -> Option<u64> {
        let mut pages = 0;
        while !self.bytes.is_empty() {
            let run = self.next()?;
            pages += run.pages;
            if run.first >= followed || run.end() > followed {
                return None;
            }
        }
        Some(pages)
    }
}

impl Iterator for TraceRuns<'_> {
    type Item = PageRange;

    fn next(&mut self) -> Option<PageRange> {
        let head = varint::take(&mut self.bytes)?;
        let pages = match head & 1 {
            0 => 1,
            _ => varint::take(&mut self.bytes)?.checked_add(2)?,
        };
        let first = self.end.checked_add(head >> 1)?;
        self.end = first.checked_add(pages)?;
        Some(PageRange::new(first, pages))
    }
}
