//! The source's end of a migration.
//!
//! ```text
//!            Hello/Welcome              forecast <= limit                all applied, State, READY
//! Greeting ---------------> Precopy ------------------> Switchover ------------------------------> relinquish
//!     |                        | ^                       (stopped)                                     |
//!     |                        +-+ a round                   |                                         | GO
//!     +-----------+------------+-----------------------------+                                         v
//!                 | any error                                                       RUNNING      Committed
//!                 v                                                     complete <-------------------- | |
//!   leases released, resume, Cancel                                                  REFUSED           | | silence,
//!   status failed or cancelled  <--------------------------------------------------------------------+  | closed
//!                                                                                                       v
//!                                                                                                    in-doubt
//! ```
//!
//! A file gives no answers: leases are acknowledged when they are written, and what would be asked of the destination
//! before `relinquish` is asked of the disk.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gleaner_bitmap::mutant::{self, Mutant};
use gleaner_bitmap::{Layout, PAGE_SIZE};

use crate::channel::StreamChannel;
use crate::link::{Limits, Link};
use crate::policy::{Goal, History, OnTimeout, Verdict};
use crate::wire::{Hello, Message, Payload, VERSION};
use crate::{
    CancelToken, Channel, Clock, Error, LeaseId, MigrationId, Progress, Report, Result, Source,
    Status, Stream,
};

/// Asked before each switchover: not before it returns true.
pub type Hold = Box<dyn FnMut() -> bool + Send>;
/// Told of each round.
pub type OnProgress = Box<dyn FnMut(&Progress) + Send>;

/// What a migration shall be like.
pub struct SenderOptions {
    /// Names this attempt.
    pub id: MigrationId,
    /// Names the source, for the people at the destination.
    pub name: String,
    /// The most downtime that a switchover is begun with. 300 ms.
    pub downtime_limit: Duration,
    /// The most time in total. None.
    pub timeout: Option<Duration>,
    /// What happens when it is over. Cancel.
    pub on_timeout: OnTimeout,
    /// The most bytes a second. No limit.
    pub bandwidth_limit: Option<u64>,
    /// How long the destination may be silent when it is its turn. 30 s.
    pub io_timeout: Duration,
    /// Calls it off.
    pub cancel: CancelToken,
    /// Times it. The real clock.
    pub clock: Clock,
    /// Holds the switchover back.
    pub hold: Option<Hold>,
    /// Told of each round.
    pub on_progress: Option<OnProgress>,
}

impl SenderOptions {
    /// The defaults, for the attempt named `id`.
    #[must_use]
    pub fn new(id: MigrationId) -> Self {
        Self {
            id,
            name: String::new(),
            downtime_limit: Duration::from_millis(300),
            timeout: None,
            on_timeout: OnTimeout::default(),
            bandwidth_limit: None,
            io_timeout: Duration::from_secs(30),
            cancel: CancelToken::new(),
            clock: Clock::real(),
            hold: None,
            on_progress: None,
        }
    }
}

/// Migrates a source.
pub struct Sender<'a> {
    source: &'a mut dyn Source,
    options: SenderOptions,
}

impl<'a> Sender<'a> {
    /// Prepares the migration of `source`.
    #[must_use]
    pub fn new(source: &'a mut dyn Source, options: SenderOptions) -> Self {
        Self { source, options }
    }

    /// Migrates over `stream`, which is closed afterwards. Errors are in the report: its status says where the guest is.
    #[must_use]
    pub fn run(self, stream: Stream) -> Report {
        match StreamChannel::open(stream) {
            Ok(mut channel) => self.run_over(&mut channel),
            Err(error) => {
                let mut report = Report::new(self.options.id);
                report.status = Status::Failed;
                if let Err(again) = self.source.resume() {
                    report.status = Status::InDoubt;
                    tracing::error!(%again, "the source can't resume");
                }
                report.reason = Some(error.to_string());
                report.error = Some(error);
                report
            }
        }
    }

    /// As [`Sender::run`], over anything that carries frames.
    #[must_use]
    pub fn run_over(self, channel: &mut dyn Channel) -> Report {
        let options = self.options;
        let start = options.clock.now();
        let on_timeout = options.on_timeout;
        let limits = Limits {
            clock: options.clock,
            cancel: options.cancel,
            // Where the timeout forces the switchover, it is the policy's business alone.
            deadline: options
                .timeout
                .filter(|_| on_timeout == OnTimeout::Cancel)
                .and_then(|limit| Some((start.checked_add(limit)?, limit))),
            silence: options.io_timeout,
            committed: false,
        };
        let mut session = Session {
            source: self.source,
            link: Link::new(channel, limits, options.bandwidth_limit),
            report: Report::new(options.id),
            start,
            goal: Goal {
                downtime_limit: options.downtime_limit,
                timeout: options.timeout,
                on_timeout,
                held: false,
            },
            hold: options.hold,
            on_progress: options.on_progress,
            history: History::default(),
            sent_layout: None,
            in_flight: VecDeque::new(),
            stopped: None,
        };
        let hello = Hello {
            version: VERSION,
            id: options.id,
            name: options.name,
            page_size: PAGE_SIZE,
        };
        let ended = session.migrate(hello);
        session.finish(ended)
    }
}

/// A migration under way.
pub(crate) struct Session<'a> {
    pub(crate) source: &'a mut dyn Source,
    pub(crate) link: Link<'a>,
    pub(crate) report: Report,
    pub(crate) start: Instant,
    pub(crate) goal: Goal,
    pub(crate) hold: Option<Hold>,
    pub(crate) on_progress: Option<OnProgress>,
    pub(crate) history: History,
    /// The layout that the destination has.
    pub(crate) sent_layout: Option<Arc<Layout>>,
    /// Leases written and not yet acknowledged, with the frame that asks for it.
    pub(crate) in_flight: VecDeque<InFlight>,
    /// When the guest was stopped.
    pub(crate) stopped: Option<Instant>,
}

/// A lease that the destination has not confirmed.
pub(crate) struct InFlight {
    pub(crate) lease: LeaseId,
    /// The Sync after it; `None` as long as it isn't written.
    pub(crate) sync: Option<u64>,
    pub(crate) since: Instant,
}

impl Session<'_> {
    pub(crate) const fn clock(&self) -> &Clock {
        &self.link.limits.clock
    }

    fn migrate(&mut self, hello: Hello) -> Result<()> {
        self.link.send(&Message::Hello(hello), &Payload::None)?;
        if self.link.is_answered() {
            match self.link.answer("awaiting the welcome")? {
                Message::Welcome(VERSION) => {}
                Message::Welcome(found) => return Err(Error::Version { found }),
                other => return Err(unexpected(&other, "the welcome was awaited")),
            }
        }
        self.precopy()?;
        self.switch_over()
    }

    /// Brings the source to where it belongs and tells how it went.
    fn finish(mut self, ended: Result<()>) -> Report {
        // Asked before the attempt ends at the source, which forgets it then.
        match self.source.transactions() {
            Ok(transactions) => self.report.transactions = transactions,
            Err(error) => tracing::warn!(%error, "the number of transactions is unknown"),
        }
        if let Err(error) = ended {
            self.end(error);
        }
        if let Some(stopped) = self.stopped {
            self.report.downtime_ms = millis(self.clock().since(stopped));
        }
        self.report.total_ms = millis(self.clock().since(self.start));
        self.report.bytes_on_wire = self.link.bytes();
        self.link.close();
        self.report
    }

    fn end(&mut self, error: Error) {
        let mut reason = error.to_string();
        let refused = matches!(error, Error::Refused { .. });
        let in_doubt = self.link.limits.committed && !refused;
        if in_doubt && !mutant::is_planted(Mutant::DoubtTakenForFailure) {
            self.report.status = Status::InDoubt;
            reason = format!(
                "the destination was told to run and has not answered: {reason}; the guest stays stopped here, ask the \
                 destination for migration {}",
                self.report.migration_id
            );
        } else {
            self.report.status = match error {
                Error::Cancelled => Status::Cancelled,
                _ => Status::Failed,
            };
            for lease in self.in_flight.drain(..) {
                // A source that lost its leases starts the next attempt with everything dirty.
                if let Err(error) = self.source.release(lease.lease) {
                    tracing::warn!(%error, "a lease can't be released");
                }
            }
            // The destination can't run without GO, so the guest needn't wait for it to hear of the end.
            if let Err(error) = self.source.resume() {
                self.report.status = Status::InDoubt;
                reason = format!("{reason}; and then the guest could not be resumed: {error}");
            }
            if !refused {
                self.link.cancel(&reason);
            }
        }
        tracing::info!(status = ?self.report.status, reason, "migration ended");
        self.report.reason = Some(reason);
        self.report.error = Some(error);
    }

    /// Adds a round to the report.
    pub(crate) fn tell(&mut self, progress: Progress) {
        /// Kept in the report; of more, early ones make room.
        const KEPT: usize = 4096;
        if let Some(told) = &mut self.on_progress {
            told(&progress);
        }
        tracing::debug!(?progress, "round");
        if progress.round == 1 {
            self.report.first_round_bytes_per_second = progress.rate_bytes_per_second;
        }
        self.report.rounds = progress.round;
        let rounds = &mut self.report.progress;
        if rounds.len() == KEPT {
            rounds.remove(1);
        }
        rounds.push(progress);
    }

    /// What the policy says now.
    pub(crate) fn decide(&mut self) -> crate::policy::Decision {
        self.goal.held = self.hold.as_mut().is_some_and(|may| !may());
        self.history.elapsed = self.clock().since(self.start);
        crate::policy::decide(&self.history, &self.goal)
    }

    /// Goes on only if the decision is to.
    pub(crate) fn obey(decision: &crate::policy::Decision) -> Result<()> {
        match decision.verdict {
            Verdict::GiveUp => Err(Error::GaveUp {
                reason: decision.reason.clone(),
            }),
            _ => Ok(()),
        }
    }
}

pub(crate) fn unexpected(message: &Message, phase: &'static str) -> Error {
    Error::OutOfState {
        kind: message.kind().name(),
        phase,
    }
}

pub(crate) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
