//! What can go wrong in this crate.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use gleaner_bitmap::{BlockId, Generation, PageRange};

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// An error of this crate. What state the two ends are in after it is told by the report of the end that met it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An address can't be read.
    #[error(
        "address \"{text}\" is not usable: {problem}; write tcp:HOST:PORT, unix:PATH, fd:N or file:PATH"
    )]
    Address {
        /// The address as given.
        text: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The operating system refused something.
    #[error("can't {what}: {cause}")]
    Io {
        /// What was attempted, with the address or path it concerned.
        what: String,
        /// What the system said.
        cause: io::Error,
    },
    /// Somebody listens on the path.
    #[error("socket path in use: another process listens on {}; stop it or choose another path", path.display())]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// A file that is no socket is in the way.
    #[error("{} exists and is not a socket: move it away or choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The stream ended where more had to come.
    #[error("the stream ended while {during}: the other end has gone")]
    Closed {
        /// What was awaited.
        during: &'static str,
    },
    /// The file ended where more had to come.
    #[error("the file ended while {during}: it is truncated")]
    Truncated {
        /// What was awaited.
        during: &'static str,
    },
    /// TLS ended the stream.
    #[error("the stream ended while {during}: {problem}")]
    Broken {
        /// What was awaited.
        during: &'static str,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The peer neither took nor sent anything.
    #[error(
        "the other end was silent for {} s while {during}: check it and the network", after.as_secs()
    )]
    Silent {
        /// What was awaited.
        during: &'static str,
        /// For how long.
        after: Duration,
    },
    /// One of several connections failed.
    #[error("connection {number}: {cause}")]
    Connection {
        /// Its number; the first one, which leads, is 0.
        number: usize,
        /// What it met.
        cause: Box<Error>,
    },
    /// More connections than can be.
    #[error("{asked} connections are asked for, {to} takes {}", few(*most))]
    Channels {
        /// What was asked for.
        asked: u16,
        /// Where to.
        to: String,
        /// The most that can be.
        most: u16,
    },
    /// A file of certificates or keys is not usable.
    #[cfg(feature = "tls")]
    #[error("{} {problem}", path.display())]
    Credentials {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// One of the ends could not prove who it is, or speaks no TLS. No frame has gone over the connection.
    #[cfg(feature = "tls")]
    #[error("no TLS connection {with}: {problem}")]
    Handshake {
        /// From or to whom.
        with: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// Not a stream of this format.
    #[error(
        "not a Gleaner stream: it starts with {found:02x?}; {}", advice(*found)
    )]
    Magic {
        /// The four bytes in place of the magic number.
        found: [u8; 4],
    },
    /// A version this end doesn't speak.
    #[error(
        "stream version {found} is not supported, only 1 is: use the same release at both ends"
    )]
    Version {
        /// The version of the peer.
        found: u16,
    },
    /// A frame kind this end doesn't know.
    #[error("unknown frame kind {found}: use the same release at both ends")]
    Kind {
        /// The kind.
        found: u8,
    },
    /// Flags this end doesn't know.
    #[error("unknown frame flags {found:#04x}: use the same release at both ends")]
    Flags {
        /// The flags.
        found: u8,
    },
    /// A frame is missing or came twice.
    #[error("frame {found} came where frame {expected} was due: the stream is damaged")]
    Sequence {
        /// The number that was due.
        expected: u64,
        /// The number that came.
        found: u64,
    },
    /// A checksum doesn't fit.
    #[error("the checksum of a {what} does not fit: the stream is damaged")]
    Checksum {
        /// What it covers.
        what: &'static str,
    },
    /// A length over its cap.
    #[error("{what} of {length} is over the cap of {cap}")]
    TooLong {
        /// What is too long, in its unit.
        what: &'static str,
        /// Its length.
        length: u64,
        /// The most that is taken.
        cap: u64,
    },
    /// A frame whose metadata can't be read or written.
    #[error("metadata of a {kind} frame is not usable: {detail}")]
    Metadata {
        /// Kind of the frame.
        kind: &'static str,
        /// What the decoder said.
        detail: String,
    },
    /// A frame that is not due now.
    #[error("a {kind} frame came while {phase}: the other end breaks the protocol")]
    OutOfState {
        /// Kind of the frame.
        kind: &'static str,
        /// What this end was doing.
        phase: &'static str,
    },
    /// Pages of a block that the layout doesn't have.
    #[error("pages of block {block} came, which is not in the layout")]
    UnknownBlock {
        /// The block.
        block: BlockId,
    },
    /// Pages past the end of a block, or none at all.
    #[error("pages {}..{} do not lie inside block {block}, which has {pages} pages", range.first, range.end())]
    OutsideBlock {
        /// The block.
        block: BlockId,
        /// The pages.
        range: PageRange,
        /// Length of the block in pages.
        pages: u64,
    },
    /// Payload and description disagree.
    #[error("a {kind} frame describes {described} bytes of payload but carries {carried}")]
    PayloadLength {
        /// Kind of the frame.
        kind: &'static str,
        /// Bytes according to the metadata.
        described: u64,
        /// Bytes according to the header.
        carried: u64,
    },
    /// A packed frame whose payload is not what it should be.
    #[error("a Packed frame can't be unpacked: {problem}")]
    Packed {
        /// What is wrong with it.
        problem: &'static str,
    },
    /// What changed of a page came, but not the page.
    #[error(
        "what has changed of page {page} of block {block} came, but the page itself has not come in this migration"
    )]
    NoBase {
        /// The block.
        block: BlockId,
        /// The page.
        page: u64,
    },
    /// A codec that this build doesn't have.
    #[error(
        "this build can't compress and has no {codec}: build it with its feature \"compress\", or migrate without"
    )]
    LeftOut {
        /// The codec.
        codec: &'static str,
    },
    /// A block is not what it was.
    #[error(
        "block {block} (\"{name}\") has {found} pages now and had {expected}: a block never changes"
    )]
    BlockChanged {
        /// The block.
        block: BlockId,
        /// Its name now.
        name: String,
        /// Its length before, in pages.
        expected: u64,
        /// Its length now, in pages.
        found: u64,
    },
    /// A layout that can't be.
    #[error("the layout is not usable: {0}")]
    Layout(#[from] gleaner_bitmap::Error),
    /// Something refers to another layout than the one in force.
    #[error("{what} belongs to {found}, but {expected} is in force")]
    Stale {
        /// What refers to it.
        what: &'static str,
        /// The generation in force.
        expected: Generation,
        /// The generation referred to.
        found: Generation,
    },
    /// Page sizes differ.
    #[error(
        "the source has pages of {found} bytes, this end has 4096: they can't migrate to each other"
    )]
    PageSize {
        /// Page size of the peer in bytes.
        found: u64,
    },
    /// Memory can't be mapped, or not be reached.
    #[error("memory {what}: {detail}")]
    Memory {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        detail: String,
    },
    /// A page is not at the destination what it is at the source.
    #[error(
        "page {page} of block {name} ({block}) differs between source and destination: the guest must not run there"
    )]
    Differs {
        /// The block.
        block: BlockId,
        /// Its name.
        name: String,
        /// The page, from the start of the block.
        page: u64,
    },
    /// Memory can't be compared where nobody is to compare it.
    #[error("memory can't be verified in a file: nobody is there to compare it")]
    Unverifiable,
    /// Memory can't be handed over.
    #[error("memory can't be handed over: {why}")]
    NotLocal {
        /// Why.
        why: &'static str,
    },
    /// The format has no words for something.
    #[error("QEMU's stream has no {what}: leave that out, or migrate to a Gleaner destination")]
    NotInFormat {
        /// What was asked for.
        what: &'static str,
    },
    /// Blocks came or went while they may not.
    #[error(
        "RAM blocks came or went ({}) while the guest was migrated: QEMU's stream can't tell that, so let no memory be \
         plugged meanwhile",
        changes(came, gone)
    )]
    Hotplug {
        /// Names of new blocks.
        came: Vec<String>,
        /// Names of blocks that are no more.
        gone: Vec<String>,
    },
    /// A further connection of multifd did not come about.
    #[error(
        "connection {number} of multifd: {cause}; the QEMU needs the capability multifd and multifd-channels {channels}, \
         both set before migrate-incoming"
    )]
    Multifd {
        /// Its number, from 1 on.
        number: u16,
        /// How many there should be.
        channels: u16,
        /// What it met.
        cause: Box<Error>,
    },
    /// The source uses multifd, and this end was not told of it.
    #[error(
        "the source uses multifd, which is not expected here: add --channels N, as many as its multifd-channels, or switch \
         multifd off at the source"
    )]
    MultifdUnasked,
    /// Connections of multifd did not come.
    #[error(
        "{came} of {channels} connections of multifd came within {} s: the source needs the capability multifd and \
         multifd-channels {channels}, or leave out --channels",
        after.as_secs()
    )]
    MultifdMissing {
        /// How many there should be.
        channels: u8,
        /// How many came.
        came: usize,
        /// How long they were awaited.
        after: Duration,
    },
    /// What answers is no QEMU.
    #[error(
        "what answers is not a QEMU that awaits a migration: check the address, and the format at both ends"
    )]
    NotQemu,
    /// A QEMU has read the whole stream and met an error. It may have started the guest before.
    #[error("QEMU shut the return path with error {value}: it says more on its standard error")]
    NotLoaded {
        /// Its number for the error.
        value: u32,
    },
    /// Not QEMU's stream.
    #[error(
        "not QEMU's stream: it starts with {found:02x?}; check address and format at both ends"
    )]
    NotQemuStream {
        /// The four bytes in place of the magic number.
        found: [u8; 4],
    },
    /// QEMU's stream has something in it that can't be read here.
    #[error("QEMU's stream can't be read: {problem}")]
    QemuStream {
        /// What, and what to do if there is something.
        problem: String,
    },
    /// The stream of a QEMU ended, and there is a page that it had not.
    #[error(
        "page {page} of RAM block {block} never came, so the memory is not complete: use one source alone, without \
         free-page-hint"
    )]
    NeverCame {
        /// Name of the block.
        block: String,
        /// The page, from the start of the block.
        page: u64,
    },
    /// Not a trace.
    #[error("not a trace of dirty pages: its first bytes are others")]
    NotATrace,
    /// A trace of a version that this release doesn't know.
    #[error(
        "the trace has version {found}, this release reads {newest}: use the release that wrote it"
    )]
    TraceVersion {
        /// The version of the trace.
        found: u16,
        /// The newest that is read.
        newest: u16,
    },
    /// A trace with something in it that can't be.
    #[error("the trace is damaged at byte {at}: {problem}")]
    DamagedTrace {
        /// Where the header, or the record, begins.
        at: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Memory that was handed over is not what it must be.
    #[error("the memory of block {name} can't be taken over: {why}")]
    NotShareable {
        /// Name of the block.
        name: String,
        /// Why.
        why: String,
    },
    /// An end that can't do what a migration was asked to do.
    #[error("this end can't {what}")]
    Unable {
        /// What was asked for.
        what: &'static str,
    },
    /// The source failed.
    #[error("source: {cause}")]
    Source {
        /// Why.
        cause: Cause,
    },
    /// The source has dirty pages that it doesn't lease, though the guest is stopped.
    #[error(
        "the source leased {leased} pages of {dirty} that are dirty: the rest is not safe to read, so no switchover"
    )]
    HeldBack {
        /// Pages leased since the last harvest.
        leased: u64,
        /// Pages dirty at the last harvest.
        dirty: u64,
    },
    /// The destination failed.
    #[error("destination: {cause}")]
    Destination {
        /// Why.
        cause: Cause,
    },
    /// The other end refused; its words. It does not run the guest and never will under this migration id.
    #[error("{reason}")]
    Refused {
        /// Its reason.
        reason: String,
    },
    /// The migration was called off at this end.
    #[error("cancelled")]
    Cancelled,
    /// The source called the migration off.
    #[error("the source ended the migration: {reason}")]
    CalledOff {
        /// Its reason.
        reason: String,
    },
    /// The time allowed is over.
    #[error("not done within the time limit of {} ms", limit.as_millis())]
    TimedOut {
        /// The time allowed.
        limit: Duration,
    },
    /// The policy gave up.
    #[error("{reason}")]
    GaveUp {
        /// Its reason.
        reason: String,
    },
    /// The migration id was used before.
    #[error("migration id {id} was used before: start again with a new one")]
    IdUsed {
        /// The id.
        id: crate::MigrationId,
    },
    /// The connection brought a question instead of a migration. It has been answered.
    #[error("the connection only asked for the outcome of a migration")]
    OnlyQuery,
}

/// A number of connections that can be.
fn few(most: u16) -> String {
    match most {
        1 => "one".into(),
        most => format!("1 to {most}"),
    }
}

/// Blocks that came, and blocks that went.
fn changes(came: &[String], gone: &[String]) -> String {
    let came = came.iter().map(|name| format!("+{name}"));
    let gone = gone.iter().map(|name| format!("-{name}"));
    came.chain(gone).collect::<Vec<_>>().join(", ")
}

/// What to do about a stream that starts so.
const fn advice(found: [u8; 4]) -> &'static str {
    match found {
        // Its main connection, and one of multifd.
        [b'Q', b'E', b'V', b'M'] | [0x11, 0x22, 0x33, 0x44] => {
            "that is QEMU's stream, add --format qemu to receive it"
        }
        [0x16, 3, ..] => "that is TLS, use it at both ends or at neither",
        // The length of a short message.
        [_, _, 0, 0] => {
            "that is how an agent and a guest's service speak: --control takes a guest's socket, --to what a destination listens at"
        }
        _ => "check address and format at both ends",
    }
}

impl Error {
    /// An error of a [`Source`](crate::Source).
    pub fn source(cause: impl Into<Cause>) -> Self {
        Self::Source {
            cause: cause.into(),
        }
    }

    /// An error of a [`Destination`](crate::Destination).
    pub fn destination(cause: impl Into<Cause>) -> Self {
        Self::Destination {
            cause: cause.into(),
        }
    }

    /// Whether a QEMU has come where Gleaner's own stream was awaited.
    pub(crate) fn is_of_a_qemu(&self) -> bool {
        use crate::qemu::{MAGIC, MULTIFD_MAGIC};
        let Self::Magic { found } = self else {
            return false;
        };
        [MAGIC, MULTIFD_MAGIC].contains(&u32::from_be_bytes(*found))
    }

    pub(crate) fn io(what: impl Into<String>, cause: io::Error) -> Self {
        Self::Io {
            what: what.into(),
            cause,
        }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
