//! Where and when a block is written: what a heat map is drawn from.

/// Bands of a block, at most.
const BANDS: u64 = 64;
/// Columns at most; when there are more, two become one.
const COLUMNS: u32 = 256;

/// How many looks a column of every heat map has. It doubles when the columns are full, so however long a meter runs, the
/// maps keep their size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Columns {
    looks: u32,
}

impl Columns {
    pub(super) const fn new() -> Self {
        Self { looks: 1 }
    }

    /// The column of a look; `true` if two of each map's have to become one first.
    pub(super) const fn of(&mut self, look: u32) -> (u32, bool) {
        let column = look.saturating_sub(1) / self.looks;
        if column < COLUMNS {
            return (column, false);
        }
        self.looks = self.looks.saturating_mul(2);
        (look.saturating_sub(1) / self.looks, true)
    }

    /// Looks in a column.
    pub(super) const fn looks(self) -> u32 {
        self.looks
    }
}

/// Pages written by time and place, of one block.
#[derive(Debug)]
pub(super) struct Heat {
    band_pages: u64,
    bands: usize,
    /// Band after band, in the order of the looks.
    columns: Vec<Vec<u64>>,
}

impl Heat {
    #[allow(clippy::cast_possible_truncation)] // at most `BANDS`
    pub(super) fn new(pages: u64) -> Self {
        let band_pages = pages.div_ceil(BANDS).max(1);
        Self {
            band_pages,
            bands: pages.div_ceil(band_pages) as usize,
            columns: Vec::new(),
        }
    }

    /// A page was written in a look of this column.
    pub(super) fn written(&mut self, column: u32, page: u64) {
        self.written_like(column, page, 1);
    }

    /// So many pages like this one were written in a look of this column.
    pub(super) fn written_like(&mut self, column: u32, page: u64, pages: u64) {
        let column = column as usize;
        if self.columns.len() <= column {
            self.columns.resize(column + 1, vec![0; self.bands]);
        }
        let band = usize::try_from(page / self.band_pages);
        if let Some(band) = band.ok().and_then(|b| self.columns[column].get_mut(b)) {
            *band += pages;
        }
    }

    /// Two columns become one.
    pub(super) fn halve(&mut self) {
        let pairs = self.columns.chunks(2).map(|pair| {
            let mut sum = pair[0].clone();
            for (to, from) in sum.iter_mut().zip(pair.get(1).into_iter().flatten()) {
                *to += from;
            }
            sum
        });
        self.columns = pairs.collect();
    }

    /// Pages written by column and band.
    pub(super) fn columns(&self) -> &[Vec<u64>] {
        &self.columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_time_takes_no_more_columns_and_loses_no_write() {
        let (mut columns, mut heat) = (Columns::new(), Heat::new(640));
        for look in 1..=5000 {
            let (column, halve) = columns.of(look);
            if halve {
                heat.halve();
            }
            heat.written(column, u64::from(look) % 640);
        }
        assert_eq!(columns.looks(), 32);
        assert_eq!(heat.columns().len(), 5000_usize.div_ceil(32));
        let all: u64 = heat.columns().iter().flatten().sum();
        assert_eq!(all, 5000);
        assert!(heat.columns().iter().all(|c| c.len() == 64));
        let first: u64 = heat.columns()[0].iter().sum();
        assert_eq!(first, 32);
    }

    #[test]
    fn a_block_of_few_pages_has_a_band_for_each() {
        let mut heat = Heat::new(3);
        heat.written(1, 2);
        assert_eq!(heat.columns(), [[0, 0, 0], [0, 0, 1]]);
    }
}
