//! Which leased pages hold nothing but zeros.

use gleaner_bitmap::{PAGE_SIZE, PageRange};
use vm_memory::VolatileSlice;

use crate::memory::PAGE;
use crate::zero::{is_zero, soon};
use crate::{Error, LeasedPart, Result};

/// How far ahead pages are announced, in bytes: as many cache misses as a core has under way at a time.
const AHEAD: usize = 16 * PAGE;

/// Pages with contents that are searched before they are handed on: a quarter of a frame. A whole lease of them would be out of
/// the cache before it is sent, and memory be read twice.
const AT_ONCE: u64 = 64;

/// Cuts the pages of `part`, whose contents are `memory`, into runs of pages that are zero (`true`) and that are not, of
/// [`AT_ONCE`] at most. Holes of the memory are zero without being read.
///
/// A page that is written while it is looked at may end up on either side: it was re-armed before it was leased, so it
/// comes again.
pub(crate) fn runs(
    part: &LeasedPart,
    memory: &VolatileSlice<'_>,
    mut each: impl FnMut(PageRange, bool) -> Result<()>,
) -> Result<()> {
    let all = part.extent().range;
    let mut run = PageRange::new(all.first, 0);
    let mut zero = false;
    let mut add = |now: bool, page: u64, pages: u64| -> Result<()> {
        if run.pages > 0 && (now != zero || !now && run.pages >= AT_ONCE) {
            each(run, zero)?;
            run = PageRange::new(page, 0);
        }
        zero = now;
        run.pages += pages;
        if run.end() == all.end() {
            each(run, zero)?;
        }
        Ok(())
    };
    let mut at = all.first;
    while at < all.end() {
        let rest = PageRange::new(at, all.end() - at);
        let data = part.data(rest).unwrap_or(PageRange::new(all.end(), 0));
        if data.first > at {
            add(true, at, data.first - at)?;
        }
        let mut offset = bytes(data.first - all.first)?;
        for page in data.first..data.end() {
            soon(memory, offset + AHEAD);
            let zero = memory
                .subslice(offset, PAGE)
                .is_ok_and(|page| is_zero(&page));
            add(zero, page, 1)?;
            offset += PAGE;
        }
        at = data.end();
    }
    Ok(())
}

/// Bytes of `pages` pages.
pub(crate) fn bytes(pages: u64) -> Result<usize> {
    pages
        .checked_mul(PAGE_SIZE)
        .and_then(|bytes| usize::try_from(bytes).ok())
        .ok_or(Error::TooLong {
            what: "lease (pages)",
            length: pages,
            cap: u64::MAX / PAGE_SIZE,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MappedMemory, PageMemory};
    use gleaner_bitmap::{BlockId, Extent};
    use std::sync::Arc;

    fn found(memory: MappedMemory, first: u64, pages: u64) -> Vec<(u64, u64, bool)> {
        let part = LeasedPart::new(Extent::new(BlockId(0), first, pages), Arc::new(memory));
        let mut seen = Vec::new();
        runs(&part, &part.slice().unwrap(), |range, zero| {
            seen.push((range.first, range.pages, zero));
            Ok(())
        })
        .unwrap();
        seen
    }

    /// First, middle and last byte of a page each make it a page with contents.
    fn fill(memory: &MappedMemory, bytes: &[(u64, usize)]) {
        for (page, at) in bytes {
            let page = memory.slice(PageRange::new(*page, 1)).unwrap();
            page.subslice(*at, 1).unwrap().copy_from(&[1u8]);
        }
    }

    #[test]
    fn runs_cover_all_pages_and_tell_zeros() {
        let memory = MappedMemory::anonymous(110).unwrap();
        fill(&memory, &[(100, 0), (101, 2000), (104, 4095), (109, 128)]);
        let expected = [
            (100, 2, false),
            (102, 2, true),
            (104, 1, false),
            (105, 4, true),
            (109, 1, false),
        ];
        assert_eq!(found(memory, 100, 10), expected);
    }

    #[test]
    fn contents_are_handed_on_while_they_are_in_the_cache() {
        let memory = MappedMemory::anonymous(400).unwrap();
        fill(&memory, &(0..200).map(|page| (page, 0)).collect::<Vec<_>>());
        let mut expected: Vec<_> = (0..3).map(|n| (n * AT_ONCE, AT_ONCE, false)).collect();
        expected.extend([(192, 8, false), (200, 200, true)]);
        assert_eq!(found(memory, 0, 400), expected);
    }

    #[test]
    fn holes_join_with_zeros_that_were_read() {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = std::fs::File::from(fd);
        file.set_len(200 * PAGE_SIZE).unwrap();
        let memory = MappedMemory::of_file(file, 200).unwrap();
        fill(&memory, &[(50, 7), (52, 4095), (120, 0)]);
        // Page 51 exists and is zero; so does page 53, before the hole that follows.
        for page in [51, 53] {
            let page = memory.slice(PageRange::new(page, 1)).unwrap();
            page.copy_from(&[0u8; PAGE]);
        }
        let expected = [
            (10, 40, true),
            (50, 1, false),
            (51, 1, true),
            (52, 1, false),
            (53, 67, true),
            (120, 1, false),
            (121, 59, true),
        ];
        assert_eq!(found(memory, 10, 170), expected);
    }
}
