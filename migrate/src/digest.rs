//! Digests of pages, by which both ends find out whether they hold the same.
//!
//! xxh3 in 64 bits: two pages that differ have the same digest once in 2^64. That guards against mistakes, of this program
//! or of the machines that it runs on, and nothing else. A peer that means harm could say any digest, or run a guest of its
//! own making in the first place; whoever fears one needs a connection that keeps it out.

use std::sync::LazyLock;

use gleaner_bitmap::PageRange;
use vm_memory::VolatileSlice;
use xxhash_rust::xxh3::xxh3_64;

use crate::memory::PAGE;
use crate::{PageMemory, Result};

/// Bytes of a digest.
pub(crate) const BYTES: u64 = 8;

/// A digest as it travels: little-endian.
pub(crate) type Digest = [u8; 8];

static OF_ZEROS: LazyLock<Digest> = LazyLock::new(|| of(&[0; PAGE]));

fn of(page: &[u8; PAGE]) -> Digest {
    xxh3_64(page).to_le_bytes()
}

/// Calls `each` with every page of `range` and its digest, in order. Holes of the memory are zero without being read:
/// reading them would allocate what nobody has touched.
pub(crate) fn each(
    memory: &dyn PageMemory,
    range: PageRange,
    mut each: impl FnMut(u64, Digest) -> Result<()>,
) -> Result<()> {
    let mut copy = [0; PAGE];
    let mut at = range.first;
    while at < range.end() {
        let rest = PageRange::new(at, range.end() - at);
        let data = memory.data(rest);
        let data = data.unwrap_or(PageRange::new(range.end(), 0));
        for page in at..data.first {
            each(page, *OF_ZEROS)?;
        }
        if data.pages > 0 {
            // A private copy: guest memory can't be borrowed, not even while nobody writes it.
            let pages: VolatileSlice<'_> = memory.slice(data)?;
            for (page, offset) in (data.first..data.end()).zip((0..).step_by(PAGE)) {
                pages.offset(offset).map_err(outside)?.copy_to(&mut copy);
                each(page, of(&copy))?;
            }
        }
        at = data.end();
    }
    Ok(())
}

fn outside(error: vm_memory::volatile_memory::Error) -> crate::Error {
    crate::Error::Memory {
        what: "can't be reached",
        detail: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MappedMemory;
    use gleaner_bitmap::PAGE_SIZE;

    fn digests(memory: &MappedMemory, first: u64, pages: u64) -> Vec<(u64, Digest)> {
        let mut all = Vec::new();
        each(memory, PageRange::new(first, pages), |page, digest| {
            all.push((page, digest));
            Ok(())
        })
        .unwrap();
        all
    }

    #[test]
    fn holes_and_zeros_have_one_digest_and_every_bit_counts() {
        use std::os::unix::fs::MetadataExt;
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = std::fs::File::from(fd);
        file.set_len(100 * PAGE_SIZE).unwrap();
        let memory = MappedMemory::of_file(file.try_clone().unwrap(), 100).unwrap();
        let page = |page| memory.slice(PageRange::new(page, 1)).unwrap();
        page(7).copy_from(&[0u8; PAGE]);
        page(93).subslice(PAGE - 1, 1).unwrap().copy_from(&[1u8]);
        page(95).subslice(PAGE - 1, 1).unwrap().copy_from(&[2u8]);
        let all = digests(&memory, 3, 97);
        assert!(all.iter().map(|(page, _)| *page).eq(3..100));
        let other: Vec<_> = all.iter().filter(|(_, d)| *d != *OF_ZEROS).collect();
        assert_eq!(other.len(), 2);
        assert_eq!((other[0].0, other[1].0), (93, 95));
        assert_ne!(other[0].1, other[1].1);
        // Nothing but the three pages that were written, though ranges end a page or two after the data.
        for first in 90..100 {
            digests(&memory, first, 100 - first);
        }
        assert_eq!(file.metadata().unwrap().blocks() * 512, 3 * PAGE_SIZE);
    }
}
