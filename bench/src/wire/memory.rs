//! Guest memory to measure with.

use std::sync::Arc;
use std::time::Duration;

use gleaner_bitmap::{PAGE_SIZE, PageRange};
use gleaner_migrate::{MappedMemory, PageMemory};
use vm_memory::VolatileSlice;

use crate::Result;
use crate::sample::time;

/// Bytes that are filled or compared at a time.
const STEP: usize = 1 << 20;

/// Memory whose every page exists, filled by `word`.
pub fn filled(pages: u64, word: impl FnMut() -> u64) -> Result<Arc<MappedMemory>> {
    let memory = MappedMemory::anonymous(pages)?;
    fill(&memory, word)?;
    Ok(Arc::new(memory))
}

/// Fills all memory by `word`.
pub fn fill(memory: &MappedMemory, mut word: impl FnMut() -> u64) -> Result<()> {
    let mut bytes = vec![0u8; STEP];
    let all = whole(memory)?;
    for at in (0..all.len()).step_by(STEP) {
        for part in bytes.chunks_exact_mut(8) {
            part.copy_from_slice(&word().to_le_bytes());
        }
        let len = STEP.min(all.len() - at);
        all.subslice(at, len)?.copy_from(&bytes[..len]);
    }
    Ok(())
}

/// Memory that was never touched, in a memfd.
pub fn untouched(pages: u64) -> Result<Arc<MappedMemory>> {
    let block = gleaner::Block::memfd("ram", pages * PAGE_SIZE)?;
    let (file, _) = block.shared_backing()?;
    Ok(Arc::new(MappedMemory::of_file(file.try_clone()?, pages)?))
}

fn whole(memory: &MappedMemory) -> Result<VolatileSlice<'_>> {
    Ok(memory.slice(PageRange::new(0, memory.pages()))?)
}

/// Makes all bytes zero.
pub fn clear(memory: &MappedMemory) -> Result<()> {
    let all = whole(memory)?;
    let zeros = vec![0u8; STEP];
    for at in (0..all.len()).step_by(STEP) {
        let part = all.subslice(at, STEP.min(all.len() - at))?;
        part.copy_from(&zeros);
    }
    Ok(())
}

/// Reads all bytes, and does nothing with them that could cost more than reading: whether one is not zero.
pub fn read_all(memory: &MappedMemory) -> Result<(Duration, bool)> {
    let all = whole(memory)?;
    let mut page = [0u8; 4096];
    let (took, any) = time(|| {
        let mut any = 0;
        for at in (0..all.len()).step_by(4096) {
            if let Ok(part) = all.subslice(at, 4096) {
                part.copy_to(&mut page);
            }
            any |= page.iter().fold(0, |all, byte| all | byte);
        }
        any
    });
    Ok((took, any != 0))
}

/// Whether both have the same bytes.
pub fn same(a: &MappedMemory, b: &MappedMemory) -> Result<bool> {
    let (a, b) = (whole(a)?, whole(b)?);
    let (mut left, mut right) = (vec![0u8; STEP], vec![0u8; STEP]);
    for at in (0..a.len()).step_by(STEP) {
        let len = STEP.min(a.len() - at);
        a.subslice(at, len)?.copy_to(&mut left[..len]);
        b.subslice(at, len)?.copy_to(&mut right[..len]);
        if left[..len] != right[..len] {
            return Ok(false);
        }
    }
    Ok(true)
}
