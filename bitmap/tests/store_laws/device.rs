//! A source that fails to order.

use std::collections::BTreeMap;

use gleaner_bitmap::{
    BlockId, Collected, DirtySource, Error, Layout, PageBitmap, PageRange, Rearm, Result, Scope,
};

use crate::{Dirtyings, Page};

/// What the next harvest meets in a source.
#[derive(Clone, Copy, Debug)]
pub enum Trouble {
    None,
    /// Collecting fails after so many items.
    Collect(usize),
    /// Re-arming comes up short.
    Short,
    /// Re-arming fails.
    Rearm,
}

/// A source that keeps its own books.
#[derive(Default)]
pub struct Device {
    /// Hands over bitmaps of whole blocks, not single pages.
    pub whole: Option<BTreeMap<BlockId, u64>>,
    pub pending: Dirtyings,
    pub given: Dirtyings,
    pub trouble: Option<Trouble>,
}

impl Device {
    fn error(&self) -> Error {
        Error::Source {
            source_name: self.name(),
            cause: "planted".into(),
        }
    }

    fn give(&mut self, pages: &[Page]) {
        for page in pages {
            let numbers = self.pending.remove(page).unwrap();
            self.given.entry(*page).or_default().extend(numbers);
        }
    }
}

impl DirtySource for Device {
    fn name(&self) -> String {
        "device".into()
    }

    fn collect(&mut self, _: &Layout, _: Scope<'_>, into: &mut Collected) -> Result<()> {
        let mut items: Vec<Vec<Page>> = Vec::new();
        for &page in self.pending.keys() {
            match items.last_mut() {
                Some(item) if self.whole.is_some() && item[0].0 == page.0 => item.push(page),
                _ => items.push(vec![page]),
            }
        }
        for (n, item) in items.iter().enumerate() {
            if matches!(self.trouble, Some(Trouble::Collect(after)) if n == after) {
                return Err(self.error());
            }
            let block = item[0].0;
            if let Some(blocks) = &self.whole {
                let mut bits = PageBitmap::new(blocks[&block]);
                item.iter().for_each(|page| bits.set(page.1));
                into.or_block(block, PageRange::new(0, bits.pages()), bits.words())?;
            } else {
                into.mark(block, item[0].1)?;
            }
            self.give(item);
        }
        match self.trouble {
            Some(Trouble::Collect(_)) => Err(self.error()),
            _ => Ok(()),
        }
    }

    fn rearm(&mut self) -> Result<Rearm> {
        match self.trouble {
            Some(Trouble::Short) => Ok(Rearm::Short {
                collected: 2,
                rearmed: 1,
            }),
            Some(Trouble::Rearm) => Err(self.error()),
            _ => Ok(Rearm::Complete),
        }
    }
}
