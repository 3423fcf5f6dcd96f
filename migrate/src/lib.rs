//! Gleaner's migration stream: wire format, sender, receiver, stop policy. No KVM.
//!
//! ```no_run
//! use gleaner_migrate::*;
//! # fn example(source: &mut dyn Source, destination: &mut dyn Destination) -> Result<()> {
//! // the destination
//! let listener = Listener::bind(&"unix:/run/in.sock".parse()?)?;
//! let received = Receiver::new(destination, ReceiverOptions::default()).listen(&listener)?;
//! println!("{:?} {:?}", received.status, received.reason);
//!
//! // the source
//! let to = Connector::new("unix:/run/in.sock".parse()?);
//! let id = MigrationId::random()?;
//! let report = Sender::new(source, SenderOptions::new(id)).run_to(&to);
//! if report.status == Status::InDoubt {
//!     // No answer after GO: the destination knows, when it can be reached again.
//!     let outcome = query(&to, id, std::time::Duration::from_secs(5))?;
//!     resolve(source, outcome)?;
//! }
//! # Ok(()) }
//! ```
//!
//! ```text
//!  Source --lease--> Sender ==frames, straight out of guest memory==> Receiver --straight into--> Destination
//!         <---ack---        <---------------- Applied --------------
//! ```
//!
//! * [`Sender`] drives a [`Source`] through rounds and the switchover; [`policy`] decides when the guest stops.
//! * [`Receiver`] drives a [`Destination`]. It refuses whatever does not fit, and its reason is what the user of the
//!   source reads.
//! * [`wire`] is the format: identity on the wire is (block, page).
//! * [`Format::Qemu`] brings the memory to a stock QEMU instead, by the same rounds. [`QemuReceiver`] takes that of one.
//! * [`trace`] tells which pages a guest dirtied by when, and [`plan`] replays that through the policy.
//! * On one host memory need not travel: with [`SenderOptions::local`] the destination goes on with the source's own.
//! * Never two guests: between GO and its answer the source stays stopped, until the destination has said what became
//!   of it ([`query`], [`resolve`]).
//!
//! Guest memory is never a `&[u8]`: it changes while it is sent, and nothing here borrows it.

// Counts of pages, bytes and seconds become f64 for rates and forecasts, where 53 bits are plenty.
#![allow(clippy::cast_precision_loss)]

mod address;
mod batch;
mod blocks;
mod channel;
mod clock;
mod connector;
mod destination;
mod digest;
mod dry_run;
mod early;
mod error;
mod handed;
mod handover;
mod holes;
mod job;
mod joint;
mod landing;
mod lane;
mod lanes;
mod line;
mod link;
mod listener;
mod memory;
mod memory_wire;
mod newcomers;
mod outcome;
mod pack;
mod patience;
pub mod plan;
pub mod policy;
mod qemu;
mod raw;
mod receiver;
mod reception;
mod report;
mod rounds;
mod scan;
mod sender;
mod source;
mod stream;
mod supply;
mod switchover;
mod there;
mod threads;
mod throttle;
#[cfg(feature = "tls")]
mod tls;
pub mod trace;
mod tuning;
pub mod units;
mod verify;
mod watch;
pub mod wire;
mod written;
mod zero;

pub use address::Address;
pub use channel::Channel;
pub use clock::Clock;
pub use connector::{Connector, connect};
pub use destination::Destination;
pub use dry_run::{DryRun, Forecasts, Rehearsal, Sample, Scene, dry_run};
pub use error::{Error, Result};
pub use holes::Holes;
pub use line::{Break, Cut, Way};
pub use listener::Listener;
pub use memory::{MappedMemory, Memory, NewMemory, PageMemory};
pub use memory_wire::MemoryWire;
pub use outcome::{MigrationId, Outcome, Outcomes, ask, query, resolve, serve_query};
pub use pack::Compress;
pub use patience::CancelToken;
pub use policy::{OnTimeout, ThrottleGoal};
pub use qemu::{Format, Images, MultifdSync, QemuOptions, QemuReceived, QemuReceiver};
pub use receiver::{Receiver, ReceiverOptions};
pub use reception::{Peer, Reception};
pub use report::{DowntimeParts, Progress, Received, Report, Status};
pub use sender::{Hold, OnProgress, Sender, SenderOptions};
pub use source::{Harvested, LeaseId, LeasedPart, PageLease, Source};
pub use stream::Stream;
pub use throttle::{Throttle, Throttles};
#[cfg(feature = "tls")]
pub use tls::{TlsClient, TlsServer, TlsStream};
pub use trace::{Followed, Recorder, Trace, TraceWriter};
pub use tuning::Tuning;
pub use watch::{OnTick, Tick};
