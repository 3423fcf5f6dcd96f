//! Which pages of a block contents were written to.

use std::collections::BTreeMap;

use gleaner_bitmap::{PageBitmap, PageRange};

/// Pages of a chunk.
const CHUNK: u64 = 1 << 15;

/// Pages that contents were written to. In chunks that exist once something was written there, so that a peer can't make
/// this end allocate for pages it merely claims to have.
#[derive(Default)]
pub(crate) struct Written(BTreeMap<u64, PageBitmap>);

impl Written {
    /// Contents are written to a range.
    pub(crate) fn set(&mut self, range: PageRange) {
        for (chunk, part) in chunks(range) {
            self.0
                .entry(chunk)
                .or_insert_with(|| PageBitmap::new(CHUNK))
                .set_range(part);
        }
    }

    /// Whether contents were written to a page.
    pub(crate) fn contains(&self, page: u64) -> bool {
        let chunk = self.0.get(&(page / CHUNK));
        chunk.is_some_and(|bits| bits.get(page % CHUNK))
    }

    /// Takes the runs of written pages out of a range.
    pub(crate) fn take(&mut self, range: PageRange) -> Vec<PageRange> {
        let mut runs = Vec::new();
        // Only chunks that exist: the range may be as long as a peer likes.
        let last = range.end().div_ceil(CHUNK);
        for (chunk, bits) in self.0.range_mut(range.first / CHUNK..last) {
            let start = chunk * CHUNK;
            if let Some(part) = range.intersect(&PageRange::new(start, CHUNK)) {
                let part = PageRange::new(part.first - start, part.pages);
                runs.extend(
                    bits.runs_in(part)
                        .map(|run| PageRange::new(start + run.first, run.pages)),
                );
                bits.clear_range(part);
            }
        }
        runs
    }
}

fn chunks(range: PageRange) -> impl Iterator<Item = (u64, PageRange)> {
    (range.first / CHUNK..range.end().div_ceil(CHUNK)).filter_map(move |chunk| {
        let start = chunk * CHUNK;
        range
            .intersect(&PageRange::new(start, CHUNK))
            .map(|part| (chunk, PageRange::new(part.first - start, part.pages)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_pages_are_taken_once_and_across_chunks() {
        let mut written = Written::default();
        written.set(PageRange::new(CHUNK - 2, 4));
        written.set(PageRange::new(5 * CHUNK, 1));
        let all = PageRange::new(1, u64::MAX - 1);
        for (page, there) in [
            (CHUNK - 3, false),
            (CHUNK - 2, true),
            (CHUNK + 1, true),
            (7 * CHUNK, false),
        ] {
            assert_eq!(written.contains(page), there, "{page}");
        }
        let taken = written.take(PageRange::new(CHUNK - 1, 2));
        assert_eq!(
            taken,
            [PageRange::new(CHUNK - 1, 1), PageRange::new(CHUNK, 1)]
        );
        assert!(!written.contains(CHUNK) && written.contains(CHUNK - 2));
        let rest: u64 = written.take(all).iter().map(|run| run.pages).sum();
        assert_eq!(rest, 3);
        assert!(written.take(all).is_empty());
    }
}
