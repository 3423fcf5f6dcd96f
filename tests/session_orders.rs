//! The session of service and agent, in every order of requests, lost answers, deaths and reconnects: never two guests,
//! never half a one, no page lost.
//!
//! A breadth-first search visits every state that a page or two, one attached agent, one whose connection is over but who
//! lives on, and one destination can reach, however many agents come one after the other; random walks go further with
//! more pages. The session is the product's; guest, agents and destination are toys, and what they are asserted to be is
//! known from outside of it.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

mod session_world;

use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use session_world::host::Told;
use session_world::steps::Step;
use session_world::world::World;

/// What a search has seen.
#[derive(Default, Debug)]
struct Seen {
    states: usize,
    steps: usize,
    deepest: usize,
    completed: usize,
    in_doubt: usize,
    /// In doubt with the destination's process gone: nobody will ever know.
    unknowable: usize,
    /// Let go of, and back again after a refusal.
    taken_back: usize,
}

fn replay(pages: usize, fenced: bool, path: &[Step]) -> World {
    let mut world = World::new(pages, fenced);
    for step in path {
        world.take(step).unwrap();
    }
    world
}

/// Visits every state that can be reached, by the shortest way there.
fn search(pages: usize, fenced: bool) -> Result<Seen, String> {
    let mut seen = Seen::default();
    let mut known = HashSet::from([World::new(pages, fenced).state()]);
    let mut ways = VecDeque::from([Vec::new()]);
    while let Some(way) = ways.pop_front() {
        seen.states += 1;
        seen.deepest = seen.deepest.max(way.len());
        let possible = replay(pages, fenced, &way).possible();
        for step in possible {
            let mut world = replay(pages, fenced, &way);
            let before = world.host.told;
            let taken = world.take(&step);
            seen.steps += 1;
            let mut way = way.clone();
            way.push(step);
            taken.map_err(|what| format!("{what}\nafter {way:#?}"))?;
            if matches!(before, Told::LetGo(_)) && world.host.told == Told::Here {
                seen.taken_back += 1;
            }
            if known.insert(world.state()) {
                seen.count(&world);
                ways.push_back(way);
            }
        }
    }
    Ok(seen)
}

impl Seen {
    fn count(&mut self, world: &World) {
        match world.host.told {
            Told::Here => {}
            Told::Away => self.completed += 1,
            Told::LetGo(_) if world.destination.as_ref().is_some_and(|d| d.dead) => {
                self.unknowable += 1;
            }
            Told::LetGo(_) => self.in_doubt += 1,
        }
    }
}

#[test]
fn every_order_of_requests_deaths_and_reconnects_keeps_one_guest_whole() {
    // Two pages, and leases that pass each other, are many more states.
    let pages = if std::env::var_os("GLEANER_LONG").is_some() {
        2
    } else {
        1
    };
    let seen = search(pages, true).unwrap_or_else(|what| panic!("{what}"));
    println!("pages: {pages}, {seen:?}");
    let all = [
        seen.completed,
        seen.in_doubt,
        seen.unknowable,
        seen.taken_back,
    ];
    assert!(
        all.iter().all(|n| *n > 0),
        "an end was never reached: {seen:?}"
    );
}

#[test]
fn without_the_fence_a_stale_agent_would_lose_pages() {
    // Or the search would say nothing about the fence.
    let found = search(1, false).unwrap_err();
    assert!(found.starts_with("page lost"), "{found}");
}

#[test]
fn long_walks_with_more_pages_keep_one_guest_whole() {
    let seen = RefCell::new(Seen::default());
    let mut runner = TestRunner::new(Config {
        cases: 5000,
        failure_persistence: None,
        ..Config::default()
    });
    let walks = vec(any::<(u16, u8)>(), 1..400);
    let walked = runner.run(&walks, |choices| {
        let mut world = World::new(4, true);
        for (choice, fortune) in choices {
            let mut possible = world.possible();
            // Where everything fails all the time nothing gets far.
            if fortune > 4 {
                possible.retain(|step| world.goes_well(step));
            }
            let step = &possible[usize::from(choice) % possible.len()];
            let taken = world.take(step);
            taken.map_err(|what| TestCaseError::fail(format!("{what} at {step:?}")))?;
            seen.borrow_mut().steps += 1;
        }
        seen.borrow_mut().count(&world);
        Ok(())
    });
    walked.unwrap_or_else(|what| panic!("{what}"));
    let seen = seen.into_inner();
    println!(
        "steps: {}, completed: {}, in doubt: {} and {}",
        seen.steps, seen.completed, seen.in_doubt, seen.unknowable
    );
    assert!(seen.completed > 0 && seen.in_doubt > 0 && seen.unknowable > 0);
}
