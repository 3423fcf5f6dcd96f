//! Simulated migrations on a model of KVM: one thread, virtual time, every interleaving a matter of a seed.
//!
//! ```text
//!  Random --decides--> World: guest on the model (vCPUs act inside of calls too), tracker, VMM's writes, transactions, faults
//!                        |
//!                      Oracle: what each consumer may and must be given
//!                        |
//!                      a migration: the sender and the receiver themselves, over a line in memory that breaks
//! ```

pub mod actors;
pub mod broken;
mod changes;
pub mod copy;
pub mod ends;
pub mod migration;
pub mod oracle;
pub mod random;
pub mod world;
