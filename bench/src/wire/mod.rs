//! The stream, beside the sockets that carry it.

mod contents;
pub mod ends;
pub mod line;
pub mod memory;
mod packed;
mod zeros;

use crate::row::Row;
use crate::{Plan, Result};

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = contents::rows(plan)?;
    rows.extend(zeros::rows(plan)?);
    rows.extend(packed::rows(plan)?);
    Ok(rows)
}
