//! Edges without any instruction that not every machine has. Also what the other ways are compared with.

use super::{BLOCK, ENOUGH, Edges, SCAN, Window, edges_of};
use crate::PageRange;

/// See [`Edges::scan`].
pub(super) fn scan(edges: &mut Edges, words: &[u64]) -> usize {
    let mut at = 0;
    while at < SCAN && edges.len < ENOUGH {
        let Some(window) = words[at..].first_chunk() else {
            break;
        };
        if !is_uniform(window) {
            block(edges, window, at);
        }
        at += BLOCK;
    }
    at
}

/// Whether all bits of the block are like the last one before it.
fn is_uniform(window: &Window) -> bool {
    let same = (window[0] >> 63).wrapping_neg();
    window[1..]
        .iter()
        .fold(0, |other, word| other | (word ^ same))
        == 0
}

/// Takes the edges of a block, which begins at the word `at` of the scan.
#[allow(clippy::cast_possible_truncation)] // a scan is so long that the places of its bits fit
fn block(edges: &mut Edges, window: &Window, at: usize) {
    edges.make_room(window);
    for (word, pair) in window.windows(2).enumerate() {
        let mut left = edges_of(pair[0], pair[1]);
        let base = ((at + word) * 64) as u16;
        while left != 0 {
            edges.places[edges.len] = base | left.trailing_zeros() as u16;
            edges.len += 1;
            left &= left - 1;
        }
    }
}

/// The runs between pairs of places that are counted from `base`.
pub(super) fn runs(pairs: &[[u16; 2]], base: u64, runs: &mut Vec<PageRange>) {
    runs.extend(
        pairs
            .iter()
            .map(|&[first, end]| PageRange::new(base + u64::from(first), u64::from(end - first))),
    );
}
