//! Bugs of whoever migrates.

use gleaner::gate::StoppedVcpus;
use gleaner::migrate::{Receiver, Sender, Status};
use gleaner::{Block, Hooks, LocalSource, PAGE_SIZE};
use gleaner_migrate::PageMemory;
use vm_memory::{Bytes, VolatileMemory};

use crate::Case;
use crate::common::{bytes_of, contents};
use crate::toy::{
    Fault, ToyDestination, ToySource, line, migrate, options, pair, receiver_options,
};
use crate::world::{Found, World, stamp};

/// Two connections: what one of them still holds back lands after what the other one has brought.
pub fn an_old_copy_never_lands_after_a_newer_one(case: Case) -> Found {
    let mut world = World::new(case);
    world.write(3);
    world.tracker.harvest().unwrap();
    let lease = world.consumer.as_ref().unwrap().lease(1).unwrap().unwrap();
    let held_back = contents(&lease);
    world.write(3);
    world.copy();
    world.copy.apply(&lease, &held_back);
    lease.ack();
    world.settle()
}

/// The VMM of these tests: saving its devices writes guest memory.
struct Vmm(Block);

impl Hooks for Vmm {
    fn pause_devices(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn save(&mut self, _: &StoppedVcpus) -> Result<Vec<u8>, String> {
        let memory = self.0.memory().as_volatile_slice();
        let at = usize::try_from(9 * PAGE_SIZE).unwrap();
        memory.write_obj(stamp(), at).unwrap();
        Ok(Vec::new())
    }

    fn resume(&mut self) {}

    fn migrated_away(&mut self) {}
}

fn source(world: &World) -> LocalSource {
    LocalSource::new(&world.tracker, Box::new(Vmm(world.ram.clone()))).unwrap()
}

/// One attempt.
fn attempt(source: &mut LocalSource, place: &ToyDestination) -> Status {
    let (near, far) = pair();
    let mut place = place.clone();
    std::thread::scope(|scope| {
        scope.spawn(move || Receiver::new(&mut place, receiver_options()).run(far));
        Sender::new(source, options()).run(near).status
    })
}

/// Every page is the same at both ends.
fn compare(world: &World, place: &ToyDestination) -> Found {
    let place = place.place();
    let there = &place.blocks[&world.ram.id()].1;
    let all = there.slice(world.ram.info().all()).unwrap();
    let mut copy = vec![0; all.len()];
    all.copy_to(&mut copy[..]);
    let page = usize::try_from(PAGE_SIZE).unwrap();
    let here = bytes_of(&world.ram);
    let pages = here.chunks(page).zip(copy.chunks(page));
    match pages.filter(|(here, there)| here != there).count() {
        0 => Ok(()),
        lost => Err(format!("lost {lost} at the destination")),
    }
}

/// What one destination has says nothing about what the next one has.
pub fn every_attempt_starts_with_everything_dirty(case: Case) -> Found {
    let mut world = World::new(case);
    let mut first = source(&world);
    let refused = attempt(&mut first, &ToyDestination::failing("ready"));
    assert_eq!(refused, Status::Failed);
    world.write(3);
    let place = ToyDestination::default();
    match attempt(&mut first, &place) {
        Status::Completed => compare(&world, &place),
        _ => {
            drop(first);
            let place = ToyDestination::default();
            assert_eq!(attempt(&mut source(&world), &place), Status::Completed);
            compare(&world, &place)
        }
    }
}

/// What saving the devices writes is at the destination.
pub fn what_saving_the_devices_writes_is_migrated(case: Case) -> Found {
    let world = World::new(case);
    let place = ToyDestination::default();
    assert_eq!(attempt(&mut source(&world), &place), Status::Completed);
    compare(&world, &place)
}

/// Bytes that a destination answers with in a whole migration.
fn answers() -> u64 {
    let (near, far, [_, back]) = line([Fault::default(); 2]);
    let (source, place) = (ToySource::new(12), ToyDestination::default());
    let (report, _) = migrate(&source, &place, options(), receiver_options(), near, far);
    assert_eq!(report.status, Status::Completed);
    back.join().unwrap()
}

/// The destination runs the guest, and the line breaks in the middle of its saying so.
pub fn a_guest_that_may_run_elsewhere_does_not_resume(_: Case) -> Found {
    let cut = Fault {
        cut: Some(answers() - 1),
        flip: None,
        ..Fault::default()
    };
    let (near, far, _line) = line([Fault::default(), cut]);
    let (source, place) = (ToySource::new(12), ToyDestination::default());
    let (report, _) = migrate(&source, &place, options(), receiver_options(), near, far);
    assert!(place.place().running, "{report:?}");
    match (source.guest().running, report.status) {
        (false, Status::InDoubt) => Ok(()),
        (running, status) => Err(format!(
            "here: running {running}, {status:?}; there: running"
        )),
    }
}
