//! The reference VMM: the smallest VMM that hosts Gleaner's service.
//!
//! An example for VMM authors, the guest of the demo, and what the tests migrate. It runs a guest ([`guest`]) whose vCPUs
//! dirty memory and check it themselves, on KVM or on the model of it ([`Backend`]), writes guest memory itself like a device
//! would ([`device`]), and changes its memory slots all the time ([`churn`]).

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the reference VMM's guest is x86_64 code: use default-features = false here");

mod backend;
pub mod churn;
pub mod device;
pub mod guest;
mod incoming;
mod machine;
mod vcpu;

pub use backend::Backend;
#[cfg(feature = "cli")]
pub(crate) use incoming::empty_ram_file;
pub use incoming::{IncomingMachine, OnComplete};
#[cfg(feature = "cli")]
pub(crate) use machine::lock_ram_file;
pub use machine::{Machine, MachineConfig, MachineError, MachineStatus};
