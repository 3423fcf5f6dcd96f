//! The main connection, record by record.
//!
//! ```text
//!          CONFIGURATION     START ram          END ram
//! Begun -----------------> Set up ----> Memory --------> Devices ----> the end of the description
//!                                        | ^
//!                                        +-+ PART ram
//! ```
//!
//! COMMANDs may come in any of these states up to the devices.

use std::sync::OnceLock;

use super::bytes::Bytes;
use super::device_state;
use super::ram::Ram;
use crate::memory::PAGE as PAGE_BYTES;
use crate::qemu::record::{
    COMMAND, CONFIGURATION, CONTINUE, EOF, EOS, FOOTER, MAGIC, MEM_SIZE, MULTIFD_FLUSH,
    OPEN_RETURN_PATH, PAGE, PING, PONG, RAM, RAM_VERSION, SECTION_END, SECTION_FULL, SECTION_PART,
    SECTION_START, SUBSECTION, SWITCHOVER_START, VERSION, VMDESCRIPTION, XBZRLE, ZERO,
};
use crate::{Error, Images, Result};

/// Longest name of a machine, in bytes.
const MAX_MACHINE: u32 = 256;
/// Longest description of no devices, in bytes.
const MAX_DESCRIPTION: u32 = 1 << 20;
/// What an XBZRLE record says that it is.
const XBZRLE_ENCODING: u8 = 1;
/// The low bits of an offset, which are flags.
const FLAGS: u64 = 0xfff;

/// What is done besides reading.
pub(super) trait Around {
    /// The main connection is at a mark: takes connections in, and waits for those that there are.
    fn meet(&mut self) -> Result<()>;

    /// Whether more comes on the main connection: waits for a while.
    fn more_comes(&mut self) -> Result<bool>;

    /// Says something on the return path.
    fn answer(&mut self, kind: u16, value: u32) -> Result<()>;
}

/// What was read.
#[derive(Default)]
pub(super) struct Read {
    pub(super) machine: String,
    /// Sections of memory.
    pub(super) sections: u64,
    /// Sections of devices and the description, as they came.
    pub(super) device_state: Vec<u8>,
    /// The source awaits an answer.
    pub(super) answers: bool,
    pub(super) bytes: u64,
}

/// The main connection.
pub(super) struct MainStream<'a, R, A> {
    bytes: Bytes<R>,
    around: A,
    images: &'a mut dyn Images,
    ram: &'a OnceLock<Ram>,
    read: &'a mut Read,
    /// Id of the section of memory.
    section: Option<u32>,
    /// Marks stand for themselves; otherwise the end of each section is one.
    flushes: bool,
    /// The block that was named last.
    block: Option<usize>,
}

impl<'a, R, A> MainStream<'a, R, A>
where
    R: FnMut(&mut [u8]) -> Result<usize>,
    A: Around,
{
    pub(super) fn new(
        bytes: Bytes<R>,
        around: A,
        images: &'a mut dyn Images,
        ram: &'a OnceLock<Ram>,
        read: &'a mut Read,
    ) -> Self {
        Self {
            bytes,
            around,
            images,
            ram,
            read,
            section: None,
            flushes: false,
            block: None,
        }
    }

    /// Reads it to its end.
    pub(super) fn run(mut self) -> Result<()> {
        let ended = self.records();
        self.read.bytes = self.bytes.position();
        ended
    }

    fn records(&mut self) -> Result<()> {
        self.header()?;
        let mut ended = false;
        loop {
            let kind = self.bytes.u8()?;
            match kind {
                COMMAND => self.command()?,
                SUBSECTION if self.section.is_none() => self.subsection()?,
                SECTION_START if !ended => self.start()?,
                SECTION_PART | SECTION_END if !ended => {
                    self.memory()?;
                    ended = kind == SECTION_END;
                }
                SECTION_FULL if ended => {
                    let around = &mut self.around;
                    let more = self.read.answers.then_some(|| around.more_comes());
                    self.read.device_state = device_state::read(kind, &mut self.bytes, more)?;
                    return Ok(());
                }
                EOF if ended => return self.description(),
                SECTION_FULL => {
                    return Err(self
                        .bytes
                        .bad("the state of a device came before all memory had"));
                }
                EOF => {
                    return Err(self
                        .bytes
                        .bad("the stream ended before all memory had come"));
                }
                _ => {
                    return Err(self
                        .bytes
                        .bad(format!("a record of the unknown kind {kind:#x}")));
                }
            }
        }
    }

    fn header(&mut self) -> Result<()> {
        let magic = self.bytes.u32()?;
        if magic != MAGIC {
            return Err(Error::NotQemuStream {
                found: magic.to_be_bytes(),
            });
        }
        let version = self.bytes.u32()?;
        if version != VERSION {
            return Err(self
                .bytes
                .bad(format!("its version is {version}, not {VERSION}")));
        }
        let kind = self.bytes.u8()?;
        if kind != CONFIGURATION {
            return Err(self.bytes.bad("it does not name its machine"));
        }
        let length = self.bytes.u32()?;
        if length > MAX_MACHINE {
            return Err(self
                .bytes
                .bad(format!("a machine's name of {length} bytes")));
        }
        self.read.machine = self.bytes.text(length as usize)?;
        Ok(())
    }

    /// What else the configuration says.
    fn subsection(&mut self) -> Result<()> {
        let name = self.bytes.name()?;
        let version = self.bytes.u32()?;
        if (name.as_str(), version) == ("configuration/uuid", 1) {
            return self.bytes.fill(&mut [0; 16]);
        }
        Err(self.bytes.bad(format!(
            "its {name} is not known here: switch x-ignore-shared, mapped-ram and the like off at the source"
        )))
    }

    fn command(&mut self) -> Result<()> {
        let command = self.bytes.u16()?;
        let length = self.bytes.u16()?;
        match (command, length) {
            (OPEN_RETURN_PATH, 0) => self.read.answers = true,
            (PING, 4) => {
                let value = self.bytes.u32()?;
                self.around.answer(PONG, value)?;
            }
            (SWITCHOVER_START, 0) => {}
            _ => {
                return Err(self.bytes.bad(format!(
                    "command {command} with {length} bytes is not known here: switch postcopy, COLO and the like off at \
                     the source"
                )));
            }
        }
        Ok(())
    }

    /// The first section of memory: which blocks there are.
    fn start(&mut self) -> Result<()> {
        let id = self.bytes.u32()?;
        let name = self.bytes.name()?;
        let _instance = self.bytes.u32()?;
        let version = self.bytes.u32()?;
        if name != RAM {
            return Err(self.bytes.bad(format!(
                "a section {name} came, which is sent while the guest runs; only memory can be read"
            )));
        }
        if version != RAM_VERSION {
            return Err(self.bytes.bad(format!(
                "the section of memory has version {version}, not {RAM_VERSION}"
            )));
        }
        if self.section.replace(id).is_some() {
            return Err(self.bytes.bad("memory began twice"));
        }
        let total = self.bytes.u64()?;
        if total & FLAGS != MEM_SIZE {
            return Err(self
                .bytes
                .bad("the list of RAM blocks does not begin as one"));
        }
        let mut left = total & !FLAGS;
        let mut ram = Ram::default();
        while left > 0 {
            let name = self.bytes.name()?;
            let length = self.bytes.u64()?;
            let Some(rest) = left.checked_sub(length).filter(|_| length > 0) else {
                return Err(self.bytes.bad(format!(
                    "RAM block {name} has {length:#x} bytes, more than all blocks together"
                )));
            };
            left = rest;
            ram.add(&name, length, self.images)?;
        }
        // It is the first, so it takes its place.
        let _ = self.ram.set(ram);
        self.pages()?;
        self.footer(id)
    }

    fn memory(&mut self) -> Result<()> {
        let id = self.bytes.u32()?;
        if self.section != Some(id) {
            return Err(self.bytes.bad(format!("a section {id} that has not begun")));
        }
        self.pages()?;
        self.footer(id)
    }

    fn footer(&mut self, id: u32) -> Result<()> {
        if self.bytes.u8()? != FOOTER || self.bytes.u32()? != id {
            return Err(self.bytes.bad("a section of memory does not end as one"));
        }
        self.read.sections += 1;
        Ok(())
    }

    /// The page records of a section.
    fn pages(&mut self) -> Result<()> {
        let Some(ram) = self.ram.get() else {
            return Err(self.bytes.bad("pages came before the RAM blocks"));
        };
        loop {
            let word = self.bytes.u64()?;
            let (offset, flags) = (word & !FLAGS, word & FLAGS);
            match flags {
                EOS | MULTIFD_FLUSH if offset != 0 => {
                    return Err(self.bytes.bad("a mark has an offset"));
                }
                EOS if self.flushes => return Ok(()),
                EOS => return self.around.meet(),
                MULTIFD_FLUSH => {
                    self.flushes = true;
                    self.around.meet()?;
                    continue;
                }
                _ => {}
            }
            if flags & CONTINUE == 0 {
                let name = self.bytes.name()?;
                self.block = Some(ram.block(&name)?);
            }
            let Some(block) = self.block else {
                return Err(self.bytes.bad("the first page names no block"));
            };
            let place = ram.place(block, offset)?;
            match flags & !CONTINUE {
                PAGE => self.bytes.memory(&ram.contents(place)?)?,
                ZERO => {
                    // Others were told so long ago that no QEMU has a word for them any more.
                    let byte = self.bytes.u8()?;
                    if byte != 0 {
                        return Err(self.bytes.bad(format!("a page of bytes {byte:#x}")));
                    }
                    ram.zero(place)?;
                }
                XBZRLE => {
                    let encoding = self.bytes.u8()?;
                    let length = usize::from(self.bytes.u16()?);
                    if encoding != XBZRLE_ENCODING || length > PAGE_BYTES {
                        return Err(self
                            .bytes
                            .bad("what has changed of a page is not told by XBZRLE"));
                    }
                    let mut delta = [0; PAGE_BYTES];
                    self.bytes.fill(&mut delta[..length])?;
                    ram.delta(place, &delta[..length])?;
                }
                _ => {
                    return Err(self.bytes.bad(format!(
                        "a page with flags {flags:#x}, which are not known here: switch compression at the source off"
                    )));
                }
            }
        }
    }

    /// The end of a stream without devices.
    fn description(&mut self) -> Result<()> {
        if self.bytes.u8()? != VMDESCRIPTION {
            return Err(self.bytes.bad("no description follows the end"));
        }
        let length = self.bytes.u32()?;
        if length > MAX_DESCRIPTION {
            return Err(self
                .bytes
                .bad(format!("a description of no devices of {length} bytes")));
        }
        let mut text = vec![0; length as usize];
        self.bytes.fill(&mut text)
    }
}
