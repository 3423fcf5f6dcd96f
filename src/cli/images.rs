//! `gleaner receive --format qemu`: what a stock QEMU sends, as files in a directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gleaner_bitmap::PAGE_SIZE;
use gleaner_migrate::{
    CancelToken, Error, Images, Listener, MappedMemory, NewMemory, QemuReceived, QemuReceiver,
    Result, Status,
};

use crate::vmm::{empty_ram_file, lock_ram_file};

/// Receives from one QEMU into `dir`, over its main connection and as many of multifd as `channels`.
pub fn receive(
    listener: &Listener,
    dir: &Path,
    channels: u8,
    cancel: CancelToken,
) -> Result<QemuReceived> {
    let mut images = Directory {
        path: dir.to_owned(),
        blocks: Vec::new(),
    };
    images.clear()?;
    let received = QemuReceiver::new(&mut images, cancel)
        .channels(channels)
        .listen(listener)?;
    if received.status != Status::Completed {
        images.remove();
    }
    Ok(received)
}

/// A file for each block, and one for the devices, which is there only when all memory is.
struct Directory {
    path: PathBuf,
    /// Of the blocks that come.
    blocks: Vec<PathBuf>,
}

impl Directory {
    fn device_state(&self) -> PathBuf {
        self.path.join("device-state")
    }

    /// Where it is while it is written.
    fn half_device_state(&self) -> PathBuf {
        self.path.join("device-state.part")
    }

    /// What an earlier guest left must not be taken for this one's.
    fn clear(&self) -> Result<()> {
        let path = self.device_state();
        remove(&path).map_err(|error| failed(&path, &error))
    }

    /// Half a guest must not be taken for one.
    fn remove(&self) {
        let half = self.half_device_state();
        for path in self.blocks.iter().chain([&half]) {
            if let Err(error) = remove(path) {
                note!("gleaner: {} is of no use: {error}", path.display());
            }
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
        let file = lock_ram_file(&path).map_err(fail)?;
        // From here on what it held is gone.
        self.blocks.push(path.clone());
        empty_ram_file(&file, pages * PAGE_SIZE).map_err(fail)?;
        let memory = MappedMemory::of_file(file, pages)?;
        Ok(NewMemory::zero(Arc::new(memory)))
    }

    fn complete(&mut self, device_state: &[u8]) -> Result<()> {
        let half = self.half_device_state();
        Self::create(&half)
            .and_then(|mut file| file.write_all(device_state))
            .map_err(|error| failed(&half, &error))?;
        let whole = self.device_state();
        fs::rename(&half, &whole).map_err(|error| failed(&whole, &error))
    }
}

/// Removes a file, if it is there.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
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

/// What came, for people.
pub fn summary(received: &QemuReceived, dir: &Path) -> String {
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
    if received.status != Status::Completed {
        return format!(
            "not completed: {pages} pages, {zero_pages} zero pages and {delta_pages} changes had come, and were removed"
        );
    }
    format!(
        "completed: machine {machine}, RAM blocks: {blocks}, pages: {pages} whole, {zero_pages} zero, {delta_pages} as what \
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
