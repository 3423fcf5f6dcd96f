//! The laws, over any sequence of what can happen to a tracker on the model, against a naive oracle: a `BTreeSet` of
//! (block, page) for each consumer.
//!
//! * 1 and 4, conservation: whatever was written since a consumer was last given a page, it is given before it settles; a
//!   destination that copies what it is given, when it is given it, holds the same as the guest.
//! * 2, precision: a consumer is given no page that no source reported since.
//! * 3, re-arm before read: copies are made while the guest writes on.
//! * 5, generations: slot ids are used again at once, also by pages of another block.
//! * 6, failure: after a call that fails the layout is the old one or the new one, the guest runs, and all of this still holds.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

use gleaner::model::{Call, Failure};
use gleaner::{Consumer, Error, Start};
use gleaner_sim::copy::Copy;
use gleaner_sim::random::Random;
use gleaner_sim::world::{Shape, World};
use proptest::prelude::*;

/// Something that happens.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// vCPUs and the VMM write, so often at most.
    Run(u64),
    /// A harvest.
    Harvest,
    /// One whose call of this number fails.
    HarvestFails(u32),
    /// A slot transaction of any kind, which may fail.
    Transact,
    /// The destination is given pages, or loses them on the way.
    Copy,
    /// Another consumer comes, from this start state.
    Join(bool),
    /// One of the others takes pages.
    Take(usize),
    /// One of the others goes.
    Part(usize),
    /// The destination is lost; another one starts from nothing.
    Again,
    /// The guest is stopped, everything is settled, and it goes on.
    Stop,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1u64..40).prop_map(Step::Run),
        3 => Just(Step::Harvest),
        1 => (0u32..4).prop_map(Step::HarvestFails),
        4 => Just(Step::Transact),
        4 => Just(Step::Copy),
        1 => any::<bool>().prop_map(Step::Join),
        2 => (0usize..3).prop_map(Step::Take),
        1 => (0usize..3).prop_map(Step::Part),
        1 => Just(Step::Again),
        1 => Just(Step::Stop),
    ]
}

const HARVEST: &[Call] = &[Call::Get, Call::Clear, Call::Reset];

/// A world, the destination of its guest, and other consumers.
struct Case {
    world: World,
    sender: (u64, Consumer),
    copy: Copy,
    others: Vec<(u64, Consumer)>,
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed, 0);
        let mut world = World::new(Shape::any(&mut random), random).unwrap();
        let sender = world.consumer(Start::AllDirty).unwrap();
        Self {
            world,
            sender,
            copy: Copy::default(),
            others: Vec::new(),
        }
    }

    fn happens(&mut self, step: Step) {
        let world = &mut self.world;
        match step {
            Step::Run(accesses) => {
                world.run(accesses);
                world.reap();
            }
            Step::Harvest => drop(world.harvest().unwrap()),
            Step::HarvestFails(after) => {
                world.kvm.state().orders.failure = Some(Failure {
                    calls: HARVEST,
                    after,
                    times: 1,
                    errno: libc::EIO,
                });
                let outcome = world.harvest();
                let failed = std::mem::take(&mut world.kvm.state().orders).failed;
                assert_eq!(outcome.is_err(), failed > 0, "{outcome:?}");
            }
            Step::Transact => {
                let before = world.tracker.layout();
                let made = world.transactions;
                world.transact().unwrap();
                let after = world.tracker.layout();
                let as_before =
                    before.slots().eq(after.slots()) && before.generation() == after.generation();
                assert!(world.transactions > made || as_before);
            }
            Step::Copy => {
                self.copy.take(world, self.sender.0, &self.sender.1);
            }
            Step::Join(all_dirty) if self.others.len() < 3 => {
                let start = if all_dirty {
                    Start::AllDirty
                } else {
                    Start::Empty
                };
                self.others.push(world.consumer(start).unwrap());
            }
            Step::Take(n) => {
                if let Some((number, consumer)) = self.others.get(n) {
                    world.take(*number, consumer);
                }
            }
            Step::Part(n) if n < self.others.len() => {
                let (number, consumer) = self.others.swap_remove(n);
                drop(consumer);
                world.parts(number);
            }
            Step::Again => {
                let next = world.consumer(Start::AllDirty).unwrap();
                let (number, consumer) = std::mem::replace(&mut self.sender, next);
                drop(consumer);
                world.parts(number);
                self.copy = Copy::default();
            }
            Step::Stop => self.settle(),
            Step::Join(_) | Step::Part(_) => {}
        }
    }

    /// Stops the guest: everybody is given what is owed, and the destination holds what the guest does.
    fn settle(&mut self) {
        let world = &mut self.world;
        let stopped = world.tracker.stop(|| Ok(())).unwrap();
        let mut tx = world.tracker.transaction();
        tx.delete(0);
        assert!(matches!(tx.commit(), Err(Error::Stopped)));
        world.harvest().unwrap();
        while self.copy.take(world, self.sender.0, &self.sender.1) {}
        assert_eq!(self.copy.differing(world), 0, "pages lost");
        for (number, consumer) in &self.others {
            while consumer.dirty_pages() > 0 {
                world.take(*number, consumer);
            }
            assert_eq!(world.actors.stage().oracle.owed(*number), []);
        }
        drop(stopped);
        assert_eq!(world.needless(), 0, "pages given without need");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, max_shrink_iters: 20_000, ..ProptestConfig::default() })]
    #[test]
    fn hold_whatever_happens(seed in any::<u64>(), steps in proptest::collection::vec(step(), 0..60)) {
        let mut case = Case::new(seed);
        for step in steps {
            case.happens(step);
        }
        case.settle();
    }
}
