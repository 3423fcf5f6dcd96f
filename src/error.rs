//! What can go wrong, and what state things are in then.

use std::io;

use gleaner_bitmap::SlotKey;

/// An error of Gleaner. Unless a variant says otherwise the call has changed nothing: tracker and KVM agree, no dirty bit
/// is gone, and the vCPUs run on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A bad layout, block or bitmap; or a dirty source that failed, whose pages are then held back until the next harvest.
    #[error(transparent)]
    Bitmap(#[from] gleaner_bitmap::Error),
    /// KVM refused something.
    #[error(transparent)]
    Kvm(#[from] gleaner_ring::Error),
    /// The migration failed.
    #[error(transparent)]
    Migrate(#[from] gleaner_migrate::Error),
    /// Host memory could not be had, mapped or discarded.
    #[error("memory of block \"{block}\": {source}")]
    Memory {
        /// The block's name.
        block: String,
        /// Why.
        source: io::Error,
    },
    /// The block has no shared file behind it.
    #[error(
        "block \"{block}\" has no shared file behind it: use a memfd for what agents and windows need"
    )]
    NoFile {
        /// The block's name.
        block: String,
    },
    /// The write log is not that of the region.
    #[error("block \"{block}\": its write log covers {log} bytes, its memory has {memory}")]
    WriteLogLength {
        /// The block's name.
        block: String,
        /// Bytes that the log covers.
        log: u64,
        /// Bytes of memory.
        memory: u64,
    },
    /// A call of a transaction failed, and the calls before it were taken back: the old layout is in force, the gate open.
    #[error("transaction refused at call {at} of {of}; the old layout is in force again: {cause}")]
    TransactionFailed {
        /// Which call, from 1.
        at: usize,
        /// How many there were.
        of: usize,
        /// Why.
        cause: gleaner_ring::Error,
    },
    /// A call of a transaction failed, and so did taking the others back. The gate stays closed: a guest with a slot
    /// missing would corrupt itself. Dirty bits are all in the store; read the guest's memory, or end it.
    #[error(
        "transaction refused ({cause}), and taking it back failed at {slot} ({rollback}): the vCPUs stay stopped"
    )]
    RollbackFailed {
        /// The slot that could not be restored.
        slot: SlotKey,
        /// Why the transaction failed.
        cause: gleaner_ring::Error,
        /// Why the rollback failed.
        rollback: gleaner_ring::Error,
    },
    /// An earlier rollback failed; only reading is possible.
    #[error("the layout is broken by an earlier failed rollback: the guest can't run on")]
    Broken,
    /// Read-only slots are not offered by this kernel.
    #[error("{slot}: this kernel has no read-only slots")]
    NoReadonly {
        /// The slot.
        slot: SlotKey,
    },
    /// A vCPU did not leave `KVM_RUN`, or its thread did not come to park. The guest runs on.
    #[error("vCPU {vcpu} did not stop within 10 s: is its thread blocked in an exit handler?")]
    KickTimeout {
        /// The vCPU.
        vcpu: u64,
    },
    /// The kick signal can't be used.
    #[error("signal {signal} can't be used to kick vCPUs: {source}")]
    KickSignal {
        /// The signal.
        signal: i32,
        /// Why.
        source: io::Error,
    },
    /// A vCPU's run page can't be mapped.
    #[error("run page of vCPU {vcpu}: {source}")]
    RunPage {
        /// The vCPU.
        vcpu: u64,
        /// Why.
        source: io::Error,
    },
    /// Two threads want the same vCPU's seat.
    #[error("vCPU {vcpu} has a seat already")]
    SeatTaken {
        /// The vCPU.
        vcpu: u64,
    },
    /// `KVM_RUN` failed.
    #[error("KVM_RUN of vCPU {vcpu}: {source}")]
    VcpuRun {
        /// The vCPU.
        vcpu: u64,
        /// Why.
        source: io::Error,
    },
    /// A vCPU's state could not be saved.
    #[error("state of vCPU {vcpu} could not be saved: {reason}")]
    SaveVcpu {
        /// The vCPU.
        vcpu: u64,
        /// Why.
        reason: String,
    },
    /// No such lease: it was acknowledged or released before.
    #[error("lease {lease} is not open")]
    UnknownLease {
        /// Its number.
        lease: u64,
    },
    /// Device state could not be saved.
    #[error("device state could not be saved: {reason}")]
    DeviceState {
        /// Why.
        reason: String,
    },
    /// The guest is stopped already.
    #[error("the guest is stopped already")]
    AlreadyStopped,
    /// The guest runs elsewhere; letting it go on here would make two of it.
    #[error("the guest has migrated away: it can't go on here")]
    MigratedAway,
    /// The guest is stopped for a switchover: its layout is what the destination builds, and stays as it is.
    #[error(
        "the guest is stopped for a switchover: its memory slots can't change before it runs again, here or there"
    )]
    Stopped,
    /// The VMM's writers did not finish. The guest runs on.
    #[error("a writer of the VMM's did not finish within {} s: is it waiting for somebody while it holds its token?", .0.as_secs())]
    WritersBusy(std::time::Duration),
    /// A block came back after it had been removed.
    #[error(
        "block \"{block}\" was removed before: a block's id is never used again, make a new block of the same memory"
    )]
    BlockReused {
        /// Its name.
        block: String,
    },
    /// A seat was asked to run another vCPU than the one it was registered for.
    #[error("this seat is that of vCPU {vcpu}, it can't run another one")]
    OtherVcpu {
        /// The vCPU of the seat.
        vcpu: u64,
    },
    /// The guest is not stopped.
    #[error("the guest is not stopped")]
    NotStopped,
    /// A device writes guest memory and reports nothing: its pages would be lost.
    #[error(
        "device \"{device}\" writes guest memory and keeps no log: unplug it, or give it an external log, before dirty tracking"
    )]
    UnloggedWriter {
        /// The device.
        device: String,
    },
    /// An external log failed. What it collected before is kept.
    #[error("external log \"{device}\": {reason}")]
    ExternalLog {
        /// The device.
        device: String,
        /// Why.
        reason: String,
    },
    /// The reaper could not empty a full dirty ring; its vCPU can't go on. Pages are held back, not lost.
    #[error("dirty rings could not be emptied: {reason}")]
    Reaper {
        /// Why.
        reason: String,
    },
    /// The guest can't be throttled like that.
    #[error(
        "{throttle:?} can't be: a share is 1 to 99 per cent, and who writes is known with dirty rings alone"
    )]
    BadThrottle {
        /// What was asked for.
        throttle: gleaner_migrate::Throttle,
    },
    /// Somebody throttles the guest already.
    #[error("the guest is throttled already, by somebody else")]
    AlreadyThrottled,
    /// It is not known which vCPU writes, so none can be held to a limit of its own.
    #[error(
        "which vCPU dirties memory is known with dirty rings alone: track with --tracking ring"
    )]
    NoWriters,
    /// The service's socket can't be used.
    #[error("service socket {path}: {source}")]
    Socket {
        /// Where.
        path: std::path::PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The service refused a request.
    #[error("the service says: {reason}")]
    Service {
        /// Why.
        reason: String,
    },
    /// A look of a meter can't be.
    #[error("a look at the guest that can't be: {reason}")]
    BadLook {
        /// Why.
        reason: String,
    },
    /// A thread could not be started.
    #[error("thread {name}: {source}")]
    Thread {
        /// Its name.
        name: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// The result of Gleaner's operations.
pub type Result<T> = std::result::Result<T, Error>;
