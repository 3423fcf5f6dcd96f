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
//! Where memory is handed over, there is nothing to send before the switchover but the layout.
//!
//! A file gives no answers: leases are acknowledged when they are written, and what would be asked of the destination
//! before `relinquish` is asked of the disk.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use gleaner_bitmap::PAGE_SIZE;
use gleaner_bitmap::mutant::{self, Mutant};

use crate::channel::StreamChannel;
use crate::lane::Lane;
use crate::lanes::{AnyLane, Lanes};
use crate::link::{Failure, Limits, Link, Pace};
use crate::pack::Packer;
use crate::policy::{Decision, Goal, History, OnTimeout, ThrottleGoal, Verdict};
use crate::qemu::{self, QemuChannel};
use crate::supply::Supply;
use crate::there::There;
use crate::watch::{Totals, Watch};
use crate::wire::{Hello, Join, MAX_CHANNELS, Message, Payload, VERSION};
use crate::{
    Address, CancelToken, Channel, Clock, Compress, Connector, Error, Format, MigrationId, OnTick,
    Progress, Report, Result, Source, Status, Stream, Throttle, Throttles, Tuning,
};

/// Why memory can't be handed over where descriptors can't go along.
pub(crate) const DESCRIPTORS: &str = "that goes over a Unix socket, without TLS";

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
    /// What it may take of downtime, and of the link: 300 ms, all of it. It may change on the way.
    pub tuning: Tuning,
    /// The most time in total. None.
    pub timeout: Option<Duration>,
    /// What happens when it is over; a round under way is cut short for it. Cancel.
    pub on_timeout: OnTimeout,
    /// What of a guest that does not converge is slowed down. Nothing.
    pub throttle: ThrottleGoal,
    /// What it is written as. Gleaner's own stream. A channel that is given has a format already.
    pub format: Format,
    /// Connections that pages go over, 1 to [`MAX_CHANNELS`]. 1. In QEMU's format those of multifd, to which the main one
    /// comes; 1 is without multifd.
    pub channels: u16,
    /// All pages are compared before the guest may run at the destination: a difference fails the migration. The time
    /// that it takes comes on top of the downtime that is forecast. No.
    pub verify: bool,
    /// What page contents are compressed with, each connection by itself, where they shrink. Nothing. With anything else,
    /// pages that are sent again travel as what has changed of them where that is less.
    pub compress: Compress,
    /// To a destination on this host, over one Unix socket: it goes on with the source's own memory, of which nothing is
    /// sent. No.
    pub local: bool,
    /// How long the destination may be silent when it is its turn. 30 s.
    pub io_timeout: Duration,
    /// Calls it off.
    pub cancel: CancelToken,
    /// Times it. The real clock.
    pub clock: Clock,
    /// Holds the switchover back.
    pub hold: Option<Hold>,
    /// By what, or until when, for people.
    pub held_back: &'static str,
    /// Told of each round.
    pub on_progress: Option<OnProgress>,
    /// Told how far a round is, at most ten times a second. A callback may take its time: nothing is sent meanwhile.
    pub on_tick: Option<OnTick>,
}

impl SenderOptions {
    /// The defaults, for the attempt named `id`.
    #[must_use]
    pub fn new(id: MigrationId) -> Self {
        Self {
            id,
            name: String::new(),
            tuning: Tuning::default(),
            timeout: None,
            on_timeout: OnTimeout::default(),
            throttle: ThrottleGoal::default(),
            format: Format::Native,
            channels: 1,
            verify: false,
            compress: Compress::None,
            local: false,
            io_timeout: Duration::from_secs(30),
            cancel: CancelToken::new(),
            clock: Clock::real(),
            hold: None,
            held_back: "by its caller",
            on_progress: None,
            on_tick: None,
        }
    }
}

impl SenderOptions {
    /// Whether it can be done over a channel that has answers, or takes descriptors.
    fn check(&self, answered: bool, descriptors: bool) -> Result<()> {
        if self.format != Format::Native {
            let what = match self {
                _ if self.verify => "digests to verify pages by",
                _ if self.local => "memory that is handed over",
                _ if self.compress != Compress::None => "compression of this kind",
                _ => return Ok(()),
            };
            return Err(Error::NotInFormat { what });
        }
        if self.verify && !answered {
            return Err(Error::Unverifiable);
        }
        let why = match self.local {
            true if self.verify => "there would be no copy to verify",
            true if self.channels != 1 => "that goes over one connection",
            true if self.compress != Compress::None => "there would be no pages to compress",
            true if !descriptors => DESCRIPTORS,
            _ => return Ok(()),
        };
        Err(Error::NotLocal { why })
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

    /// Migrates to the destination that `to` reaches, over as many connections as the options say. Errors are in the
    /// report: its status says where the guest is.
    #[must_use]
    pub fn run_to(self, to: &Connector) -> Report {
        let channels = self.options.channels;
        let most = match to.address() {
            Address::Tcp { .. } | Address::Unix(_) => MAX_CHANNELS,
            Address::Fd(_) | Address::File(_) => 1,
        };
        if !(1..=most).contains(&channels) {
            return self.failed(Error::Channels {
                asked: channels,
                to: to.address().to_string(),
                most,
            });
        }
        // Before connecting, which empties a file.
        let (answered, descriptors) = match to.address() {
            Address::Tcp { .. } => (true, false),
            Address::Unix(_) | Address::Fd(_) => (true, true),
            Address::File(_) => (false, false),
        };
        if let Err(error) = self.options.check(answered, descriptors) {
            return self.failed(error);
        }
        if let Format::Qemu(qemu) = &self.options.format
            && channels > 1
        {
            return match qemu::open(to, channels, qemu, &self.options.cancel) {
                Ok(channels) => self.run_to_qemu(channels),
                Err(error) => self.failed(error),
            };
        }
        match to.connect_until(&self.options.cancel) {
            Ok(stream) if channels == 1 => self.run(stream),
            Ok(stream) => self.run_on_many(stream, to),
            Err(error) => self.failed(error),
        }
    }

    /// As [`Sender::run_to`], over one stream that is open already, and closed afterwards.
    #[must_use]
    pub fn run(self, stream: Stream) -> Report {
        let channel: Result<Box<dyn Channel>> = match &self.options.format {
            Format::Native => StreamChannel::open(stream).map(|channel| Box::new(channel) as _),
            Format::Qemu(qemu) => {
                QemuChannel::over(stream, qemu).map(|channel| Box::new(channel) as _)
            }
        };
        match channel {
            Ok(mut channel) => self.run_over(&mut channel),
            Err(error) => self.failed(error),
        }
    }

    /// As [`Sender::run_to`], over one channel of any kind.
    #[must_use]
    pub fn run_over(self, channel: &mut dyn Channel) -> Report {
        if self.options.channels != 1 {
            let asked = self.options.channels;
            let to = "a stream that is open already".to_owned();
            return self.failed(Error::Channels { asked, to, most: 1 });
        }
        let (answered, descriptors) = (channel.is_answered(), channel.takes_descriptors());
        if let Err(error) = self.options.check(answered, descriptors) {
            return self.failed(error);
        }
        let limits = self.limits();
        let packer = match Packer::new(self.options.compress) {
            Ok(packer) => packer,
            Err(error) => return self.failed(error),
        };
        let lanes = Lanes::One(Lane::new(Link::new(channel, limits), packer));
        let mut session = Session::new(self.source, self.options, lanes);
        let ended = session.greet(1).and_then(|()| session.migrate());
        session.finish(ended)
    }

    fn run_on_many(self, first: Stream, to: &Connector) -> Report {
        let (channels, compress) = (self.options.channels, self.options.compress);
        let limits = self.limits();
        let lane = |stream| {
            let packer = Packer::new(compress)?;
            let channel: Box<dyn Channel + Send> = Box::new(StreamChannel::open(stream)?);
            Ok(Lane::new(Link::new(channel, Arc::clone(&limits)), packer))
        };
        let first = match lane(first) {
            Ok(first) => first,
            Err(error) => return self.failed(error),
        };
        let lanes = Lanes::Many(vec![first]);
        let mut session = Session::new(self.source, self.options, lanes);
        let ended = session
            .greet(channels)
            .and_then(|()| {
                (1..channels).try_for_each(|number| {
                    let joined = to.connect_until(&limits.cancel).and_then(lane);
                    let joined = joined.and_then(|lane| session.join(lane, number));
                    joined.map_err(|error| session.lanes.not_joined(number, error))
                })
            })
            .and_then(|()| session.migrate());
        session.finish(ended)
    }

    fn run_to_qemu(self, channels: Vec<QemuChannel>) -> Report {
        let limits = self.limits();
        let lane = |channel| {
            let channel: Box<dyn Channel + Send> = Box::new(channel);
            Lane::new(Link::new(channel, Arc::clone(&limits)), None)
        };
        let count = self.options.channels;
        let lanes = Lanes::Many(channels.into_iter().map(lane).collect());
        let mut session = Session::new(self.source, self.options, lanes);
        let ended = session.greet(count).and_then(|()| session.migrate());
        session.finish(ended)
    }

    /// It failed before there was anything to send over.
    fn failed(self, error: Error) -> Report {
        let mut report = Report::new(self.options.id);
        report.local = self.options.local;
        report.status = Status::after(&error);
        if let Err(again) = self.source.resume() {
            report.status = Status::InDoubt;
            tracing::error!(%again, "the source can't resume");
        }
        report.reason = Some(error.to_string());
        report.error = Some(error);
        report
    }

    fn limits(&self) -> Arc<Limits> {
        let options = &self.options;
        let now = options.clock.now();
        Arc::new(Limits {
            clock: options.clock.clone(),
            cancel: options.cancel.clone(),
            // Where the timeout forces the switchover, it is the policy's business alone.
            deadline: options
                .timeout
                .filter(|_| options.on_timeout == OnTimeout::Cancel)
                .and_then(|limit| Some((now.checked_add(limit)?, limit))),
            silence: options.io_timeout,
            committed: AtomicBool::new(false),
            failure: Failure::default(),
            pace: Pace::new(options.tuning.clone(), now),
            totals: Totals::default(),
        })
    }
}

/// A migration under way.
pub(crate) struct Session<'a> {
    pub(crate) supply: Supply<'a>,
    pub(crate) lanes: Lanes<'a>,
    pub(crate) there: There,
    pub(crate) report: Report,
    pub(crate) clock: Clock,
    pub(crate) start: Instant,
    name: String,
    pub(crate) format: Format,
    pub(crate) verify: bool,
    throttle: ThrottleGoal,
    pub(crate) goal: Goal,
    tuning: Tuning,
    pub(crate) hold: Option<Hold>,
    held_back: &'static str,
    pub(crate) on_progress: Option<OnProgress>,
    pub(crate) history: History,
    /// When the guest was stopped.
    pub(crate) stopped: Option<Instant>,
}

impl<'a> Session<'a> {
    fn new(source: &'a mut dyn Source, options: SenderOptions, mut lanes: Lanes<'a>) -> Self {
        let start = options.clock.now();
        // Of one that ends the migration the links know.
        let end = options
            .timeout
            .filter(|_| options.on_timeout == OnTimeout::Switchover)
            .and_then(|limit| start.checked_add(limit));
        let totals = lanes.lead().link.limits.totals.clone();
        let watch = Watch::new(options.clock.clone(), end, totals, options.on_tick);
        Self {
            supply: Supply::new(source, options.channels.into(), watch),
            lanes,
            there: There::new(options.compress != Compress::None),
            report: Report {
                local: options.local,
                ..Report::new(options.id)
            },
            start,
            clock: options.clock,
            name: options.name,
            format: options.format,
            verify: options.verify,
            throttle: options.throttle,
            goal: Goal {
                downtime_limit: options.tuning.downtime_limit(),
                timeout: options.timeout,
                on_timeout: options.on_timeout,
                throttle: Throttles::Nothing,
                held: None,
            },
            tuning: options.tuning,
            hold: options.hold,
            held_back: options.held_back,
            on_progress: options.on_progress,
            history: History::default(),
            stopped: None,
        }
    }

    /// Opens the migration, over `channels` connections.
    fn greet(&mut self, channels: u16) -> Result<()> {
        let hello = Message::Hello(Hello {
            version: VERSION,
            id: self.report.migration_id,
            name: std::mem::take(&mut self.name),
            page_size: PAGE_SIZE,
            channels,
            local: self.report.local,
        });
        welcome(self.lanes.lead(), &hello)
    }

    /// Adds a connection to a migration that is open.
    fn join(&mut self, lane: AnyLane, number: u16) -> Result<()> {
        let join = Message::Join(Join {
            id: self.report.migration_id,
            channel: number,
        });
        let Lanes::Many(lanes) = &mut self.lanes else {
            return Ok(()); // not reached: one connection has nobody to join
        };
        // Before it is welcome, so that it is ended with the others if it never is.
        lanes.push(lane);
        lanes.last_mut().map_or(Ok(()), |lane| welcome(lane, &join))
    }

    fn migrate(&mut self) -> Result<()> {
        if self.report.local {
            self.await_switchover()?;
        } else {
            if self.throttle != ThrottleGoal::Never {
                self.goal.throttle = self.throttle.of(self.supply.source.throttles()?)?;
            }
            self.precopy()?;
        }
        self.switch_over()
    }

    fn limits(&mut self) -> Arc<Limits> {
        Arc::clone(&self.lanes.lead().link.limits)
    }

    /// Brings the source to where it belongs and tells how it went.
    fn finish(mut self, ended: Result<()>) -> Report {
        // Asked before the attempt ends at the source, which forgets it then.
        match self.supply.source.transactions() {
            Ok(transactions) => self.report.transactions = transactions,
            Err(error) => tracing::warn!(%error, "the number of transactions is unknown"),
        }
        if let Err(error) = ended {
            self.end(error);
        }
        if let Some(stopped) = self.stopped {
            self.report.downtime_ms = millis(self.clock.since(stopped));
        }
        self.report.throttle = self.history.throttle;
        self.report.total_ms = millis(self.clock.since(self.start));
        self.count();
        self.lanes.close();
        self.report
    }

    fn end(&mut self, error: Error) {
        let mut reason = error.to_string();
        if let (Error::TimedOut { .. }, Some(last)) = (&error, self.report.progress.last()) {
            reason = format!("{reason}; after round {}: {}", last.round, last.reason);
        }
        let gone = matches!(
            error,
            Error::Closed { .. }
                | Error::Io { .. }
                | Error::Silent { .. }
                | Error::Connection { .. }
        );
        let advice = self.lanes.lead().link.advice();
        let refused = matches!(error, Error::Refused { .. });
        let in_doubt = self.limits().is_committed() && !refused;
        if in_doubt && !mutant::is_planted(Mutant::DoubtTakenForFailure) {
            self.report.status = Status::InDoubt;
            let id = self.report.migration_id;
            let advice =
                advice.unwrap_or_else(|| format!("ask the destination for migration {id}"));
            reason = format!(
                "the destination was told to run and has not answered: {reason}; the guest stays stopped here, {advice}"
            );
        } else {
            if let Some(advice) = advice.filter(|_| gone) {
                reason = format!("{reason}; {advice}");
            }
            self.report.status = Status::after(&error);
            self.supply.release();
            // The end of the attempt lets it go anyway; said all the same, because a guest that stays slow is not noticed.
            if self.history.throttle != Throttle::Off
                && self.stopped.is_none()
                && let Err(error) = self.supply.source.throttle(Throttle::Off)
            {
                tracing::warn!(%error, "the guest may still be throttled");
            }
            // The destination can't run without GO, so the guest needn't wait for it to hear of the end.
            if let Err(error) = self.supply.source.resume() {
                self.report.status = Status::InDoubt;
                reason = format!("{reason}; and then the guest could not be resumed: {error}");
            }
            if !refused {
                let cancel = Message::Cancel(reason.clone());
                self.lanes.lead().link.say_last(&cancel);
            }
        }
        tracing::info!(status = ?self.report.status, reason, "migration ended");
        self.report.reason = Some(reason);
        self.report.error = Some(error);
    }

    /// Brings the report's counts up to date.
    pub(crate) fn count(&mut self) {
        let (sent, bytes) = self.lanes.sent();
        self.report.pages_sent = sent.pages;
        self.report.zero_pages = sent.zeros;
        self.report.bytes_on_wire = bytes;
        self.report.pages_delta = sent.deltas;
        self.report.bytes_saved = sent.saved;
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
    pub(crate) fn decide(&mut self) -> Decision {
        let held = self.hold.as_mut().is_some_and(|may| !may());
        self.goal.held = held.then_some(self.held_back);
        self.goal.downtime_limit = self.tuning.downtime_limit();
        self.history.elapsed = self.clock.since(self.start);
        crate::policy::decide(&self.history, &self.goal)
    }

    /// Goes on only if the decision is to.
    pub(crate) fn obey(&mut self, decision: &Decision) -> Result<()> {
        match decision.verdict {
            Verdict::GiveUp => {
                return Err(Error::GaveUp {
                    reason: decision.reason.clone(),
                });
            }
            Verdict::SwitchOver => self.report.foretold(decision.forecast.as_ref()),
            Verdict::Throttle(throttle) => {
                self.supply.source.throttle(throttle)?;
                self.history.throttle = throttle;
            }
            Verdict::Continue | Verdict::Done => {}
        }
        Ok(())
    }
}

/// Says hello or joins, and awaits the welcome.
fn welcome<C: Channel + ?Sized>(lane: &mut Lane<C>, greeting: &Message) -> Result<()> {
    lane.link.send(greeting, &Payload::None)?;
    if !lane.link.is_answered() {
        return Ok(());
    }
    match lane.link.answer("awaiting the welcome")? {
        Message::Welcome(VERSION) => Ok(()),
        Message::Welcome(found) => Err(Error::Version { found }),
        other => Err(unexpected(&other, "the welcome was awaited")),
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
