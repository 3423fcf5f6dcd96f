//! Edges without any instruction that not every machine has. Also what the other ways are compared with.

use super::{Edges, STEP, Window, edges_of};
use crate::PageRange;

/// See [`Edges::scan`].
pub(super) fn scan(edges: &mut Edges, words: &[u64]) -> usize {
    edges.walk(words, quiet, block)
}

/// See [`Edges::walk`].
fn quiet(words: &[u64]) -> usize {
    let same = (words[0] >> 63).wrapping_neg();
    let (steps, _) = words[1..].as_chunks::<STEP>();
    let is_quiet = |step: &&[u64; STEP]| step.iter().fold(0, |other, w| other | (w ^ same)) == 0;
    steps.iter().take_while(is_quiet).count() * STEP
}

/// Takes the edges of a block, which begins at the word `at` of the scan. Whether it has any.
#[allow(clippy::cast_possible_truncation)] // a scan is so long that the places of its bits fit
fn block(edges: &mut Edges, window: &Window, at: usize) -> bool {
    let before = edges.len;
    for (word, pair) in window.windows(2).enumerate() {
        let mut left = edges_of(pair[0], pair[1]);
        if left == 0 {
            continue;
        }
        edges.make_room(1);
        let base = ((at + word) * 64) as u16;
        while left != 0 {
            edges.places[edges.len] = base | left.trailing_zeros() as u16;
            edges.len += 1;
            left &= left - 1;
        }
    }
    edges.len > before
}

/// The runs between pairs of places that are counted from `base`.
pub(super) fn runs(pairs: &[[u16; 2]], base: u64, runs: &mut Vec<PageRange>) {
    runs.extend(
        pairs
            .iter()
            .map(|&[first, end]| PageRange::new(base + u64::from(first), u64::from(end - first))),
    );
}
