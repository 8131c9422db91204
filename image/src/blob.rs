//! The file a layer's image is written to: file data appended block by block while the archive streams in.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt as _;

use crate::erofs::BLOCK;

/// Bytes gathered before they go to the kernel: large enough that system calls don't show, small enough for a cache.
const BUFFER: usize = 512 * 1024;

/// An append-only blob whose holes stay holes in the file.
pub(crate) struct Blob<'a> {
    file: &'a File,
    buffer: Vec<u8>,
    /// Where the buffer's first byte goes.
    flushed: u64,
}

impl<'a> Blob<'a> {
    /// Appends to `file` from `start` on.
    pub(crate) fn new(file: &'a File, start: u64) -> Self {
        Self {
            file,
            buffer: Vec::with_capacity(BUFFER),
            flushed: start,
        }
    }

    /// Where the next byte goes.
    pub(crate) fn position(&self) -> u64 {
        self.flushed + self.buffer.len() as u64
    }

    /// Leaves a hole up to `position`.
    pub(crate) fn skip_to(&mut self, position: u64) -> io::Result<()> {
        let gap = position - self.position();
        if gap < BLOCK {
            return self.write_all(&[0; BLOCK as usize][..gap as usize]);
        }
        self.send()?;
        self.flushed = position;
        Ok(())
    }

    /// Fills the last block with zeros.
    pub(crate) fn fill_block(&mut self) -> io::Result<()> {
        self.skip_to(self.position().next_multiple_of(BLOCK))
    }

    fn send(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer, self.flushed)?;
        self.flushed += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

impl Write for Blob<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.buffer.len() + bytes.len() > BUFFER {
            self.send()?;
        }
        if bytes.len() >= BUFFER {
            self.file.write_all_at(bytes, self.flushed)?;
            self.flushed += bytes.len() as u64;
        } else {
            self.buffer.extend_from_slice(bytes);
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}
