//! Streams of migrations, whole and spoilt.

use gleaner_bitmap::{BlockId, BlockInfo, Extent, Generation, PAGE_SIZE, PageRange, Slot};
use gleaner_migrate::wire::{
    Encoding, Extents, Header, Hello, LayoutBody, MAX_PAYLOAD, MemoryBody, Message, PackedBody,
    StateBody, VERSION,
};
use gleaner_migrate::{Compress, MigrationId, Outcome};

use super::Seed;
use crate::migration_stream::{BY_FILE, CALLS, FAILING_SHIFT, REPAIRED, filler};

const STATE: usize = 40;

/// Frames with the lengths of their payloads.
type Sketch = Vec<(Message, u64)>;

fn encoded(mode: u8, sketch: &Sketch, payload: impl Fn(u64, u64) -> Vec<u8>) -> Vec<u8> {
    let mut bytes = vec![mode];
    for (sequence, (message, length)) in (0..).zip(sketch) {
        let metadata = message.encode().expect("metadata");
        let kind = message.kind();
        let header = Header::encode(kind, sequence, &metadata, *length).expect("a header");
        bytes.extend(header);
        bytes.extend(metadata);
        bytes.extend(payload(sequence, *length));
    }
    bytes
}

/// Without payloads, which the target makes up.
fn sketched(mode: u8, sketch: &Sketch) -> Vec<u8> {
    encoded(mode | REPAIRED, sketch, |_, _| Vec::new())
}

fn hello() -> (Message, u64) {
    let hello = Hello {
        version: VERSION,
        id: MigrationId([7; 16]),
        name: "source".into(),
        page_size: PAGE_SIZE,
        channels: 1,
        local: false,
    };
    (Message::Hello(hello), 0)
}

fn local_hello() -> (Message, u64) {
    let (mut message, _) = hello();
    if let Message::Hello(hello) = &mut message {
        hello.local = true;
    }
    (message, 0)
}

fn memory(generation: u64, block: u64) -> (Message, u64) {
    let body = MemoryBody {
        generation: Generation(generation),
        block: BlockId(block),
        offset: 0,
    };
    (Message::Memory(body), 0)
}

fn block(id: u64, name: &str, pages: u64) -> BlockInfo {
    BlockInfo {
        id: BlockId(id),
        name: name.into(),
        pages,
    }
}

fn slot(id: u16, page: u64, block: u64, first: u64, pages: u64) -> Slot {
    Slot {
        key: id.into(),
        gpa: page * PAGE_SIZE,
        block: BlockId(block),
        range: PageRange::new(first, pages),
        readonly: id == 2,
    }
}

fn layout(generation: u64, blocks: &[BlockInfo], slots: &[Slot]) -> (Message, u64) {
    let body = LayoutBody {
        generation: Generation(generation),
        blocks: blocks.to_vec(),
        slots: slots.to_vec(),
    };
    (Message::Layout(body), 0)
}

fn extents(generation: u64, list: &[(u64, u64, u64)]) -> Extents {
    let extents = list
        .iter()
        .map(|(block, first, pages)| Extent::new(BlockId(*block), *first, *pages));
    Extents {
        generation: Generation(generation),
        extents: extents.collect(),
    }
}

fn pages(generation: u64, list: &[(u64, u64, u64)]) -> (Message, u64) {
    let pages = list
        .iter()
        .fold(0u64, |sum, (_, _, n)| sum.saturating_add(*n));
    let length = pages.saturating_mul(PAGE_SIZE).min(MAX_PAYLOAD.into());
    (Message::Pages(extents(generation, list)), length)
}

fn zeros(generation: u64, list: &[(u64, u64, u64)]) -> (Message, u64) {
    (Message::Zeros(extents(generation, list)), 0)
}

fn digests(generation: u64, list: &[(u64, u64, u64)]) -> (Message, u64) {
    let pages: u64 = list.iter().map(|(_, _, n)| n).sum();
    (Message::Digests(extents(generation, list)), 8 * pages)
}

fn state(generation: u64, sequence: u64) -> (Message, u64) {
    let body = StateBody {
        generation: Generation(generation),
        crc: crc32fast::hash(&filler(sequence, STATE)),
    };
    (Message::State(body), STATE as u64)
}

fn sync() -> (Message, u64) {
    (Message::Sync, 0)
}

/// A migration during which a block goes and its name is taken over.
fn migration() -> Sketch {
    let ram = block(3, "ram", 9);
    let slots = [
        slot(0, 0, 3, 0, 4),
        slot(1, 100, 3, 4, 5),
        slot(2, 7, 4, 0, 2),
    ];
    let mut sketch = vec![
        hello(),
        layout(1, &[ram.clone(), block(4, "dimm", 2)], &slots),
        pages(1, &[(3, 0, 1), (4, 1, 1), (3, 2, 2)]),
        zeros(1, &[(3, 5, 2)]),
        sync(),
        layout(2, &[ram.clone(), block(5, "dimm", 3)], &slots[..2]),
        pages(2, &[(5, 0, 2)]),
        zeros(2, &[(3, 0, 1), (5, 1, 1)]),
        layout(3, &[ram], &slots[..1]),
        sync(),
    ];
    sketch.push(state(3, sketch.len() as u64));
    sketch.push((Message::Go, 0));
    sketch
}

/// After a greeting and a layout of ten pages.
fn then(frames: &[(Message, u64)]) -> Vec<u8> {
    let mut sketch = vec![hello(), layout(1, &[block(3, "ram", 10)], &[])];
    sketch.extend_from_slice(frames);
    sketched(0, &sketch)
}

/// A frame of packed pages and its payload.
fn packed(
    list: &[(u64, u64, u64)],
    codec: Compress,
    encodings: &[Encoding],
    payload: &[u8],
) -> Vec<u8> {
    let message = Message::Packed(PackedBody {
        pages: extents(1, list),
        codec,
        encodings: encodings.to_vec(),
    });
    let metadata = message.encode().expect("metadata");
    let length = payload.len() as u64;
    let header = Header::encode(message.kind(), 0, &metadata, length).expect("a header");
    [&header[..], &metadata, payload].concat()
}

/// A guest of ten pages, whose memory comes in `frames`.
fn unpacks(frames: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = then(&[]);
    frames.iter().for_each(|frame| bytes.extend(frame));
    let sequence = 2 + frames.len() as u64;
    let end = vec![state(1, sequence), (Message::Go, 0)];
    bytes.extend(&sketched(0, &end)[1..]);
    bytes
}

/// Packed pages, good ones and others.
fn packed_pages() -> Vec<Seed> {
    use Encoding::{Delta, Whole};
    let text = b"four pages in one ".repeat(1000);
    let contents = &text[..4 * 4096];
    let lz4 = lz4_flex::block::compress(contents);
    let zstd = zstd::bulk::compress(contents, 1).expect("compressed");
    let whole = |codec, payload| packed(&[(3, 0, 3), (3, 9, 1)], codec, &[Whole; 4], payload);
    // Of page 2: byte 5, and bytes 205 and 206.
    let delta = [5, 1, b'!', 0x80 | 71, 1, 2, b'?', b'?'];
    let changes = |page, delta: &[u8]| {
        let length = Delta(u16::try_from(delta.len()).expect("short"));
        packed(&[(3, page, 1)], Compress::None, &[length], delta)
    };
    let again = |codec, payload| [whole(codec, payload), changes(2, &delta)];
    let mut many = zstd::bulk::compress(&vec![0; 1 << 20], 1).expect("compressed");
    many.truncate(many.len() / 2);
    let of = |frames: &[Vec<u8>]| unpacks(frames);
    let seeds = [
        ("packed-lz4", of(&again(Compress::Lz4, &lz4))),
        ("packed-zstd", of(&again(Compress::Zstd, &zstd))),
        (
            "packed-no-base",
            of(&[whole(Compress::Lz4, &lz4), changes(5, &delta)]),
        ),
        (
            "packed-past-its-page",
            of(&[
                whole(Compress::Lz4, &lz4),
                changes(2, &[0xff, 0x1f, 2, 1, 1]),
            ]),
        ),
        ("packed-other-codec", of(&[whole(Compress::Zstd, &lz4)])),
        ("packed-ends-early", of(&[whole(Compress::Zstd, &many)])),
        (
            "packed-too-few",
            of(&[packed(&[(3, 0, 3)], Compress::Lz4, &[Whole; 4], &lz4)]),
        ),
    ];
    seeds.map(|(name, bytes)| (name.to_owned(), bytes)).to_vec()
}

pub fn seeds() -> Vec<Seed> {
    let whole = migration();
    let mut seeds = vec![
        ("completes".to_owned(), sketched(0, &whole)),
        ("completes-by-file".into(), sketched(BY_FILE, &whole)),
    ];
    for (number, call) in (1u8..).zip(CALLS) {
        let bytes = sketched(number << FAILING_SHIFT, &whole);
        seeds.push((format!("fails-{call}"), bytes));
    }
    let small = vec![
        hello(),
        layout(1, &[block(3, "ram", 2)], &[slot(0, 0, 3, 0, 2)]),
        zeros(1, &[(3, 0, 2)]),
        state(1, 3),
        (Message::Go, 0),
    ];
    let as_it_is =
        |sequence, length: u64| filler(sequence, usize::try_from(length).unwrap_or_default());
    let raw = encoded(0, &small, as_it_is);
    seeds.push(("as-it-is-ends-early".into(), raw[..raw.len() - 30].to_vec()));
    seeds.push(("as-it-is".into(), raw));
    let cancel = (Message::Cancel("enough".into()), 0);
    let query = (Message::Query(MigrationId([7; 16])), 0);
    let overlapping = [slot(0, 0, 3, 0, 4), slot(1, 3, 3, 4, 5)];
    let ten = [block(3, "ram", 10)];
    let more = [
        ("local", {
            let handed = memory(1, 3);
            sketched(0, &vec![local_hello(), layout(1, &ten, &[]), handed])
        }),
        ("local-without-memory", {
            let built = state(1, 2);
            sketched(0, &vec![local_hello(), layout(1, &ten, &[]), built])
        }),
        ("memory-among-pages", then(&[memory(1, 3)])),
        ("query", sketched(0, &vec![query])),
        ("cancels", then(&[cancel])),
        ("unknown-block", then(&[pages(1, &[(9, 0, 1)])])),
        ("outside-its-block", then(&[pages(1, &[(3, 9, 2)])])),
        ("wraps", then(&[zeros(1, &[(3, u64::MAX, 2)])])),
        ("stale", then(&[zeros(4, &[(3, 0, 1)])])),
        (
            "twice-the-same-page",
            then(&[pages(1, &[(3, 1, 3), (3, 2, 1)])]),
        ),
        ("differs", then(&[digests(1, &[(3, 4, 2)])])),
        ("digests-outside", then(&[digests(1, &[(3, 9, 2)])])),
        ("digests-of-another-length", {
            let (message, length) = digests(1, &[(3, 1, 1)]);
            then(&[(message, length + 8)])
        }),
        (
            "block-grows",
            then(&[layout(2, &[block(3, "ram", 11)], &[])]),
        ),
        ("overlapping-slots", then(&[layout(2, &ten, &overlapping)])),
        (
            "more-than-there-is",
            then(&[layout(2, &[block(4, "huge", 1 << 40)], &[])]),
        ),
        ("go-too-early", then(&[(Message::Go, 0)])),
        (
            "unsafe-name",
            then(&[layout(2, &[block(4, "../ram", 1)], &[])]),
        ),
    ];
    seeds.extend(more.map(|(name, bytes)| (name.to_owned(), bytes)));
    seeds.extend(packed_pages());
    seeds.extend(metadata());
    seeds
}

/// Bare metadata, whose first byte is the mode.
fn metadata() -> Vec<Seed> {
    let messages = [
        hello().0,
        migration()[1].0.clone(),
        pages(1, &[(3, 0, 1), (4, 300, 70_000)]).0,
        state(1, 0).0,
        Message::Packed(PackedBody {
            pages: extents(1, &[(3, 0, 1), (4, 300, 1)]),
            codec: Compress::Zstd,
            encodings: vec![Encoding::Whole, Encoding::Delta(300)],
        }),
        Message::Refused("no memory".into()),
        Message::Applied(1 << 40),
        memory(1, 70_000).0,
        Message::Outcome(Outcome::Pending),
    ];
    let seed = |message: &Message| {
        let mut bytes = vec![0];
        bytes.extend(message.encode().expect("metadata"));
        (
            format!("metadata-{}", message.kind().name().to_lowercase()),
            bytes,
        )
    };
    let mut seeds: Vec<Seed> = messages.iter().map(seed).collect();
    // A list that claims 2^63 entries.
    let mut claim = vec![0, 0, 253];
    claim.extend(u64::to_le_bytes(1 << 63));
    seeds.push(("metadata-claims-much".into(), claim));
    seeds
}
