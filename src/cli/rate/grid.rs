//! A heat map of the address space over time, in as many cells as there is room for.

use std::time::Duration;

use crate::rate::Findings;

/// Blocks side by side, in the order in which they came.
pub struct Grid {
    /// Column (time) by column, row (address) by row: writes seen, by page and second.
    pub cells: Vec<Vec<f64>>,
    /// Names of the blocks and where each begins, 0 to 1.
    pub blocks: Vec<(String, f64)>,
    /// Seconds that the columns last together.
    pub seconds: f64,
}

impl Grid {
    /// As many columns and rows at most.
    pub fn of(measured: &dyn Findings, columns: usize, rows: usize) -> Self {
        let (maps, column) = measured.heat();
        let total: f64 = maps.iter().map(|map| map.block.pages as f64).sum();
        let taken = maps.iter().map(|map| map.columns.len()).max().unwrap_or(0);
        let merged = taken.div_ceil(columns).max(1);
        let mut cells = vec![vec![0.0; rows]; taken.div_ceil(merged)];
        let mut blocks = Vec::new();
        let mut first = 0.0;
        for map in maps {
            let info = map.block;
            blocks.push((info.name.clone(), first / total.max(1.0)));
            for (at, bands) in map.columns.iter().enumerate() {
                let cell = &mut cells[at / merged];
                let height = info.pages as f64 / bands.len() as f64;
                for (band, writes) in bands.iter().enumerate() {
                    let from = (first + band as f64 * height) / total * rows as f64;
                    let to = from + height / total * rows as f64;
                    spread(cell, from, to, *writes as f64);
                }
            }
            first += info.pages as f64;
        }
        let each = column.max(Duration::from_millis(1)).as_secs_f64() * merged as f64;
        let pages = total / rows as f64;
        for cell in cells.iter_mut().flatten() {
            *cell /= each * pages;
        }
        Self {
            seconds: each * cells.len() as f64,
            cells,
            blocks,
        }
    }

    /// How hot each cell is, 0 to 1, on a scale that keeps the lukewarm apart from the cold.
    pub fn shades(&self) -> Vec<Vec<f64>> {
        let most = self.cells.iter().flatten().copied().fold(0.0, f64::max);
        let shade = |heat: &f64| {
            if *heat > 0.0 {
                // Three decades below the hottest are told apart.
                (1.0 + (heat / most).log10() / 3.0).clamp(0.05, 1.0)
            } else {
                0.0
            }
        };
        let column = |column: &Vec<f64>| column.iter().map(shade).collect();
        self.cells.iter().map(column).collect()
    }
}

/// Adds to the rows from one place to another what of `amount` lies in each.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // inside the rows
fn spread(rows: &mut [f64], from: f64, to: f64, amount: f64) {
    if amount == 0.0 {
        return;
    }
    let last = rows.len().saturating_sub(1);
    let (first, end) = ((from as usize).min(last), (to as usize).min(last) + 1);
    for (row, sum) in (first..end).zip(&mut rows[first..end]) {
        let top = to.min(row as f64 + 1.0);
        let part = (top - from.max(row as f64)).max(0.0) / (to - from);
        *sum += amount * part;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_spread_over_rows_is_all_there() {
        let mut rows = [0.0; 4];
        spread(&mut rows, 0.5, 2.5, 8.0);
        assert_eq!(rows, [2.0, 4.0, 2.0, 0.0]);
        spread(&mut rows, 3.0, 4.0, 1.0);
        assert_eq!(rows, [2.0, 4.0, 2.0, 1.0]);
    }

    #[test]
    fn the_hottest_is_one_and_a_thousandth_of_it_barely_warm() {
        let grid = Grid {
            cells: vec![vec![0.0, 1e3, 1.0, 1e-3]],
            blocks: Vec::new(),
            seconds: 1.0,
        };
        assert_eq!(grid.shades(), [[0.0, 1.0, 0.05, 0.05]]);
    }
}
