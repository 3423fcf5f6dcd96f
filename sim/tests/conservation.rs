//! Laws 1, 2, 4, 5 and 6 on the model: whatever happens, in whatever order, no page is lost and none is given without need.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

use gleaner::Start;
use gleaner_sim::copy::Copy;
use gleaner_sim::random::Random;
use gleaner_sim::world::{Shape, World};

/// Pages lost and given without need.
fn follow(seed: u64, index: u64) -> (u64, u64) {
    let mut random = Random::new(seed, index);
    let mut world = World::new(Shape::any(&mut random), random).unwrap();
    let (number, consumer) = world.consumer(Start::AllDirty).unwrap();
    let mut copy = Copy::default();
    for _ in 0..world.random.below(40) {
        world.live().unwrap();
        if world.random.one_in(3) {
            world.harvest().unwrap();
        }
        if world.random.one_in(2) {
            copy.take(&mut world, number, &consumer);
        }
    }
    let stopped = world.tracker.stop(|| Ok(())).unwrap();
    world.harvest().unwrap();
    while copy.take(&mut world, number, &consumer) {}
    let lost = copy.differing(&world) + world.settle();
    drop(stopped);
    (lost, world.needless())
}

#[test]
fn no_page_is_lost_and_none_is_given_without_need() {
    let bad: Vec<_> = (0..3000)
        .map(|index| (index, follow(1, index)))
        .filter(|(_, found)| *found != (0, 0))
        .collect();
    assert_eq!(bad, [], "run, (pages lost, pages given without need)");
}
