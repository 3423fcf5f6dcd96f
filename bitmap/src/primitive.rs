//! The atomics of what many threads share: the standard library's, or loom's, which tries every order in which threads may
//! see them (`RUSTFLAGS="--cfg loom"`).

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU8, AtomicU64};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU8, AtomicU64};

/// Words of 0. Their memory comes with the first write to it.
#[cfg(not(loom))]
pub(crate) fn zeroed_words(len: usize) -> Box<[AtomicU64]> {
    bytemuck::zeroed_slice_box(len)
}

/// Flags of 0. Their memory comes with the first write to it.
#[cfg(not(loom))]
pub(crate) fn zeroed_flags(len: usize) -> Box<[AtomicU8]> {
    bytemuck::zeroed_slice_box(len)
}

#[cfg(loom)]
pub(crate) fn zeroed_words(len: usize) -> Box<[AtomicU64]> {
    (0..len).map(|_| AtomicU64::new(0)).collect()
}

#[cfg(loom)]
pub(crate) fn zeroed_flags(len: usize) -> Box<[AtomicU8]> {
    (0..len).map(|_| AtomicU8::new(0)).collect()
}
