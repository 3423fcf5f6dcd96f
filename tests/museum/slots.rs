//! Bugs of whoever changes slots.

use crate::Case;
use crate::world::{Found, HALF, World};

/// What was written before a slot goes is still dirty afterwards.
pub fn what_a_slot_had_dirty_is_dirty_when_it_is_gone(case: Case) -> Found {
    let mut world = World::new(case);
    world.write(3);
    world.split();
    world.settle()
}

/// A slot that a transaction does not touch keeps its log.
pub fn a_slot_that_stays_keeps_what_it_has_dirty(case: Case) -> Found {
    let mut world = World::new(case);
    world.write(HALF + 3);
    world.split();
    world.settle()
}

/// A slot that comes back under another id is not read under its old one.
pub fn entries_mean_the_slots_they_were_made_for(case: Case) -> Found {
    let mut world = World::new(case);
    world.write(3);
    world.exchange();
    world.settle()
}

/// A new slot owes what was written, and no page more.
pub fn a_new_slot_owes_nothing_that_was_not_written(case: Case) -> Found {
    let mut world = World::new(case);
    world.split();
    world.owes_nothing()?;
    world.write(3);
    world.settle()
}
