//! What has changed of a page, as QEMU says it.
//!
//! ```text
//! ( length of what stays, length of what is new, the new bytes )*
//! ```
//!
//! Lengths are LEB128, of one byte or two. What stays at the end may be left out.

use crate::memory::PAGE;

/// Applies a delta to what the page held before. After an error the page holds part of it.
pub(super) fn apply(mut delta: &[u8], page: &mut [u8; PAGE]) -> Result<(), &'static str> {
    let mut at = 0;
    while !delta.is_empty() {
        at += length(&mut delta)?;
        if delta.is_empty() && at <= PAGE {
            break;
        }
        let new = length(&mut delta)?;
        let (bytes, rest) = delta
            .split_at_checked(new)
            .ok_or("a delta is shorter than it says")?;
        page.get_mut(at..at + new)
            .ok_or("a delta reaches past its page")?
            .copy_from_slice(bytes);
        at += new;
        delta = rest;
    }
    Ok(())
}

/// Takes a length.
fn length(delta: &mut &[u8]) -> Result<usize, &'static str> {
    let (value, used) = match **delta {
        [low, ..] if low < 0x80 => (usize::from(low), 1),
        [low, high, ..] if high < 0x80 => (usize::from(low & 0x7f) | usize::from(high) << 7, 2),
        _ => return Err("a length in a delta can't be read"),
    };
    *delta = &delta[used..];
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(delta: &[u8]) -> Result<[u8; PAGE], &'static str> {
        let mut page = [7; PAGE];
        apply(delta, &mut page).map(|()| page)
    }

    #[test]
    fn what_is_new_takes_its_place_and_the_rest_stays() {
        let mut expected = [7; PAGE];
        expected[300..303].copy_from_slice(&[1, 2, 3]);
        expected[304] = 4;
        // 300 = 0b10_0101100
        let delta = [0xac, 0x02, 3, 1, 2, 3, 1, 1, 4];
        assert_eq!(applied(&delta).unwrap(), expected);
        // 3791 bytes stay at the end, and that is said.
        let told = [&delta[..], &[0xcf, 0x1d]].concat();
        assert_eq!(applied(&told).unwrap(), expected);
        assert_eq!(applied(&[]).unwrap(), [7; PAGE]);
        let whole = [&[0, 0x80, 0x20][..], &[9; PAGE]].concat();
        assert_eq!(applied(&whole).unwrap(), [9; PAGE]);
    }

    #[test]
    fn a_delta_that_lies_is_refused() {
        let past = [&[1, 0x80, 0x20][..], &[9; PAGE]].concat();
        for bad in [
            &[0, 3, 1][..],            // fewer bytes than it says
            &[0xff, 0x1f, 2, 1, 1],    // from 4095 on two bytes
            &[0x81, 0x20],             // 4097 stay
            &[0x80],                   // half a length
            &[0x80, 0x80, 0x01, 1, 1], // a length of three bytes
            &past,
        ] {
            assert!(applied(bad).is_err(), "{:?}", &bad[..bad.len().min(8)]);
        }
    }
}
