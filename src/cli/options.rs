//! Options that several commands take.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use gleaner_migrate::{
    Address, CancelToken, Compress, Connector, Listener, MigrationId, OnTimeout, SenderOptions,
    ThrottleGoal,
};

pub use super::signals::cancel_on_signal;
use super::trace::Trace;
use super::{progress, units};
use crate::Tracking;
use crate::vmm::churn::{ChurnConfig, Kind};
use crate::vmm::guest::{Guest, MemoryMap, Workload};
use crate::vmm::{Backend, MachineConfig};

/// The guest.
#[derive(Clone, Debug, Args)]
pub struct GuestOptions {
    /// RAM in bytes (K, M, G), 4M to 16G.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = units::ram)]
    pub ram: u64,
    /// Number of vCPUs, 1 to 16.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = units::vcpus)]
    pub vcpus: usize,
    /// Keep RAM in this file: shared, exactly --ram bytes, made when it is missing.
    #[arg(long, value_name = "PATH")]
    pub ram_file: Option<PathBuf>,
    /// How dirty pages are tracked: auto, bitmap, bitmap-clear or ring.
    #[arg(long, default_value = "auto")]
    pub tracking: Tracking,
    /// What the guest writes: idle, sweep, random or hot:SIZE.
    #[arg(long, default_value = "random")]
    pub workload: Workload,
    /// Pages a second that it writes at most, beside its page tables, in which the machine notes that; as many as it can unless
    /// given. A device of the VMM's writes meanwhile, 8 pages each millisecond.
    #[arg(long, value_name = "PAGES", value_parser = clap::value_parser!(u64).range(1..))]
    pub write_rate: Option<u64>,
    /// Slot transactions a second, or max.
    #[arg(long, value_name = "RATE", value_parser = units::churn)]
    pub churn: Option<units::Churn>,
    /// Kinds of slot transactions: hole, fill, split, merge, move, flags, remap, hotplug. All unless given.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub churn_kinds: Vec<Kind>,
    /// What runs the guest.
    #[arg(long, value_enum, default_value_t = BackendChoice::Auto)]
    pub backend: BackendChoice,
    /// Seed of everything random.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

impl GuestOptions {
    /// What no guest can be, and no single option can tell.
    pub fn check(&self) -> Result<(), String> {
        MemoryMap::new(self.ram, self.vcpus)
            .and_then(|map| Guest::new(map, self.workload, 1, self.seed))
            .map(drop)
            .map_err(|error| error.to_string())
    }

    /// The machine that is asked for; `churn` where none is.
    pub fn machine(&self, churn: Option<units::Churn>) -> MachineConfig {
        let kinds = if self.churn_kinds.is_empty() {
            Kind::ALL.to_vec()
        } else {
            self.churn_kinds.clone()
        };
        MachineConfig {
            backend: self.backend.settle(),
            ram: self.ram,
            vcpus: self.vcpus,
            ram_file: self.ram_file.clone(),
            tracking: self.tracking,
            workload: self.workload,
            write_rate: self.write_rate,
            churn: self.churn.or(churn).map(|rate| ChurnConfig {
                rate: rate.0,
                kinds,
                seed: self.seed,
            }),
            seed: self.seed,
        }
    }
}

/// What is to run the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum BackendChoice {
    /// KVM where /dev/kvm opens, else the model.
    Auto,
    /// KVM.
    Kvm,
    /// The model of KVM, in software.
    Model,
}

impl BackendChoice {
    /// Decides, and says so on standard error where it is not KVM for lack of it.
    pub fn settle(self) -> Backend {
        match self {
            Self::Kvm => Backend::Kvm,
            Self::Model => Backend::Model,
            Self::Auto => {
                let (backend, why) = Backend::detect();
                if let Some(why) = why {
                    note!("gleaner: {why}: running on {backend} instead");
                }
                backend
            }
        }
    }
}

/// How a migration shall be.
#[derive(Clone, Debug, Args)]
pub struct MigrationOptions {
    /// The most downtime that a switchover is begun with (300ms, 2s).
    #[arg(long, value_name = "D", default_value = "300ms", value_parser = units::duration)]
    pub downtime_limit: Duration,
    /// Connections that memory goes over, 1 to 64; one only to a file or a descriptor.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub channels: u16,
    /// Compare all pages before the guest may run at the destination: a difference fails the migration, and the guest
    /// runs on at the source. It takes time in which the guest stands still.
    #[arg(long)]
    pub verify: bool,
    /// What memory is compressed with where it shrinks; with anything but none, pages that are sent again go as what
    /// has changed of them.
    #[arg(long, value_enum, default_value_t = Packing::None)]
    pub compress: Packing,
    /// The most bytes a second, all connections together (K, M, G).
    #[arg(long, value_name = "RATE", value_parser = units::size)]
    pub bandwidth_limit: Option<u64>,
    /// The most time in total, for example 30s or 5m; no limit unless given.
    #[arg(long, value_name = "D", value_parser = units::time_limit)]
    pub timeout: Option<Duration>,
    /// What happens when --timeout is over.
    #[arg(long, value_enum, default_value_t = AtTimeout::Cancel, requires = "timeout")]
    pub on_timeout: AtTimeout,
    /// What is slowed down of a guest that does not converge: auto is the writers where the guest can tell them, else all
    /// vCPUs.
    #[arg(long, value_enum, default_value_t = Slow::Never)]
    pub throttle: Slow,
    /// Record the rounds in this file, as JSON lines, and in FILE.pages which pages were dirtied by when, for `gleaner plan`.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}

/// How the ends of a migration know each other.
#[derive(Clone, Debug, Args)]
pub struct TlsOptions {
    /// Mutual TLS, and no connection without: DIR holds ca-cert.pem, and for `send` client-cert.pem and client-key.pem, for `receive` server-cert.pem (made out to HOST of tcp:HOST:PORT, else to localhost) and server-key.pem. Not with --format qemu.
    #[cfg(feature = "tls")]
    #[arg(long, value_name = "DIR")]
    pub tls: Option<PathBuf>,
}

impl TlsOptions {
    /// Whether connections are to be with TLS.
    pub const fn is_asked_for(&self) -> bool {
        #[cfg(feature = "tls")]
        return self.tls.is_some();
        #[cfg(not(feature = "tls"))]
        false
    }

    /// What connects to `address` so.
    pub fn connector(&self, address: Address) -> Result<Connector, gleaner_migrate::Error> {
        let connector = Connector::new(address);
        #[cfg(feature = "tls")]
        if let Some(dir) = &self.tls {
            return connector.tls(gleaner_migrate::TlsClient::load(dir)?);
        }
        Ok(connector)
    }

    /// What listens at `address` so.
    pub fn listener(&self, address: &Address) -> Result<Listener, gleaner_migrate::Error> {
        #[cfg(feature = "tls")]
        if let Some(dir) = &self.tls {
            // First, so that nobody connects to what can't serve him.
            let server = gleaner_migrate::TlsServer::load(dir)?;
            return Listener::bind(address)?.tls(server);
        }
        Listener::bind(address)
    }
}

/// What memory is compressed with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Packing {
    /// Nothing.
    None,
    /// LZ4: for links of some Gbit/s.
    Lz4,
    /// Zstandard: for slower ones.
    Zstd,
}

/// What happens when the time is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum AtTimeout {
    /// The guest runs on at the source.
    Cancel,
    /// The guest is moved, whatever the downtime.
    Switchover,
}

/// What of a guest that does not converge is slowed down.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Slow {
    /// Nothing.
    Never,
    /// What hurts the guest least.
    Auto,
    /// All vCPUs alike.
    All,
    /// vCPUs that dirty too much memory.
    Writers,
}

impl MigrationOptions {
    /// The trace that is asked for.
    pub fn trace(&self) -> Result<Option<Trace>, String> {
        self.trace.as_deref().map(Trace::create).transpose()
    }

    /// A sender's options, progress on standard error and in the trace, which begins here.
    pub fn sender(
        &self,
        id: MigrationId,
        cancel: CancelToken,
        trace: Option<&Trace>,
    ) -> SenderOptions {
        let mut options = SenderOptions {
            name: format!("gleaner {}", env!("CARGO_PKG_VERSION")),
            channels: self.channels,
            verify: self.verify,
            compress: match self.compress {
                Packing::None => Compress::None,
                Packing::Lz4 => Compress::Lz4,
                Packing::Zstd => Compress::Zstd,
            },
            timeout: self.timeout,
            on_timeout: match self.on_timeout {
                AtTimeout::Cancel => OnTimeout::Cancel,
                AtTimeout::Switchover => OnTimeout::Switchover,
            },
            throttle: match self.throttle {
                Slow::Never => ThrottleGoal::Never,
                Slow::Auto => ThrottleGoal::Auto,
                Slow::All => ThrottleGoal::All,
                Slow::Writers => ThrottleGoal::Writers,
            },
            cancel,
            ..SenderOptions::new(id)
        };
        options.tuning.limit_downtime(self.downtime_limit);
        options.tuning.limit_bandwidth(self.bandwidth_limit);
        if let Some(trace) = trace {
            trace.start(id, &options);
        }
        progress::follow(&mut options, trace.cloned());
        options
    }
}
