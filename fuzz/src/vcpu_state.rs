//! The state of a vCPU, as it comes with a migration.

use gleaner::vmm::guest::VcpuState;

use crate::MAX_INPUT;
use crate::allocations::capped;

/// A list's length is believed up to 1 MiB, and what was made of up to 16 KiB is encoded again to compare: its bytes double as
/// they grow.
const CAP: usize = (1 << 20) + (128 << 10);

/// Whatever the bytes: a refusal, or a state that has these bytes and no others.
///
/// # Panics
/// When something else holds.
pub fn run(input: &[u8]) {
    let input = &input[..input.len().min(MAX_INPUT)];
    capped(CAP, || {
        if let Ok(state) = VcpuState::from_bytes(input) {
            assert_eq!(state.to_bytes().ok().as_deref(), Some(input));
        }
    });
}
