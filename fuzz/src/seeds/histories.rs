//! Histories of a guest's memory.

use super::{Random, Seed};
use crate::layouts::code;

fn number(n: usize) -> u8 {
    u8::try_from(n).expect("a small number")
}

/// A transaction of these edits.
fn transaction(edits: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![number(code::TRANSACTION), number(edits.len())];
    for (edit, operands) in edits {
        bytes.push(number(*edit));
        bytes.extend_from_slice(operands);
    }
    bytes
}

fn step(step: usize, operands: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number(step)];
    bytes.extend_from_slice(operands);
    bytes
}

/// A block of 150 pages, shown at guest page 10 by slot 1.
fn plugged() -> Vec<u8> {
    transaction(&[
        (code::ADD_BLOCK, &[149]),
        (code::CREATE, &[1, 10, 0, 0, 150]),
    ])
}

/// A write to each of these pages of slot 1.
fn writes(pages: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for page in pages {
        bytes.extend(step(code::WRITE, &[1, *page]));
    }
    bytes
}

/// A change of the plugged slot, with written pages before and after it, two consumers and a lease that is out.
fn changed(edits: &[(usize, &[u8])]) -> Vec<u8> {
    [
        plugged(),
        step(code::CONSUMER, &[0]),
        step(code::CONSUMER, &[1]),
        writes(&[0, 63, 64, 65, 100, 149]),
        step(code::DEVICE_WRITES, &[0, 70]),
        step(code::HARVEST, &[]),
        step(code::LEASE, &[0, 64]),
        step(code::LEASE, &[1, 2]),
        writes(&[0, 1, 64, 128]),
        transaction(edits),
        writes(&[2, 30]),
        step(code::ACK, &[0]),
        step(code::HARVEST, &[]),
        step(code::FALL_BACK, &[1]),
        step(code::LEASE, &[0, 100]),
    ]
    .concat()
}

/// A history whose every step means something more often than not.
fn random(seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = [plugged(), step(code::CONSUMER, &[0])].concat();
    for _ in 0..120 {
        let kind = [0, 1, 1, 1, 1, 2, 2, 3, 4, 5, 6, 6, 7, 7, 8, 9, 10][random.below(17)];
        bytes.push(number(kind));
        if kind == code::TRANSACTION {
            let edits = 1 + random.below(3);
            bytes.push(number(edits));
            for _ in 0..edits {
                let edit = random.below(code::EDITS);
                let operands = [1, 1, 5, 1, 0, 2, 2, 2, 3, 4, 2][edit];
                bytes.push(number(edit));
                bytes.extend((0..operands).map(|_| number(random.below(40))));
            }
        } else {
            let operands = [0, 2, 2, 0, 1, 1, 2, 1, 1, 1, 0][kind];
            bytes.extend((0..operands).map(|_| number(random.below(160))));
        }
    }
    bytes
}

pub fn seeds() -> Vec<Seed> {
    let split: (usize, &[u8]) = (code::SPLIT, &[1, 65, 2]);
    let mut seeds = vec![
        ("split", changed(&[split])),
        (
            "split-and-merged",
            [changed(&[split]), transaction(&[(code::MERGE, &[1, 2])])].concat(),
        ),
        ("hole", changed(&[(code::PUNCH, &[1, 33, 70, 3])])),
        (
            "hole-filled",
            [
                changed(&[(code::PUNCH, &[1, 33, 70, 3])]),
                transaction(&[(code::CREATE, &[2, 43, 0, 33, 70])]),
            ]
            .concat(),
        ),
        ("moved", changed(&[(code::MOVE, &[1, 90])])),
        (
            "swapped",
            changed(&[split, (code::MOVE, &[1, 95]), (code::MOVE, &[2, 10])]),
        ),
        ("read-only", changed(&[(code::ACCESS, &[1, 1])])),
        ("shrunk", changed(&[(code::RESIZE, &[1, 66])])),
        ("deleted", changed(&[(code::DELETE, &[1])])),
        (
            "unplugged",
            changed(&[(code::CLEAR, &[]), (code::REMOVE_BLOCK, &[0])]),
        ),
        (
            "replaced",
            changed(&[
                (code::DELETE, &[1]),
                (code::REMOVE_BLOCK, &[0]),
                (code::ADD_BLOCK, &[99]),
                (code::CREATE, &[1, 10, 0, 0, 100]),
            ]),
        ),
        (
            "shown-twice",
            changed(&[(code::CREATE, &[9, 10, 0, 5, 130])]),
        ),
        (
            "overlap-refused",
            changed(&[(code::CREATE, &[2, 50, 0, 0, 9])]),
        ),
        (
            "removed-while-mapped",
            changed(&[(code::REMOVE_BLOCK, &[0])]),
        ),
        (
            "merged-while-unplugged",
            changed(&[
                split,
                (code::REMOVE_BLOCK, &[0]),
                (code::MERGE, &[1, 2]),
                (code::DELETE, &[1]),
            ]),
        ),
        (
            "edges",
            changed(&[
                (code::MOVE, &[1, 253]),
                (code::RESIZE, &[1, 248]),
                (code::PUNCH, &[1, 1, 248, 2]),
                (code::SPLIT, &[1, 248, 2]),
                (code::CREATE, &[3, 249, 0, 248, 249]),
            ]),
        ),
        (
            "faults",
            [
                plugged(),
                step(code::CONSUMER, &[1]),
                writes(&[1, 2, 3]),
                step(code::FAULT, &[2]),
                step(code::HARVEST, &[]),
                writes(&[3, 4]),
                step(code::FAULT, &[1 | 64]),
                transaction(&[split]),
                step(code::FAULT, &[64]),
                step(code::FAULT, &[3]),
                step(code::HARVEST, &[]),
                step(code::LEASE, &[0, 9]),
                step(code::FAULT, &[0]),
                transaction(&[split]),
                step(code::LEASE, &[0, 9]),
            ]
            .concat(),
        ),
        (
            "consumers-come-and-go",
            [
                changed(&[split]),
                step(code::LEAVE, &[0]),
                step(code::CONSUMER, &[0]),
                step(code::LEASE, &[1, 20]),
                step(code::ORPHANS_END, &[]),
                step(code::LEAVE, &[0]),
                step(code::LEAVE, &[0]),
                writes(&[9]),
                step(code::CONSUMER, &[1]),
            ]
            .concat(),
        ),
    ]
    .into_iter()
    .map(|(name, bytes)| (name.to_owned(), bytes))
    .collect::<Vec<_>>();
    for seed in 1..=8 {
        seeds.push((format!("random-{seed}"), random(seed)));
    }
    seeds
}
