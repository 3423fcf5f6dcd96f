//! One simulated migration: attempts that fail in every way, until one moves the guest.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use gleaner::migrate::{
    Break, CancelToken, Clock, Cut, MemoryWire, MigrationId, Outcome, PageMemory, ReceiverOptions,
    Sender, SenderOptions, Status, Way, resolve,
};
use gleaner::model::{Call, Failure};
use gleaner::{Block, LocalSource, PageRange, Result, Start};

use crate::actors::Actors;
use crate::copy::words_of;
use crate::ends::{Arrived, Faults, Place, SimHooks, Watched, Whereabouts};
use crate::random::Random;
use crate::world::{Shape, World};

/// What a simulated migration came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct Tally {
    /// Attempts.
    pub attempts: u64,
    /// Attempts whose outcome the source did not know before it asked.
    pub in_doubt: u64,
    /// Things that went wrong: calls of KVM, resets, lines, destinations, hooks, users.
    pub faults: u64,
    /// Slot transactions.
    pub transactions: u64,
    /// Pages that differed at the destination, or that a meter was not told of.
    pub pages_lost: u64,
    /// Pages given to somebody who was not owed them.
    pub pages_needless: u64,
    /// Guests that ran twice, or attempts that failed although nothing went wrong.
    pub wrong: u64,
}

impl Tally {
    /// Adds another one up.
    pub const fn add(&mut self, other: &Self) {
        self.attempts += other.attempts;
        self.in_doubt += other.in_doubt;
        self.faults += other.faults;
        self.transactions += other.transactions;
        self.pages_lost += other.pages_lost;
        self.pages_needless += other.pages_needless;
        self.wrong += other.wrong;
    }

    /// Whether it is as it must be.
    #[must_use]
    pub const fn is_good(&self) -> bool {
        self.pages_lost == 0 && self.pages_needless == 0 && self.wrong == 0
    }
}

const ANY: &[Call] = &[Call::Set, Call::Get, Call::Clear, Call::Reset, Call::Manual];

/// Attempts that may fail; the next one meets no faults.
const TROUBLED: u64 = 3;

/// What goes wrong in one attempt.
#[derive(Default)]
struct Plan {
    ends: Faults,
    line: Option<Break>,
    /// KVM fails at the call of this number when logging is switched on.
    start: Option<u32>,
    /// The user calls it off before the frame of this number.
    cancel: Option<u64>,
}

impl Plan {
    fn any(random: &mut Random) -> Self {
        let mut plan = Self::default();
        match random.below(11) {
            10 => plan.start = Some(u32::try_from(random.below(6)).unwrap_or(0)),
            0 => plan.ends.harvest = Some(random.below(4)),
            1 => plan.ends.save = true,
            2 => plan.ends.destination = Some(random.below(8)),
            3 => plan.cancel = Some(random.below(40)),
            4..8 => {
                plan.line = Some(Break {
                    way: if random.one_in(2) {
                        Way::Forth
                    } else {
                        Way::Back
                    },
                    frame: random.below(30),
                    cut: match random.below(3) {
                        0 => Cut::Before,
                        1 => Cut::Half,
                        _ => Cut::After,
                    },
                    silent: random.one_in(4),
                });
            }
            _ => {}
        }
        plan
    }

    const fn is_troubled(&self) -> bool {
        self.line.is_some()
            || self.cancel.is_some()
            || self.ends.save
            || self.ends.harvest.is_some()
            || self.ends.destination.is_some()
    }
}

/// Migration `index` under `seed`: the same each time.
///
/// # Errors
/// An error of the tracker's that nothing explains.
pub fn migrate(seed: u64, index: u64) -> Result<Tally> {
    let mut random = Random::new(seed, index);
    let shape = Shape::any(&mut random);
    migrate_in(shape, random)
}

/// A migration in a world of this shape.
///
/// # Errors
/// As [`migrate`].
pub fn migrate_in(shape: Shape, random: Random) -> Result<Tally> {
    let mut world = World::new(shape, random)?;
    let mut tally = Tally::default();
    for _ in 0..world.random.below(4) {
        world.live()?;
    }
    let whereabouts = Whereabouts::default();
    loop {
        let plan = if tally.attempts < TROUBLED {
            Plan::any(&mut world.random)
        } else {
            world.quiet = true;
            Plan::default()
        };
        tally.attempts += 1;
        if attempt(&mut world, &whereabouts, &plan, &mut tally)? {
            break;
        }
    }
    tally.transactions = world.transactions;
    tally.faults += world.troubles;
    tally.pages_lost += world.settle();
    tally.pages_needless += world.needless();
    tally.wrong += u64::from(whereabouts.ran_twice());
    Ok(tally)
}

/// One attempt; whether the guest has moved.
fn attempt(
    world: &mut World,
    whereabouts: &Whereabouts,
    plan: &Plan,
    tally: &mut Tally,
) -> Result<bool> {
    let number = world.joins(Start::AllDirty);
    let hooks = SimHooks {
        actors: world.actors.clone(),
        whereabouts: whereabouts.clone(),
        fails: plan.ends.save,
    };
    let tracker = world.tracker.clone();
    world.kvm.state().orders.failure = plan.start.map(|after| Failure {
        calls: ANY,
        after,
        times: 1,
        errno: libc::ENOMEM,
    });
    let begun = world.harvesting(|| LocalSource::new(&tracker, Box::new(hooks)));
    world.kvm.state().orders.failure = None;
    let inner = match begun {
        Ok(inner) => inner,
        Err(error) => {
            world.explain(error)?;
            world.calm();
            world.parts(number);
            return Ok(false);
        }
    };
    world.calm();
    let most = match world.random.below(17) {
        0 => u64::MAX,
        pages => pages,
    };
    let mut source = Watched {
        inner,
        number,
        actors: world.actors.clone(),
        kvm: world.kvm.clone(),
        faults: plan.ends,
        harvests: 0,
        most,
        leases: BTreeMap::new(),
    };
    let id = identity(&mut world.random);
    let (clock, cancel) = (Clock::stopped(), CancelToken::new());
    let mut rounds = world.random.below(5);
    let options = SenderOptions {
        clock: clock.clone(),
        cancel: cancel.clone(),
        hold: Some(Box::new(move || {
            rounds = rounds.saturating_sub(1);
            rounds == 0
        })),
        ..SenderOptions::new(id)
    };
    let receiver = ReceiverOptions {
        clock,
        ..ReceiverOptions::default()
    };
    let outcomes = receiver.outcomes.clone();
    let stage = world.actors.clone();
    let compare = move |arrived: &Arrived| differing(&stage, arrived);
    let mut place = Place::new(whereabouts.clone(), plan.ends, &compare);
    let latency = Duration::from_micros(world.random.below(2000));
    let bandwidth = 1 << (20 + world.random.below(12));
    let troubled = RefCell::new(Ok(()));
    let frames = RefCell::new(0);
    let world_now = RefCell::new(&mut *world);
    let mut wire = MemoryWire::new(&mut place, receiver)
        .latency(latency)
        .bandwidth(bandwidth)
        .watch(|_, _| {
            *frames.borrow_mut() += 1;
            if plan.cancel == Some(*frames.borrow()) {
                cancel.cancel();
            }
            let lived = world_now.borrow_mut().live();
            let mut first = troubled.borrow_mut();
            *first = std::mem::replace(&mut *first, Ok(())).and(lived);
        });
    if let Some(line) = plan.line {
        wire = wire.break_at(line);
    }
    let report = Sender::new(&mut source, options).run_over(&mut wire);
    let _ = wire.end();
    troubled.into_inner()?;
    tally.pages_lost += place.differing;
    let status = match report.status {
        Status::InDoubt => {
            tally.in_doubt += 1;
            // The destination is still there, and has decided.
            let outcome = outcomes.get(id);
            let decided = matches!(outcome, Outcome::Running | Outcome::Refused);
            tally.wrong += u64::from(!decided);
            let resolved = resolve(&mut source, outcome);
            resolved.unwrap_or(Status::InDoubt)
        }
        status => status,
    };
    let moved = status == Status::Completed;
    let as_said = moved == whereabouts.runs_there() && moved != whereabouts.runs_here();
    tally.wrong += u64::from(!as_said);
    if plan.is_troubled() && !moved {
        tally.faults += 1;
    }
    // What failed without a cause did not have to.
    tally.wrong += u64::from(!moved && !plan.is_troubled());
    drop(source);
    world.parts(number);
    Ok(moved)
}

fn identity(random: &mut Random) -> MigrationId {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&random.next().to_le_bytes());
    bytes[8..].copy_from_slice(&random.next().to_le_bytes());
    MigrationId(bytes)
}

/// Pages of the stopped source that are not the same at the destination.
fn differing(actors: &Actors, arrived: &Arrived) -> u64 {
    let blocks: Vec<Block> = actors.stage().blocks().cloned().collect();
    let mut differing = arrived.blocks.len().abs_diff(blocks.len()) as u64;
    for block in &blocks {
        let there = arrived.blocks.get(&block.id());
        for page in 0..block.info().pages {
            let page = PageRange::new(page, 1);
            let here = block.slice(page).map(|s| words_of(&s));
            let same = there.is_some_and(|(_, memory)| {
                let there = memory.slice(page).map(|s| words_of(&s));
                matches!((here, there), (Ok(a), Ok(b)) if a == b)
            });
            differing += u64::from(!same);
        }
    }
    differing
}
