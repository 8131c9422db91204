//! The probe guest: long mode, a breakpoint through an IDT, a 16-byte exchange,
//! saved and restored extended state, a page mapped while running.
#![allow(unsafe_code)] // reason: the guest's code lies between two assembler symbols

use crate::arch::current::{
    self as arch,
    layout::{GDT, HIGH_MEMORY, PAGE_TABLES},
    registers,
};
use crate::memory::GuestMemory;
use std::arch::global_asm;

/// Where the guest starts.
pub(super) const ENTRY: u64 = HIGH_MEMORY;
/// Where it answers.
pub(super) const PORT: u16 = casemate_protocol::POWER_PORT;
/// What it answers when all went well.
pub(super) const PASSED: u8 = 0x5a;

const IDT: u64 = 0x1000;
const SCRATCH: u64 = 0x2000;
const SAVE_AREA: u64 = 0x3000;
const STACK_TOP: u64 = 0x7000;
const BREAKPOINT: u64 = 3;
/// Code selector of the boot GDT.
const CODE: u64 = 0x10;
/// Present, 64-bit interrupt gate.
const GATE: u64 = 0x8e00;
/// 1 GiB: nothing is mapped there until the guest does so.
const NEW_PAGE: u64 = 1 << 30;
const MARK: u64 = 0x1bad_b002;

global_asm!(
    ".pushsection .rodata.casemate_probe",
    ".globl casemate_probe_start, casemate_probe_breakpoint, casemate_probe_end",
    "casemate_probe_start:",
    "mov rsp, {stack}",
    // int3: the handler adds one to r15.
    "xor r15d, r15d",
    "sub rsp, 16",
    "mov word ptr [rsp], {idt_limit}",
    "mov qword ptr [rsp + 2], {idt}",
    "lidt [rsp]",
    "int3",
    "cmp r15d, 1",
    "mov al, 1",
    "jne 9f",
    // cmpxchg16b: 0:0 becomes 2:1.
    "xor eax, eax",
    "xor edx, edx",
    "mov ebx, 1",
    "mov ecx, 2",
    "mov edi, {scratch}",
    "lock cmpxchg16b [rdi]",
    "mov al, 2",
    "jnz 9f",
    "cmp qword ptr [rdi + 8], 2",
    "jne 9f",
    // xsave64 and xrstor64, where the processor has them.
    "mov eax, 1",
    "xor ecx, ecx",
    "cpuid",
    "bt ecx, 26",
    "jnc 2f",
    "mov rax, cr4",
    "or rax, 0x40000",
    "mov cr4, rax",
    "mov edi, {save}",
    "mov eax, 1",
    "xor edx, edx",
    "xsave64 [rdi]",
    "xrstor64 [rdi]",
    "2:",
    // A second name for the first page, through a new entry of the PDPT.
    "mov rax, [{tables} + 4096]",
    "mov [{tables} + 4096 + 8], rax",
    "mov rdi, {new_page}",
    "invlpg [rdi]",
    "mov dword ptr [rdi + {scratch}], {mark}",
    "cmp dword ptr [{scratch}], {mark}",
    "mov al, 3",
    "jne 9f",
    "mov al, {passed}",
    "9:",
    "mov dx, {port}",
    "out dx, al",
    "3: hlt",
    "jmp 3b",
    "casemate_probe_breakpoint:",
    "inc r15d",
    "iretq",
    "casemate_probe_end:",
    ".popsection",
    stack = const STACK_TOP,
    idt = const IDT,
    idt_limit = const (BREAKPOINT + 1) * 16 - 1,
    scratch = const SCRATCH,
    save = const SAVE_AREA,
    tables = const PAGE_TABLES,
    new_page = const NEW_PAGE,
    mark = const MARK,
    passed = const PASSED,
    port = const PORT,
);

unsafe extern "C" {
    static casemate_probe_start: u8;
    static casemate_probe_breakpoint: u8;
    static casemate_probe_end: u8;
}

/// Puts the guest into memory: code, descriptor tables, page tables.
pub(super) fn load(memory: &GuestMemory) -> Result<(), arch::Error> {
    let start = &raw const casemate_probe_start;
    let length = &raw const casemate_probe_end as usize - start as usize;
    // SAFETY: the assembler puts the bytes between both symbols into one read-only section.
    let code = unsafe { std::slice::from_raw_parts(start, length) };
    let handler = ENTRY + (&raw const casemate_probe_breakpoint as u64 - start as u64);
    memory.write(ENTRY, code)?;
    memory.write(GDT, &registers::gdt_bytes())?;
    memory.write(PAGE_TABLES, &registers::page_tables())?;
    memory.write(IDT + BREAKPOINT * 16, &gate(handler))
}

/// An interrupt gate of the IDT.
fn gate(handler: u64) -> [u8; 16] {
    let low = handler & 0xffff | CODE << 16 | GATE << 32 | (handler >> 16 & 0xffff) << 48;
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&low.to_le_bytes());
    bytes[8..].copy_from_slice(&(handler >> 32).to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gate_spreads_the_handlers_address() {
        let bytes = gate(0x1122_3344_5566_7788);

        assert_eq!(bytes[..8], [0x88, 0x77, 0x10, 0, 0, 0x8e, 0x66, 0x55]);
        assert_eq!(bytes[8..], [0x44, 0x33, 0x22, 0x11, 0, 0, 0, 0]);
    }

    #[test]
    fn load_fits_the_smallest_guest() {
        let memory = GuestMemory::allocate(crate::memory::MIN_MIB).expect("memory");

        load(&memory).expect("loaded");
    }
}
