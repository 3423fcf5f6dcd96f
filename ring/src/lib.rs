//! KVM's dirty log and dirty ring as dirty sources.
//!
//! * [`Kvm`]: the memory calls of a VM, as a trait; [`StockKvm`] makes them for real.
//! * [`Vcpu`]: what runs the guest, and how it is kicked.
//! * [`model`]: a software KVM behind the same trait.
//! * [`MemslotCall`]: one change of one slot, and its inverse.
//! * [`Tracking`], [`Capabilities`]: which way of tracking the kernel offers, and how it is switched on.
//! * [`BitmapSource`]: `KVM_GET_DIRTY_LOG`, with or without manual protection.
//! * [`RingSource`]: the dirty rings of all vCPUs, reset with every signal blocked.
//!
//! Both sources are [`gleaner_bitmap::DirtySource`]s: nothing that can be read comes out of them before they are
//! re-armed.

#[cfg(target_arch = "aarch64")]
mod backup;
mod bitmap_source;
mod calls;
mod capabilities;
mod dirty_ring;
mod error;
#[cfg(test)]
mod fake;
mod kvm;
#[cfg(loom)]
mod loom_atomic;
pub mod model;
#[cfg(not(loom))]
mod ring_memory;
#[cfg(loom)]
#[path = "ring_memory_loom.rs"]
mod ring_memory;
mod ring_source;
mod run_page;
mod signals;
mod stock;
mod unarmed;
mod vcpu;

pub use bitmap_source::BitmapSource;
pub use calls::MemslotCall;
pub use capabilities::{Capabilities, Mode, Tracking};
pub use dirty_ring::DirtyRing;
pub use error::{Error, Result};
pub use kvm::{HostRange, Kvm, Region, Reset};
pub use ring_source::{RingHandle, RingLevel, RingSource};
pub use signals::with_signals_blocked;
pub use stock::StockKvm;
pub use vcpu::{Entered, Kick, Vcpu, VcpuIdentity};
