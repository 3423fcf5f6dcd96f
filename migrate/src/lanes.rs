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
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use gleaner_bitmap::Generation;

use crate::batch::Tally;
use crate::channel::StreamChannel;
use crate::job::Job;
use crate::lane::{Lane, MAX_IN_FLIGHT};
use crate::patience::TICK;
use crate::supply::{Next, Supply};
use crate::there::There;
use crate::{Channel, Error, LeaseId, Result};

/// The connections: the first one leads, and carries what is no page.
pub(crate) enum Lanes<'a> {
    One(Lane<&'a mut dyn Channel>),
    Many(Vec<Lane<StreamChannel>>),
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
            all.pages += lane.tally.pages;
            all.zeros += lane.tally.zeros;
            bytes += lane.link.bytes();
        });
        (all, bytes)
    }

    pub(crate) fn close(&mut self) {
        self.each(|lane| lane.link.close());
    }

    /// Sends all that `supply` has, and waits until every page has been applied.
    pub(crate) fn carry(&mut self, supply: &mut Supply<'_>, there: &There) -> Result<()> {
        let generation = supply.sent_generation();
        match self {
            Self::One(lane) => alone(lane, supply, generation, there),
            Self::Many(lanes) => {
                let carried = together(lanes, supply, generation, there);
                carried.map_err(|error| match error {
                    // The destination says why on the first connection.
                    Error::Closed { .. } | Error::Io { .. } | Error::Connection { .. } => {
                        lanes[0].link.last_words().unwrap_or(error)
                    }
                    other => other,
                })
            }
        }
    }
}

fn alone<C: Channel>(
    lane: &mut Lane<C>,
    supply: &mut Supply<'_>,
    generation: Generation,
    there: &There,
) -> Result<()> {
    let mut most = MAX_IN_FLIGHT - 1;
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
        most = MAX_IN_FLIGHT - 1;
    }
    while let Some(lease) = lane.applied()? {
        supply.done(lease)?;
    }
    Ok(())
}

fn together(
    lanes: &mut [Lane<StreamChannel>],
    supply: &mut Supply<'_>,
    generation: Generation,
    there: &There,
) -> Result<()> {
    let board = Board::default();
    let room = lanes.len();
    let limits = std::sync::Arc::clone(&lanes[0].link.limits);
    let supplied = std::thread::scope(|scope| {
        for (number, lane) in lanes.iter_mut().enumerate() {
            let board = &board;
            scope.spawn(move || {
                if let Err(error) = work(lane, board, generation, there) {
                    // What else fails fails because of this.
                    lane.link.limits.failed.store(true, Ordering::Relaxed);
                    board.fail(number, error);
                }
            });
        }
        let supplied = board.feed(supply, room);
        if supplied.is_err() {
            limits.failed.store(true, Ordering::Relaxed);
        }
        board.over();
        supplied
    });
    // A connection's error is the cause of what the feeding met, if there is one.
    match board.lock().failed.take() {
        Some(error) => Err(error),
        None => supplied,
    }
}

/// A connection's thread: job by job, until there will be no more and all have been applied.
fn work(
    lane: &mut Lane<StreamChannel>,
    board: &Board,
    generation: Generation,
    there: &There,
) -> Result<()> {
    loop {
        match board.take(lane.under_way() == 0) {
            Take::Job(job) => lane.send(&job, generation, there)?,
            Take::Nothing => apply(lane, board)?,
            Take::Over if lane.under_way() == 0 => return Ok(()),
            Take::Over => apply(lane, board)?,
        }
        while lane.under_way() >= MAX_IN_FLIGHT {
            apply(lane, board)?;
        }
    }
}

fn apply(lane: &mut Lane<StreamChannel>, board: &Board) -> Result<()> {
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
    /// The first connection that failed.
    failed: Option<Error>,
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

    fn fail(&self, lane: usize, error: Error) {
        let mut state = self.lock();
        state.failed.get_or_insert_with(|| match error {
            Error::Closed { .. } | Error::Io { .. } | Error::Silent { .. } if lane > 0 => {
                Error::Connection {
                    number: lane,
                    cause: Box::new(error),
                }
            }
            other => other,
        });
        state.jobs.clear();
        state.over = true;
        self.changed.notify_all();
    }

    fn over(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }

    /// Puts up what the supply has, a few jobs at a time so that none is read long before it is sent, until all have
    /// been applied. An error of a connection is left on the board.
    fn feed(&self, supply: &mut Supply<'_>, room: usize) -> Result<()> {
        let mut under_way = 0;
        loop {
            let (done, space) = {
                let mut state = self.lock();
                if state.failed.is_some() {
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
                    state.failed.is_none()
                        && state.done.is_empty()
                        && (!full || state.jobs.len() >= room)
                };
                // Time passes here only while connections work, and they keep it.
                let _ = self.changed.wait_timeout_while(state, TICK, quiet);
            }
        }
    }
}
