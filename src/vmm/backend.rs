//! What runs a machine's guest: KVM, or the model of it. Only this file knows which.

use std::fmt;
use std::io;
use std::sync::Arc;

use gleaner_ring::model::{ModelConfig, ModelExit, ModelKvm, ModelVcpu, Program};
use gleaner_ring::{DirtyRing, Entered, Kick, StockKvm, Vcpu, VcpuIdentity};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::MachineError;
use super::guest::{Guest, Result as GuestResult, VcpuState, VirtualProgram};

/// What runs the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Backend {
    /// The kernel's KVM: the guest is real.
    Kvm,
    /// The [model](crate::model): needs no `/dev/kvm`, and the guest is a program that does the same.
    Model,
}

impl Backend {
    /// KVM where `/dev/kvm` opens; else the model, and why.
    #[must_use]
    pub fn detect() -> (Self, Option<MachineError>) {
        match open_kvm() {
            Ok(_) => (Self::Kvm, None),
            Err(error) => (Self::Model, Some(error)),
        }
    }

    /// Its name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Model => "model",
        }
    }
}

/// Its name in a sentence.
impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Kvm => "KVM",
            Self::Model => "the model of KVM",
        })
    }
}

fn os(error: kvm_ioctls::Error) -> MachineError {
    MachineError::Kvm(io::Error::from_raw_os_error(error.errno()))
}

fn open_kvm() -> Result<Kvm, MachineError> {
    Kvm::new().map_err(os)
}

/// A virtual machine of either kind.
pub(super) enum Vm {
    Kvm { kvm: Arc<Kvm>, vm: Arc<VmFd> },
    Model(ModelKvm),
}

impl Vm {
    pub(super) fn open(backend: Backend) -> Result<Self, MachineError> {
        Ok(match backend {
            Backend::Kvm => {
                let kvm = Arc::new(open_kvm()?);
                let vm = Arc::new(kvm.create_vm().map_err(os)?);
                Self::Kvm { kvm, vm }
            }
            Backend::Model => Self::Model(ModelKvm::new(ModelConfig::default())),
        })
    }

    pub(super) const fn backend(&self) -> Backend {
        match self {
            Self::Kvm { .. } => Backend::Kvm,
            Self::Model(_) => Backend::Model,
        }
    }

    /// Its memory calls, which the tracker makes.
    pub(super) fn memory(&self) -> Arc<dyn gleaner_ring::Kvm> {
        match self {
            Self::Kvm { vm, .. } => Arc::new(StockKvm::new(Arc::clone(vm))),
            Self::Model(model) => Arc::new(model.clone()),
        }
    }

    /// A vCPU that is in no state to run: [`MachineVcpu::start`] it, or [`MachineVcpu::restore`] it.
    pub(super) fn create_vcpu(&self, index: usize) -> Result<MachineVcpu, MachineError> {
        Ok(match self {
            Self::Kvm { kvm, vm } => MachineVcpu::Kvm {
                kvm: Arc::clone(kvm),
                vcpu: vm.create_vcpu(index as u64).map_err(os)?,
            },
            Self::Model(model) => {
                let failed = |error: io::Error| MachineError::Vcpu {
                    vcpu: index,
                    reason: error.to_string(),
                };
                MachineVcpu::Model(Box::new(ModelRun {
                    vcpu: model.vcpu(VirtualProgram::default()).map_err(failed)?,
                    data: [0; 8],
                    loading: false,
                }))
            }
        })
    }
}

/// A vCPU of either kind.
#[derive(Debug)]
pub(super) enum MachineVcpu {
    Kvm { kvm: Arc<Kvm>, vcpu: VcpuFd },
    Model(Box<ModelRun>),
}

/// A vCPU of the model, with what the run page is to one of KVM's: the data of the last exit. A load is completed when it
/// is entered again.
#[derive(Debug)]
pub(super) struct ModelRun {
    vcpu: ModelVcpu<VirtualProgram>,
    data: [u8; 8],
    loading: bool,
}

/// What a vCPU wants from the machine. The data lives until it is entered again.
#[derive(Debug)]
pub(super) enum Exit<'a> {
    /// An `out`.
    Out { port: u16, data: &'a [u8] },
    /// A load where no slot is; the machine fills in what is there.
    Load { gpa: u64, data: &'a mut [u8] },
    /// A store where no slot is, or a read-only one.
    Store { gpa: u64, data: &'a [u8] },
    /// Nothing that the guest does on purpose.
    Unknown(VcpuExit<'a>),
}

impl MachineVcpu {
    /// Brings a fresh vCPU to the guest's first instruction.
    pub(super) fn start(&mut self, guest: &Guest, index: usize) -> GuestResult<()> {
        match self {
            Self::Kvm { vcpu, .. } => guest.start(vcpu, index)?,
            Self::Model(run) => *run.vcpu.program() = VirtualProgram::new(guest, index)?,
        }
        Ok(())
    }

    /// Its state; its last exit must be complete.
    pub(super) fn save(&mut self) -> GuestResult<Vec<u8>> {
        match self {
            Self::Kvm { kvm, vcpu } => VcpuState::save(kvm, vcpu)?.to_bytes(),
            Self::Model(run) => run.vcpu.program().to_bytes(),
        }
    }

    /// Brings a fresh vCPU to where another one was. The bytes may come from a peer.
    pub(super) fn restore(&mut self, state: &[u8]) -> GuestResult<()> {
        match self {
            Self::Kvm { vcpu, .. } => VcpuState::from_bytes(state)?.restore(vcpu)?,
            Self::Model(run) => *run.vcpu.program() = VirtualProgram::from_bytes(state)?,
        }
        Ok(())
    }
}

impl Vcpu for MachineVcpu {
    type Exit<'a> = Exit<'a>;

    fn identity(&self) -> VcpuIdentity {
        match self {
            Self::Kvm { vcpu, .. } => vcpu.identity(),
            Self::Model(run) => run.vcpu.identity(),
        }
    }

    fn kicker(&self, signal: i32) -> io::Result<Box<dyn Kick>> {
        match self {
            Self::Kvm { vcpu, .. } => vcpu.kicker(signal),
            Self::Model(run) => run.vcpu.kicker(signal),
        }
    }

    fn ring(&self, id: u64, bytes: u32) -> gleaner_ring::Result<DirtyRing> {
        match self {
            Self::Kvm { vcpu, .. } => vcpu.ring(id, bytes),
            Self::Model(run) => run.vcpu.ring(id, bytes),
        }
    }

    fn enter(&mut self) -> Entered<Exit<'_>> {
        match self {
            Self::Kvm { vcpu, .. } => map(vcpu.enter(), |exit| match exit {
                VcpuExit::IoOut(port, data) => Exit::Out { port, data },
                VcpuExit::MmioRead(gpa, data) => Exit::Load { gpa, data },
                VcpuExit::MmioWrite(gpa, data) => Exit::Store { gpa, data },
                other => Exit::Unknown(other),
            }),
            Self::Model(run) => run.enter(),
        }
    }
}

impl ModelRun {
    fn enter(&mut self) -> Entered<Exit<'_>> {
        if std::mem::take(&mut self.loading) {
            let value = u64::from_le_bytes(self.data);
            self.vcpu.program().loaded(value);
        }
        let Self {
            vcpu,
            data,
            loading,
        } = self;
        map(vcpu.enter(), |exit| match exit {
            ModelExit::Out { port, value } => {
                data[..4].copy_from_slice(&value.to_le_bytes());
                Exit::Out {
                    port,
                    data: &data[..4],
                }
            }
            ModelExit::Load { gpa } => {
                *loading = true;
                Exit::Load { gpa, data }
            }
            ModelExit::Store { gpa, value } => {
                *data = value.to_le_bytes();
                Exit::Store { gpa, data }
            }
        })
    }
}

fn map<A, B>(entered: Entered<A>, exit: impl FnOnce(A) -> B) -> Entered<B> {
    match entered {
        Entered::Exit(e) => Entered::Exit(exit(e)),
        Entered::RingFull => Entered::RingFull,
        Entered::Interrupted => Entered::Interrupted,
        Entered::Failed(error) => Entered::Failed(error),
    }
}
