//! The inputs that a search begins with, made by the product's own encoders. What is in `corpus/` is these, and what a search
//! has found and was worth a name.

mod histories;
mod protocol;
mod qemu;
mod streams;
mod traces;

use crate::MAX_INPUT;

/// An input with its name, which says what it is for.
pub type Seed = (String, Vec<u8>);

/// The seeds of a target. The same ones at each call.
#[must_use]
pub fn of(target: &str) -> Vec<Seed> {
    let seeds = match target {
        "migration_stream" => streams::seeds(),
        "service" => protocol::requests(),
        "agent" => protocol::answers(),
        "layouts" => histories::seeds(),
        "qemu_stream" => qemu::seeds(),
        "trace" => traces::seeds(),
        "vcpu_state" => vec![("fresh".into(), vcpu_state())],
        _ => Vec::new(),
    };
    debug_assert!(seeds.iter().all(|(_, bytes)| bytes.len() <= MAX_INPUT));
    seeds
}

/// A vCPU's state whose registers are all zero: a version, then each of KVM's structures as its length and its bytes.
fn vcpu_state() -> Vec<u8> {
    let mut bytes = 1u32.to_le_bytes().to_vec();
    let structure = |bytes: &mut Vec<u8>, length: u16| {
        if length < 251 {
            bytes.push(length.to_le_bytes()[0]);
        } else {
            bytes.push(251);
            bytes.extend(length.to_le_bytes());
        }
        bytes.resize(bytes.len() + usize::from(length), 0);
    };
    structure(&mut bytes, 144); // kvm_regs
    structure(&mut bytes, 312); // kvm_sregs
    structure(&mut bytes, 4096); // kvm_xsave
    bytes.push(1);
    structure(&mut bytes, 392); // kvm_xcrs
    structure(&mut bytes, 128); // kvm_debugregs
    structure(&mut bytes, 64); // kvm_vcpu_events
    structure(&mut bytes, 4); // kvm_mp_state
    bytes.push(2);
    for index in [0x10u32, 0x277] {
        structure(&mut bytes, 16); // kvm_msr_entry
        let entry = bytes.len() - 16;
        bytes[entry..entry + 4].copy_from_slice(&index.to_le_bytes());
    }
    bytes
}

/// Numbers that look random and are the same each time.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next one, below `limit`.
    ///
    /// # Panics
    /// For a limit of 0.
    pub fn below(&mut self, limit: usize) -> usize {
        // xorshift64*, whose high bits are the good ones.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        usize::try_from(number).unwrap_or(0) % limit
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).unwrap_or(0)
    }
}
