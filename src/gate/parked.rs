//! Stopped vCPUs.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use gleaner_ring::Vcpu;
use kvm_ioctls::VcpuFd;

use super::{Gate, SHUTDOWN, STOP, Seat};
use crate::{Error, Result};

/// A vCPU thread that was asked to stop.
pub struct Parked<'a, V: Vcpu = VcpuFd> {
    seat: &'a Seat,
    vcpu: &'a mut V,
}

impl<V: Vcpu> fmt::Debug for Parked<'_, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Parked").field(self.seat).finish()
    }
}

/// A vCPU thread whose last exit is complete: its state can be saved.
#[must_use = "the thread has to serve, or whoever stops the guest waits in vain"]
pub struct Drained<'a, V: Vcpu = VcpuFd>(Parked<'a, V>);

impl<V: Vcpu> fmt::Debug for Drained<'_, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Drained").field(self.0.seat).finish()
    }
}

impl<'a, V: Vcpu> Parked<'a, V> {
    pub(super) fn new(seat: &'a Seat, vcpu: &'a mut V) -> Self {
        Self { seat, vcpu }
    }

    /// Lets KVM complete the I/O of the last exit: an unfinished `in` or MMIO read is part of no saved state. It may write
    /// guest memory, which the last harvest then sees. Exits that follow are handled by `handle`, like any other.
    ///
    /// # Errors
    /// [`Error::VcpuRun`], and what `handle` returns.
    pub fn complete_io<E: From<Error>>(
        self,
        mut handle: impl FnMut(V::Exit<'_>) -> std::result::Result<(), E>,
    ) -> std::result::Result<Drained<'a, V>, E> {
        while let Some(exit) = self.seat.complete_io(self.vcpu)? {
            handle(exit)?;
        }
        Ok(Drained(self))
    }
}

impl<V: Vcpu> Drained<'_, V> {
    /// Parks the thread until the guest goes on (here or nowhere), saving the vCPU's state with `save` when it is asked for.
    pub fn serve(self, mut save: impl FnMut(&mut V) -> std::result::Result<Vec<u8>, String>) {
        let Parked { seat, vcpu } = self.0;
        let (gate, state) = seat.shared();
        let id = state.vcpu;
        let mut inner = gate.lock();
        inner.parked.push(id);
        gate.changed.notify_all();
        while gate.word.load(Ordering::SeqCst) & (STOP | SHUTDOWN) == STOP {
            if let Some(at) = inner.saving.iter().position(|&v| v == id) {
                inner.saving.swap_remove(at);
                drop(inner);
                let answer = save(vcpu);
                inner = gate.lock();
                inner.saved.push((id, answer));
                gate.changed.notify_all();
            } else {
                inner = gate.wait(inner);
            }
        }
        inner.parked.retain(|&v| v != id);
    }
}

/// Every vCPU thread of the VM is parked. Dropping it lets the guest go on.
#[derive(Debug)]
#[must_use = "dropping it lets the guest go on"]
pub struct StoppedVcpus {
    gate: Arc<Gate>,
    /// They stay parked when it is dropped, until the gate is shut down.
    for_good: bool,
}

impl StoppedVcpus {
    pub(super) const fn new(gate: Arc<Gate>) -> Self {
        Self {
            gate,
            for_good: false,
        }
    }

    /// Leaves them parked for good: the guest runs elsewhere. Only a shutdown ends their threads.
    pub(crate) fn keep(mut self) {
        self.for_good = true;
    }

    /// Asks every vCPU thread for its state; (vCPU, state), by vCPU.
    ///
    /// # Errors
    /// [`Error::SaveVcpu`]: the first one that failed. All are still parked.
    pub fn save(&self) -> Result<Vec<(u64, Vec<u8>)>> {
        let mut inner = self.gate.lock();
        inner.saved.clear();
        let all: Vec<u64> = inner.threads().map(|s| s.vcpu).collect();
        inner.saving.clone_from(&all);
        self.gate.changed.notify_all();
        let mut inner = self.gate.wait_until(inner, |inner| {
            all.iter()
                .find(|v| {
                    inner.seats.iter().any(|s| s.vcpu == **v)
                        && !inner.saved.iter().any(|(s, _)| s == *v)
                })
                .copied()
        })?;
        let mut states = Vec::new();
        for (vcpu, answer) in std::mem::take(&mut inner.saved) {
            match answer {
                Ok(state) => states.push((vcpu, state)),
                Err(reason) => return Err(Error::SaveVcpu { vcpu, reason }),
            }
        }
        states.sort_by_key(|(vcpu, _)| *vcpu);
        Ok(states)
    }
}

impl Drop for StoppedVcpus {
    fn drop(&mut self) {
        if self.for_good {
            return;
        }
        let _inner = self.gate.lock();
        self.gate.word.fetch_and(!STOP, Ordering::SeqCst);
        self.gate.changed.notify_all();
    }
}
