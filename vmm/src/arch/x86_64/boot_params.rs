//! Linux's `boot_params` with the e820 memory map.

use super::{BootInfo, layout};
use crate::memory::MemoryMap;
use linux_loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::ByteValued;

const E820_RAM: u32 = 1;
/// "HdrS": the boot protocol's magic.
const HEADER_MAGIC: u32 = 0x5372_6448;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
/// Alignment of the kernel; only bzImage decompressors read it.
const KERNEL_ALIGNMENT: u32 = 0x20_0000;

/// `boot_params` as plain bytes.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub struct Bytes(boot_params);

#[allow(unsafe_code)] // reason: the one promise that vm-memory can't check itself
// SAFETY: `boot_params` is packed plain data, any bit pattern is valid and there is no padding.
unsafe impl ByteValued for Bytes {}

/// The bytes to write at [`layout::BOOT_PARAMS`].
pub fn bytes(params: &Bytes) -> &[u8] {
    params.as_slice()
}

/// Builds `boot_params` for a kernel that is entered at `startup_64`.
pub fn build(map: &MemoryMap, boot: &BootInfo<'_>) -> Bytes {
    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = boot.cmdline.len() as u32;
    if let Some((address, size)) = boot.initrd {
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = size as u32;
    }
    for (slot, entry) in params.e820_table.iter_mut().zip(e820(map)) {
        *slot = entry;
        params.e820_entries += 1;
    }
    Bytes(params)
}

/// The memory map: conventional memory, memory from 1 MiB up to the guest log, memory above
/// the hole. What lies between isn't listed, which keeps the guest off it as well as an entry
/// would: Linux goes through all entries some thousand times while it maps memory.
fn e820(map: &MemoryMap) -> impl Iterator<Item = boot_e820_entry> {
    let ram = |addr: u64, end: u64| boot_e820_entry {
        addr,
        size: end.saturating_sub(addr),
        r#type: E820_RAM,
    };
    [
        ram(0, layout::LOW_MEMORY_END),
        ram(layout::HIGH_MEMORY, map.log_start()),
        ram(layout::HOLE_END, map.high_end()),
    ]
    .into_iter()
    .filter(|entry| entry.size != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(initrd: Option<(u64, u64)>) -> BootInfo<'static> {
        BootInfo {
            entry: 0x100_0000,
            cmdline: "quiet",
            initrd,
            vcpus: 1,
            irqs: &[],
        }
    }

    fn map_of(mib: u32) -> Vec<(u64, u64, u32)> {
        e820(&MemoryMap::new(mib))
            .map(|e| (e.addr, e.size, e.r#type))
            .collect()
    }

    #[test]
    fn e820_small_guest_leaves_out_log_at_top() {
        let entries = map_of(128);

        let log = 64 << 10;
        assert_eq!(
            entries,
            [(0, 0x9fc00, 1), (0x10_0000, (127 << 20) - log, 1),]
        );
    }

    #[test]
    fn e820_large_guest_continues_above_hole() {
        let entries = map_of(8192);

        let above = entries.last().copied();
        assert_eq!(above, Some((1 << 32, (8 << 30) - 0xd000_0000, 1)));
        assert_eq!(entries.len(), 3);
    }

    #[test]
    fn e820_any_size_has_sorted_disjoint_entries_of_all_but_log_and_rom_area() {
        for mib in [32, 64, 3327, 3328, 3329, 4096, 1 << 20] {
            let entries = map_of(mib);

            for pair in entries.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{mib} MiB: {pair:x?}");
            }
            let total: u64 = entries.iter().map(|e| e.1).sum();
            let left_out = (64 << 10) + (layout::HIGH_MEMORY - layout::LOW_MEMORY_END);
            assert_eq!(total, (u64::from(mib) << 20) - left_out);
        }
    }

    #[test]
    fn build_with_initrd_names_its_place() {
        let params = build(&MemoryMap::new(64), &boot(Some((0x200_0000, 0x1234)))).0;

        let (image, size, entries) = (
            params.hdr.ramdisk_image,
            params.hdr.ramdisk_size,
            params.e820_entries,
        );
        assert_eq!((image, size, entries), (0x200_0000, 0x1234, 2));
    }

    #[test]
    fn bytes_are_one_page() {
        assert_eq!(bytes(&build(&MemoryMap::new(64), &boot(None))).len(), 4096);
    }
}
