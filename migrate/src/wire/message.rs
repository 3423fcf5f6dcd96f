//! What frames say.

use gleaner_bitmap::{BlockId, BlockInfo, Extent, Generation, Layout, PAGE_SIZE, Slot};
use serde::{Deserialize, Serialize};

use super::codec;
use super::header::Kind;
use super::packed::PackedBody;
use crate::{Error, MigrationId, Outcome, Result};

/// The version of the stream.
pub const VERSION: u16 = 1;
/// Most extents in a frame.
pub const MAX_EXTENTS: usize = 4096;
/// Most blocks in a layout.
pub const MAX_BLOCKS: usize = 8192;
/// Most connections of a migration.
pub const MAX_CHANNELS: u16 = 64;
/// Most bytes of a reason; longer ones are cut.
pub const MAX_REASON: usize = 4096;
/// Most bytes of a source's name; longer ones are cut.
pub const MAX_NAME: usize = 256;

/// Opens a migration.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// The version that the source speaks.
    pub version: u16,
    /// Names this attempt.
    pub id: MigrationId,
    /// Names the source, for people.
    pub name: String,
    /// Bytes in a page.
    pub page_size: u64,
    /// Connections, this one included: 1 to [`MAX_CHANNELS`].
    pub channels: u16,
    /// No pages come: the memory itself is handed over.
    pub local: bool,
}

/// Opens a further connection of a migration.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Join {
    /// The migration.
    pub id: MigrationId,
    /// Number of the connection: from 1 on, the first one is 0.
    pub channel: u16,
}

/// A layout is in force at the destination.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Adopted {
    /// The layout.
    pub generation: Generation,
    /// Blocks, of those that are new in it, whose memory holds nothing but zeros: pages of zeros need not be sent there
    /// before anything else was.
    pub zero: Vec<BlockId>,
}

/// A layout as it travels.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LayoutBody {
    /// Its stamp.
    pub generation: Generation,
    /// Its blocks.
    pub blocks: Vec<BlockInfo>,
    /// Its slots.
    pub slots: Vec<Slot>,
}

impl From<&Layout> for LayoutBody {
    fn from(layout: &Layout) -> Self {
        Self {
            generation: layout.generation(),
            blocks: layout.blocks().cloned().collect(),
            slots: layout.slots().copied().collect(),
        }
    }
}

impl LayoutBody {
    /// The layout, if it is one.
    ///
    /// # Errors
    /// [`Error::TooLong`], [`Error::Layout`].
    pub fn check(self) -> Result<Layout> {
        self.check_count()?;
        for block in &self.blocks {
            // Pages in bytes must be a number, and no more than x86 can address.
            if !(1..=(1 << 52) / PAGE_SIZE).contains(&block.pages) {
                return Err(Error::TooLong {
                    what: "RAM block (pages, at least 1)",
                    length: block.pages,
                    cap: (1 << 52) / PAGE_SIZE,
                });
            }
        }
        Ok(Layout::from_parts(
            self.generation,
            self.blocks,
            self.slots,
        )?)
    }

    fn check_count(&self) -> Result<()> {
        check_blocks(self.blocks.len())
    }
}

fn check_blocks(count: usize) -> Result<()> {
    if count > MAX_BLOCKS {
        return Err(Error::TooLong {
            what: "list of RAM blocks",
            length: count as u64,
            cap: MAX_BLOCKS as u64,
        });
    }
    Ok(())
}

/// Pages that a frame speaks of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Extents {
    /// The layout they belong to.
    pub generation: Generation,
    /// The pages.
    pub extents: Vec<Extent>,
}

/// State of devices and vCPUs: what describes the payload.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StateBody {
    /// The layout it belongs to.
    pub generation: Generation,
    /// Checksum of the payload.
    pub crc: u32,
}

/// The memory of a block. Its descriptor goes along with the frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MemoryBody {
    /// The layout that the block belongs to.
    pub generation: Generation,
    /// The block.
    pub block: BlockId,
    /// Where it starts in the file, in bytes.
    pub offset: u64,
}

/// A frame without its payload.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // the table of the module says what each one is
pub enum Message {
    Hello(Hello),
    Layout(LayoutBody),
    Pages(Extents),
    Zeros(Extents),
    Sync,
    State(StateBody),
    Go,
    Cancel(String),
    Query(MigrationId),
    Join(Join),
    Heard,
    Packed(PackedBody),
    Digests(Extents),
    Memory(MemoryBody),
    Welcome(u16),
    Applied(u64),
    Ready,
    Running,
    Refused(String),
    Outcome(Outcome),
    Adopted(Adopted),
}

impl Message {
    /// Its kind.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::Layout(_) => Kind::Layout,
            Self::Pages(_) => Kind::Pages,
            Self::Zeros(_) => Kind::Zeros,
            Self::Sync => Kind::Sync,
            Self::State(_) => Kind::State,
            Self::Go => Kind::Go,
            Self::Cancel(_) => Kind::Cancel,
            Self::Query(_) => Kind::Query,
            Self::Join(_) => Kind::Join,
            Self::Heard => Kind::Heard,
            Self::Packed(_) => Kind::Packed,
            Self::Digests(_) => Kind::Digests,
            Self::Memory(_) => Kind::Memory,
            Self::Welcome(_) => Kind::Welcome,
            Self::Applied(_) => Kind::Applied,
            Self::Ready => Kind::Ready,
            Self::Running => Kind::Running,
            Self::Refused(_) => Kind::Refused,
            Self::Outcome(_) => Kind::Outcome,
            Self::Adopted(_) => Kind::Adopted,
        }
    }

    /// Its metadata.
    ///
    /// # Errors
    /// [`Error::TooLong`] when it is over its cap, [`Error::Metadata`].
    pub fn encode(&self) -> Result<Vec<u8>> {
        let kind = self.kind();
        match self {
            Self::Hello(hello) => codec::encode(
                kind,
                &Hello {
                    name: cut(&hello.name, MAX_NAME).to_owned(),
                    ..hello.clone()
                },
            ),
            Self::Layout(layout) => {
                layout.check_count()?;
                codec::encode(kind, layout)
            }
            Self::Pages(extents) | Self::Zeros(extents) | Self::Digests(extents) => {
                check_extents(extents)?;
                codec::encode(kind, extents)
            }
            Self::Packed(packed) => {
                packed.check()?;
                codec::encode(kind, packed)
            }
            Self::State(state) => codec::encode(kind, state),
            Self::Memory(memory) => codec::encode(kind, memory),
            Self::Cancel(reason) | Self::Refused(reason) => {
                codec::encode(kind, &cut(reason, MAX_REASON))
            }
            Self::Query(id) => codec::encode(kind, id),
            Self::Welcome(version) => codec::encode(kind, version),
            Self::Applied(sequence) => codec::encode(kind, sequence),
            Self::Join(join) => codec::encode(kind, join),
            Self::Outcome(outcome) => codec::encode(kind, outcome),
            Self::Adopted(adopted) => {
                check_blocks(adopted.zero.len())?;
                codec::encode(kind, adopted)
            }
            Self::Sync | Self::Go | Self::Heard | Self::Ready | Self::Running => Ok(Vec::new()),
        }
    }

    /// Reads metadata as a peer sent it.
    ///
    /// # Errors
    /// [`Error::Metadata`], [`Error::TooLong`] for more extents or a longer text than allowed.
    pub fn decode(kind: Kind, bytes: &[u8]) -> Result<Self> {
        kind.check_metadata(bytes.len() as u64)?;
        Ok(match kind {
            Kind::Hello => {
                let hello: Hello = codec::decode(kind, bytes)?;
                check_text("name of the source (bytes)", &hello.name, MAX_NAME)?;
                Self::Hello(hello)
            }
            Kind::Layout => Self::Layout(codec::decode(kind, bytes)?),
            Kind::Pages | Kind::Zeros | Kind::Digests => {
                let extents = codec::decode(kind, bytes)?;
                check_extents(&extents)?;
                match kind {
                    Kind::Pages => Self::Pages(extents),
                    Kind::Zeros => Self::Zeros(extents),
                    _ => Self::Digests(extents),
                }
            }
            Kind::Packed => {
                let packed: PackedBody = codec::decode(kind, bytes)?;
                packed.check()?;
                Self::Packed(packed)
            }
            Kind::State => Self::State(codec::decode(kind, bytes)?),
            Kind::Memory => Self::Memory(codec::decode(kind, bytes)?),
            Kind::Cancel | Kind::Refused => {
                let reason: String = codec::decode(kind, bytes)?;
                check_text("reason (bytes)", &reason, MAX_REASON)?;
                if kind == Kind::Cancel {
                    Self::Cancel(reason)
                } else {
                    Self::Refused(reason)
                }
            }
            Kind::Query => Self::Query(codec::decode(kind, bytes)?),
            Kind::Welcome => Self::Welcome(codec::decode(kind, bytes)?),
            Kind::Applied => Self::Applied(codec::decode(kind, bytes)?),
            Kind::Join => Self::Join(codec::decode(kind, bytes)?),
            Kind::Outcome => Self::Outcome(codec::decode(kind, bytes)?),
            Kind::Adopted => {
                let adopted: Adopted = codec::decode(kind, bytes)?;
                check_blocks(adopted.zero.len())?;
                Self::Adopted(adopted)
            }
            // The cap of these kinds leaves them no metadata.
            Kind::Sync => Self::Sync,
            Kind::Go => Self::Go,
            Kind::Heard => Self::Heard,
            Kind::Ready => Self::Ready,
            Kind::Running => Self::Running,
        })
    }
}

fn check_extents(extents: &Extents) -> Result<()> {
    if extents.extents.len() > MAX_EXTENTS {
        return Err(Error::TooLong {
            what: "list of extents",
            length: extents.extents.len() as u64,
            cap: MAX_EXTENTS as u64,
        });
    }
    Ok(())
}

fn check_text(what: &'static str, text: &str, cap: usize) -> Result<()> {
    if text.len() > cap {
        return Err(Error::TooLong {
            what,
            length: text.len() as u64,
            cap: cap as u64,
        });
    }
    Ok(())
}

fn cut(text: &str, cap: usize) -> &str {
    let mut end = text.len().min(cap);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Compress;
    use crate::wire::{Encoding, MAX_DELTA, MAX_PACKED_PAGES};
    use gleaner_bitmap::{BlockId, PageRange};
    use proptest::prelude::*;

    #[test]
    fn the_widest_of_each_kind_fits_its_cap() {
        let widest = Extent::new(BlockId(u64::MAX), u64::MAX, u64::MAX);
        let extents = Extents {
            generation: Generation(u64::MAX),
            extents: vec![widest; MAX_EXTENTS],
        };
        let slots = (0..32_764).map(|id| Slot {
            key: id.into(),
            gpa: u64::MAX,
            block: BlockId(id.into()),
            range: PageRange::new(u64::MAX, u64::MAX),
            readonly: true,
        });
        for message in [
            Message::Pages(extents.clone()),
            Message::Zeros(extents.clone()),
            Message::Digests(extents),
            Message::Packed(PackedBody {
                pages: Extents {
                    generation: Generation(u64::MAX),
                    extents: vec![widest; MAX_PACKED_PAGES],
                },
                codec: Compress::Zstd,
                encodings: vec![Encoding::Delta(MAX_DELTA); MAX_PACKED_PAGES],
            }),
            Message::Refused("x".repeat(MAX_REASON * 2)),
            Message::Hello(Hello {
                version: VERSION,
                id: MigrationId([255; 16]),
                name: "ä".repeat(MAX_NAME),
                page_size: u64::MAX,
                channels: u16::MAX,
                local: true,
            }),
            Message::Memory(MemoryBody {
                generation: Generation(u64::MAX),
                block: BlockId(u64::MAX),
                offset: u64::MAX,
            }),
            Message::Join(Join {
                id: MigrationId([255; 16]),
                channel: u16::MAX,
            }),
            Message::Adopted(Adopted {
                generation: Generation(u64::MAX),
                zero: vec![BlockId(u64::MAX); MAX_BLOCKS],
            }),
            Message::State(StateBody {
                generation: Generation(u64::MAX),
                crc: u32::MAX,
            }),
            Message::Applied(u64::MAX),
            Message::Layout(LayoutBody {
                generation: Generation(u64::MAX),
                blocks: (0..MAX_BLOCKS as u64)
                    .map(|id| BlockInfo {
                        id: BlockId(u64::MAX - id),
                        name: "n".repeat(BlockInfo::NAME_MAX),
                        pages: u64::MAX,
                    })
                    .collect(),
                slots: slots.collect(),
            }),
        ] {
            let bytes = message.encode().unwrap();
            Message::decode(message.kind(), &bytes).unwrap();
        }
    }

    #[test]
    fn a_length_in_the_bytes_asks_for_no_memory() {
        // Generation 0, then a list that claims 2^63 entries.
        let mut bytes = vec![0, 253];
        bytes.extend(u64::to_le_bytes(1 << 63));
        for kind in [Kind::Pages, Kind::Packed, Kind::Layout] {
            assert!(matches!(
                Message::decode(kind, &bytes),
                Err(Error::Metadata { .. })
            ));
        }
    }

    #[test]
    fn what_follows_the_metadata_is_refused() {
        let mut bytes = Message::Applied(1).encode().unwrap();
        bytes.push(0);
        assert!(Message::decode(Kind::Applied, &bytes).is_err());
    }

    proptest! {
        #[test]
        fn random_metadata_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            for kind in Kind::ALL {
                if let Ok(Message::Layout(layout)) = Message::decode(*kind, &bytes) {
                    let _ = layout.check();
                }
            }
        }
    }
}
