//! RAM blocks: host memory that backs guest RAM, whatever slots map it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::{Error, PageRange, Result, pages_of};

/// The identity of a RAM block. It outlives every slot and is never reused, not even for a block of
/// the same name: that is why a late dirty bit or an old lease can never name a wrong page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct BlockId(pub u64);

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

impl BlockId {
    /// An id that this process never handed out before.
    #[must_use]
    pub fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// What everybody may know of a RAM block: name and length, not where it is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BlockInfo {
    /// Its identity.
    pub id: BlockId,
    /// Its name, unique among the blocks that exist at one moment; the destination names its file after it.
    pub name: String,
    /// Its length in pages.
    pub pages: u64,
}

impl BlockInfo {
    /// Longest name in bytes.
    pub const NAME_MAX: usize = 64;

    /// A block of `bytes` bytes.
    ///
    /// # Errors
    /// [`Error::BlockName`] for a name that is empty, longer than [`BlockInfo::NAME_MAX`], or could not be a file's
    /// name; [`Error::Unaligned`] for a length that is not a positive multiple of the page size.
    pub fn new(id: BlockId, name: impl Into<String>, bytes: u64) -> Result<Self> {
        let info = Self {
            id,
            name: name.into(),
            pages: pages_of("block length", bytes)?,
        };
        info.check_name()?;
        Ok(info)
    }

    /// Checks a name that came from a peer.
    ///
    /// # Errors
    /// [`Error::BlockName`], as [`BlockInfo::new`].
    pub fn check_name(&self) -> Result<()> {
        let good = (1..=Self::NAME_MAX).contains(&self.name.len())
            && !self.name.starts_with('.')
            && self
                .name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-:@".contains(&b));
        if good {
            Ok(())
        } else {
            Err(Error::BlockName {
                name: self.name.escape_default().take(80).collect(),
            })
        }
    }

    /// All its pages.
    #[must_use]
    pub const fn all(&self) -> PageRange {
        PageRange::new(0, self.pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE;

    #[test]
    fn a_name_must_do_for_a_file() {
        let new = |name: &str| BlockInfo::new(BlockId(0), name, PAGE_SIZE);
        for good in ["r", "pc.ram", "a-b_c:D@9", &"x".repeat(BlockInfo::NAME_MAX)] {
            assert_eq!(new(good).unwrap().name, good);
        }
        let long = "x".repeat(BlockInfo::NAME_MAX + 1);
        for bad in [
            "", ".", "..", ".hidden", "a/b", "a b", "a\0", "\u{e9}", &long,
        ] {
            assert!(matches!(new(bad), Err(Error::BlockName { .. })), "{bad:?}");
        }
    }

    #[test]
    fn a_block_has_all_its_pages_and_an_id_of_its_own() {
        let (a, b) = (BlockId::fresh(), BlockId::fresh());
        assert_ne!(a, b);
        let block = BlockInfo::new(BlockId(5), "ram", 7 * PAGE_SIZE).unwrap();
        assert_eq!(block.all(), PageRange::new(0, 7));
        assert_eq!(block.id.to_string(), "#5");
        assert!(BlockInfo::new(a, "ram", 4097).is_err());
    }
}
