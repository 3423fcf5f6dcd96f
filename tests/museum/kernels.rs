//! Bugs of kernels, which the model can have: that they are found here says that they would be found in a kernel.

use gleaner::model::{ModelConfig, Point};

use crate::Case;
use crate::world::{Found, World};

/// A page that is written while the bitmap is being taken is not taken along and left writable.
pub fn what_is_written_while_a_bitmap_is_taken_is_armed_if_it_is_in_it(case: Case) -> Found {
    let mut world = World::new(case);
    world.write(3);
    // Far enough behind that KVM lets vCPUs run in between.
    world.write(17 * 64);
    world.write_at(Point::Taking, 0, 5);
    world.copy();
    world.write(5);
    world.settle()
}

/// A vCPU that is out has left nothing in its page-modification log.
pub fn a_vcpu_that_is_out_has_logged_all_it_wrote(case: Case) -> Found {
    let config = ModelConfig {
        pml: true,
        bug: case.bug,
        ..ModelConfig::default()
    };
    let mut world = World::with(case, config);
    world.write(3);
    world.settle()
}

/// A page whose bit was cleared is found again when it is written again.
pub fn a_page_that_was_cleared_is_logged_when_it_is_written_again(case: Case) -> Found {
    let mut world = World::new(case);
    world.write(3);
    world.copy();
    world.write(3);
    world.settle()
}
