//! A stock QEMU as the destination: the messages of a migration as records of QEMU's stream.
//!
//! ```text
//! Hello            file header, CONFIGURATION, OPEN_RETURN_PATH, PING    PONG -> Welcome
//! Layout           SECTION_START ram: blocks by name, PING               PONG -> Adopted
//! Pages, Zeros     page records in a SECTION_PART ram
//! Sync             end of that section, PING                             PONG -> Applied
//! State            PING                                                  PONG -> Ready
//! Go               SECTION_END ram, EOF, VMDESCRIPTION                   SHUT -> Running
//! ```
//!
//! Rounds, leases and the stop are those of every migration; this is a [`Channel`](crate::Channel) and knows of none.
//! What QEMU's stream has no words for is an error: blocks that come or go, packed pages, digests, memory that is handed
//! over. Slots that move are nothing to QEMU. The state of devices and vCPUs stays behind: it is memory that arrives.
//!
//! # Never two guests
//!
//! A QEMU runs what it has loaded as soon as it has read the end of the stream, unless it was started with `-S`, and
//! nobody can hold it back then. So END is what GO is: it is sent after
//! [`Source::relinquish`](crate::Source::relinquish) and never otherwise, and READY is the answer to a PING behind all
//! pages. Until END the source alone can run: a stream that breaks off before makes QEMU exit. From END to SHUT the
//! source is in doubt, as with any destination between GO and its answer. But a QEMU can't be asked by migration id
//! afterwards: whoever ends the doubt has to look there (QMP `query-migrate`: `completed` means that the guest is there).
//! A QEMU that shuts the return path with an error may have started its guest before, so that is no refusal.
//!
//! # Several connections
//!
//! With more than one, pages travel as packets of multifd, and the main connection carries everything else:
//!
//! ```text
//!            Pages                          packets
//! lane 0 ------------+---------------> connection 0 ---------+
//! lane 1 ------------|---+-----------> connection 1 ---------+--> QEMU
//!            Zeros   |   |                                   |
//!                    +---+--(lock)---> main -----------------+
//! ```
//!
//! Between two connections nothing is in order, so nothing is known to be applied before a full sync: a SYNC packet on
//! every connection, behind which QEMU waits, and a mark on the main one that lets all go on when all have come there.
//! Sync is answered by the PONG behind a full sync that began after it, and a page is leased again only then. A full
//! sync serves all lanes, so it is put off: until a lane has six Syncs that none covers, or waits for an answer.
//!
//! Zeros go over the main connection whatever the version. From 9.0 on they may go in packets too, but there QEMU takes a
//! page that comes as zero for the first time to be zero already, which used memory is not.

mod answers;
mod channel;
mod in_turn;
mod incoming;
mod line;
mod packet;
mod peer;
mod record;
#[cfg(test)]
mod tests;

pub(crate) use channel::{QemuChannel, open};
pub use incoming::{Images, QemuReceived, QemuReceiver};
pub(crate) use packet::MAGIC as MULTIFD_MAGIC;
pub(crate) use record::MAGIC;

/// What a migration is written as.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Format {
    /// Gleaner's own stream.
    #[default]
    Native,
    /// QEMU's.
    Qemu(QemuOptions),
}

/// What QEMU's stream has to say so that a destination takes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct QemuOptions {
    /// Name of the destination's machine, versioned as `-machine help` lists it: `none`, `pc-i440fx-7.2`. `none`.
    pub machine: String,
    /// Which full sync a destination knows, where pages go over several connections. [`MultifdSync::Flush`]: whoever
    /// does not know it refuses it before the first page.
    pub sync: MultifdSync,
}

impl Default for QemuOptions {
    fn default() -> Self {
        Self {
            machine: "none".into(),
            sync: MultifdSync::default(),
        }
    }
}

/// What lets multifd's connections go on after a full sync.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum MultifdSync {
    /// The end of each section: QEMU before 8.1. A later one goes on without it, and may miss pages, unless its property
    /// `migration.multifd-flush-after-each-section` is on.
    Section,
    /// A mark of its own: QEMU from 8.1 on. An earlier one refuses it.
    #[default]
    Flush,
}
