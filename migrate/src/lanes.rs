//! All connections of a migration, as they carry a round.
//!
//! ```text
//!            jobs                      job by job, whoever is free
//!  Supply ---------> Board (a few) ------------------------------> Lane 0 .. Lane N-1, a thread each
//!         <---------                <------------------------------
//!            ack: all jobs of a lease     a job has been applied
//! ```
//!
//! The source is used by the calling thread alone. With one connection there is no board and no other thread.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use gleaner_bitmap::Generation;

use crate::batch::Tally;
use crate::job::Job;
use crate::lane::Lane;
use crate::link::{Failure, Limits};
use crate::patience::TICK;
use crate::supply::{Next, Supply};
use crate::there::There;
use crate::threads::{self, Finally, panic_met};
use crate::{Channel, Error, LeaseId, Result};

/// One of several connections, whatever it speaks.
pub(crate) type AnyLane = Lane<Box<dyn Channel + Send>>;

/// The connections: the first one leads, and carries what is no page.
pub(crate) enum Lanes<'a> {
    One(Lane<&'a mut dyn Channel>),
    Many(Vec<AnyLane>),
}

impl<'a> Lanes<'a> {
    /// The connection that leads.
    pub(crate) fn lead(&mut self) -> &mut Lane<dyn Channel + 'a> {
        match self {
            Self::One(lane) => lane,
            Self::Many(lanes) => &mut lanes[0],
        }
    }

    fn each(&mut self, mut each: impl FnMut(&mut Lane<dyn Channel + 'a>)) {
        match self {
            Self::One(lane) => each(lane),
            Self::Many(lanes) => lanes.iter_mut().for_each(|lane| each(lane)),
        }
    }

    /// What all of them have sent together, and bytes on the wire.
    pub(crate) fn sent(&mut self) -> (Tally, u64) {
        let (mut all, mut bytes) = (Tally::default(), 0);
        self.each(|lane| {
            all += lane.tally;
            bytes += lane.link.bytes();
        });
        (all, bytes)
    }

    /// Why connection `number` did not come about. Where it is the migration that ended, the destination says why on the
    /// first.
    pub(crate) fn not_joined(&mut self, number: u16, error: Error) -> Error {
        match error {
            Error::Cancelled | Error::TimedOut { .. } => error,
            cause => self.lead().link.last_words().unwrap_or(Error::Connection {
                number: number.into(),
                cause: Box::new(cause),
            }),
        }
    }

    pub(crate) fn close(&mut self) {
        // First: what was said last is heard before the end of the others is.
        self.lead().link.close();
        // At once: each waits a while for the other end to be done too.
        let _ = self.at_once(|lane| {
            lane.link.close();
            Ok(())
        });
    }

    /// Sends all that `supply` has, and waits until every page has been applied.
    pub(crate) fn carry(&mut self, supply: &mut Supply<'_>, there: &There) -> Result<()> {
        let generation = supply.sent_generation();
        match self {
            Self::One(lane) => alone(lane, supply, generation, there),
            Self::Many(lanes) => {
                together(lanes, supply, generation, there);
                told(lanes)
            }
        }
    }

    /// Lets every connection do `work` at the same time.
    pub(crate) fn at_once(
        &mut self,
        work: impl Fn(&mut Lane<dyn Channel + '_>) -> Result<()> + Sync,
    ) -> Result<()> {
        let lanes = match self {
            Self::One(lane) => return work(lane),
            Self::Many(lanes) => lanes,
        };
        let limits = Arc::clone(&lanes[0].link.limits);
        std::thread::scope(|scope| {
            for (number, lane) in lanes.iter_mut().enumerate() {
                let (work, limits) = (&work, &limits);
                let started = threads::start(scope, move || {
                    let _fails = Finally(|| fail_of_panic(limits));
                    if let Err(error) = work(lane) {
                        fail(lane, number, error);
                    }
                });
                if let Err(error) = started {
                    limits.failure.meet(error);
                }
            }
        });
        told(lanes)
    }
}

/// A connection failed, and the others with it.
fn fail(lane: &AnyLane, number: usize, error: Error) {
    lane.link.limits.failure.meet(match error {
        Error::Closed { .. } | Error::Broken { .. } | Error::Io { .. } | Error::Silent { .. }
            if number > 0 =>
        {
            Error::Connection {
                number,
                cause: Box::new(error),
            }
        }
        other => other,
    });
}

/// What became of the work of several connections. Where one is gone, the destination says why on the first.
fn told(lanes: &mut [AnyLane]) -> Result<()> {
    let link = &mut lanes[0].link;
    match link.limits.failure.take() {
        Some(
            error @ (Error::Closed { .. }
            | Error::Broken { .. }
            | Error::Io { .. }
            | Error::Connection { .. }),
        ) => Err(link.last_words().unwrap_or(error)),
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Where the VMM's code panics, the others end too.
fn fail_of_panic(limits: &Limits) {
    if let Some(error) = panic_met() {
        limits.failure.meet(error);
    }
}

fn alone<C: Channel>(
    lane: &mut Lane<C>,
    supply: &mut Supply<'_>,
    generation: Generation,
    there: &There,
) -> Result<()> {
    let busy = lane.most_under_way() - 1;
    let mut most = busy;
    loop {
        match supply.next()? {
            Next::Job(job) => lane.send(&job, generation, there)?,
            Next::Wait if lane.under_way() > 0 => most = lane.under_way() - 1,
            Next::Wait | Next::Nothing => break,
        }
        while lane.under_way() > most {
            if let Some(lease) = lane.applied()? {
                supply.done(lease)?;
            }
        }
        most = busy;
    }
    while let Some(lease) = lane.applied()? {
        supply.done(lease)?;
    }
    Ok(())
}

fn together(lanes: &mut [AnyLane], supply: &mut Supply<'_>, generation: Generation, there: &There) {
    let board = Board::default();
    let room = lanes.len();
    let limits = Arc::clone(&lanes[0].link.limits);
    std::thread::scope(|scope| {
        let (board, limits) = (&board, &limits);
        // However it ends.
        let _over = Finally(|| {
            fail_of_panic(limits);
            board.over();
        });
        for (number, lane) in lanes.iter_mut().enumerate() {
            let started = threads::start(scope, move || {
                let _fails = Finally(|| fail_of_panic(limits));
                if let Err(error) = work(lane, board, generation, there) {
                    fail(lane, number, error);
                    board.over();
                }
            });
            if let Err(error) = started {
                limits.failure.meet(error);
            }
        }
        if let Err(error) = board.feed(supply, room, &limits.failure) {
            limits.failure.meet(error);
        }
    });
}

/// A connection's thread: job by job, until there will be no more and all have been applied.
fn work(lane: &mut AnyLane, board: &Board, generation: Generation, there: &There) -> Result<()> {
    loop {
        match board.take(lane.under_way() == 0) {
            Take::Job(job) => lane.send(&job, generation, there)?,
            Take::Nothing => apply(lane, board)?,
            Take::Over if lane.under_way() == 0 => return Ok(()),
            Take::Over => apply(lane, board)?,
        }
        while lane.under_way() >= lane.most_under_way() {
            apply(lane, board)?;
        }
    }
}

fn apply(lane: &mut AnyLane, board: &Board) -> Result<()> {
    if let Some(lease) = lane.applied()? {
        board.done(lease);
    }
    Ok(())
}

/// What a connection finds on the board.
enum Take {
    Job(Job),
    /// Nothing now.
    Nothing,
    /// Nothing any more in this round.
    Over,
}

/// Where the supply puts jobs up and connections take them.
#[derive(Default)]
struct Board {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Leases whose jobs have been applied, one entry a job.
    done: Vec<LeaseId>,
    /// No more jobs will come.
    over: bool,
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next job; waits for one if asked to.
    fn take(&self, wait: bool) -> Take {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                self.changed.notify_all();
                return Take::Job(job);
            }
            if state.over {
                return Take::Over;
            }
            if !wait {
                return Take::Nothing;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn done(&self, lease: LeaseId) {
        self.lock().done.push(lease);
        self.changed.notify_all();
    }

    /// No more jobs come. After a failure there may be some that nobody has taken; nobody shall.
    fn over(&self) {
        let mut state = self.lock();
        state.over = true;
        state.jobs.clear();
        drop(state);
        self.changed.notify_all();
    }

    /// Puts up what the supply has, a few jobs at a time so that none is read long before it is sent, until all have
    /// been applied, or a connection has failed.
    fn feed(&self, supply: &mut Supply<'_>, room: usize, failure: &Failure) -> Result<()> {
        let mut under_way = 0;
        loop {
            let (done, space) = {
                let mut state = self.lock();
                if failure.has_happened() {
                    return Ok(());
                }
                let done = std::mem::take(&mut state.done);
                (done, room.saturating_sub(state.jobs.len()))
            };
            under_way -= done.len();
            for lease in done {
                supply.done(lease)?;
            }
            let mut idle = true;
            for _ in 0..space {
                match supply.next()? {
                    Next::Job(job) => {
                        under_way += 1;
                        self.lock().jobs.push_back(job);
                        self.changed.notify_all();
                        idle = false;
                    }
                    Next::Wait | Next::Nothing if under_way == 0 => return Ok(()),
                    Next::Wait | Next::Nothing => break,
                }
            }
            if idle {
                let state = self.lock();
                let full = state.jobs.len() >= room;
                let quiet = |state: &mut State| {
                    !failure.has_happened()
                        && state.done.is_empty()
                        && (!full || state.jobs.len() >= room)
                };
                // Time passes here only while connections work, and they keep it.
                let _ = self.changed.wait_timeout_while(state, TICK, quiet);
            }
        }
    }
}
