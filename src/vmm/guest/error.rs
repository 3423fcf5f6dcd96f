//! What can go wrong with the reference guest.

use super::memory_map::{MAX_BYTES, MAX_VCPUS, MIN_BYTES};

/// The result of this module's operations.
pub type Result<T> = std::result::Result<T, GuestError>;

/// An error of this module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// RAM of this length is not possible.
    #[error(
        "guest RAM of {bytes} bytes is not possible: {} MiB to {} GiB, a multiple of 4096 bytes",
        MIN_BYTES >> 20,
        MAX_BYTES >> 30
    )]
    RamSize {
        /// What was asked for.
        bytes: u64,
    },
    /// So many vCPUs are not possible.
    #[error("{vcpus} vCPUs are not possible: 1 to {MAX_VCPUS}")]
    Vcpus {
        /// What was asked for.
        vcpus: usize,
    },
    /// No such vCPU.
    #[error("vCPU {index} does not exist: the guest has {vcpus}")]
    NoSuchVcpu {
        /// What was asked for.
        index: usize,
        /// How many there are.
        vcpus: usize,
    },
    /// A batch of this length is not possible.
    #[error("a batch of {batch} writes is not possible: 1 to {max}")]
    Batch {
        /// What was asked for.
        batch: u32,
        /// The longest.
        max: u32,
    },
    /// The text names no workload.
    #[error("unknown workload \"{text}\": idle, sweep, random, or hot:SIZE (as hot:64M)")]
    UnknownWorkload {
        /// The text, escaped and cut.
        text: String,
    },
    /// The text is no size.
    #[error(
        "\"{text}\" is not a size: a positive number with the suffix K, M or G, or of bytes without one"
    )]
    BadSize {
        /// The text, escaped and cut.
        text: String,
    },
    /// The hot set exceeds what the guest has to write to.
    #[error(
        "a hot set of {bytes} bytes does not fit: the guest's vCPUs have {available} bytes of data pages"
    )]
    HotTooLarge {
        /// What was asked for.
        bytes: u64,
        /// What there is.
        available: u64,
    },
    /// An MMIO exit for an address that is no RAM, or that no instruction of the guest makes.
    #[error("the guest accessed {len} bytes at {gpa:#x}, where it has no RAM")]
    NotRam {
        /// The guest-physical address.
        gpa: u64,
        /// The length of the access.
        len: usize,
    },
    /// An `out` that the guest's program does not have.
    #[error("the guest wrote {data:02x?} to port {port:#x}, which means nothing")]
    UnknownOut {
        /// The port.
        port: u16,
        /// The data.
        data: Vec<u8>,
    },
    /// The saved state of a vCPU is of another version.
    #[error(
        "vCPU state has version {found}, expected {expected}: both sides must be of the same release"
    )]
    StateVersion {
        /// Its version.
        found: u32,
        /// The version of this release.
        expected: u32,
    },
    /// The saved state of a vCPU can't be decoded.
    #[error("vCPU state is malformed: {what}")]
    StateMalformed {
        /// Why.
        what: String,
    },
    /// KVM refused.
    #[error("{call} of a vCPU failed: {cause}")]
    Kvm {
        /// The ioctl.
        call: &'static str,
        /// Why.
        #[source]
        cause: kvm_ioctls::Error,
    },
    /// The RAM handed in is shorter than the memory map says.
    #[error("access to guest RAM failed: {0}")]
    Memory(#[from] vm_memory::VolatileMemoryError),
}

/// Text that may come from anywhere, fit for a message.
pub(super) fn quotable(text: &str) -> String {
    text.escape_default().take(80).collect()
}
