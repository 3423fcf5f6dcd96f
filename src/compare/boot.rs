//! Changes of memory in the style of a PC that boots: firmware shadows itself in RAM, finds its BARs, opens and closes SMRAM,
//! switches VGA's banks, sets memory aside below its top, and locks the shadow.

use gleaner_bitmap::{PAGE_SIZE, PageRange};

use super::listener::{Listener, Series, View};
use crate::Result;

const fn pages(bytes: u64) -> u64 {
    bytes / PAGE_SIZE
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

// The block: RAM, then VGA's memory, then the ROMs' 256 KiB.
const RAM: u64 = pages(4 * GIB);
const VRAM: PageRange = PageRange::new(RAM, pages(16 * MIB));
const ROM: PageRange = PageRange::new(VRAM.end(), pages(256 * KIB));

/// RAM that is below 4 GiB.
const LOW: u64 = pages(3 * GIB);
/// What SMM keeps at the top of it.
const TSEG: u64 = pages(8 * MIB);
const VGA: u64 = pages(640 * KIB);
const SHADOW: u64 = pages(768 * KIB);
const SEGMENT: u64 = pages(16 * KIB);

/// What one segment of the shadow area shows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shadow {
    Rom,
    Ram,
    Locked,
}

/// What shows at 640 KiB.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Window {
    Nothing,
    Smram,
    Bank(u64),
}

struct Board {
    shadow: [Shadow; 16],
    window: Window,
    /// Where VGA's memory is.
    bar: Option<u64>,
    tseg: bool,
}

impl Board {
    fn view(&self) -> View {
        let mut view = View::default();
        view.show(0, PageRange::new(0, VGA), false);
        match self.window {
            Window::Nothing => {}
            Window::Smram => view.show(VGA, PageRange::new(VGA, pages(128 * KIB)), false),
            Window::Bank(bank) => {
                let bytes = pages(64 * KIB);
                view.show(VGA, PageRange::new(VRAM.first + bank * bytes, bytes), false);
            }
        }
        for (segment, shows) in (0..).zip(self.shadow) {
            let at = SHADOW + segment * SEGMENT;
            let from = match shows {
                Shadow::Rom => ROM.first + segment * SEGMENT,
                Shadow::Ram | Shadow::Locked => at,
            };
            view.show(at, PageRange::new(from, SEGMENT), shows != Shadow::Ram);
        }
        let top = if self.tseg { LOW - TSEG } else { LOW };
        let rest = pages(MIB);
        view.show(rest, PageRange::new(rest, top - rest), false);
        if let Some(at) = self.bar {
            view.show(at, VRAM, false);
        }
        view.show(pages(4 * GIB) - ROM.pages, ROM, true);
        view.show(pages(4 * GIB), PageRange::new(LOW, RAM - LOW), false);
        view
    }
}

/// A board, and who listens to it.
struct Boot {
    board: Board,
    listener: Listener,
}

impl Boot {
    /// A register is written.
    fn set(&mut self, write: impl FnOnce(&mut Board)) {
        write(&mut self.board);
        self.listener.hear(&self.board.view());
    }

    /// A register is written, and that is all.
    fn alone(&mut self, write: impl FnOnce(&mut Board)) -> Result<()> {
        self.set(write);
        self.listener.commit()
    }

    /// Seven registers, two segments each but for the first, whose one segment is 64 KiB.
    fn shadow(&mut self, registers: std::ops::Range<usize>, shows: Shadow) -> Result<()> {
        for register in registers {
            let segments = match register {
                0 => 12..16,
                n => 2 * (n - 1)..2 * n,
            };
            self.set(|board| board.shadow[segments].fill(shows));
        }
        self.listener.commit()
    }
}

/// The whole boot, tracked from its first instruction on.
pub(super) fn boot() -> Result<Series> {
    let mut boot = Boot {
        listener: Listener::new(ROM.end())?,
        board: Board {
            shadow: [Shadow::Rom; 16],
            window: Window::Nothing,
            bar: None,
            tseg: false,
        },
    };
    boot.alone(|_| ())?;
    boot.shadow(0..7, Shadow::Ram)?;
    boot.alone(|b| b.bar = Some(pages(0xe000_0000)))?;
    boot.alone(|b| b.window = Window::Smram)?;
    boot.alone(|b| b.window = Window::Nothing)?;
    // The option ROM of the VGA.
    boot.shadow(1..3, Shadow::Locked)?;
    for bank in [0, 1, 2, 0] {
        boot.alone(|b| b.window = Window::Bank(bank))?;
    }
    boot.alone(|b| b.window = Window::Nothing)?;
    boot.alone(|b| b.tseg = true)?;
    boot.shadow(0..7, Shadow::Locked)?;
    // The system deals out addresses again: off, another address, on.
    for bar in [0xf000_0000, 0xd000_0000, 0xfd00_0000] {
        boot.set(|b| b.bar = None);
        boot.set(|b| b.bar = Some(pages(bar)));
        boot.listener.commit()?;
    }
    // A hundredth of it is dirty.
    Ok(boot.listener.series("PC boot, 4 GiB", RAM / 100))
}
