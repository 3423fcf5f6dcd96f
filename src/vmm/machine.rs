//! A machine: VM, tracker, RAM, vCPU threads, device, churn.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gleaner_bitmap::BlockInfo;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, VolatileMemory, VolatileSlice};

use super::backend::{Backend, MachineVcpu, Vm};
use super::churn::{Churn, ChurnConfig, ChurnCounts};
use super::device::{Device, DeviceState};
use super::guest::{CheckResult, Guest, GuestError, HOME, Mailbox, MemoryMap, Workload};
use super::vcpu;
use crate::codec;
use crate::gate::StoppedVcpus;
use crate::{Block, Hooks, StoppedGuest, Tracker, TrackerBuilder, Tracking, WriteLogSlice};

/// What can go wrong in the reference VMM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// `/dev/kvm` does not open, or gives no VM.
    #[error("/dev/kvm: {0}")]
    Kvm(io::Error),
    /// The tracker refused something.
    #[error(transparent)]
    Tracker(#[from] crate::Error),
    /// The guest can't be built.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// A RAM file can't be used.
    #[error("{path}: {source}")]
    RamFile {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A thread can't be started.
    #[error("thread: {0}")]
    Thread(io::Error),
    /// The guest can't go on here.
    #[error(
        "the guest comes from {guest}, this destination runs on {here}: use --backend {}",
        guest.name()
    )]
    OtherBackend {
        /// What it ran on.
        guest: Backend,
        /// What runs guests here.
        here: Backend,
    },
    /// State that came from a source is not this machine's.
    #[error("machine state from the source: {0}")]
    State(String),
    /// A vCPU stopped for a reason that the machine does not know.
    #[error("vCPU {vcpu}: {reason}")]
    Vcpu {
        /// Which one.
        vcpu: usize,
        /// Why.
        reason: String,
    },
    /// The guest did not answer.
    #[error("the guest did not finish its check within {} s", .0.as_secs())]
    CheckTimeout(Duration),
}

/// What a machine is made of.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// What runs it.
    pub backend: Backend,
    /// Bytes of RAM.
    pub ram: u64,
    /// vCPUs.
    pub vcpus: usize,
    /// Where RAM is, instead of in a memfd: a file of exactly `ram` bytes, which is made when it is missing.
    pub ram_file: Option<PathBuf>,
    /// How dirty pages are tracked.
    pub tracking: Tracking,
    /// What the guest writes.
    pub workload: Workload,
    /// Pages a second that all vCPUs together write at most.
    pub write_rate: Option<u64>,
    /// Slot transactions.
    pub churn: Option<ChurnConfig>,
    /// Seed of everything random.
    pub seed: u64,
}

/// What a machine is doing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum MachineStatus {
    /// The guest runs, or can.
    #[default]
    Running,
    /// The guest runs elsewhere; here it stays stopped.
    MigratedAway,
    /// A vCPU failed.
    Failed(String),
}

/// What threads of the machine share.
#[derive(Debug, Default)]
pub(super) struct Board {
    state: Mutex<BoardState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct BoardState {
    status: MachineStatus,
    checks: BTreeMap<usize, CheckResult>,
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, BoardState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn fail(&self, reason: String) {
        self.lock().status = MachineStatus::Failed(reason);
        self.changed.notify_all();
    }

    /// Reports a thread that ends by a panic, until it is dropped.
    pub(super) fn watch(&self, who: String) -> Watch<'_> {
        Watch { board: self, who }
    }

    pub(super) fn checked(&self, vcpu: usize, result: CheckResult) {
        self.lock().checks.insert(vcpu, result);
        self.changed.notify_all();
    }
}

/// See [`Board::watch`].
pub(super) struct Watch<'a> {
    board: &'a Board,
    who: String,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.board.fail(format!("{} panicked", self.who));
        }
    }
}

/// The machine's state as it travels.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct MachineState {
    pub backend: Backend,
    pub ram: BlockInfo,
    pub vcpus: Vec<Vec<u8>>,
    pub write_rate: Option<u64>,
    pub idle: bool,
    pub churn: Option<ChurnConfig>,
    pub device: DeviceState,
}

/// More than any valid state: 16 vCPUs of 16 KiB.
const STATE_LIMIT: usize = 1 << 20;

impl MachineState {
    fn to_bytes(&self) -> Result<Vec<u8>, String> {
        codec::encode::<STATE_LIMIT>(self)
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, MachineError> {
        codec::decode::<STATE_LIMIT, _>(bytes).map_err(MachineError::State)
    }
}

/// The name of the block that every machine has.
pub const RAM: &str = "ram";

/// A machine with its threads. Dropping it ends them.
pub struct Machine {
    pub(super) parts: Arc<Parts>,
    threads: Vec<JoinHandle<()>>,
    device: Option<Device>,
    churn: Option<Churn>,
    /// Until the guest is started.
    stopped: Option<StoppedGuest>,
}

/// What the machine's threads use.
pub(super) struct Parts {
    pub vm: Vm,
    pub tracker: Tracker,
    pub map: MemoryMap,
    pub ram: Block,
    pub board: Board,
    pub write_rate: Option<u64>,
    pub idle: bool,
    pub churn: Option<ChurnConfig>,
}

impl Parts {
    /// All RAM; writes through it are the VMM's and are logged.
    pub(super) fn memory(&self) -> VolatileSlice<'_, WriteLogSlice<'_>> {
        self.ram.memory().as_volatile_slice()
    }
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("tracker", &self.parts.tracker)
            .finish_non_exhaustive()
    }
}

/// The machine's RAM in a file, which is made when it is missing.
fn ram_file(path: &Path, bytes: u64) -> Result<File, MachineError> {
    let fail = |source| MachineError::RamFile {
        path: path.to_path_buf(),
        source,
    };
    let file = lock_ram_file(path).map_err(fail)?;
    match file.metadata().map_err(fail)?.len() {
        0 => file.set_len(bytes).map_err(fail)?,
        length if length == bytes => {}
        length => {
            let text = format!("it has {length} bytes, RAM has {bytes}: they must be the same");
            return Err(fail(io::Error::other(text)));
        }
    }
    Ok(file)
}

/// Opens a file for guest memory, which is secret, and keeps other machines out of it for as long as it is open.
pub(crate) fn lock_ram_file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "another machine has its memory in this file",
        )),
        Err(error) => Err(error.into()),
    }
}

/// A VM and its tracker.
pub(super) fn open_vm(
    backend: Backend,
    tracking: Tracking,
    adjust: impl FnOnce(TrackerBuilder) -> TrackerBuilder,
) -> Result<(Vm, Tracker), MachineError> {
    let vm = Vm::open(backend)?;
    let tracker = adjust(Tracker::on(vm.memory()).tracking(tracking)).build()?;
    Ok((vm, tracker))
}

impl Machine {
    /// A new machine, its guest ready to start.
    ///
    /// # Errors
    /// [`MachineError`]; nothing is left behind.
    pub fn new(config: &MachineConfig) -> Result<Self, MachineError> {
        Self::with_tracker(config, |builder| builder)
    }

    /// A new machine, whose tracker is built as `adjust` says.
    ///
    /// # Errors
    /// [`MachineError`]; nothing is left behind.
    pub fn with_tracker(
        config: &MachineConfig,
        adjust: impl FnOnce(TrackerBuilder) -> TrackerBuilder,
    ) -> Result<Self, MachineError> {
        let map = MemoryMap::new(config.ram, config.vcpus)?;
        let ram = match &config.ram_file {
            None => Block::memfd(RAM, config.ram)?,
            Some(path) => Block::file(RAM, ram_file(path, config.ram)?, config.ram)?,
        };
        let (vm, tracker) = open_vm(config.backend, config.tracking, adjust)?;
        // Many writes for an exit when nothing paces them, few when something does.
        let batch = match config.write_rate {
            None => 4096,
            Some(rate) => u32::try_from(rate / config.vcpus as u64 / 200)
                .unwrap_or(4096)
                .clamp(1, 4096),
        };
        let guest = Guest::new(map, config.workload, batch, config.seed)?;
        let parts = Arc::new(Parts {
            vm,
            tracker,
            map,
            ram,
            board: Board::default(),
            write_rate: config.write_rate,
            idle: config.workload == Workload::Idle,
            churn: config.churn.clone(),
        });
        guest.load(&parts.memory())?;
        let mut tx = parts.tracker.transaction();
        let home = map.home();
        tx.add_block(&parts.ram)
            .create(0, GuestAddress(0), parts.ram.extent(map.low()))
            .create(1, GuestAddress(HOME), parts.ram.extent(home));
        tx.commit()?;
        let device = DeviceState::new(config.seed);
        Self::assemble(parts, device, |vcpu, index| vcpu.start(&guest, index))
    }

    /// Makes vCPUs and threads; the guest stays stopped.
    pub(super) fn assemble(
        parts: Arc<Parts>,
        device: DeviceState,
        mut init: impl FnMut(&mut MachineVcpu, usize) -> Result<(), GuestError>,
    ) -> Result<Self, MachineError> {
        let stopped = parts.tracker.stop(|| Ok(()))?;
        // All vCPUs before the first thread: what can't be built must not leave one behind that runs.
        let mut vcpus = Vec::new();
        for index in 0..parts.map.vcpus() {
            let mut vcpu = parts.vm.create_vcpu(index)?;
            init(&mut vcpu, index)?;
            vcpus.push(vcpu);
        }
        // From here on an error drops the machine, which ends its threads while the guest is still stopped.
        let mut machine = Self {
            parts: Arc::clone(&parts),
            threads: Vec::new(),
            device: None,
            churn: None,
            stopped: Some(stopped),
        };
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            machine.threads.push(vcpu::spawn(&parts, vcpu, index)?);
        }
        machine.device = Some(Device::spawn(&parts, device).map_err(MachineError::Thread)?);
        if let Some(config) = parts.churn.clone() {
            machine.churn = Some(Churn::spawn(&parts, config).map_err(MachineError::Thread)?);
        }
        Ok(machine)
    }

    /// Lets the guest run.
    pub fn start(&mut self) {
        self.stopped = None;
    }

    /// What runs it.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.parts.vm.backend()
    }

    /// Its tracker.
    #[must_use]
    pub fn tracker(&self) -> &Tracker {
        &self.parts.tracker
    }

    /// Its RAM.
    #[must_use]
    pub fn ram(&self) -> &Block {
        &self.parts.ram
    }

    /// What it is doing.
    #[must_use]
    pub fn status(&self) -> MachineStatus {
        self.parts.board.lock().status.clone()
    }

    /// Slot transactions by kind, and their blackouts.
    #[must_use]
    pub fn churn_counts(&self) -> ChurnCounts {
        self.churn.as_ref().map(Churn::counts).unwrap_or_default()
    }

    /// Pages that the guest has written so far, as of the end of each vCPU's last batch; a page written twice counts twice.
    ///
    /// # Errors
    /// [`MachineError::Guest`].
    pub fn guest_writes(&self) -> Result<u64, MachineError> {
        let memory = self.parts.memory();
        (0..self.parts.map.vcpus()).try_fold(0, |sum, index| {
            Ok(sum + Mailbox::new(&memory, &self.parts.map, index)?.count()?)
        })
    }

    /// Lets every vCPU check its memory, and waits for the answers: the first that is not ok, or ok.
    ///
    /// # Errors
    /// [`MachineError::CheckTimeout`]; [`MachineError::Vcpu`] when a vCPU failed meanwhile.
    pub fn check(&self, limit: Duration) -> Result<CheckResult, MachineError> {
        let vcpus = self.parts.map.vcpus();
        self.parts.board.lock().checks.clear();
        let memory = self.parts.memory();
        {
            let Some(_writing) = self.parts.tracker.writers().try_enter() else {
                return Err(crate::Error::AlreadyStopped.into());
            };
            for index in 0..vcpus {
                Mailbox::new(&memory, &self.parts.map, index)?.request_check()?;
            }
        }
        let deadline = Instant::now() + limit;
        let mut board = self.parts.board.lock();
        loop {
            if let MachineStatus::Failed(reason) = &board.status {
                return Err(MachineError::Vcpu {
                    vcpu: 0,
                    reason: reason.clone(),
                });
            }
            if board.checks.len() == vcpus {
                let bad = board.checks.values().find(|c| !c.is_ok());
                return Ok(bad.copied().unwrap_or(CheckResult::Ok));
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Err(MachineError::CheckTimeout(limit));
            };
            let waited = self.parts.board.changed.wait_timeout(board, left);
            board = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Makes what the machine does at a switchover, for each attempt anew.
    pub fn hooks_factory(&self) -> impl FnMut() -> Box<dyn Hooks> + Send + 'static {
        let parts = Arc::clone(&self.parts);
        let device = self.device.as_ref().map(Device::shared).unwrap_or_default();
        move || {
            Box::new(MachineHooks {
                parts: Arc::clone(&parts),
                device: Arc::clone(&device),
            })
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The vCPUs end first, and while the guest is stopped if it is: one that was never started must not run now, for it
        // may be running elsewhere.
        self.parts.tracker.shutdown();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
        self.churn = None;
        self.device = None;
        self.stopped = None;
    }
}

struct MachineHooks {
    parts: Arc<Parts>,
    device: Arc<Mutex<DeviceState>>,
}

impl Hooks for MachineHooks {
    /// The device and the churn count as writers, which are drained next.
    fn pause_devices(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn save(&mut self, stopped: &StoppedVcpus) -> Result<Vec<u8>, String> {
        if let MachineStatus::Failed(reason) = &self.parts.board.lock().status {
            return Err(reason.clone());
        }
        let vcpus = stopped.save().map_err(|e| e.to_string())?;
        // A vCPU whose thread has ended has no seat, and would be missing at the destination without a word.
        let all = 0..self.parts.map.vcpus() as u64;
        if !vcpus.iter().map(|(id, _)| *id).eq(all) {
            return Err("a vCPU of the machine has ended".into());
        }
        let state = MachineState {
            backend: self.parts.vm.backend(),
            ram: self.parts.ram.info().clone(),
            vcpus: vcpus.into_iter().map(|(_, state)| state).collect(),
            write_rate: self.parts.write_rate,
            idle: self.parts.idle,
            churn: self.parts.churn.as_ref().map(ChurnConfig::next),
            device: self
                .device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        };
        state.to_bytes()
    }

    fn resume(&mut self) {}

    fn migrated_away(&mut self) {
        self.parts.board.lock().status = MachineStatus::MigratedAway;
        self.parts.board.changed.notify_all();
    }
}
