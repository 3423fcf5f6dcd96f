//! Which leased pages hold nothing but zeros.

use gleaner_bitmap::{Extent, PageRange};
use vm_memory::VolatileSlice;

use crate::Result;
use crate::memory::PAGE;

/// Bytes looked at first: most pages that are not zero show it there, and cost no more than this.
const PROBE: usize = 128;

/// Cuts `extent` into runs of pages that are zero (`true`) and that are not.
///
/// A page that is written while it is looked at may end up on either side: it was re-armed before it was leased, so it
/// comes again.
pub(crate) fn runs(
    extent: Extent,
    memory: &VolatileSlice<'_>,
    mut each: impl FnMut(PageRange, bool) -> Result<()>,
) -> Result<()> {
    let mut run = PageRange::new(extent.range.first, 0);
    let mut zero = false;
    for (page, offset) in (extent.range.first..).zip((0..memory.len()).step_by(PAGE)) {
        let now = is_zero(memory, offset);
        if now != zero && run.pages > 0 {
            each(run, zero)?;
            run = PageRange::new(page, 0);
        }
        zero = now;
        run.pages += 1;
    }
    if run.pages > 0 {
        each(run, zero)?;
    }
    Ok(())
}

/// Looks at a private copy: guest memory can't be borrowed.
fn is_zero(memory: &VolatileSlice<'_>, offset: usize) -> bool {
    let mut copy = [0u8; PAGE];
    for (from, to) in [(0, PROBE), (PROBE, copy.len())] {
        let copy = &mut copy[from..to];
        let Ok(part) = memory.subslice(offset + from, copy.len()) else {
            return false;
        };
        part.copy_to(copy);
        // Without an early exit the loop is vectorised.
        if copy.iter().fold(0, |all, byte| all | byte) != 0 {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MappedMemory, PageMemory};
    use gleaner_bitmap::BlockId;

    #[test]
    fn runs_cover_all_pages_and_tell_zeros() {
        let memory = MappedMemory::anonymous(10).unwrap();
        let all = memory.slice(PageRange::new(0, 10)).unwrap();
        // First, middle and last byte of a page each make it a page with contents.
        for (page, at) in [(0, 0), (1, 2000), (4, 4095), (9, PROBE)] {
            all.subslice(page * 4096 + at, 1).unwrap().copy_from(&[1u8]);
        }
        let mut seen = Vec::new();
        runs(Extent::new(BlockId(0), 100, 10), &all, |range, zero| {
            seen.push((range.first, range.pages, zero));
            Ok(())
        })
        .unwrap();
        let expected = [
            (100, 2, false),
            (102, 2, true),
            (104, 1, false),
            (105, 4, true),
            (109, 1, false),
        ];
        assert_eq!(seen, expected);
    }
}
