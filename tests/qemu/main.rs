//! A stock QEMU as destination of a guest on KVM: what it says of a migration, and what its memory holds afterwards. It does
//! not notice a page that is missing, so every page is compared, in memory that held something else before.
//!
//! And as source: what is kept of its guest is its memory, byte for byte.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

mod arrives;
#[path = "../common/mod.rs"]
mod common;
mod file;
#[path = "../processes/harness.rs"]
#[allow(dead_code)] // of the processes' tests, which use more of it
mod harness;
mod peer;
mod qmp;
mod qmp_clients;
mod received;
mod refused;
mod source;
