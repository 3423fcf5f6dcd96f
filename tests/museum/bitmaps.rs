//! Bugs of whoever fetches and clears bitmaps.

use gleaner::model::{Call, Failure, Point};
use gleaner::{Collected, ExternalLog, Layout, Mode, PageRange, SlotKey};
use gleaner_ring::Kvm;

use crate::Case;
use crate::world::{Found, HALF, PAGES, World, store};

/// A page that is written between GET and CLEAR was not fetched, and is not cleared.
pub fn what_is_written_between_fetching_and_clearing_is_kept(case: Case) -> Found {
    let mut world = World::new(case);
    world.write(3);
    world.write_at(Point::After(Call::Get), 0, 5);
    world.copy();
    world.settle()
}

/// What was fetched from two slots is cleared in each of them, and nothing else is.
pub fn each_slot_is_cleared_of_what_was_fetched_from_it(case: Case) -> Found {
    let mut world = World::new(case);
    world.write(3);
    world.write(HALF + 70);
    // In slot 1, after both were fetched.
    world.write_at(Point::After(Call::Get), 1, 70);
    world.copy();
    world.settle()?;
    world.owes_nothing()
}

/// A harvest that fails half way keeps what it has.
pub fn what_a_failed_harvest_had_is_in_the_next_one(case: Case) -> Found {
    let mut world = World::new(case);
    world.write(3);
    world.write(HALF + 3);
    let rings = matches!(world.tracker.mode(), Mode::Ring { .. });
    world.kvm.state().orders.failure = Some(Failure {
        calls: &[Call::Get, Call::Reset],
        after: u32::from(!rings),
        times: 1,
        errno: libc::EIO,
    });
    world.tracker.harvest().unwrap_err();
    world.copy();
    world.settle()
}

/// A slot that ends clean shifts no other slot's pages.
pub fn pages_keep_their_place_behind_a_slot_that_is_clean(case: Case) -> Found {
    let mut world = World::new(case);
    world.write(HALF + 3);
    world.settle()
}

/// A buffer of another size than the slot's log is refused before KVM writes to it.
pub fn a_log_is_fetched_into_nothing_but_a_whole_buffer(case: Case) -> Found {
    let mut world = World::new(case);
    world.write(3);
    world.write(HALF - 1);
    let mut stale = [0];
    let fetched = world.kvm.get_dirty_log(SlotKey::new(1), &mut stale);
    let overrun = world.kvm.state().counts().overrun;
    match (fetched, overrun) {
        (Err(gleaner_ring::Error::LogBuffer { .. }), 0) => world.settle(),
        (_, words) => Err(format!("{words} words past the buffer")),
    }
}

/// A device whose log was made for less memory than there is now.
struct Short(gleaner::Block);

impl ExternalLog for Short {
    fn name(&self) -> String {
        "short".into()
    }

    fn pause(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn harvest(&mut self, _: &Layout, into: &mut Collected) -> gleaner_bitmap::Result<()> {
        let words = vec![0; usize::try_from(PAGES / 64 - 1).unwrap()];
        into.or_block(self.0.id(), PageRange::new(0, PAGES), &words)
    }

    fn layout_changed(&mut self, _: &Layout) -> Result<(), String> {
        Ok(())
    }

    fn resume(&mut self) {}
}

/// A bitmap that is too short for what it is to speak of is refused: nothing is known of the rest.
pub fn a_bitmap_that_is_too_short_is_refused(case: Case) -> Found {
    let mut world = World::new(case);
    world
        .tracker
        .attach(Box::new(Short(world.ram.clone())))
        .unwrap();
    store(&world.ram, PAGES - 1).unwrap();
    match world.tracker.harvest() {
        Err(gleaner::Error::Bitmap(gleaner_bitmap::Error::LengthMismatch { .. })) => Ok(()),
        other => {
            other.unwrap();
            world.settle()
        }
    }
}
