//! Files of an OCI layout, into a tar archive or a directory.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Somewhere to put files, each once, with its size known.
pub(super) trait Output {
    fn file(&mut self, name: &str, size: u64, content: &mut dyn Read) -> Result<()>;
    fn finish(&mut self) -> Result<()>;
}

/// A tar archive. Nothing in it depends on the time or the user: the same images give the same archive.
pub(super) struct TarOutput<'a> {
    out: &'a mut (dyn Write + Send),
}

const BLOCK: u64 = 512;

impl<'a> TarOutput<'a> {
    pub(super) fn new(out: &'a mut (dyn Write + Send)) -> Self {
        Self { out }
    }

    fn pad(&mut self, written: u64) -> io::Result<()> {
        let padding = written.next_multiple_of(BLOCK) - written;
        self.out.write_all(&[0; BLOCK as usize][..padding as usize])
    }
}

impl Output for TarOutput<'_> {
    fn file(&mut self, name: &str, size: u64, content: &mut dyn Read) -> Result<()> {
        self.out
            .write_all(&header(name, size))
            .map_err(write_error)?;
        copy_exactly(content, self.out, size)?;
        self.pad(size).map_err(write_error)
    }

    fn finish(&mut self) -> Result<()> {
        self.out
            .write_all(&[0; 2 * BLOCK as usize])
            .and_then(|()| self.out.flush())
            .map_err(write_error)
    }
}

fn write_error(e: io::Error) -> Error {
    Error::io("cannot write archive", "", e)
}

/// Copies, and holds the reader to its promise: an archive's header was written already.
fn copy_exactly(content: &mut dyn Read, out: &mut dyn Write, size: u64) -> Result<()> {
    let mut buffer = vec![0; 256 * 1024];
    let mut left = size;
    loop {
        let count = match content.read(&mut buffer) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(crate::tar::input_error(e)),
        };
        if count == 0 && left == 0 {
            return Ok(());
        }
        if count == 0 || count as u64 > left {
            let detail = format!(
                "a file of {size} bytes has {}",
                if count == 0 { "fewer" } else { "more" }
            );
            return Err(Error::Truncated {
                what: "archive".into(),
                detail,
            });
        }
        out.write_all(&buffer[..count]).map_err(write_error)?;
        left -= count as u64;
    }
}

/// A ustar header of a regular file; names here are short.
fn header(name: &str, size: u64) -> [u8; BLOCK as usize] {
    let mut header = [0; BLOCK as usize];
    let mut put =
        |offset: usize, bytes: &[u8]| header[offset..offset + bytes.len()].copy_from_slice(bytes);
    assert!(name.len() <= 100, "names in OCI layouts are short");
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    if size < 1 << 33 {
        put(124, format!("{size:011o}\0").as_bytes());
    } else {
        // GNU's base 256 for files of 8 GiB and more.
        put(124, &[0x80, 0, 0, 0]);
        put(128, &size.to_be_bytes());
    }
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// A directory.
pub(super) struct DirectoryOutput {
    root: PathBuf,
}

impl DirectoryOutput {
    /// Makes the directory; one that holds something is refused.
    pub(super) fn create(root: &Path) -> Result<Self> {
        std::fs::create_dir_all(root).map_err(|e| Error::io("cannot create directory", root, e))?;
        let mut entries = std::fs::read_dir(root).map_err(|e| Error::io("cannot list", root, e))?;
        if entries.next().is_some() {
            let exists = io::Error::new(io::ErrorKind::AlreadyExists, "the directory isn't empty");
            return Err(Error::io("cannot save into", root, exists));
        }
        let blobs = root.join("blobs/sha256");
        std::fs::create_dir_all(&blobs)
            .map_err(|e| Error::io("cannot create directory", blobs, e))?;
        Ok(Self {
            root: root.to_owned(),
        })
    }
}

impl Output for DirectoryOutput {
    fn file(&mut self, name: &str, size: u64, content: &mut dyn Read) -> Result<()> {
        let path = self.root.join(name);
        let mut file = File::create_new(&path).map_err(|e| Error::io("cannot create", &path, e))?;
        copy_exactly(content, &mut file, size)
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}
