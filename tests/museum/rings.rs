//! Bugs of whoever empties rings; and of the order in which pages are taken, armed and handed out.

use gleaner::model::{Call, Cut, Point};

use crate::Case;
use crate::world::{Found, World};

/// Every vCPU that can run has a ring that is read.
pub fn a_vcpu_that_can_run_has_a_ring_that_is_read(case: Case) -> Found {
    let mut world = World::new(case);
    world.write(3);
    world.settle()
}

/// A page is handed out after its source will tell of the next write to it.
pub fn a_page_is_armed_before_it_can_be_read(case: Case) -> Found {
    let mut world = World::new(case);
    world.write(3);
    world.copy();
    world.write(3);
    world.settle()
}

/// A RESET that counts pages which it did not arm.
fn cut(world: &World) {
    world.kvm.state().orders.cut = Some(Cut {
        after: 1,
        noticed: false,
    });
}

/// Pages that a short RESET left unarmed are armed before they are handed out.
pub fn a_short_reset_leaves_no_page_unarmed(case: Case) -> Found {
    let mut world = World::new(case);
    (3..7).for_each(|page| world.write(page));
    cut(&world);
    world.copy();
    (3..7).for_each(|page| world.write(page));
    world.settle()
}

/// While the log is switched off and on nobody writes.
pub fn nobody_writes_while_the_log_is_switched_off(case: Case) -> Found {
    let mut world = World::new(case);
    (3..7).for_each(|page| world.write(page));
    cut(&world);
    world.write_at(Point::After(Call::Set), 0, 9);
    world.copy();
    world.settle()
}

/// What a harvest takes is in the store when the harvest is over.
pub fn what_was_taken_from_its_source_is_in_the_store(case: Case) -> Found {
    let mut world = World::new(case);
    world.write(3);
    world.settle()
}
