//! Virtual vCPUs: one that a thread runs, and one that a simulation moves on step by step.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::{ModelKvm, State};
use crate::{DirtyRing, Entered, Error, Kick, Result, Vcpu, VcpuIdentity};

/// Instructions between two looks whether the vCPU has to leave.
const STEPS: u32 = 64;

/// What a virtual vCPU executes.
pub trait Program: Send {
    /// Executes one instruction; `Some` when it needs the VMM. An access that did not come about
    /// ([`Access::RingFull`](super::Access::RingFull), [`Access::Stalled`](super::Access::Stalled)) is tried again.
    fn step(&mut self, vcpu: usize, state: &mut State) -> Option<ModelExit>;

    /// The VMM has carried out a load.
    fn loaded(&mut self, value: u64);
}

/// Why a virtual vCPU needs the VMM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ModelExit {
    /// An `out`.
    Out {
        /// The port.
        port: u16,
        /// What is written.
        value: u32,
    },
    /// A load where no memory is: the program waits for [`Program::loaded`].
    Load {
        /// Guest-physical address.
        gpa: u64,
    },
    /// A store where no memory is.
    Store {
        /// Guest-physical address.
        gpa: u64,
        /// What is stored.
        value: u64,
    },
}

/// Never two of the same number, whatever virtual machine they belong to.
static NEXT: AtomicU64 = AtomicU64::new(1 << 32);

impl ModelKvm {
    /// A vCPU that runs `program`, for a thread to run.
    ///
    /// # Errors
    /// When there is no memory for its ring.
    pub fn vcpu<P: Program>(&self, program: P) -> io::Result<ModelVcpu<P>> {
        Ok(ModelVcpu {
            step: self.step_vcpu()?,
            program,
            leave: Arc::default(),
        })
    }

    /// A vCPU that no thread runs: a simulation makes its accesses in the [`State`].
    ///
    /// # Errors
    /// When there is no memory for its ring.
    pub fn step_vcpu(&self) -> io::Result<StepVcpu> {
        let index = self.state().add_vcpu()?;
        Ok(StepVcpu {
            kvm: self.clone(),
            index,
            identity: VcpuIdentity(NEXT.fetch_add(1, Ordering::Relaxed)),
        })
    }
}

/// A virtual vCPU that runs a program, in a thread.
pub struct ModelVcpu<P> {
    step: StepVcpu,
    program: P,
    leave: Arc<AtomicBool>,
}

impl<P> fmt::Debug for ModelVcpu<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.step.fmt(f)
    }
}

impl<P> ModelVcpu<P> {
    /// What it runs, and where it is in it.
    pub const fn program(&mut self) -> &mut P {
        &mut self.program
    }
}

/// Looks at the flag after a few instructions, and is never long in one: needs no interrupt.
#[derive(Debug)]
struct Flag(Arc<AtomicBool>);

impl Kick for Flag {
    fn set_immediate_exit(&self, on: bool) {
        self.0.store(on, Ordering::SeqCst);
    }

    fn interrupt(&self) {}
}

impl<P: Program> Vcpu for ModelVcpu<P> {
    type Exit<'a>
        = ModelExit
    where
        P: 'a;

    fn identity(&self) -> VcpuIdentity {
        self.step.identity
    }

    fn kicker(&self, _signal: i32) -> io::Result<Box<dyn Kick>> {
        Ok(Box::new(Flag(Arc::clone(&self.leave))))
    }

    fn ring(&self, id: u64, bytes: u32) -> Result<DirtyRing> {
        self.step.ring(id, bytes)
    }

    fn enter(&mut self) -> Entered<ModelExit> {
        let vcpu = self.step.index;
        let mut entered = None;
        while entered.is_none() {
            if self.leave.load(Ordering::SeqCst) {
                return Entered::Interrupted;
            }
            let mut state = self.step.kvm.turn();
            if !state.enter(vcpu) {
                return Entered::RingFull;
            }
            for _ in 0..STEPS {
                if let Some(exit) = self.program.step(vcpu, &mut state) {
                    entered = Some(Entered::Exit(exit));
                } else if state.ring_full(vcpu) {
                    entered = Some(Entered::RingFull);
                }
                if entered.is_some() {
                    break;
                }
            }
            // Nothing of what a call does can be seen between two turns but that it was done.
            state.leave(vcpu);
        }
        entered.unwrap_or(Entered::Interrupted)
    }
}

/// A virtual vCPU that a simulation moves on.
pub struct StepVcpu {
    kvm: ModelKvm,
    index: usize,
    identity: VcpuIdentity,
}

impl fmt::Debug for StepVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Vcpu").field(&self.index).finish()
    }
}

impl StepVcpu {
    /// Its number in the [`State`].
    #[must_use]
    pub const fn index(&self) -> usize {
        self.index
    }
}

/// Leaves at once, inside the call.
#[derive(Debug)]
struct Leave {
    kvm: ModelKvm,
    index: usize,
}

impl Kick for Leave {
    fn set_immediate_exit(&self, _on: bool) {}

    fn interrupt(&self) {
        self.kvm.state().kick(self.index);
    }

    fn is_threadless(&self) -> bool {
        true
    }
}

impl Vcpu for StepVcpu {
    type Exit<'a> = ModelExit;

    fn identity(&self) -> VcpuIdentity {
        self.identity
    }

    fn kicker(&self, _signal: i32) -> io::Result<Box<dyn Kick>> {
        Ok(Box::new(Leave {
            kvm: self.kvm.clone(),
            index: self.index,
        }))
    }

    fn ring(&self, id: u64, bytes: u32) -> Result<DirtyRing> {
        let entries = self.kvm.state().ring_entries(self.index);
        let entries = entries.filter(|e| e.count() * 16 == bytes);
        entries.map(DirtyRing::of).ok_or(Error::MapRing {
            vcpu: id,
            source: io::ErrorKind::InvalidInput.into(),
        })
    }

    /// No thread may run it.
    fn enter(&mut self) -> Entered<ModelExit> {
        Entered::Failed(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::model::ModelConfig;

    /// Leaves at once, and tells whether it was to run.
    struct Leaves(Arc<AtomicBool>);

    impl Program for Leaves {
        fn step(&mut self, _vcpu: usize, _state: &mut State) -> Option<ModelExit> {
            let value = u32::from(self.0.load(Ordering::SeqCst));
            Some(ModelExit::Out { port: 0, value })
        }

        fn loaded(&mut self, _value: u64) {}
    }

    #[test]
    fn no_vcpu_takes_a_turn_while_somebody_waits_for_the_state() {
        let kvm = ModelKvm::new(ModelConfig::default());
        let may_run = Arc::new(AtomicBool::new(false));
        let mut vcpu = kvm.vcpu(Leaves(Arc::clone(&may_run))).expect("no ring");
        kvm.waiting.fetch_add(1, Ordering::SeqCst);
        let barrier = Barrier::new(2);
        std::thread::scope(|scope| {
            let vcpu = scope.spawn(|| {
                barrier.wait();
                let left = vcpu.enter();
                let told = matches!(left, Entered::Exit(ModelExit::Out { value: 1, .. }));
                assert!(told, "it ran while somebody waited: {left:?}");
            });
            barrier.wait();
            // Time enough to do it wrong.
            for _ in 0..10_000 {
                std::thread::yield_now();
            }
            may_run.store(true, Ordering::SeqCst);
            kvm.waiting.fetch_sub(1, Ordering::SeqCst);
            vcpu.join().expect("it ran in time");
        });
    }
}
