//! What a disk is made of: files laid end to end, each padded to the next 4 KiB.

// fallocate has no safe wrapper among the crates at hand.
#![allow(unsafe_code)]

use crate::virtio::buffers::Buffers;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};

/// Each file starts at a multiple of it: EROFS and ext4 address disks in such blocks.
pub(super) const SEGMENT_ALIGN: u64 = 4096;

/// Largest disk: its sectors still count in an i64 of bytes, with room to add one request.
const MAX_DISK: u64 = 1 << 60;

#[derive(Debug)]
struct Segment {
    file: File,
    /// First byte on the disk.
    start: u64,
    /// Bytes in the file.
    len: u64,
    /// `len` and its padding.
    padded: u64,
    /// Written since the last flush.
    dirty: bool,
}

/// The files of a disk.
#[derive(Debug)]
pub(super) struct Backing {
    segments: Vec<Segment>,
    capacity: u64,
    /// Nobody reads the files after the VM's end.
    volatile: bool,
}

impl Backing {
    /// Lays `files` end to end; none: a disk of no size.
    pub(super) fn new(files: Vec<File>, volatile: bool) -> io::Result<Self> {
        let mut segments = Vec::with_capacity(files.len());
        let mut start = 0u64;
        for mut file in files {
            // Unlike the metadata's length, right for block devices too.
            let len = file.seek(SeekFrom::End(0))?;
            let padded = len
                .checked_next_multiple_of(SEGMENT_ALIGN)
                .filter(|padded| start.checked_add(*padded).is_some_and(|end| end <= MAX_DISK))
                .ok_or_else(|| {
                    let why = format!("a file of {len} bytes at {start} makes the disk larger than {MAX_DISK} bytes");
                    io::Error::new(io::ErrorKind::FileTooLarge, why)
                })?;
            segments.push(Segment {
                file,
                start,
                len,
                padded,
                dirty: false,
            });
            start += padded;
        }
        // An empty file takes no room and is never the segment of an offset.
        segments.retain(|segment| segment.padded > 0);
        Ok(Backing {
            segments,
            capacity: start,
            volatile,
        })
    }

    /// Bytes on the disk, a multiple of 4096.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Whether `len` bytes at `offset` are on the disk.
    pub(super) fn contains(&self, offset: u64, len: u64) -> bool {
        offset
            .checked_add(len)
            .is_some_and(|end| end <= self.capacity)
    }

    /// Fills `count` bytes of `buffers` from the disk.
    pub(super) fn read(
        &self,
        mut offset: u64,
        mut count: usize,
        buffers: &mut Buffers,
    ) -> io::Result<()> {
        while count > 0 {
            let segment = &self.segments[self.find(offset)?];
            let within = offset - segment.start;
            let n = count.min(to_usize(segment.padded - within));
            let done = if within >= segment.len {
                buffers.write_zeros(n);
                n
            } else {
                let in_file = n.min(to_usize(segment.len - within));
                match buffers.read_at(segment.file.as_fd(), within, in_file)? {
                    // The file was cut short behind our back: an error is better than made-up zeros.
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    done => done,
                }
            };
            offset += done as u64;
            count -= done;
        }
        Ok(())
    }

    /// Writes `count` bytes of `buffers` to the disk.
    pub(super) fn write(
        &mut self,
        mut offset: u64,
        mut count: usize,
        buffers: &mut Buffers,
    ) -> io::Result<()> {
        while count > 0 {
            let index = self.find(offset)?;
            let segment = &mut self.segments[index];
            let within = offset - segment.start;
            let n = count.min(to_usize(segment.padded - within));
            segment.dirty = true;
            let done = buffers.write_at(segment.file.as_fd(), within, n)?;
            if done == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            // A write into the padding makes the file longer, up to its padded end.
            segment.len = segment.len.max(within + done as u64);
            offset += done as u64;
            count -= done;
        }
        Ok(())
    }

    /// Makes `len` bytes read as zeros; with `unmap` their blocks are given back to the host.
    pub(super) fn zero(&mut self, mut offset: u64, mut len: u64, unmap: bool) -> io::Result<()> {
        while len > 0 {
            let index = self.find(offset)?;
            let segment = &mut self.segments[index];
            let within = offset - segment.start;
            let n = len.min(segment.padded - within);
            // The padding is zeros already.
            let in_file = n.min(segment.len.saturating_sub(within));
            if in_file > 0 {
                segment.dirty = true;
                zero_range(&segment.file, within, in_file, unmap)?;
            }
            offset += n;
            len -= n;
        }
        Ok(())
    }

    /// Makes durable what was written, unless nobody needs it.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.volatile {
            return Ok(());
        }
        for segment in self.segments.iter_mut().filter(|segment| segment.dirty) {
            segment.file.sync_data()?;
            segment.dirty = false;
        }
        Ok(())
    }

    /// Index of the segment that holds byte `offset`.
    fn find(&self, offset: u64) -> io::Result<usize> {
        let index = self
            .segments
            .partition_point(|segment| segment.start + segment.padded <= offset);
        if index < self.segments.len() {
            Ok(index)
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }
}

/// Requests are far smaller than usize::MAX: saturating is exact enough.
fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn zero_range(file: &File, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let zero = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    // Each file system knows the one or the other; both leave zeros behind.
    let modes = if unmap { [punch, zero] } else { [zero, punch] };
    match fallocate(file, modes[0], offset, len) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            fallocate(file, modes[1], offset, len)
        }
        result => result,
    }
}

fn fallocate(file: &File, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    let too_large = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let offset = libc::off_t::try_from(offset).map_err(too_large)?;
    let len = libc::off_t::try_from(len).map_err(too_large)?;
    loop {
        // SAFETY: a call on an open descriptor, no memory involved.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(volatile: bool) -> Backing {
        let file = tempfile::tempfile().expect("file");
        file.set_len(SEGMENT_ALIGN).expect("length");
        let mut backing = Backing::new(vec![file], volatile).expect("backing");
        backing.zero(0, 512, false).expect("zeroed");
        backing
    }

    #[test]
    fn flush_of_a_disk_syncs_what_was_written() {
        let mut backing = written(false);
        assert!(backing.segments[0].dirty);

        backing.flush().expect("flushed");

        assert!(!backing.segments[0].dirty);
    }

    #[test]
    fn flush_of_a_volatile_disk_syncs_nothing() {
        let mut backing = written(true);

        backing.flush().expect("flushed");

        assert!(backing.segments[0].dirty, "still waits for a sync");
    }
}
