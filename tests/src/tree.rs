//! A file tree as text, one line an entry with all its metadata: equal trees give equal text.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Lists everything below `root`, the root itself as `.`, without crossing into `skip` (relative paths).
///
/// Left out is what file systems may differ in: inode numbers (hard links are told by the first path of
/// the same file), sizes and link counts of directories, block counts.
pub fn list(root: &Path, skip: &[PathBuf]) -> io::Result<String> {
    let mut listing = Listing {
        root,
        skip,
        text: String::new(),
        first_paths: BTreeMap::new(),
    };
    listing.visit(Path::new("."))?;
    Ok(listing.text)
}

struct Listing<'a> {
    root: &'a Path,
    skip: &'a [PathBuf],
    text: String,
    first_paths: BTreeMap<(u64, u64), PathBuf>,
}

impl Listing<'_> {
    fn visit(&mut self, path: &Path) -> io::Result<()> {
        let full = self.root.join(path);
        let meta = fs::symlink_metadata(&full)?;
        let kind = meta.file_type();
        let content = if kind.is_symlink() {
            format!(
                "-> {}",
                fs::read_link(&full)?.as_os_str().as_bytes().escape_ascii()
            )
        } else if kind.is_file() {
            format!("{} {}", meta.len(), self.file(path, &full, &meta)?)
        } else if kind.is_block_device() || kind.is_char_device() {
            format!("device {:#x}", meta.rdev())
        } else {
            String::new()
        };
        let _ = write!(
            self.text,
            "{} {:o} {}:{} {}.{:09} {content}",
            path.as_os_str().as_bytes().escape_ascii(),
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec(),
        );
        for (name, value) in xattrs(&full)? {
            let _ = write!(
                self.text,
                " {}={}",
                name.escape_ascii(),
                value.escape_ascii()
            );
        }
        self.text.push('\n');
        if kind.is_dir() {
            let mut names: Vec<OsString> = fs::read_dir(&full)?
                .map(|entry| Ok(entry?.file_name()))
                .collect::<io::Result<_>>()?;
            names.sort();
            for name in names {
                let child = path.join(name);
                if !self
                    .skip
                    .iter()
                    .any(|skip| Path::new(".").join(skip) == child)
                {
                    self.visit(&child)?;
                }
            }
        }
        Ok(())
    }

    /// Digest of a file's content, or the path that the same file had before.
    fn file(&mut self, path: &Path, full: &Path, meta: &fs::Metadata) -> io::Result<String> {
        if meta.nlink() > 1 {
            let first = self
                .first_paths
                .entry((meta.dev(), meta.ino()))
                .or_insert_with(|| path.to_path_buf());
            if first != path {
                return Ok(format!(
                    "same as {}",
                    first.as_os_str().as_bytes().escape_ascii()
                ));
            }
        }
        digest(fs::File::open(full)?)
    }
}

fn digest(mut file: impl Read) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            read => hash.update(&buffer[..read]),
        }
    }
    Ok(hash
        .finalize()
        .iter()
        .fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        }))
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    // The kernel's limits: 64 KiB of names, 64 KiB a value.
    let mut names = vec![0_u8; 64 << 10];
    let length = match rustix::fs::llistxattr(path, &mut names) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => 0,
        Err(error) => return Err(error.into()),
    };
    let mut found = BTreeMap::new();
    for name in names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0_u8; 64 << 10];
        let length = rustix::fs::lgetxattr(path, name, &mut value)?;
        value.truncate(length);
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}
