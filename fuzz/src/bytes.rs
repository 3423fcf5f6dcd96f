//! An input, read as a row of numbers.

/// Numbers at which arithmetic goes wrong. The last bytes stand for them.
const EDGES: [u64; 8] = [
    u64::MAX,
    u64::MAX - 1,
    u64::MAX / 4096,
    u64::MAX / 4096 + 1,
    1 << 63,
    1 << 52,
    1 << 40,
    1 << 32,
];

/// What is left of an input. It has an end, so whoever reads it in a loop ends too.
#[derive(Clone, Debug)]
pub struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    /// The next byte.
    pub fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// The next byte as one of `count` choices.
    pub fn choice(&mut self, count: usize) -> Option<usize> {
        Some(usize::from(self.byte()?).checked_rem(count).unwrap_or(0))
    }

    /// The next byte as a number: a small one as it is, the last ones as edges.
    pub fn number(&mut self) -> Option<u64> {
        let byte = self.byte()?;
        let edge = usize::from(byte).checked_sub(256 - EDGES.len());
        Some(edge.map_or(u64::from(byte), |edge| EDGES[edge]))
    }

    /// Up to `length` bytes.
    pub fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }
}
