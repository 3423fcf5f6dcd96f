//! A rollback that fails: the guest never runs again, and all that it wrote can still be had.

use std::time::Duration;

use gleaner::model::{Call, Failure, Orders};
use gleaner::{Error, Result, Start};

use crate::copy::Copy;
use crate::migration::Tally;
use crate::random::Random;
use crate::world::{Shape, World};

const CHANGES: &[Call] = &[Call::Set, Call::Delete];

/// A guest whose slots can't be changed any more after some call of a transaction. What is lost then.
///
/// # Errors
/// What no order explains.
pub fn break_down(shape: Shape, random: Random) -> Result<Tally> {
    let mut world = World::new(shape, random)?;
    let (number, consumer) = world.consumer(Start::AllDirty)?;
    let mut copy = Copy::default();
    for _ in 0..world.random.below(6) {
        world.live()?;
        copy.take(&mut world, number, &consumer);
    }
    world.quiet = true;
    let mut tally = Tally::default();
    let broken = loop {
        world.kvm.state().orders.failure = Some(Failure {
            calls: CHANGES,
            after: u32::try_from(world.random.below(4)).unwrap_or(0),
            times: u32::MAX,
            errno: libc::ENOMEM,
        });
        world.transact()?;
        tally.attempts += 1;
        let tracker = world.tracker.clone();
        let broken = matches!(tracker.transaction().commit(), Err(Error::Broken));
        if broken || tally.attempts == 20 {
            break broken;
        }
    };
    world.kvm.state().orders = Orders::default();
    // The gate is closed for good: nobody gets in, and nobody writes.
    world.run(8);
    let inside = (0..shape.vcpus).any(|vcpu| world.kvm.state().is_inside(vcpu));
    tally.wrong += u64::from(broken && inside);
    // Who reads what is left has to stop the VMM's own writers, too.
    let (stopped, _quiet) = if broken {
        let quiet = world.tracker.writers().quiet(Duration::ZERO)?;
        (None, Some(quiet))
    } else {
        (Some(world.tracker.stop(|| Ok(()))?), None)
    };
    world.harvest()?;
    while copy.take(&mut world, number, &consumer) {}
    tally.pages_lost += copy.differing(&world) + world.settle();
    drop(stopped);
    tally.faults += u64::from(broken);
    tally.pages_needless += world.needless();
    Ok(tally)
}
