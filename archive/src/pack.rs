//! From a tree to a stream.

use crate::at;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use tar::{Builder, EntryType, Header};

/// The kernel's bound on a list of extended attributes' names, and on one's value (xattr(7)).
const XATTR_MAX: usize = 64 << 10;

/// What was packed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Packed {
    /// Of all files.
    pub bytes: u64,
}

/// Writes the file or tree at `source` as `name`. An empty name packs what is in the directory, without itself.
///
/// Symbolic links are packed as such, `source` itself too. Sockets are left out: they mean nothing elsewhere.
pub fn pack(source: &Path, name: &Path, to: impl Write) -> io::Result<Packed> {
    let mut packer = Packer::new(to);
    packer.tree(source, name)?;
    packer.finish()
}

/// A stream being written.
pub(crate) struct Packer<W: Write> {
    builder: Builder<W>,
    /// Files with several names: where the first one was packed.
    links: HashMap<(u64, u64), PathBuf>,
    packed: Packed,
}

impl<W: Write> Packer<W> {
    pub(crate) fn new(to: W) -> Self {
        let mut builder = Builder::new(to);
        builder.follow_symlinks(false);
        Self {
            builder,
            links: HashMap::new(),
            packed: Packed::default(),
        }
    }

    fn tree(&mut self, source: &Path, name: &Path) -> io::Result<()> {
        let metadata = fs::symlink_metadata(source).map_err(at(source))?;
        if !name.as_os_str().is_empty() {
            self.one(source, name, &metadata)?;
        }
        if metadata.is_dir() {
            for entry in sorted(source)? {
                self.tree(&source.join(&entry), &name.join(&entry))?;
            }
        }
        Ok(())
    }

    /// One file, link, device or directory (without what is in it).
    pub(crate) fn one(
        &mut self,
        source: &Path,
        name: &Path,
        metadata: &Metadata,
    ) -> io::Result<()> {
        if metadata.file_type().is_socket() {
            return Ok(());
        }
        if metadata.nlink() > 1 && !metadata.is_dir() {
            let inode = (metadata.dev(), metadata.ino());
            if let Some(first) = self.links.get(&inode) {
                let mut header = Header::new_gnu();
                header.set_metadata(metadata);
                header.set_entry_type(EntryType::Link);
                header.set_size(0);
                return self.builder.append_link(&mut header, name, first);
            }
            self.links.insert(inode, name.to_owned());
        }
        self.xattrs(source)?;
        if metadata.is_dir() {
            return self.builder.append_dir(name, source).map_err(at(source));
        }
        if metadata.is_file() {
            self.packed.bytes += metadata.len();
            if metadata.blocks() * 512 >= metadata.len() {
                return self.dense(source, name, metadata).map_err(at(source));
            }
        }
        self.builder
            .append_path_with_name(source, name)
            .map_err(at(source))
    }

    /// A file without holes, which may grow or shrink while it is read.
    fn dense(&mut self, source: &Path, name: &Path, metadata: &Metadata) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_metadata(metadata);
        let exactly = Exactly {
            file: fs::File::open(source)?,
            left: metadata.len(),
        };
        self.builder.append_data(&mut header, name, exactly)
    }

    /// An empty file that stands for something.
    pub(crate) fn mark(&mut self, name: &Path) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0);
        header.set_size(0);
        self.builder.append_data(&mut header, name, io::empty())
    }

    /// Attributes go before the entry that has them. Those of overlayfs are about its layers, not about the files.
    fn xattrs(&mut self, source: &Path) -> io::Result<()> {
        let attributes = xattrs(source).map_err(at(source))?;
        let attributes: Vec<(String, Vec<u8>)> = attributes
            .into_iter()
            .filter(|(name, _)| !name.starts_with("trusted.overlay."))
            .map(|(name, value)| (format!("SCHILY.xattr.{name}"), value))
            .collect();
        if attributes.is_empty() {
            return Ok(());
        }
        let attributes = attributes.iter().map(|(n, v)| (n.as_str(), v.as_slice()));
        self.builder.append_pax_extensions(attributes)
    }

    pub(crate) fn finish(mut self) -> io::Result<Packed> {
        self.builder.finish()?;
        self.builder.get_mut().flush()?;
        Ok(self.packed)
    }
}

/// As many bytes of a file as its header promised, zeros where it has fewer by now.
struct Exactly {
    file: fs::File,
    left: u64,
}

impl Read for Exactly {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let buffer = &mut buffer[..wanted];
        let got = match self.file.read(buffer)? {
            0 => {
                buffer.fill(0);
                wanted
            }
            got => got,
        };
        self.left -= got as u64;
        Ok(got)
    }
}

/// The names in a directory, in an order that doesn't depend on the file system.
pub(crate) fn sorted(directory: &Path) -> io::Result<Vec<std::ffi::OsString>> {
    let entries = fs::read_dir(directory).map_err(at(directory))?;
    let mut names = entries
        .map(|entry| Ok(entry?.file_name()))
        .collect::<io::Result<Vec<_>>>()
        .map_err(at(directory))?;
    names.sort();
    Ok(names)
}

/// The extended attributes of a file, of a symbolic link itself. A file system without any has none.
fn xattrs(path: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut names = vec![0; XATTR_MAX];
    let length = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let names = names[..length].split(|b| *b == 0);
    // A name that is not UTF-8 can't be said in a pax record.
    let names = names.filter_map(|name| std::str::from_utf8(name).ok());
    let mut all = Vec::new();
    for name in names.filter(|name| !name.is_empty()) {
        let mut value = vec![0; XATTR_MAX];
        match rustix::fs::lgetxattr(path, OsStr::from_bytes(name.as_bytes()), &mut value[..]) {
            Ok(length) => value.truncate(length),
            // It went away, or is not for us to read.
            Err(rustix::io::Errno::NODATA | rustix::io::Errno::PERM) => continue,
            Err(error) => return Err(error.into()),
        }
        all.push((name.to_owned(), value));
    }
    Ok(all)
}

/// Whether overlayfs marks the directory as one that hides what is below it.
pub(crate) fn is_opaque(directory: &Path) -> bool {
    let mut value = [0; 1];
    let got = rustix::fs::lgetxattr(directory, "trusted.overlay.opaque", &mut value[..]);
    matches!(got, Ok(1)) && &value == b"y"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_is_as_long_as_promised_whatever_the_file_does() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "12345678").unwrap();
        for (left, expected) in [(4, &b"1234"[..]), (10, b"12345678\0\0"), (0, b"")] {
            let file = fs::File::open(&path).unwrap();
            let mut got = Vec::new();
            Exactly { file, left }.read_to_end(&mut got).unwrap();
            assert_eq!(got, expected);
        }
    }
}
