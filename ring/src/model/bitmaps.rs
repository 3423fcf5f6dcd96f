//! GET and CLEAR of dirty bitmaps.

use std::io;

use gleaner_bitmap::{PageRange, SlotKey};

use super::{Bug, Point, State, WORDS_BETWEEN, errno};

type At<'a> = &'a mut dyn FnMut(Point, &mut State);

impl State {
    /// Takes a slot's bitmap. Plain: clears it and protects its pages, under KVM's memory lock. With manual protection it is only
    /// read.
    pub(super) fn get(&mut self, key: SlotKey, words: &mut [u64], at: At<'_>) -> io::Result<()> {
        let has_bug = self.has_bug(Bug::ProtectBeforeTake);
        let manual = self.is_manual();
        self.dirty(key)?;
        self.lock(!manual && !has_bug);
        let mut index = 0;
        let mut next = WORDS_BETWEEN;
        loop {
            let dirty = self.dirty(key)?;
            index = dirty.next(index);
            if index >= dirty.words() {
                break;
            }
            if index >= next {
                next = index + WORDS_BETWEEN;
                at(Point::Taking, self);
            }
            let word = if manual {
                self.dirty(key)?.word(index)
            } else if has_bug {
                // Protected by what was dirty a moment ago: what is dirtied now is taken along, and stays writable.
                let word = self.dirty(key)?.word(index);
                self.protect_word(key, index, word);
                at(Point::Taking, self);
                self.take_bits(key, index)
            } else {
                self.take_word(key, index, u64::MAX)
            };
            // Whatever buffer it is: that it has as many words as the slot was to be checked before.
            match usize::try_from(index).ok().and_then(|i| words.get_mut(i)) {
                Some(slot) => *slot = word,
                None => self.count_overrun(),
            }
            index += 1;
        }
        self.lock(false);
        Ok(())
    }

    /// Clears the bits that are set both in the log and in `words`, and protects their pages.
    pub(super) fn clear(
        &mut self,
        key: SlotKey,
        range: PageRange,
        words: &[u64],
        at: At<'_>,
    ) -> io::Result<()> {
        self.dirty(key)?;
        self.lock(true);
        for (n, word) in (0..).zip(words).take_while(|(n, _)| n * 64 < range.pages) {
            if n > 0 && n % WORDS_BETWEEN == 0 {
                at(Point::Taking, self);
            }
            let mask = match range.pages - n * 64 {
                64.. => *word,
                left => word & ((1 << left) - 1),
            };
            if mask == 0 {
                continue;
            }
            let index = range.first / 64 + n;
            if self.has_bug(Bug::ClearWithoutProtect) {
                self.take_mask(key, index, mask);
            } else {
                self.take_word(key, index, mask);
            }
        }
        self.lock(false);
        Ok(())
    }

    fn dirty(&self, key: SlotKey) -> io::Result<&super::sparse::Sparse> {
        let slot = self.slots.get(key).ok_or_else(|| errno(libc::ENOENT))?;
        slot.dirty.as_ref().ok_or_else(|| errno(libc::ENOENT))
    }

    fn protect_word(&mut self, key: SlotKey, index: u64, mask: u64) {
        if let Some(slot) = self.slots.get_mut(key) {
            slot.writable.clear(index, mask);
        }
    }

    fn take_bits(&mut self, key: SlotKey, index: u64) -> u64 {
        self.take_mask(key, index, u64::MAX)
    }

    fn take_mask(&mut self, key: SlotKey, index: u64, mask: u64) -> u64 {
        let slot = self.slots.get_mut(key);
        slot.and_then(|s| s.dirty.as_mut())
            .map_or(0, |d| d.clear(index, mask))
    }
}
