//! The first vCPU's registers at `startup_64`: long mode, flat segments, the
//! first GiB mapped one to one.

use super::layout::{BOOT_PARAMS, GDT, PAGE_TABLES};
use super::{Error, kvm_error};
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// Fast string operations: Linux on Intel distrusts `rep movsb` without it.
const MISC_FAST_STRING: u64 = 1;
/// MTRRs on, all memory write-back: what a firmware would leave behind.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set; interrupts are off.
const RFLAGS: u64 = 2;

/// Selectors that Linux's boot protocol names: `__BOOT_CS` and `__BOOT_DS`.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;

const PAGE: usize = 4096;
const PRESENT_WRITABLE: u64 = 3;
const LARGE_PAGE: u64 = 1 << 7;

/// Null, unused, code, data.
pub fn gdt_bytes() -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[16..24].copy_from_slice(&CODE_DESCRIPTOR.to_le_bytes());
    bytes[24..].copy_from_slice(&DATA_DESCRIPTOR.to_le_bytes());
    bytes
}

/// PML4, PDPT and page directory: the first GiB in 2 MiB pages, for [`PAGE_TABLES`].
pub fn page_tables() -> Vec<u8> {
    let mut tables = vec![0; 3 * PAGE];
    let mut put = |page: usize, index: usize, entry: u64| {
        let at = page * PAGE + index * 8;
        tables[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    };
    put(0, 0, (PAGE_TABLES + PAGE as u64) | PRESENT_WRITABLE);
    put(1, 0, (PAGE_TABLES + 2 * PAGE as u64) | PRESENT_WRITABLE);
    for index in 0..512 {
        put(
            2,
            index,
            (index as u64) << 21 | PRESENT_WRITABLE | LARGE_PAGE,
        );
    }
    tables
}

/// MSRs that a firmware would have set.
pub fn set_msrs(vcpu: &VcpuFd) -> Result<(), Error> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[
        entry(MSR_IA32_MISC_ENABLE, MISC_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ])
    .expect("two entries fit");
    let set = vcpu.set_msrs(&msrs).map_err(kvm_error("set MSRs"))?;
    if set != msrs.as_slice().len() {
        return Err(kvm_error("set MSRs")(kvm_ioctls::Error::new(libc::EINVAL)));
    }
    Ok(())
}

/// Points a vCPU at `entry` in long mode with `boot_params` in RSI.
pub fn set_long_mode(vcpu: &VcpuFd, entry: u64) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(kvm_error("get segments"))?;
    sregs.cs = segment(CODE_SELECTOR, CODE_DESCRIPTOR);
    let data = segment(DATA_SELECTOR, DATA_DESCRIPTOR);
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = gdt_bytes().len() as u16 - 1;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).map_err(kvm_error("set segments"))?;
    let regs = kvm_regs {
        rip: entry,
        rsi: BOOT_PARAMS,
        rflags: RFLAGS,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(kvm_error("set registers"))
}

/// The hidden part of a flat segment, as its descriptor has it.
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let bits = |from: u32, count: u32| (descriptor >> from & ((1 << count) - 1)) as u8;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: bits(55, 1),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(tables: &[u8], page: usize, index: usize) -> u64 {
        let at = page * PAGE + index * 8;
        u64::from_le_bytes(tables[at..at + 8].try_into().expect("8 bytes"))
    }

    #[test]
    fn page_tables_map_first_gib_one_to_one() {
        let tables = page_tables();

        assert_eq!(entry(&tables, 0, 0), 0xa003);
        assert_eq!(entry(&tables, 1, 0), 0xb003);
        assert_eq!(entry(&tables, 2, 0), 0x83);
        assert_eq!(entry(&tables, 2, 511), 511 << 21 | 0x83);
    }

    #[test]
    fn code_segment_is_64_bit_and_accessed() {
        let code = segment(CODE_SELECTOR, CODE_DESCRIPTOR);

        assert_eq!((code.l, code.db, code.g), (1, 0, 1));
        assert_eq!((code.type_, code.s, code.present, code.dpl), (0xb, 1, 1, 0));
    }

    #[test]
    fn data_segment_is_writable() {
        let data = segment(DATA_SELECTOR, DATA_DESCRIPTOR);

        assert_eq!((data.type_, data.s, data.db, data.l), (3, 1, 1, 0));
    }
}
