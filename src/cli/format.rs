//! What a migration is written as.

use clap::{Args, ValueEnum};
use gleaner_migrate::{Format, MultifdSync, QemuOptions};

/// The format, and what QEMU's needs to know of the destination.
#[derive(Clone, Debug, Args)]
pub struct FormatOptions {
    /// What the destination reads: native is `gleaner receive`; qemu is a stock QEMU started with -incoming, which gets the
    /// RAM blocks by their names, and no state of vCPUs and devices. Of --channels, 1 is without multifd then, and more are
    /// as many as the QEMU's multifd-channels. It goes without --tls, --verify, --compress and --local.
    #[arg(long, value_enum, default_value_t = Written::Native)]
    pub format: Written,
    /// The QEMU's machine, with its version: none, pc-i440fx-7.2. None unless given.
    #[arg(long, value_name = "NAME", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub machine: Option<String>,
    /// The QEMU's version, which matters where --channels asks for multifd: 7.2 is any before 8.1, 9 any from 8.1 on. The
    /// default is 9, because an older one refuses that at once, while a newer one may take 7.2 and miss pages.
    #[arg(long, value_enum, value_name = "V")]
    pub qemu_version: Option<QemuVersion>,
}

/// What is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Written {
    /// Gleaner's own stream.
    Native,
    /// QEMU's.
    Qemu,
}

/// A version of QEMU.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum QemuVersion {
    /// Before 8.1.
    #[value(name = "7.2", alias = "8.0")]
    Before,
    /// From 8.1 on.
    #[value(name = "9", alias = "8.1", alias = "8.2")]
    Nine,
    /// As 9.
    #[value(name = "10")]
    Ten,
}

impl FormatOptions {
    /// What can't be asked for together.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.is_qemu() {
            return Ok(());
        }
        match self {
            Self {
                machine: Some(_), ..
            } => Err("--machine tells of a QEMU: add --format qemu"),
            Self {
                qemu_version: Some(_),
                ..
            } => Err("--qemu-version tells of a QEMU: add --format qemu"),
            _ => Ok(()),
        }
    }

    /// Whether a QEMU is the destination.
    pub fn is_qemu(&self) -> bool {
        self.format == Written::Qemu
    }

    /// The format that is asked for.
    pub fn format(&self) -> Format {
        if !self.is_qemu() {
            return Format::Native;
        }
        Format::Qemu(qemu_options(self.machine.as_deref(), self.qemu_version))
    }
}

/// What a QEMU of this machine and version has to be told.
pub fn qemu_options(machine: Option<&str>, version: Option<QemuVersion>) -> QemuOptions {
    let mut qemu = QemuOptions {
        sync: match version {
            Some(QemuVersion::Before) => MultifdSync::Section,
            Some(QemuVersion::Nine | QemuVersion::Ten) | None => MultifdSync::Flush,
        },
        ..QemuOptions::default()
    };
    if let Some(machine) = machine {
        machine.clone_into(&mut qemu.machine);
    }
    qemu
}
