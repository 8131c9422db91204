//! Where things are in guest physical memory and on the I/O ports.

/// Global descriptor table, three entries and a null one.
pub const GDT: u64 = 0x500;
/// `boot_params`, the "zero page".
pub const BOOT_PARAMS: u64 = 0x7000;
/// PML4, PDPT and page directory, a page each.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line with its terminator: Linux's own COMMAND_LINE_SIZE.
pub const CMDLINE_MAX: usize = 2048;
/// MP table, in the last KiB of conventional memory, where Linux looks for it early.
pub const MP_TABLE: u64 = 0x9_fc00;
/// Bytes that the MP table may take: up to the end of conventional memory.
pub const MP_TABLE_MAX: usize = 0x400;
/// Start of the legacy video and ROM area: not for the guest's kernel.
pub const LOW_MEMORY_END: u64 = MP_TABLE;
/// Memory from 1 MiB on is the kernel's.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// The hole below 4 GiB that holds devices, IO-APIC and local APIC.
pub const HOLE_START: u64 = 0xd000_0000;
/// First address behind the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// Virtio-mmio devices, a page each.
pub const VIRTIO_MMIO: u64 = HOLE_START;
/// Size of one virtio-mmio window.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Interrupt line of the first virtio device; each has one of its own. Line 0 is the timer's to Linux.
pub const FIRST_VIRTIO_IRQ: u8 = 1;
/// Last line of the IO-APIC.
pub const LAST_IRQ: u8 = 23;

/// IO-APIC registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Its interrupt lines.
pub const IO_APIC_PINS: usize = LAST_IRQ as usize + 1;
/// Local APIC registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page that KVM needs on old Intel processors (real mode without "unrestricted guest").
pub const IDENTITY_MAP: u64 = 0xfeff_c000;
/// Three pages that KVM needs for the same reason.
pub const TSS: u64 = 0xfeff_d000;

/// First I/O port of the serial console.
pub const SERIAL_PORT: u64 = 0x3f8;
/// Number of the serial console's ports.
pub const SERIAL_PORTS: u64 = 8;
/// Interrupt line of the serial console.
pub const SERIAL_IRQ: u8 = 4;
