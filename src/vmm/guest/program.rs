//! What the guest executes.
//!
//! Position-independent: nothing in it is an absolute address, so that boot can copy it to any page. Each access to
//! RAM is a `mov` of 8 aligned bytes, which KVM's emulator knows, because it may hit a hole between slots.
//!
//! | register | holds |
//! |---|---|
//! | `rbp` | the control page |
//! | `rsi`, `r13` | the table, the data pages |
//! | `rdi` | number of data pages |
//! | `r8` | pages to pick from at random; 0: sweep |
//! | `r9`, `r11` | writes in a batch (0: idle), what is left of it |
//! | `r12` | last page of the sweep, or state of the random numbers |
//! | `r15`, `r14` | the count, and what it was at the end of the last batch |
//! | `r10` | turns of an idle batch |
//! | `xmm0` | the count at the end of the last batch: a register that only the FPU state brings along |

// `global_asm` can't be entered, only copied: all that is unsafe is to name where it starts and ends.
#![allow(unsafe_code)]

use std::arch::global_asm;

use super::exits::{CODE_CONTROL, CODE_FPU, CODE_PAGE_WRONG, CODE_SHIFT, CODE_SUM};
use super::mailbox::{CHECK, Word};
use super::{PORT_BATCH, PORT_CHECK};

/// What a page's count of writes is multiplied with in its stamp. Odd, and 31 bits long for use as an immediate.
pub const STAMP: u64 = 0x5851_f42d;

global_asm!(
    ".pushsection .rodata.gleaner_guest, \"a\", @progbits",
    ".globl gleaner_guest_start, gleaner_guest_end",
    "gleaner_guest_start:",
    "mov rsi, [rbp + {table}]",
    "mov r13, [rbp + {data}]",
    "mov rdi, [rbp + {pages}]",
    "mov r8, [rbp + {span}]",
    "mov r9, [rbp + {batch}]",
    "mov r10, [rbp + {idle}]",
    "mov r12, [rbp + {state}]",
    "xor r14d, r14d",
    "xor r15d, r15d",
    "movq xmm0, r15",
    // ---- a batch
    ".Lguest_batch:",
    "mov r11, r9",
    "test r11, r11",
    "jz .Lguest_idle",
    ".Lguest_pick:",
    "test r8, r8",
    "jz .Lguest_sweep",
    // xorshift64; the high half of the product with the span is a page below it.
    "mov rax, r12",
    "shl rax, 13",
    "xor r12, rax",
    "mov rax, r12",
    "shr rax, 7",
    "xor r12, rax",
    "mov rax, r12",
    "shl rax, 17",
    "xor r12, rax",
    "mov rax, r12",
    "mul r8",
    "jmp .Lguest_write",
    ".Lguest_sweep:",
    "add r12, 1",
    "cmp r12, rdi",
    "jb .Lguest_no_wrap",
    "xor r12d, r12d",
    ".Lguest_no_wrap:",
    "mov rdx, r12",
    // ---- a write to page rdx
    ".Lguest_write:",
    "mov rcx, rdx",
    "shl rcx, 12",
    "add rcx, r13",
    "mov rax, [rsi + rdx * 8]",
    "imul rbx, rax, {stamp}",
    "add rbx, rdx",
    "add rax, 1",
    "mov [rsi + rdx * 8], rax",
    "lea rdx, [rbx + {stamp}]",
    // The end first: a fresh page is first met by a store, and a copy that runs upwards beside it is torn in the one
    // way that the next lines see.
    "mov [rcx + {last}], rdx",
    "cmp rax, 1",
    "jne .Lguest_had_stamp",
    "xor ebx, ebx",
    ".Lguest_had_stamp:",
    // A page that does not hold its last stamp was lost: leave the evidence.
    "mov rax, [rcx]",
    "cmp rax, rbx",
    "jne .Lguest_written",
    "mov [rcx], rdx",
    ".Lguest_written:",
    "add r15, 1",
    "sub r11, 1",
    "jnz .Lguest_pick",
    // ---- the end of a batch: both mirrors of the count move on, unless they are not where they were left
    "mov rax, [rbp + {count}]",
    "cmp rax, r14",
    "jne .Lguest_control_lost",
    "mov [rbp + {count}], r15",
    ".Lguest_control_lost:",
    "movq rax, xmm0",
    "cmp rax, r14",
    "jne .Lguest_fpu_lost",
    "movq xmm0, r15",
    ".Lguest_fpu_lost:",
    "mov r14, r15",
    ".Lguest_leave:",
    "out {port_batch}, eax",
    "mov rax, [rbp + {mailbox}]",
    "cmp rax, {check}",
    "jne .Lguest_batch",
    // ---- the check: rbx is the page, r11 the sum
    "xor eax, eax",
    "mov [rbp + {mailbox}], rax",
    "xor ebx, ebx",
    "xor r11d, r11d",
    ".Lguest_check_page:",
    "mov rcx, rbx",
    "shl rcx, 12",
    "add rcx, r13",
    "mov rax, [rsi + rbx * 8]",
    "add r11, rax",
    "xor edx, edx",
    "test rax, rax",
    "jz .Lguest_no_stamp",
    "imul rdx, rax, {stamp}",
    "add rdx, rbx",
    ".Lguest_no_stamp:",
    "mov rax, [rcx]",
    "cmp rax, rdx",
    "jne .Lguest_page_wrong",
    "mov rax, [rcx + {last}]",
    "cmp rax, rdx",
    "jne .Lguest_page_wrong",
    "add rbx, 1",
    "cmp rbx, rdi",
    "jb .Lguest_check_page",
    "mov eax, {sum_wrong}",
    "cmp r11, r15",
    "jne .Lguest_report",
    "mov eax, {control_wrong}",
    "mov rcx, [rbp + {count}]",
    "cmp rcx, r15",
    "jne .Lguest_report",
    "mov eax, {fpu_wrong}",
    "movq rcx, xmm0",
    "cmp rcx, r15",
    "jne .Lguest_report",
    "xor eax, eax",
    ".Lguest_report:",
    "out {port_check}, eax",
    "jmp .Lguest_batch",
    ".Lguest_page_wrong:",
    "mov eax, ebx",
    "shl eax, {code_shift}",
    "or eax, {page_wrong}",
    "jmp .Lguest_report",
    // ---- an idle batch takes time, and touches nothing
    ".Lguest_idle:",
    "mov rcx, r10",
    ".Lguest_pause:",
    "pause",
    "sub rcx, 1",
    "jnz .Lguest_pause",
    "jmp .Lguest_leave",
    "gleaner_guest_end:",
    ".popsection",
    stamp = const STAMP,
    last = const gleaner_bitmap::PAGE_SIZE - 8,
    table = const Word::Table.offset(),
    data = const Word::Data.offset(),
    pages = const Word::Pages.offset(),
    span = const Word::Span.offset(),
    batch = const Word::Batch.offset(),
    idle = const Word::IdleTurns.offset(),
    state = const Word::State.offset(),
    mailbox = const Word::Mailbox.offset(),
    count = const Word::Count.offset(),
    check = const CHECK,
    port_batch = const PORT_BATCH,
    port_check = const PORT_CHECK,
    code_shift = const CODE_SHIFT,
    page_wrong = const CODE_PAGE_WRONG,
    sum_wrong = const CODE_SUM,
    control_wrong = const CODE_CONTROL,
    fpu_wrong = const CODE_FPU,
);

unsafe extern "C" {
    static gleaner_guest_start: [u8; 0];
    static gleaner_guest_end: [u8; 0];
}

/// The program's bytes.
pub(super) fn code() -> &'static [u8] {
    let start = &raw const gleaner_guest_start;
    let len = (&raw const gleaner_guest_end).addr() - start.addr();
    // SAFETY: both labels are in one section of one assembly block, the end after the start, and what is between them
    // is read-only for as long as the program runs.
    unsafe { std::slice::from_raw_parts(start.cast(), len) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn fits_its_page() {
        let code = super::code();
        assert!((64..4096).contains(&code.len()), "{}", code.len());
        // It ends with the jump back to the loop.
        assert!(code[code.len() - 5] == 0xe9 || code[code.len() - 2] == 0xeb);
    }
}
