//! Intel MultiProcessor Specification 1.4 tables: processors, one ISA bus, one
//! IO-APIC and the interrupt lines in use. An entry costs the guest IO-APIC
//! accesses (VM exits), so unused lines have none.

use super::layout::{IO_APIC, LOCAL_APIC, MP_TABLE, MP_TABLE_MAX};

const SPEC_1_4: u8 = 4;
/// Version of the local APICs and the IO-APIC that KVM emulates.
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const FLOATING_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL: u8 = 4;

const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
const ALL_LAPICS: u8 = 0xff;

/// The floating pointer and the table right behind it, for [`MP_TABLE`].
pub fn build(vcpus: u8, irqs: &[u8]) -> Vec<u8> {
    let ioapic_id = vcpus; // ids of local APICs are 0 .. vcpus
    let mut entries = Vec::with_capacity(MP_TABLE_MAX);
    let mut count = 0u16;
    let mut push = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for cpu in 0..vcpus {
        let flags = ENABLED | if cpu == 0 { BOOT_PROCESSOR } else { 0 };
        let mut entry = [0u8; 20];
        entry[..4].copy_from_slice(&[ENTRY_PROCESSOR, cpu, LAPIC_VERSION, flags]);
        push(&entry);
    }
    push(&[ENTRY_BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = IO_APIC.to_le_bytes();
    push(&[ENTRY_IOAPIC, ioapic_id, IOAPIC_VERSION, ENABLED, a, b, c, d]);
    for &irq in irqs {
        // Flags 0: as the ISA bus has it, edge-triggered and active high; so irqfd wants it.
        push(&[ENTRY_INTERRUPT, INT, 0, 0, 0, irq, ioapic_id, irq]);
    }
    push(&[ENTRY_LOCAL, EXT_INT, 0, 0, 0, 0, 0, 0]);
    push(&[ENTRY_LOCAL, NMI, 0, 0, 0, 0, ALL_LAPICS, 1]);

    let mut table = floating_pointer();
    table.extend(header(&entries, count));
    table.extend(entries);
    assert!(table.len() <= MP_TABLE_MAX, "at most 32 vCPUs and 20 lines");
    table
}

fn floating_pointer() -> Vec<u8> {
    let mut mpf = [0u8; FLOATING_SIZE];
    mpf[..4].copy_from_slice(b"_MP_");
    mpf[4..8].copy_from_slice(&(MP_TABLE as u32 + FLOATING_SIZE as u32).to_le_bytes());
    mpf[8] = 1; // length in paragraphs of 16 bytes
    mpf[9] = SPEC_1_4;
    mpf[10] = checksum(&[&mpf]);
    mpf.to_vec()
}

fn header(entries: &[u8], count: u16) -> Vec<u8> {
    let mut header = [0u8; HEADER_SIZE];
    header[..4].copy_from_slice(b"PCMP");
    header[4..6].copy_from_slice(&((HEADER_SIZE + entries.len()) as u16).to_le_bytes());
    header[6] = SPEC_1_4;
    header[8..16].copy_from_slice(b"CASEMATE");
    header[16..28].copy_from_slice(b"MICROVM     ");
    header[34..36].copy_from_slice(&count.to_le_bytes());
    header[36..40].copy_from_slice(&LOCAL_APIC.to_le_bytes());
    header[7] = checksum(&[&header, entries]);
    header.to_vec()
}

/// The byte that makes the sum of all parts zero.
fn checksum(parts: &[&[u8]]) -> u8 {
    let sum = parts
        .iter()
        .flat_map(|part| part.iter())
        .fold(0u8, |sum, &byte| sum.wrapping_add(byte));
    0u8.wrapping_sub(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums_to_zero(bytes: &[u8]) -> bool {
        bytes.iter().fold(0u8, |s, &b| s.wrapping_add(b)) == 0
    }

    /// Entries by type, walked as the guest's kernel does.
    fn walk(table: &[u8]) -> Vec<&[u8]> {
        let mut rest = &table[FLOATING_SIZE + HEADER_SIZE..];
        let mut entries = Vec::new();
        while let Some(&kind) = rest.first() {
            let (entry, tail) = rest.split_at(if kind == ENTRY_PROCESSOR { 20 } else { 8 });
            entries.push(entry);
            rest = tail;
        }
        entries
    }

    #[test]
    fn build_any_machine_has_valid_checksums_and_lengths() {
        for vcpus in [1, 2, 31, 32] {
            let table = build(vcpus, &[4, 5, 6, 23]);

            let length = usize::from(u16::from_le_bytes([table[20], table[21]]));
            assert!(sums_to_zero(&table[..FLOATING_SIZE]));
            assert!(sums_to_zero(&table[FLOATING_SIZE..]));
            assert_eq!(table.len(), FLOATING_SIZE + length);
        }
    }

    #[test]
    fn build_largest_machine_fits() {
        let irqs: Vec<u8> = (4..=23).collect();

        let table = build(32, &irqs);

        assert!(table.len() <= MP_TABLE_MAX, "{}", table.len());
    }

    #[test]
    fn build_two_vcpus_has_one_boot_processor() {
        let table = build(2, &[5]);

        let flags: Vec<u8> = walk(&table)
            .iter()
            .filter(|e| e[0] == ENTRY_PROCESSOR)
            .map(|e| e[3])
            .collect();
        assert_eq!(flags, [ENABLED | BOOT_PROCESSOR, ENABLED]);
    }

    #[test]
    fn build_lists_only_lines_in_use() {
        let table = build(1, &[5, 17]);

        let lines: Vec<u8> = walk(&table)
            .iter()
            .filter(|e| e[0] == ENTRY_INTERRUPT)
            .map(|e| e[7])
            .collect();
        assert_eq!(lines, [5, 17]);
    }

    #[test]
    fn build_entry_count_matches_header() {
        let table = build(3, &[5, 6]);

        let counted = u16::from_le_bytes([table[FLOATING_SIZE + 34], table[FLOATING_SIZE + 35]]);
        assert_eq!(usize::from(counted), walk(&table).len());
        assert_eq!(walk(&table)[3][0], ENTRY_BUS);
    }
}
