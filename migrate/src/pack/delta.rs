//! A page as what has changed of it.
//!
//! ```text
//! | bytes that are equal | bytes that differ | those bytes, as they are now | and so on; what is left is equal
//! |  varint              |  varint, not 0    |                              |
//! ```

use crate::memory::PAGE;
use crate::wire::MAX_DELTA;
use crate::{Error, Result};

/// Bytes of a page.
pub(crate) type Page = [u8; PAGE];

/// Most bytes of a delta. A page that has changed more than that goes whole, for the codec to make less of.
const MOST: usize = MAX_DELTA as usize;

const WORD: usize = size_of::<u64>();

/// Appends what makes `new` of `old` to `out`. `false`, with nothing appended, when it takes more than [`MOST`] bytes.
pub(crate) fn encode(old: &Page, new: &Page, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    let mut at = 0;
    loop {
        let from = at + equal(&old[at..], &new[at..]);
        if from == PAGE {
            return true;
        }
        let to = from + different(&old[from..], &new[from..]);
        number(from - at, out);
        number(to - from, out);
        if out.len() + (to - from) > start + MOST {
            out.truncate(start);
            return false;
        }
        out.extend_from_slice(&new[from..to]);
        at = to;
    }
}

/// Makes the new page of the old one.
///
/// # Errors
/// [`Error::Packed`]: it is no delta of a page, of which some of the bytes may have changed.
pub(crate) fn apply(mut delta: &[u8], page: &mut Page) -> Result<()> {
    let bad = |problem| Error::Packed { problem };
    let mut rest = &mut page[..];
    while !delta.is_empty() {
        let skip = take(&mut delta)?;
        let length = take(&mut delta)?;
        let (new, behind) = delta
            .split_at_checked(length)
            .filter(|(new, _)| !new.is_empty())
            .ok_or_else(|| bad("a delta ends early"))?;
        let from = rest.get_mut(skip..).unwrap_or_default();
        let (old, further) = from
            .split_at_mut_checked(length)
            .ok_or_else(|| bad("a delta reaches past the end of its page"))?;
        old.copy_from_slice(new);
        (rest, delta) = (further, behind);
    }
    Ok(())
}

/// The words of two pages' ends side by side, exclusive or; bytes that make no whole word come as the last one.
fn words<'p>(old: &'p [u8], new: &'p [u8]) -> impl Iterator<Item = u64> + 'p {
    old.chunks(WORD).zip(new.chunks(WORD)).map(|(old, new)| {
        let word = |bytes: &[u8]| match bytes.try_into() {
            Ok(whole) => u64::from_le_bytes(whole),
            Err(_) => bytes
                .iter()
                .rev()
                .fold(0, |word, byte| word << 8 | u64::from(*byte)),
        };
        word(old) ^ word(new)
    })
}

/// Bytes that are equal before the first one that is not.
fn equal(old: &[u8], new: &[u8]) -> usize {
    let mut bytes = 0;
    for word in words(old, new) {
        if word != 0 {
            return bytes + word.trailing_zeros() as usize / 8;
        }
        bytes += WORD;
    }
    old.len()
}

/// Bytes up to the last one that differs before a whole word that is equal: shorter gaps cost more than they save.
fn different(old: &[u8], new: &[u8]) -> usize {
    let mut bytes = 0;
    let mut end = 0;
    for word in words(old, new) {
        if word == 0 {
            break;
        }
        end = bytes + WORD - word.leading_zeros() as usize / 8;
        bytes += WORD;
    }
    end
}

/// Numbers are less than 2^14: seven bits a byte, the low ones first.
fn number(number: usize, out: &mut Vec<u8>) {
    let [low, high, ..] = (number << 1).to_le_bytes();
    match high {
        0 => out.push(low >> 1),
        _ => out.extend([low >> 1 | 0x80, high]),
    }
}

fn take(delta: &mut &[u8]) -> Result<usize> {
    let (number, rest) = match **delta {
        [low @ ..0x80, ref rest @ ..] => (usize::from(low), rest),
        [low, high @ ..0x80, ref rest @ ..] => {
            (usize::from(high) << 7 | usize::from(low & 0x7f), rest)
        }
        _ => {
            return Err(Error::Packed {
                problem: "a delta ends early",
            });
        }
    };
    *delta = rest;
    Ok(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round_trip(old: &Page, new: &Page) -> Option<usize> {
        let mut delta = vec![1, 2, 3];
        if !encode(old, new, &mut delta) {
            assert_eq!(delta, [1, 2, 3]);
            return None;
        }
        let mut page = *old;
        apply(&delta[3..], &mut page).unwrap();
        assert!(page == *new);
        assert!(delta.len() - 3 <= MOST);
        Some(delta.len() - 3)
    }

    #[test]
    fn a_page_that_is_the_same_takes_nothing_and_an_edge_little() {
        let old = [9; PAGE];
        assert_eq!(round_trip(&old, &old), Some(0));
        for at in [0, 1, 7, 8, 127, 128, 4088, 4095] {
            let mut new = old;
            new[at] = 1;
            // One byte, its length, and how far in it stands.
            assert_eq!(round_trip(&old, &new), Some(if at < 128 { 3 } else { 4 }));
        }
    }

    #[test]
    fn a_page_that_is_another_one_is_given_up() {
        assert_eq!(round_trip(&[0; PAGE], &[1; PAGE]), None);
        let mut half = [0; PAGE];
        half[..MOST].fill(1);
        assert_eq!(round_trip(&[0; PAGE], &half), None);
        half[..8].fill(0);
        assert_eq!(round_trip(&[0; PAGE], &half), Some(MOST - 8 + 3));
    }

    #[test]
    fn a_delta_that_leaves_its_page_or_says_nothing_is_refused() {
        let refused: [&[u8]; 6] = [
            &[0],
            &[0x80],
            &[0, 0],
            &[0, 2, 1],
            // 4095 bytes on, two bytes.
            &[0xff, 0x1f, 2, 1, 1],
            &[0xff, 0xff, 1, 1],
        ];
        for delta in refused {
            assert!(apply(delta, &mut [0; PAGE]).is_err(), "{delta:?}");
        }
        apply(&[0xff, 0x1f, 1, 1], &mut [0; PAGE]).unwrap();
    }

    fn page() -> impl Strategy<Value = Page> {
        // Few different bytes, so that two pages have runs in common by chance.
        proptest::collection::vec(0u8..3, PAGE).prop_map(|bytes| bytes.try_into().unwrap())
    }

    proptest! {
        #[test]
        fn what_was_encoded_makes_the_new_page_of_the_old_one(
            old in page(),
            other in page(),
            writes in proptest::collection::vec((0..PAGE, 1usize..300, any::<u8>()), 0..20),
        ) {
            let mut new = old;
            for (at, length, byte) in writes {
                new[at..(at + length).min(PAGE)].fill(byte);
            }
            round_trip(&old, &new);
            round_trip(&old, &other);
        }

        #[test]
        fn any_bytes_apply_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            let _ = apply(&bytes, &mut [0; PAGE]);
        }
    }
}
