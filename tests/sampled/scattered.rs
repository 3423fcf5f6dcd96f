//! A guest for a stock QEMU that writes the same pages again and again, scattered over its memory: all its firmware does.

pub const QEMU: &str = "qemu-system-x86_64";
/// From here on it writes; before it is what a PC has there.
pub const FIRST: u64 = 1 << 20;

/// Firmware that adds 1 to the first word of `pages` pages, each `stride` pages after the one before, over and over.
pub fn firmware(pages: u32, stride: u32) -> Vec<u8> {
    // In real mode: lgdt; protection on; a far jump. Then flat segments, and the loop.
    let mut code = vec![
        0xfa, 0x2e, 0x66, 0x0f, 0x01, 0x16, 0x50, 0x00, 0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22,
        0xc0, 0x66, 0xea, 0x18, 0x00, 0x0f, 0x00, 0x08, 0x00, 0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd8,
        // again: mov edi, FIRST; mov ecx, pages
        0xbf, 0x00, 0x00, 0x10, 0x00, 0xb9,
    ];
    code.extend(pages.to_le_bytes());
    // next: inc dword [edi]; add edi, stride; dec ecx; jnz next; jmp again
    code.extend([0xff, 0x07, 0x81, 0xc7]);
    code.extend((stride * 4096).to_le_bytes());
    code.extend([0x49, 0x75, 0xf5, 0xeb, 0xe9]);
    // The table of segments at 0x38: none, code, data. What lgdt reads is at 0x50.
    code.resize(0x40, 0);
    code.extend([
        0xff, 0xff, 0, 0, 0, 0x9b, 0xcf, 0, 0xff, 0xff, 0, 0, 0, 0x93, 0xcf, 0,
    ]);
    code.extend([0x17, 0, 0x38, 0, 0x0f, 0]);
    let mut image = code;
    image.resize(0xfff0, 0);
    // The first instruction of all: a jump to F000:0000.
    image.extend([0xea, 0, 0, 0, 0xf0]);
    image.resize(0x1_0000, 0);
    image
}

/// Arguments of a QEMU that runs it on KVM, in `mebibytes` of memory, all of which exist.
pub fn arguments(image: &str, mebibytes: u64) -> Vec<String> {
    let object = format!("memory-backend-memfd,id=ram,size={mebibytes}M,share=on,prealloc=on");
    let memory = format!("{mebibytes}M");
    let all = [
        "-machine",
        "pc,memory-backend=ram",
        "-accel",
        "kvm",
        "-object",
        &object,
        "-m",
        &memory,
        "-bios",
        image,
        "-nodefaults",
        "-display",
        "none",
        "-vga",
        "none",
    ];
    all.map(str::to_owned).to_vec()
}
