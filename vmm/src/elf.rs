//! Loads an uncompressed ELF kernel straight from its file into guest memory.

use crate::arch::current::layout::HIGH_MEMORY;
use crate::memory::{GuestMemory, HUGE_PAGE};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

/// Program headers of a kernel; Linux has four or five.
const MAX_SEGMENTS: u16 = 32;
const HEADER: usize = 64;
const SEGMENT_HEADER: usize = 56;
/// `\x7fELF`, 64 bits, little-endian, version 1.
const IDENT: [u8; 7] = [0x7f, b'E', b'L', b'F', 2, 1, 1];
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;

/// Why a file is no kernel that can be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file ended early or could not be read.
    #[error("kernel: can't read {what}: the file is truncated or unreadable")]
    Read {
        /// What was being read.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("kernel: {0}: an uncompressed x86_64 vmlinux is needed")]
    Format(String),
    /// It doesn't fit into the guest.
    #[error(
        "kernel: segment at {start:#x}..{end:#x} lies outside of guest memory {low:#x}..{high:#x}: give the guest more memory"
    )]
    Range {
        /// First address.
        start: u64,
        /// Address behind it.
        end: u64,
        /// First address a kernel may use.
        low: u64,
        /// Address behind the last.
        high: u64,
    },
}

/// Where the kernel lies now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// Physical address of the entry point.
    pub entry: u64,
    /// First address behind the kernel, bss included.
    pub end: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

/// Reads each loadable segment to its physical address. The rest of guest memory must still be zero.
pub fn load(memory: &GuestMemory, file: &File) -> Result<Loaded, Error> {
    let (entry, segments) = read_headers(file)?;
    let (low, high) = (HIGH_MEMORY, memory.map().log_start());
    let mut end = 0;
    spare_huge_pages(memory, &segments);
    for segment in &segments {
        let start = segment.address;
        let segment_end = start.saturating_add(segment.memory_size);
        if start < low || segment_end > high || segment.file_size > segment.memory_size {
            return Err(Error::Range {
                start,
                end: segment_end,
                low,
                high,
            });
        }
        end = end.max(segment_end);
        memory
            .read_file(start, file, segment.offset, segment.file_size)
            .map_err(|source| Error::Read {
                what: "a segment",
                source,
            })?;
    }
    if !segments
        .iter()
        .any(|s| (s.address..s.address + s.file_size).contains(&entry))
    {
        return Err(Error::Format(format!(
            "its entry point {entry:#x} is in no segment"
        )));
    }
    Ok(Loaded { entry, end })
}

/// Linux aligns its sections to huge pages, and fills some of those with a page or two.
fn spare_huge_pages(memory: &GuestMemory, segments: &[Segment]) {
    let mut filled = BTreeMap::new();
    for segment in segments {
        let end = segment.address.saturating_add(segment.file_size);
        let mut at = segment.address;
        while at < end.min(memory.map().low_end()) {
            let block = at / HUGE_PAGE;
            let stop = end.min((block + 1) * HUGE_PAGE);
            *filled.entry(block).or_insert(0) += stop - at;
            at = stop;
        }
    }
    for (block, bytes) in filled {
        if bytes < HUGE_PAGE / 8 {
            memory.use_small_pages(block * HUGE_PAGE, HUGE_PAGE);
        }
    }
}

fn read_headers(mut file: impl Read + Seek) -> Result<(u64, Vec<Segment>), Error> {
    let read = |what| move |source| Error::Read { what, source };
    let mut header = [0; HEADER];
    file.rewind().map_err(read("the ELF header"))?;
    file.read_exact(&mut header)
        .map_err(read("the ELF header"))?;
    if header[..7] != IDENT {
        return Err(Error::Format(format!(
            "starts with {:02x?}, no 64-bit ELF",
            &header[..7]
        )));
    }
    let (machine, count, size) = (
        u16_at(&header, 18),
        u16_at(&header, 56),
        u16_at(&header, 54),
    );
    if machine != MACHINE_X86_64 {
        return Err(Error::Format(format!("is for ELF machine {machine}")));
    }
    if usize::from(size) != SEGMENT_HEADER || count == 0 || count > MAX_SEGMENTS {
        return Err(Error::Format(format!(
            "has {count} program headers of {size} bytes"
        )));
    }
    let mut table = vec![0; SEGMENT_HEADER * usize::from(count)];
    file.seek(SeekFrom::Start(u64_at(&header, 32)))
        .map_err(read("the program headers"))?;
    file.read_exact(&mut table)
        .map_err(read("the program headers"))?;
    let segments: Vec<_> = table
        .chunks_exact(SEGMENT_HEADER)
        .filter(|h| u32::from_le_bytes([h[0], h[1], h[2], h[3]]) == PT_LOAD)
        .map(|h| Segment {
            offset: u64_at(h, 8),
            address: u64_at(h, 24),
            file_size: u64_at(h, 32),
            memory_size: u64_at(h, 40),
        })
        .filter(|s| s.memory_size != 0)
        .collect();
    Ok((u64_at(&header, 24), segments))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress};

    const LOAD_AT: u64 = 0x100_0000;

    /// A kernel of one segment holding `body` with `bss` zero bytes behind it.
    fn image(address: u64, body: &[u8], bss: u64) -> Vec<u8> {
        let mut bytes = vec![0; HEADER + SEGMENT_HEADER];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &IDENT);
        put(18, &MACHINE_X86_64.to_le_bytes());
        put(24, &address.to_le_bytes());
        put(32, &(HEADER as u64).to_le_bytes());
        put(54, &(SEGMENT_HEADER as u16).to_le_bytes());
        put(56, &1u16.to_le_bytes());
        put(HEADER, &PT_LOAD.to_le_bytes());
        put(
            HEADER + 8,
            &((HEADER + SEGMENT_HEADER) as u64).to_le_bytes(),
        );
        put(HEADER + 24, &address.to_le_bytes());
        put(HEADER + 32, &(body.len() as u64).to_le_bytes());
        put(HEADER + 40, &(body.len() as u64 + bss).to_le_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    fn load_bytes(bytes: &[u8]) -> Result<(Loaded, GuestMemory), Error> {
        let mut file = tempfile::tempfile().expect("temporary file");
        file.write_all(bytes).expect("written");
        let memory = GuestMemory::allocate(32).expect("memory");
        load(&memory, &file).map(|loaded| (loaded, memory))
    }

    #[test]
    fn load_valid_kernel_places_it() {
        let (loaded, memory) = load_bytes(&image(LOAD_AT, b"kernel", 100)).expect("valid");

        let mut read = [0; 6];
        memory
            .mmap()
            .read_slice(&mut read, GuestAddress(LOAD_AT))
            .expect("memory");
        assert_eq!(&read, b"kernel");
        assert_eq!(
            loaded,
            Loaded {
                entry: LOAD_AT,
                end: LOAD_AT + 106
            }
        );
    }

    #[test]
    fn load_truncated_kernel_says_so() {
        let whole = image(LOAD_AT, &[7; 4096], 0);
        for length in [0, 3, HEADER, HEADER + 10, whole.len() - 1] {
            let error = load_bytes(&whole[..length]).expect_err("truncated");

            assert!(error.to_string().contains("truncated"), "{length}: {error}");
        }
    }

    #[test]
    fn load_bzimage_asks_for_vmlinux() {
        let error = load_bytes(&[0x4d; 4096]).expect_err("no ELF");

        assert!(error.to_string().contains("uncompressed"), "{error}");
    }

    #[test]
    fn load_outside_of_memory_names_both_ranges() {
        for address in [0, HIGH_MEMORY - 1, 32 << 20, u64::MAX - 3] {
            let error = load_bytes(&image(address, b"kernel", 0)).expect_err("outside");

            assert!(
                matches!(error, Error::Range { .. }),
                "{address:#x}: {error}"
            );
        }
    }

    #[test]
    fn load_too_large_bss_is_refused() {
        let error = load_bytes(&image(LOAD_AT, b"kernel", 32 << 20)).expect_err("too large");

        assert!(matches!(error, Error::Range { .. }), "{error}");
    }

    #[test]
    fn load_entry_outside_of_segments_is_refused() {
        let mut bytes = image(LOAD_AT, b"kernel", 0);
        bytes[24..32].copy_from_slice(&(LOAD_AT + 6).to_le_bytes());

        let error = load_bytes(&bytes).expect_err("entry outside");

        assert!(error.to_string().contains("entry point"), "{error}");
    }

    proptest! {
        #[test]
        fn load_mangled_header_never_panics(at in 0usize..HEADER + SEGMENT_HEADER, value: [u8; 8]) {
            let mut bytes = image(LOAD_AT, b"kernel", 16);
            for (slot, byte) in bytes[at..].iter_mut().zip(value) {
                *slot = byte;
            }
            let _ = load_bytes(&bytes);
        }
    }
}
