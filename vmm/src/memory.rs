//! Guest memory around the device hole, made known to KVM: private anonymous pages, or a memory file where a device's other
//! half is a process of its own.
#![allow(unsafe_code)] // reason: madvise and KVM_SET_USER_MEMORY_REGION take addresses

use crate::arch::current::{self as arch, layout};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::sync::Arc;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap,
};

/// Smallest guest: its kernel and agent need most of this.
pub const MIN_MIB: u32 = 32;
/// Largest guest: 1 TiB.
pub const MAX_MIB: u32 = 1 << 20;
/// Size of a huge page on the host, and of the block that shares a fate in [`GuestMemory::use_small_pages`].
pub const HUGE_PAGE: u64 = 2 << 20;
/// The guest's kernel log, at the end of low memory: a ramoops zone.
pub const LOG_SIZE: u64 = 64 << 10;

/// Why guest memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused the mapping.
    #[error(
        "can't map {mib} MiB of guest memory: lower the guest's memory or free some of the host's"
    )]
    Map {
        /// Size asked for.
        mib: u32,
        /// The system's answer.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The host gave no memory file.
    #[error("can't make a memory file for the guest")]
    File(#[source] io::Error),
    /// Regions overlap: the memory map is wrong.
    #[error("memory regions")]
    Regions(#[source] vm_memory::GuestRegionCollectionError),
}

/// Which guest physical addresses are memory: a pure function of its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryMap {
    bytes: u64,
}

impl MemoryMap {
    /// The map of a guest with so much memory.
    pub fn new(mib: u32) -> Self {
        Self {
            bytes: u64::from(mib) << 20,
        }
    }

    /// End of the memory below the hole.
    pub fn low_end(&self) -> u64 {
        self.bytes.min(layout::HOLE_START)
    }

    /// Start of the guest log, which ends at [`Self::low_end`].
    pub fn log_start(&self) -> u64 {
        self.low_end() - LOG_SIZE
    }

    /// End of the memory above the hole; the hole's end if there is none.
    pub fn high_end(&self) -> u64 {
        layout::HOLE_END + (self.bytes - self.low_end())
    }
}

/// The guest's memory; clones of [`GuestMemory::mmap`] share it.
#[derive(Debug)]
pub struct GuestMemory {
    map: MemoryMap,
    mmap: GuestMemoryMmap,
}

impl GuestMemory {
    /// Reserves address space; the host gives pages as the guest touches them.
    pub fn allocate(mib: u32) -> Result<Self, Error> {
        Self::build(mib, None)
    }

    /// The same, of a memory file that another process can map.
    pub fn allocate_shared(mib: u32) -> Result<Self, Error> {
        let file = memory_file(u64::from(mib) << 20).map_err(Error::File)?;
        Self::build(mib, Some(Arc::new(file)))
    }

    fn build(mib: u32, file: Option<Arc<File>>) -> Result<Self, Error> {
        let map = MemoryMap::new(mib);
        let part = |offset| file.clone().map(|file| FileOffset::from_arc(file, offset));
        let mut regions = vec![region(mib, 0, map.low_end(), part(0))?];
        if map.high_end() > layout::HOLE_END {
            let size = map.high_end() - layout::HOLE_END;
            regions.push(region(mib, layout::HOLE_END, size, part(map.low_end()))?);
        }
        let mmap = GuestMemoryMmap::from_regions(regions).map_err(Error::Regions)?;
        Ok(Self { map, mmap })
    }

    /// Which addresses are memory.
    pub fn map(&self) -> &MemoryMap {
        &self.map
    }

    /// The mapping that devices work on.
    pub fn mmap(&self) -> &GuestMemoryMmap {
        &self.mmap
    }

    /// Copies `bytes` to a guest physical address.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), arch::Error> {
        self.mmap
            .write_slice(bytes, GuestAddress(address))
            .map_err(|source| arch::Error::Memory { address, source })
    }

    /// Reads part of a file to a guest physical address. (A mapping and a copy instead of
    /// `read` cost a third more instructions: 7.7 against 5.7 million for 12 MB.)
    pub fn read_file(
        &self,
        address: u64,
        mut file: &File,
        offset: u64,
        size: u64,
    ) -> io::Result<()> {
        file.seek(SeekFrom::Start(offset))?;
        self.mmap
            .read_exact_volatile_from(GuestAddress(address), &mut file, size as usize)
            .map_err(io::Error::other)
    }

    /// Keeps huge pages away from where little of one would be used: clearing the rest of it
    /// takes longer than some small faults, and the guest would hold all of it.
    pub fn use_small_pages(&self, start: u64, size: u64) {
        let slice = self.mmap.get_slice(GuestAddress(start), size as usize);
        if let Ok(slice) = slice {
            // SAFETY: the range is within a mapping, and the advice leaves its contents as they are.
            // A refusal costs time only.
            let _ = unsafe {
                let guard = slice.ptr_guard_mut();
                libc::madvise(guard.as_ptr().cast(), size as usize, libc::MADV_NOHUGEPAGE)
            };
        }
    }

    /// Makes every region a memory slot of the VM.
    pub fn register(&self, vm: &VmFd) -> Result<(), arch::Error> {
        for (slot, region) in self.mmap.iter().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                flags: 0,
            };
            // SAFETY: the range is a mapping of that size; vCPUs and devices stop before it is unmapped,
            // because the process ends by `exit` and never drops a VM that runs.
            unsafe { vm.set_user_memory_region(slot) }
                .map_err(arch::kvm_error("set a memory region"))?;
        }
        Ok(())
    }
}

/// A memory file whose size nobody can change: a part that went missing would kill who touches it.
fn memory_file(size: u64) -> io::Result<File> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("guest-memory", flags)?;
    rustix::fs::ftruncate(&fd, size)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(fd.into())
}

fn region(
    mib: u32,
    start: u64,
    size: u64,
    file: Option<FileOffset>,
) -> Result<GuestRegionMmap, Error> {
    let builder =
        MmapRegionBuilder::new(size as usize).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    let builder = match file {
        None => {
            builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        }
        Some(part) => builder
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(part),
    };
    let mapping = builder
        .build()
        .map_err(|source| Error::Map { mib, source })?;
    // Fewer, larger faults while the guest boots; the host's administrator has the last word
    // (/sys/kernel/mm/transparent_hugepage/enabled), so a refusal is no error.
    let _ = advise(&mapping, libc::MADV_HUGEPAGE);
    let _ = advise(&mapping, libc::MADV_DONTDUMP);
    Ok(GuestRegionMmap::new(mapping, GuestAddress(start)).expect("below 2^64"))
}

fn advise(mapping: &vm_memory::MmapRegion, advice: i32) -> io::Result<()> {
    // SAFETY: both kinds of advice used here leave the contents as they are; the range is the mapping's own.
    match unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_below_hole_has_no_high_memory() {
        let map = MemoryMap::new(128);

        assert_eq!(map.low_end(), 128 << 20);
        assert_eq!(map.log_start(), (128 << 20) - LOG_SIZE);
        assert_eq!(map.high_end(), layout::HOLE_END);
    }

    #[test]
    fn map_above_hole_keeps_the_size() {
        let map = MemoryMap::new(4096);

        assert_eq!(map.low_end(), layout::HOLE_START);
        assert_eq!(map.high_end() - layout::HOLE_END + map.low_end(), 4 << 30);
    }

    #[test]
    fn allocate_above_hole_leaves_hole_unmapped() {
        let memory = GuestMemory::allocate(4096).expect("address space");

        memory
            .write(layout::HOLE_START - 4, b"last")
            .expect("memory");
        memory.write(layout::HOLE_END, b"high").expect("memory");
        assert!(memory.write(layout::HOLE_START, b"hole").is_err());
        assert!(memory.write(layout::HOLE_START - 2, b"span").is_err());
    }

    #[test]
    fn allocate_shared_puts_both_regions_into_one_file_of_fixed_size() {
        let memory = GuestMemory::allocate_shared(4096).expect("address space");

        memory.write(layout::HOLE_END, b"high").expect("memory");
        let region = memory.mmap().iter().last().expect("two regions");
        let part = region.file_offset().expect("a file");
        assert_eq!(part.start(), memory.map().low_end());
        let mut found = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(part.file(), &mut found, part.start())
            .expect("the file");
        assert_eq!(&found, b"high");
        assert!(part.file().set_len(1).is_err());
    }

    #[test]
    fn allocate_beyond_address_space_names_the_size() {
        let error = GuestMemory::allocate(u32::MAX).expect_err("4 PiB");

        assert!(error.to_string().contains("4294967295 MiB"), "{error}");
    }
}
