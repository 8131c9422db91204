//! The numbers of the on-disk format (Linux, Documentation/filesystems/erofs.rst).

/// Bytes of a block.
pub(crate) const BLOCK: u64 = 4096;
pub(super) const BLOCK_BITS: u8 = 12;

pub(super) const SUPER_OFFSET: usize = 1024;
pub(super) const SUPER_SIZE: usize = 128;
pub(super) const MAGIC: u32 = 0xe0f5_e1e2;

pub(super) const COMPAT_CHECKSUM: u32 = 1;
pub(super) const COMPAT_MTIME: u32 = 2;
pub(super) const INCOMPAT_CHUNKED: u32 = 4;
pub(super) const INCOMPAT_DEVICES: u32 = 8;

/// Bytes of an entry of the device table.
pub(super) const DEVICE_SLOT: usize = 128;
/// The table follows the superblock at once; its offset counts in slots.
pub(super) const DEVICE_TABLE_SLOT: u16 = ((SUPER_OFFSET + SUPER_SIZE) / DEVICE_SLOT) as u16;

/// Inodes are numbered by their place in the metadata area, in units of this.
pub(super) const INODE_UNIT: u64 = 32;
pub(super) const COMPACT_SIZE: usize = 32;
pub(super) const EXTENDED_SIZE: usize = 64;

pub(super) const LAYOUT_PLAIN: u16 = 0;
pub(super) const LAYOUT_INLINE: u16 = 2;
pub(super) const LAYOUT_CHUNKED: u16 = 4;

/// Bytes of a chunk index, and the flag that says it has a device number.
pub(super) const CHUNK_INDEX: u64 = 8;
pub(super) const CHUNK_INDEXES_FLAG: u16 = 0x20;
pub(super) const CHUNK_BITS_MASK: u16 = 0x1f;
/// The address of a hole.
pub(super) const NO_BLOCK: u32 = u32::MAX;

pub(super) const DIRENT: usize = 12;

pub(super) const XATTR_HEADER: usize = 12;

pub(super) const S_IFMT: u16 = 0o170_000;
pub(super) const S_IFSOCK: u16 = 0o140_000;
pub(super) const S_IFLNK: u16 = 0o120_000;
pub(super) const S_IFREG: u16 = 0o100_000;
pub(super) const S_IFBLK: u16 = 0o060_000;
pub(super) const S_IFDIR: u16 = 0o040_000;
pub(super) const S_IFCHR: u16 = 0o020_000;
pub(super) const S_IFIFO: u16 = 0o010_000;

/// File type of a directory entry, from the type bits of a mode.
pub(super) fn dirent_type(mode: u16) -> u8 {
    match mode & S_IFMT {
        S_IFREG => 1,
        S_IFDIR => 2,
        S_IFCHR => 3,
        S_IFBLK => 4,
        S_IFIFO => 5,
        S_IFSOCK => 6,
        S_IFLNK => 7,
        _ => 0,
    }
}

/// Blocks that hold so many bytes.
pub(crate) fn block_count(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK)
}

pub(super) fn align(position: u64, unit: u64) -> u64 {
    position.next_multiple_of(unit)
}

/// CRC-32C as EROFS keeps it: seeded with all ones, not inverted at the end.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    !crc32c::crc32c(bytes)
}
