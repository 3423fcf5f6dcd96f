//! The corpus without libFuzzer: each input as it is, and a little around it.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

use std::path::{Path, PathBuf};

use gleaner_fuzz::seeds::{self, Random};
use gleaner_fuzz::{MAX_INPUT, TARGETS, Target};

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "seed"))
        .collect();
    files.sort();
    files
        .into_iter()
        .map(|path| {
            let bytes = std::fs::read(&path).unwrap();
            (path, bytes)
        })
        .collect()
}

/// Says which input it was when a target panics.
struct Trying<'a>(&'a str, &'a dyn std::fmt::Debug, &'a [u8]);

impl Drop for Trying<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: {:?}: {:?}", self.0, self.1, self.2);
        }
    }
}

/// Replays the corpus, then tries `mutants` inputs around it: the same ones in each run.
fn replay((name, run): Target, mutants: usize) {
    let files = corpus(name);
    assert!(!files.is_empty());
    for (path, bytes) in &files {
        let _trying = Trying(name, path, bytes);
        run(bytes);
    }
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for number in 0..mutants {
        let bytes = mutant(&files, &mut random);
        let _trying = Trying(name, &number, &bytes);
        run(&bytes);
    }
}

/// An input of the corpus with a few changes of the kinds that libFuzzer makes.
fn mutant(files: &[(PathBuf, Vec<u8>)], random: &mut Random) -> Vec<u8> {
    let pick = |random: &mut Random| &files[random.below(files.len())].1;
    let mut bytes = pick(random).clone();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        let end = (at + random.below(16)).min(bytes.len());
        match random.below(6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = [0, 1, 250, 251, 253, 255][random.below(6)],
            2 if at < bytes.len() => bytes[at] = random.byte(),
            3 => drop(bytes.drain(at..end)),
            4 => bytes.insert(at, random.byte()),
            _ => {
                // A piece of another one.
                let other = pick(random);
                let from = random.below(other.len() + 1);
                let to = (from + random.below(64)).min(other.len());
                bytes.splice(at..at, other[from..to].iter().copied());
            }
        }
    }
    bytes
}

#[test]
fn migration_streams() {
    replay(TARGETS[0], 10_000);
}

#[test]
fn requests_to_the_service() {
    replay(TARGETS[1], 10_000);
}

#[test]
fn answers_to_the_agent() {
    // Each takes a socket and a thread.
    replay(TARGETS[2], 1_000);
}

#[test]
fn histories_of_layouts() {
    replay(TARGETS[3], 10_000);
}

#[test]
fn states_of_vcpus() {
    replay(TARGETS[4], 10_000);
}

#[test]
fn streams_of_a_qemu() {
    replay(TARGETS[5], 10_000);
}

#[test]
fn traces() {
    replay(TARGETS[6], 10_000);
}

/// After a change of a format: `cargo run --release -p gleaner-fuzz --example seed`.
#[test]
fn the_corpus_holds_what_the_encoders_make_now() {
    for (target, _) in TARGETS {
        let files = corpus(target);
        assert!(files.iter().all(|(_, bytes)| bytes.len() <= MAX_INPUT));
        for (name, bytes) in seeds::of(target) {
            let file = files
                .iter()
                .find(|(path, _)| path.file_stem().is_some_and(|stem| *stem == *name));
            let (_, found) = file.unwrap_or_else(|| panic!("no {target}/{name}.seed"));
            assert!(*found == bytes, "{target}/{name}.seed is another one");
        }
    }
}
