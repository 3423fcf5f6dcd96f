//! Whether guest memory is zero: read once, and without a copy.
#![allow(unsafe_code)] // guest memory may change while it is read: no reference to it may exist, so it is read by pointer

use vm_memory::VolatileSlice;

/// Bytes looked at first: most pages that are not zero show it there, and cost no more than this.
const PROBE: usize = 128;

/// Whether every byte is zero. A byte that changes meanwhile may be seen either way.
pub(crate) fn is_zero(memory: &VolatileSlice<'_>) -> bool {
    let guard = memory.ptr_guard();
    let (start, len) = (guard.as_ptr(), guard.len());
    let probe = len.min(PROBE);
    // SAFETY: both ranges lie inside the slice, which the guard keeps mapped.
    unsafe { bytes_are_zero(start, probe) && rest_is_zero(start.add(probe), len - probe) }
}

/// Has what [`is_zero`] looks at first brought into the cache, of a page that is `at` bytes into `memory` and will be looked
/// at soon: waiting for each page's turn costs a cache miss and a TLB miss, one after the other.
pub(crate) fn soon(memory: &VolatileSlice<'_>, at: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let guard = memory.ptr_guard();
        for line in (0..PROBE).step_by(64) {
            let line = guard.as_ptr().wrapping_add(at).wrapping_add(line);
            // SAFETY: a hint, which reads nothing that a program sees and faults nowhere, past the end included.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (memory, at);
}

/// # Safety
/// `len` bytes from `start` on are mapped.
unsafe fn rest_is_zero(start: *const u8, len: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        let steps = len - len % avx2::STEP;
        // SAFETY: the CPU has AVX2, and both ranges lie inside the one that is mapped.
        return unsafe {
            avx2::steps_are_zero(start, steps) && bytes_are_zero(start.add(steps), len - steps)
        };
    }
    // SAFETY: the range is mapped.
    unsafe { bytes_are_zero(start, len) }
}

/// # Safety
/// `len` bytes from `start` on are mapped.
unsafe fn bytes_are_zero(start: *const u8, len: usize) -> bool {
    const WORD: usize = size_of::<u64>();
    let mut any = 0;
    let mut at = 0;
    while at < len {
        // SAFETY: it lies inside the range and is aligned. Volatile, because the guest may write it at the same time.
        let from = unsafe { start.add(at) };
        if len - at >= WORD && from.cast::<u64>().is_aligned() {
            // SAFETY: as above.
            any |= unsafe { from.cast::<u64>().read_volatile() };
            at += WORD;
        } else {
            // SAFETY: as above.
            any |= u64::from(unsafe { from.read_volatile() });
            at += 1;
        }
    }
    any == 0
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::asm;

    /// Bytes that are looked at together.
    pub(super) const STEP: usize = 128;

    /// In assembly, because the guest may write the bytes at the same time: to the compiler, what assembly reads is
    /// nobody's reference.
    ///
    /// # Safety
    /// The CPU has AVX2; `len` bytes from `start` on, whole steps, are mapped.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn steps_are_zero(start: *const u8, len: usize) -> bool {
        let end = start.wrapping_add(len);
        let any: u32;
        // SAFETY: each load lies inside a step, which lies inside the range; nothing is written.
        unsafe {
            asm!(
                "xor {any:e}, {any:e}",
                "2:",
                "cmp {at}, {end}",
                "jae 3f",
                "vmovdqu {a}, [{at}]",
                "vpor {a}, {a}, [{at} + 32]",
                "vmovdqu {b}, [{at} + 64]",
                "vpor {b}, {b}, [{at} + 96]",
                "vpor {a}, {a}, {b}",
                "add {at}, {step}",
                "vptest {a}, {a}",
                "jz 2b",
                "mov {any:e}, 1",
                "3:",
                "vzeroupper",
                at = inout(reg) start => _,
                end = in(reg) end,
                any = out(reg) any,
                a = out(ymm_reg) _,
                b = out(ymm_reg) _,
                step = const STEP,
                options(nostack, readonly),
            );
        }
        any == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_byte_that_is_not_zero_is_seen_and_none_outside() {
        let mut bytes = vec![0u8; 4096 + 200];
        for (first, len) in [(0, 4096), (3, 4096), (64, 130), (8, 1), (5, 0), (100, 4096)] {
            for at in (0..bytes.len()).step_by(7).chain([first, first + len]) {
                let Some(byte) = bytes.get_mut(at) else {
                    continue;
                };
                *byte = 0x80;
                let inside = (first..first + len).contains(&at);
                let part = VolatileSlice::from(&mut bytes[first..first + len]);
                assert_eq!(is_zero(&part), !inside, "byte {at} of {first}+{len}");
                bytes[at] = 0;
            }
            for at in first..first + len {
                bytes[at] = 1;
                let part = VolatileSlice::from(&mut bytes[first..first + len]);
                assert!(!is_zero(&part), "byte {at} of {first}+{len}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn words_alone_see_every_byte_too() {
        let mut bytes = vec![0u8; 400];
        for at in 0..bytes.len() {
            bytes[at] = 4;
            // SAFETY: the bytes are there.
            assert!(unsafe { !bytes_are_zero(bytes.as_ptr(), bytes.len()) });
            bytes[at] = 0;
        }
        // SAFETY: the bytes are there.
        assert!(unsafe { bytes_are_zero(bytes.as_ptr(), bytes.len()) });
    }
}
