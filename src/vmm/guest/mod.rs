//! The reference guest: software that finds out by itself whether a page of it was lost.
//!
//! Each vCPU owns a *table* and as many *data pages* as the table has words. All it does is write: it picks a data
//! page `p` by the rule of its [`Workload`], adds one to `table[p]`, and puts the stamp `table[p] * STAMP + p` at both
//! ends of the page. A register counts the writes; after each batch the count also goes to the vCPU's *control page*
//! and to `xmm0`, and the guest leaves by an `out`, where the VMM may pace it or ask for a check.
//!
//! # Why the check is strong
//!
//! A write changes four things in four places, of which any could be lost alone: a data page, a table page, the
//! registers, and (with the batch) the control page and the FPU. The check compares all of them:
//!
//! | lost, or brought back in an older version | found because |
//! |---|---|
//! | a data page | its stamps do not fit its word of the table ([`CheckResult::Page`]) |
//! | half of a data page | one of its stamps does not fit |
//! | a table page | the stamps of its data pages are ahead of it |
//! | table and data pages together | the sum of the table is behind the count ([`CheckResult::Sum`]) |
//! | the registers | the sum of the table is not the count they hold |
//! | the control page | its count is not that of the registers ([`CheckResult::ControlPage`]) |
//! | the FPU state | `xmm0` is not the count ([`CheckResult::Fpu`]) |
//!
//! No two losses cancel, because words of the table and counts only grow: an older version of anything is behind, and
//! nothing is ever ahead. And nothing heals before it is found: the guest stamps the end of a page, then looks whether
//! its start holds the stamp before, and leaves it as it is if not; in the same way the counts in the control page and
//! in `xmm0` move on only from the value they must have. So it does not matter how long after a loss the check comes.
//!
//! # How it runs
//!
//! 64-bit code at CPL 3 with IOPL 3, interrupts off, without a stack: every KVM runs such code natively, also one that
//! emulates privileged code, and it can still leave by `out`. Page tables map 64 GiB by identity with the accessed and
//! dirty bits preset, so neither the walker nor the CPU ever writes them. Memory is touched by plain aligned `mov`s of
//! 8 bytes only: where no slot is, each is an MMIO exit that [`mmio`] carries out on the block itself.
//!
//! The model's vCPUs can't execute code: they run a [`VirtualProgram`], which does the same, access by access.
//!
//! [`mmio`]: emulate_read

mod boot;
mod error;
mod exits;
mod mailbox;
mod memory_map;
mod program;
mod vcpu_state;
mod versioned;
mod virtual_program;
mod workload;

pub use boot::Guest;
pub use error::{GuestError, Result};
pub use exits::{GuestEvent, PORT_BATCH, PORT_CHECK, emulate_read, emulate_write};
pub use mailbox::{CheckResult, Mailbox};
pub use memory_map::{HOME, LOW_PAGES, MemoryMap, VcpuPages};
pub use program::STAMP;
pub use vcpu_state::VcpuState;
pub use virtual_program::VirtualProgram;
pub use workload::{Workload, parse_size};
