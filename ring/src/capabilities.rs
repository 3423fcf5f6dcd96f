//! What the kernel offers, and how a way of tracking is switched on.

use std::fmt;
use std::io;
use std::str::FromStr;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CAP_NR_MEMSLOTS, KVM_CAP_READONLY_MEM, kvm_enable_cap,
};
use kvm_ioctls::VmFd;

use crate::{Error, Result};

/// The way in which dirty pages are tracked, as the user asks for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Tracking {
    /// The ring where it is offered, else `bitmap-clear`, else `bitmap`.
    #[default]
    Auto,
    /// `KVM_GET_DIRTY_LOG`, which fetches, clears and re-arms a whole slot.
    Bitmap,
    /// Manual protection: fetch, then clear and re-arm exactly what was fetched.
    BitmapClear,
    /// A dirty ring of this many bytes for each vCPU.
    Ring {
        /// A power of two from 4096 to what the kernel allows; 16 bytes an entry.
        bytes: u32,
    },
}

impl Tracking {
    /// The ring at the largest size that any kernel takes: 65,536 entries.
    pub const RING: Self = Self::Ring { bytes: 1 << 20 };
}

impl FromStr for Tracking {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        match s {
            "auto" => Ok(Self::Auto),
            "bitmap" => Ok(Self::Bitmap),
            "bitmap-clear" => Ok(Self::BitmapClear),
            "ring" => Ok(Self::RING),
            _ => Err("one of auto, bitmap, bitmap-clear, ring".into()),
        }
    }
}

/// The way in which dirty pages are tracked, as it was settled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// `KVM_GET_DIRTY_LOG`.
    Bitmap,
    /// `KVM_GET_DIRTY_LOG` and `KVM_CLEAR_DIRTY_LOG`.
    BitmapClear,
    /// Dirty rings of this many bytes.
    Ring {
        /// Bytes a vCPU.
        bytes: u32,
    },
}

impl Mode {
    /// Its name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bitmap => "bitmap",
            Self::BitmapClear => "bitmap-clear",
            Self::Ring { .. } => "ring",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a VM's kernel offers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capabilities {
    /// Number of slot ids.
    pub slot_limit: u32,
    /// Largest ring in bytes; 0 when there are no rings.
    pub ring_bytes_max: u32,
    /// Manual protection can be enabled.
    pub manual_protect: bool,
    /// Logs can start with all bits set, which spares the start of logging a walk over all memory.
    pub initially_set: bool,
    /// Slots can be read-only.
    pub readonly: bool,
    /// Deleting a slot can be told not to drop the mappings of all others.
    pub slot_zap_all_quirk: bool,
}

/// `KVM_X86_QUIRK_SLOT_ZAP_ALL`.
const SLOT_ZAP_ALL: u64 = 128;
const MANUAL_ENABLE: u64 = 1;
const INITIALLY_SET: u64 = 2;
const RING_BYTES_MIN: u64 = 4096;

impl Capabilities {
    /// Asks the kernel.
    #[must_use]
    pub fn query(vm: &VmFd) -> Self {
        let ask = |cap: u32| u64::try_from(vm.check_extension_raw(cap.into())).unwrap_or(0);
        let manual = ask(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
        Self {
            slot_limit: u32::try_from(ask(KVM_CAP_NR_MEMSLOTS)).unwrap_or(32),
            ring_bytes_max: u32::try_from(ask(KVM_CAP_DIRTY_LOG_RING_ACQ_REL)).unwrap_or(0),
            manual_protect: manual & MANUAL_ENABLE != 0,
            initially_set: manual & INITIALLY_SET != 0,
            readonly: ask(KVM_CAP_READONLY_MEM) != 0,
            slot_zap_all_quirk: ask(KVM_CAP_DISABLE_QUIRKS2) & SLOT_ZAP_ALL != 0,
        }
    }

    /// The mode that a user's choice comes down to here.
    ///
    /// # Errors
    /// [`Error::RingSize`], [`Error::NotOffered`].
    pub fn settle(&self, tracking: Tracking) -> Result<Mode> {
        let mode = match tracking {
            Tracking::Auto if self.ring_bytes_max > 0 => Mode::Ring {
                bytes: self.ring_bytes_max.min(1 << 20),
            },
            Tracking::Auto if self.manual_protect => Mode::BitmapClear,
            Tracking::Auto | Tracking::Bitmap => Mode::Bitmap,
            Tracking::BitmapClear => Mode::BitmapClear,
            Tracking::Ring { bytes } => Mode::Ring { bytes },
        };
        match mode {
            Mode::BitmapClear if !self.manual_protect => Err(Error::NotOffered {
                mode: "bitmap-clear",
            }),
            Mode::Ring { .. } if self.ring_bytes_max == 0 => {
                Err(Error::NotOffered { mode: "ring" })
            }
            Mode::Ring { bytes } => {
                let (bytes, max) = (u64::from(bytes), u64::from(self.ring_bytes_max));
                if bytes.is_power_of_two() && (RING_BYTES_MIN..=max).contains(&bytes) {
                    Ok(mode)
                } else {
                    Err(Error::RingSize { bytes, max })
                }
            }
            Mode::Bitmap | Mode::BitmapClear => Ok(mode),
        }
    }

    /// Switches a mode on: see [`Kvm::enable`](crate::Kvm::enable).
    pub(crate) fn enable(&self, vm: &VmFd, mode: Mode) -> Result<()> {
        match mode {
            Mode::Bitmap => self.manual_off(vm)?,
            Mode::BitmapClear => enable_manual_protect(vm, MANUAL_ENABLE)?,
            Mode::Ring { bytes } => {
                self.manual_off(vm)?;
                enable(
                    vm,
                    (
                        "KVM_CAP_DIRTY_LOG_RING_ACQ_REL",
                        KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
                    ),
                    bytes.into(),
                    " (rings are enabled once, before the first vCPU)",
                )?;
                // What no vCPU dirties goes to a bitmap there; it has to be on before there is any slot.
                #[cfg(target_arch = "aarch64")]
                enable(
                    vm,
                    (
                        "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP",
                        kvm_bindings::KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
                    ),
                    0,
                    " (before any slot)",
                )?;
            }
        }
        if self.slot_zap_all_quirk {
            // Else each delete or move drops all mappings of the VM, and pages merely read afterwards count as dirty.
            enable(
                vm,
                ("KVM_CAP_DISABLE_QUIRKS2", KVM_CAP_DISABLE_QUIRKS2),
                SLOT_ZAP_ALL,
                "",
            )?;
        }
        Ok(())
    }

    fn manual_off(&self, vm: &VmFd) -> Result<()> {
        if self.manual_protect {
            enable_manual_protect(vm, 0)?;
        }
        Ok(())
    }
}

/// Manual protection with KVM's flags.
pub(crate) fn enable_manual_protect(vm: &VmFd, flags: u64) -> Result<()> {
    enable(
        vm,
        (
            "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
            KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        ),
        flags,
        "",
    )
}

/// The flags of manual protection.
pub(crate) const fn manual_flags(on: bool, initially_set: bool) -> u64 {
    (if on { MANUAL_ENABLE } else { 0 })
        | (if on && initially_set {
            INITIALLY_SET
        } else {
            0
        })
}

fn enable(
    vm: &VmFd,
    (capability, number): (&'static str, u32),
    arg: u64,
    hint: &'static str,
) -> Result<()> {
    let mut cap = kvm_enable_cap {
        cap: number,
        ..Default::default()
    };
    cap.args[0] = arg;
    vm.enable_cap(&cap)
        .map_err(|error| Error::EnableCapability {
            capability,
            number,
            source: io::Error::from_raw_os_error(error.errno()),
            hint,
        })
}
