//! Everything a vCPU of this guest has, as bytes that travel.

// `set_xsave` is unsafe: it is the one call here whose length the kernel decides.
#![allow(unsafe_code)]

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::versioned::malformed;
use super::{GuestError, Result, versioned};

/// Of the format. A change of the fields changes it.
const VERSION: u32 = 1;

/// More than any valid state, so that a hostile length allocates little.
const LIMIT: usize = 16 << 10;

/// The MSRs of a 64-bit vCPU that neither special registers nor events cover. A state may name no others.
const MSRS: [u32; 12] = [
    0x10,        // TSC
    0x174,       // SYSENTER_CS
    0x175,       // SYSENTER_ESP
    0x176,       // SYSENTER_EIP
    0x1a0,       // MISC_ENABLE
    0x277,       // PAT
    0xc000_0081, // STAR
    0xc000_0082, // LSTAR
    0xc000_0083, // CSTAR
    0xc000_0084, // SYSCALL_MASK
    0xc000_0102, // KERNEL_GS_BASE
    0xc000_0103, // TSC_AUX
];

/// The state of a vCPU that is out of `KVM_RUN`, its last exit completed (see [`crate::gate::Parked::complete_io`]). CPUID is not part of it:
/// the guest's vCPUs have none.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: Option<kvm_xcrs>,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    msrs: Vec<kvm_msr_entry>,
}

fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> GuestError {
    move |cause| GuestError::Kvm { call, cause }
}

impl VcpuState {
    /// Reads the state of a vCPU.
    ///
    /// # Errors
    /// [`GuestError::Kvm`].
    pub fn save(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self> {
        Ok(Self {
            // First, since it settles events that the others then show.
            mp_state: vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?,
            regs: vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?,
            xsave: vcpu.get_xsave().map_err(failed("KVM_GET_XSAVE"))?,
            xcrs: match vcpu.get_xcrs() {
                Ok(xcrs) => Some(xcrs),
                // A host without XSAVE has no such registers.
                Err(e) if e.errno() == EINVAL => None,
                Err(cause) => return Err(failed("KVM_GET_XCRS")(cause)),
            },
            debug: vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            events: vcpu
                .get_vcpu_events()
                .map_err(failed("KVM_GET_VCPU_EVENTS"))?,
            msrs: read_msrs(kvm, vcpu)?,
        })
    }

    /// Writes the state into a vCPU that has not run.
    ///
    /// # Errors
    /// [`GuestError::Kvm`]. The vCPU is then in no state to run.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<()> {
        vcpu.set_mp_state(self.mp_state)
            .map_err(failed("KVM_SET_MP_STATE"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(failed("KVM_SET_SREGS"))?;
        vcpu.set_regs(&self.regs).map_err(failed("KVM_SET_REGS"))?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(failed("KVM_SET_XCRS"))?;
        }
        // KVM refuses this call for a vCPU whose state is longer than `kvm_xsave`.
        vcpu.get_xsave().map_err(failed("KVM_GET_XSAVE"))?;
        // SAFETY: the kernel reads as many bytes as the vCPU's state is long, and the call before has shown that these
        // are no more than `kvm_xsave` has. It validates what it reads.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(failed("KVM_SET_DEBUGREGS"))?;
        write_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(failed("KVM_SET_VCPU_EVENTS"))
    }

    /// The state as bytes: a version, then the fields.
    ///
    /// # Errors
    /// [`GuestError::StateMalformed`].
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        versioned::encode::<LIMIT>(VERSION, self)
    }

    /// The state that [`VcpuState::to_bytes`] made these bytes of. They may come from a peer.
    ///
    /// # Errors
    /// [`GuestError::StateVersion`], [`GuestError::StateMalformed`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let state: Self = versioned::decode::<LIMIT, _>(VERSION, bytes)?;
        // A KVM structure that is too short is padded, one that is too long is cut. Neither encodes to the same bytes again.
        if state.to_bytes()? != bytes {
            return Err(malformed(
                "its parts do not have the lengths they must have",
            ));
        }
        let mut allowed = MSRS.iter();
        if !state
            .msrs
            .iter()
            .all(|msr| msr.reserved == 0 && allowed.any(|index| *index == msr.index))
        {
            return Err(malformed("it names MSRs that no state has"));
        }
        Ok(state)
    }
}

fn read_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>> {
    let known = kvm
        .get_msr_index_list()
        .map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
    let entries: Vec<kvm_msr_entry> = MSRS
        .iter()
        .filter(|index| known.as_slice().contains(index))
        .map(|&index| kvm_msr_entry {
            index,
            ..kvm_msr_entry::default()
        })
        .collect();
    let mut msrs = Msrs::from_entries(&entries).map_err(malformed_list)?;
    let read = vcpu.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))?;
    all_of(read, entries.len(), "KVM_GET_MSRS")?;
    Ok(msrs.as_slice().to_vec())
}

fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<()> {
    let msrs = Msrs::from_entries(entries).map_err(malformed_list)?;
    let written = vcpu.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
    all_of(written, entries.len(), "KVM_SET_MSRS")
}

fn malformed_list(error: impl std::fmt::Debug) -> GuestError {
    malformed(format!("MSRs: {error:?}"))
}

/// KVM stops at the first MSR that it refuses, and says only how many came before it.
fn all_of(done: usize, wanted: usize, call: &'static str) -> Result<()> {
    if done == wanted {
        return Ok(());
    }
    Err(GuestError::Kvm {
        call,
        cause: kvm_ioctls::Error::new(EINVAL),
    })
}

const EINVAL: i32 = 22;

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::vmm::guest::{Guest, MemoryMap, Workload};

    fn saved() -> Option<(Kvm, VcpuState)> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(e) => {
                let mut err = std::io::stderr().lock(); // the test runner would swallow `eprintln`
                writeln!(err, "skipped: /dev/kvm: {e}").unwrap();
                return None;
            }
        };
        let vcpu = kvm.create_vm().unwrap().create_vcpu(0).unwrap();
        let map = MemoryMap::new(4 << 20, 1).unwrap();
        let guest = Guest::new(map, Workload::Random, 256, 1).unwrap();
        guest.start(&vcpu, 0).unwrap();
        let mut xsave = vcpu.get_xsave().unwrap();
        xsave.region[40] = 0xdead_beef; // xmm0
        xsave.region[128] |= 2; // SSE state present
        // SAFETY: the kernel just wrote no more than this structure, and reads as much.
        unsafe { vcpu.set_xsave(&xsave) }.unwrap();
        let mut debug = vcpu.get_debug_regs().unwrap();
        debug.db[2] = 0x1234;
        vcpu.set_debug_regs(&debug).unwrap();
        let star = kvm_msr_entry {
            index: 0xc000_0081,
            data: 0x0013_0008_0000_0000,
            ..kvm_msr_entry::default()
        };
        write_msrs(&vcpu, &[star]).unwrap();
        let state = VcpuState::save(&kvm, &vcpu).unwrap();
        Some((kvm, state))
    }

    #[test]
    fn a_restored_vcpu_has_all_of_the_state() {
        let Some((kvm, mut state)) = saved() else {
            return;
        };
        let state_again = VcpuState::from_bytes(&state.to_bytes().unwrap()).unwrap();
        let vcpu = kvm.create_vm().unwrap().create_vcpu(0).unwrap();
        state_again.restore(&vcpu).unwrap();
        let mut back = VcpuState::save(&kvm, &vcpu).unwrap();
        assert_eq!(back.xsave.region[40], 0xdead_beef);
        assert_eq!(back.debug.db[2], 0x1234);
        assert!(back.msrs.iter().any(|m| m.data == 0x0013_0008_0000_0000));
        let tsc = |s: &VcpuState| s.msrs.iter().find(|m| m.index == 0x10).unwrap().data;
        assert!(tsc(&back) >= tsc(&state));
        for s in [&mut back, &mut state] {
            s.msrs.retain(|m| m.index != 0x10);
        }
        assert_eq!(back.to_bytes().unwrap(), state.to_bytes().unwrap());
    }

    #[test]
    fn malformed_bytes_are_refused() {
        let Some((_, mut state)) = saved() else {
            return;
        };
        let bytes = state.to_bytes().unwrap();
        for len in 0..bytes.len() {
            assert!(VcpuState::from_bytes(&bytes[..len]).is_err(), "{len}");
        }
        let refused = |bytes: &[u8]| {
            let error = VcpuState::from_bytes(bytes).unwrap_err();
            assert!(
                matches!(error, GuestError::StateMalformed { .. }),
                "{error}"
            );
        };
        let mut longer = bytes.clone();
        longer.push(0);
        refused(&longer);
        // The length of the first structure: one less, one more, and hostile.
        for length in [bytes[4] - 1, bytes[4] + 1, 0xff] {
            let mut bent = bytes.clone();
            bent[4] = length;
            refused(&bent);
            bent[4..12].fill(length);
            refused(&bent);
        }
        let mut newer = bytes.clone();
        newer[0] += 1;
        let error = VcpuState::from_bytes(&newer).unwrap_err();
        assert!(matches!(error, GuestError::StateVersion { found: 2, .. }));
        // APIC_BASE is none of the guest's, and no MSR comes twice.
        let tsc = state.msrs[0];
        state.msrs.push(tsc);
        refused(&state.to_bytes().unwrap());
        state.msrs.pop();
        state.msrs[0].index = 0x1b;
        refused(&state.to_bytes().unwrap());
    }

    #[test]
    fn what_kvm_refuses_is_an_error_with_the_call() {
        let Some((kvm, mut state)) = saved() else {
            return;
        };
        state.xsave.region[6] = u32::MAX; // MXCSR, reserved bits and all
        state.xsave.region[128] |= 2;
        let vcpu = kvm.create_vm().unwrap().create_vcpu(0).unwrap();
        let error = state.restore(&vcpu).unwrap_err();
        assert!(error.to_string().starts_with("KVM_SET_XSAVE"), "{error}");
    }
}
