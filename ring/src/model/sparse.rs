//! Bitmaps that take memory only where they are neither all clear nor all set.

/// Words of a chunk: 4096 pages, 16 MiB of guest memory.
const WORDS: usize = 64;

/// A bit for each page, in chunks.
#[derive(Clone, Debug)]
pub(super) struct Sparse {
    pages: u64,
    chunks: Vec<Chunk>,
}

#[derive(Clone, Debug)]
enum Chunk {
    Clear,
    Set,
    Mixed(Box<[u64; WORDS]>),
}

impl Chunk {
    fn words(&mut self) -> &mut [u64; WORDS] {
        let fill = match self {
            Self::Clear => 0,
            Self::Set => u64::MAX,
            Self::Mixed(_) => 0,
        };
        if !matches!(self, Self::Mixed(_)) {
            *self = Self::Mixed(Box::new([fill; WORDS]));
        }
        match self {
            Self::Mixed(words) => words,
            Self::Clear | Self::Set => unreachable!("made mixed above"),
        }
    }
}

/// Chunk and word of word `index`. Bitmaps live in memory, so the index fits.
#[allow(clippy::cast_possible_truncation)]
const fn at(index: u64) -> (usize, usize) {
    let index = index as usize;
    (index / WORDS, index % WORDS)
}

impl Sparse {
    /// All clear.
    pub(super) fn new(pages: u64) -> Self {
        let (chunks, _) = at(pages.div_ceil(64).next_multiple_of(WORDS as u64));
        Self {
            pages,
            chunks: vec![Chunk::Clear; chunks],
        }
    }

    /// Number of words; bits past the last page are never set in any.
    pub(super) const fn words(&self) -> u64 {
        self.pages.div_ceil(64)
    }

    pub(super) fn fill(&mut self, set: bool) {
        for chunk in &mut self.chunks {
            *chunk = if set { Chunk::Set } else { Chunk::Clear };
        }
    }

    pub(super) fn word(&self, index: u64) -> u64 {
        let (chunk, word) = at(index);
        let bits = match &self.chunks[chunk] {
            Chunk::Clear => 0,
            Chunk::Set => u64::MAX,
            Chunk::Mixed(words) => words[word],
        };
        bits & self.tail(index)
    }

    /// What of word `index` belongs to pages.
    fn tail(&self, index: u64) -> u64 {
        match self.pages - index * 64 {
            64.. => u64::MAX,
            left => (1 << left) - 1,
        }
    }

    /// The first word from `index` on that may have bits set: whole clear chunks are passed over.
    pub(super) fn next(&self, index: u64) -> u64 {
        let (mut chunk, word) = at(index);
        if word > 0 && !matches!(self.chunks.get(chunk), Some(Chunk::Clear)) {
            return index;
        }
        while matches!(self.chunks.get(chunk), Some(Chunk::Clear)) {
            chunk += 1;
        }
        index.max((chunk * WORDS) as u64)
    }

    pub(super) fn get(&self, page: u64) -> bool {
        self.word(page / 64) >> (page % 64) & 1 == 1
    }

    pub(super) fn count(&self) -> u64 {
        let mut count = 0;
        let mut index = self.next(0);
        while index < self.words() {
            count += u64::from(self.word(index).count_ones());
            index = self.next(index + 1);
        }
        count
    }

    pub(super) fn set(&mut self, page: u64) {
        let (chunk, word) = at(page / 64);
        if !matches!(self.chunks[chunk], Chunk::Set) {
            self.chunks[chunk].words()[word] |= 1 << (page % 64);
        }
    }

    /// Clears bits of a word, and returns those of them that were set.
    pub(super) fn clear(&mut self, index: u64, mask: u64) -> u64 {
        let hit = self.word(index) & mask;
        if hit != 0 {
            let (chunk, word) = at(index);
            self.chunks[chunk].words()[word] &= !hit;
        }
        hit
    }

    pub(super) fn clear_page(&mut self, page: u64) {
        self.clear(page / 64, 1 << (page % 64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_is_a_set_of_pages_whatever_its_chunks_are(
            pages in 1u64..10_000, full in any::<bool>(),
            steps in proptest::collection::vec((0u64..10_000, any::<bool>()), 0..200),
        ) {
            let mut sparse = Sparse::new(pages);
            sparse.fill(full);
            let mut oracle: BTreeSet<u64> = if full { (0..pages).collect() } else { BTreeSet::new() };
            for (page, set) in steps {
                let page = page % pages;
                if set {
                    sparse.set(page);
                    oracle.insert(page);
                } else {
                    sparse.clear_page(page);
                    oracle.remove(&page);
                }
            }
            let mut got = BTreeSet::new();
            let mut index = sparse.next(0);
            while index < sparse.words() {
                let word = sparse.word(index);
                got.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| index * 64 + bit));
                index = sparse.next(index + 1);
            }
            prop_assert_eq!(sparse.count(), oracle.len() as u64);
            prop_assert_eq!(got, oracle);
        }
    }
}
