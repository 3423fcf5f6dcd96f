//! `gleaner receive --format qemu`: what a stock QEMU sends, as files in a directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use gleaner_bitmap::PAGE_SIZE;
use gleaner_migrate::{
    CancelToken, Error, Images, Listener, MappedMemory, NewMemory, QemuReceived, QemuReceiver,
    Result, Status,
};

use super::Failure;
use super::output::Output;
use crate::vmm::empty_ram_file;

/// Receives from one QEMU into `dir`, over its main connection and as many of multifd as `channels`.
pub fn receive(
    listener: &Listener,
    dir: &Path,
    channels: u8,
    cancel: CancelToken,
    output: Output,
) -> std::result::Result<ExitCode, Failure> {
    let mut images = Directory {
        path: dir.to_owned(),
    };
    images.clear().map_err(output.failure())?;
    let received = QemuReceiver::new(&mut images, cancel)
        .channels(channels)
        .listen(listener)
        .map_err(output.failure())?;
    output.result(&received, || summary(&received, dir));
    if let Some(reason) = &received.reason {
        eprintln!("gleaner: {reason}");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// A file for each block, and one for the devices, which is there only when all memory is.
struct Directory {
    path: PathBuf,
}

impl Directory {
    fn device_state(&self) -> PathBuf {
        self.path.join("device-state")
    }

    /// What an earlier guest left must not be taken for this one's.
    fn clear(&self) -> Result<()> {
        match fs::remove_file(self.device_state()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed(&self.device_state(), &error))
            }
            _ => Ok(()),
        }
    }

    fn create(path: &Path) -> io::Result<File> {
        // Memory of a guest is secret.
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        options.mode(0o600).open(path)
    }
}

impl Images for Directory {
    fn add_block(&mut self, name: &str, pages: u64) -> Result<NewMemory> {
        let path = self.path.join(format!("{}.ram", file_name(name)));
        let fail = |error: io::Error| failed(&path, &error);
        let file = empty_ram_file(&path, pages * PAGE_SIZE).map_err(fail)?;
        let memory = MappedMemory::of_file(file, pages)?;
        Ok(NewMemory::zero(Arc::new(memory)))
    }

    fn complete(&mut self, device_state: &[u8]) -> Result<()> {
        let path = self.device_state();
        Self::create(&path)
            .and_then(|mut file| file.write_all(device_state))
            .map_err(|error| failed(&path, &error))
    }
}

fn failed(path: &Path, error: &io::Error) -> Error {
    Error::destination(format!("{}: {error}", path.display()))
}

/// A block's name as a file's: every character that is not fit for one is its bytes in hexadecimal, so that no two names
/// become the same.
fn file_name(name: &str) -> String {
    let mut file = String::new();
    for (at, byte) in name.bytes().enumerate() {
        match byte {
            b'.' if at == 0 => file.push_str("%2e"),
            b'.' | b'_' | b'-' | b':' | b'@' => file.push(byte.into()),
            _ if byte.is_ascii_alphanumeric() => file.push(byte.into()),
            _ => file.push_str(&format!("%{byte:02x}")),
        }
    }
    file
}

fn summary(received: &QemuReceived, dir: &Path) -> String {
    let status = match received.status {
        Status::Completed => "completed",
        _ => "not completed",
    };
    let QemuReceived {
        machine,
        blocks,
        pages,
        zero_pages,
        delta_pages,
        sections,
        channels,
        device_state_bytes,
        total_ms,
        ..
    } = received;
    format!(
        "{status}: machine {machine}, RAM blocks: {blocks}, pages: {pages} whole, {zero_pages} zero, {delta_pages} as what \
         had changed, in {sections} sections and {channels} connections of multifd, {device_state_bytes} bytes of \
         devices, in {total_ms:.0} ms, into {}",
        dir.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_a_block_is_a_file_of_its_own() {
        for (name, file) in [
            ("pc.ram", "pc.ram"),
            ("0000:00:02.0/vga.vram", "0000:00:02.0%2fvga.vram"),
            ("a%2fb", "a%252fb"),
            ("..", "%2e."),
            ("/rom@etc/acpi", "%2from@etc%2facpi"),
        ] {
            assert_eq!(file_name(name), file);
        }
    }
}
