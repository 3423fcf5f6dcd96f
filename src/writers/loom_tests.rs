//! Writers against those who make them quiet: in every order that the memory model allows, nobody writes while writers are
//! quiet, and whoever waits is woken. Threads and locks are loom's; nothing times out there, so a wake-up that is lost is a
//! deadlock, which ends the test.
//!
//! ```sh
//! RUSTFLAGS="--cfg loom" cargo test --release -p gleaner --lib loom_tests --target-dir target/loom
//! ```
//!
//! Bounds: three threads, each of which writes once or is quiet once; up to three preemptions (328 to 501
//! executions).
#![allow(clippy::unwrap_used)] // a test fails by panicking

use super::*;
use crate::loom_model::{Memory, explore};

/// Threads that may be suspended where they could go on, in one execution.
const BOUND: usize = 3;
const LONG: Duration = Duration::from_secs(3600);

/// What a thread does with the writers.
type Part = fn(&Writers, &Memory);

/// Two that write are no fault, so for loom they read, and who is quiet writes.
fn write(writers: &Writers, memory: &Memory) {
    let _writing = writers.enter();
    memory.read();
}

fn be_quiet(writers: &Writers, memory: &Memory) {
    let _quiet = writers.quiet(LONG).unwrap();
    memory.write();
}

/// All parts at the same time, the last on this thread.
fn together(name: &str, others: &'static [Part], last: Part) {
    explore(name, BOUND, move || {
        let (writers, memory) = (Writers::default(), Memory::new());
        let threads: Vec<_> = others
            .iter()
            .map(|part| {
                let (writers, memory) = (writers.clone(), memory.clone());
                loom::thread::spawn(move || part(&writers, &memory))
            })
            .collect();
        last(&writers, &memory);
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

#[test]
fn nobody_writes_while_writers_are_quiet_and_all_get_in_afterwards() {
    together("two writers, one quiet", &[write, write], be_quiet);
}

#[test]
fn who_makes_writers_quiet_waits_for_another_who_has() {
    together("one writer, two quiet", &[write, be_quiet], be_quiet);
}

#[test]
fn writers_that_waited_for_one_who_gave_up_get_in() {
    fn give_up(writers: &Writers, memory: &Memory) {
        if let Ok(_quiet) = writers.quiet(Duration::ZERO) {
            memory.write();
        }
    }
    together("two writers, one who gives up", &[write, write], give_up);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn planted_quiet_that_does_not_wait() {
    fn be_quiet(writers: &Writers, memory: &Memory) {
        writers.0.lock().quiet = true;
        let _quiet = QuietWriters {
            shared: Arc::clone(&writers.0),
            for_good: false,
        };
        memory.write();
    }
    together("planted", &[write], be_quiet);
}

#[test]
#[should_panic(expected = "deadlock")]
fn planted_writer_that_looks_for_who_waits_before_it_leaves() {
    fn write(writers: &Writers, memory: &Memory) {
        let writing = writers.enter();
        memory.read();
        let awaited = writers.0.lock().quiet;
        writers.0.lock().writing -= 1;
        if awaited {
            writers.0.changed.notify_all();
        }
        std::mem::forget(writing);
    }
    together("planted", &[write], be_quiet);
}
