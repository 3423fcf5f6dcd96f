//! The dirty bitmaps of all slots as one dirty source.

use std::sync::Arc;

use gleaner_bitmap::mutant::{self, Mutant};
use gleaner_bitmap::{Collected, DirtySource, Layout, PageRange, Rearm, Runs, Scope, Slot};

use crate::{Kvm, Result};

/// Clean words between dirty ones that are cleared along, because a call costs more than they do.
const JOIN_WORDS: u64 = 16;
/// Pages cleared by one call at most (256 MiB): it holds KVM's memory lock, and vCPUs wait for that.
const CLEAR_PAGES: u64 = 1 << 16;

/// `KVM_GET_DIRTY_LOG` for each slot that is logged.
///
/// Plain, fetching re-arms. With manual protection nothing is re-armed by fetching; then exactly the words that were
/// fetched are cleared. A bit that was never fetched is never cleared.
pub struct BitmapSource {
    kvm: Arc<dyn Kvm>,
    manual: bool,
    /// Logs fetched and not yet cleared (manual protection). What is left of them after an error is still set in KVM.
    fetched: Vec<(Slot, Vec<u64>)>,
    buffer: Vec<u64>,
}

impl BitmapSource {
    /// The bitmaps of a VM; `manual` says whether manual protection is on.
    #[must_use]
    pub fn new(kvm: Arc<dyn Kvm>, manual: bool) -> Self {
        Self {
            kvm,
            manual,
            fetched: Vec::new(),
            buffer: Vec::new(),
        }
    }

    fn clear(&self, slot: &Slot, words: &[u64]) -> Result<()> {
        for span in dirty_spans(words) {
            let first = span.first * 64;
            let end = (span.end() * 64).min(slot.range.pages);
            let mut part = words_of(words, span);
            if mutant::is_planted(Mutant::ClearedUnfetched) {
                part = &[u64::MAX; 1 << 10][..part.len()];
            }
            self.kvm
                .clear_dirty_log(slot.key, PageRange::new(first, end - first), part)?;
        }
        Ok(())
    }
}

#[allow(clippy::cast_possible_truncation)] // word indices of a slice in memory
fn words_of(words: &[u64], span: PageRange) -> &[u64] {
    &words[span.first as usize..span.end() as usize]
}

/// Spans of words that have bits set, near ones joined, none longer than a call should take.
fn dirty_spans(words: &[u64]) -> Vec<PageRange> {
    let mut spans: Vec<PageRange> = Vec::new();
    let mut at = 0;
    for run in Runs::new(words, 0, words.len() as u64 * 64) {
        let first = (run.first / 64).max(at);
        let end = run.end().div_ceil(64);
        at = end;
        if first >= end {
            continue;
        }
        match spans.last_mut() {
            Some(last) if first - last.end() <= JOIN_WORDS => last.pages = end - last.first,
            _ => spans.push(PageRange::new(first, end - first)),
        }
    }
    let most = CLEAR_PAGES / 64;
    spans
        .into_iter()
        .flat_map(|s| {
            (s.first..s.end())
                .step_by(usize::try_from(most).unwrap_or(usize::MAX))
                .map(move |f| PageRange::new(f, most.min(s.end() - f)))
        })
        .collect()
}

impl DirtySource for BitmapSource {
    fn name(&self) -> String {
        "dirty bitmap".into()
    }

    fn collect(
        &mut self,
        layout: &Layout,
        scope: Scope<'_>,
        into: &mut Collected,
    ) -> gleaner_bitmap::Result<()> {
        // What an earlier attempt fetched and did not clear is fetched again, or still waits to be cleared.
        self.fetched
            .retain(|(slot, _)| !scope.covers(slot.key) && layout.slot(slot.key) == Some(slot));
        let mut place = 0;
        for slot in layout
            .slots()
            .filter(|s| !s.readonly && scope.covers(s.key))
        {
            let words = usize::try_from(slot.range.pages.div_ceil(64)).unwrap_or(usize::MAX);
            self.buffer.clear();
            self.buffer.resize(words, 0);
            self.kvm.get_dirty_log(slot.key, &mut self.buffer)?;
            if self.buffer.iter().all(|&w| w == 0) {
                continue;
            }
            let mut slot_at = *slot;
            if mutant::is_planted(Mutant::CleanSlotNotPassed) {
                slot_at.range.first = place;
            }
            place = slot_at.range.end();
            into.or_slot(&slot_at, &self.buffer)?;
            if self.manual {
                self.fetched.push((*slot, std::mem::take(&mut self.buffer)));
            }
        }
        Ok(())
    }

    fn rearm(&mut self) -> gleaner_bitmap::Result<Rearm> {
        while let Some((slot, words)) = self.fetched.last() {
            let first = mutant::is_planted(Mutant::ClearedInOneSlot);
            self.clear(if first { &self.fetched[0].0 } else { slot }, words)?;
            self.fetched.pop();
        }
        Ok(Rearm::Complete)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_cover_every_set_bit_and_join_only_near_words() {
        let mut words = vec![0u64; 4096];
        for i in [0, 1, 17, 40, 4095] {
            words[i] = 1 << (i % 64);
        }
        let spans = dirty_spans(&words);
        let pairs: Vec<_> = spans.iter().map(|s| (s.first, s.pages)).collect();
        assert_eq!(pairs, [(0, 18), (40, 1), (4095, 1)]);
        words.fill(u64::MAX);
        let spans = dirty_spans(&words);
        assert!(spans.iter().all(|s| s.pages * 64 <= CLEAR_PAGES));
        assert_eq!(spans.iter().map(|s| s.pages).sum::<u64>(), 4096);
    }
}
