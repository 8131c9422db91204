//! Files of the store: where they are, and how they come to be at once or not at all.
//!
//! A file is written under `tmp/`, synced, renamed to its place, and the directory is synced. Its writer holds a lock on it, so
//! that a second process waits for the first instead of doing the work twice, and so that what a killed process left is told
//! from what a living one still writes.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::digest::Digest;
use crate::error::{Error, Result};

/// Paths of a store.
#[derive(Clone, Debug)]
pub(super) struct Paths {
    root: PathBuf,
}

impl Paths {
    /// Lays the directories, each 0700, if they aren't there.
    pub(super) fn create(root: &Path) -> Result<Self> {
        for directory in ["", "blobs/sha256", "layers", "rootfs", "tmp"] {
            make_directory(&root.join(directory))?;
        }
        Ok(Self {
            root: root.to_owned(),
        })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn index(&self) -> PathBuf {
        self.root.join("index.json")
    }

    /// Held exclusively while the index changes.
    pub(super) fn index_lock(&self) -> PathBuf {
        self.root.join("index.lock")
    }

    /// Shared by whoever adds files, held exclusively by whoever removes them.
    pub(super) fn use_lock(&self) -> PathBuf {
        self.root.join("use.lock")
    }

    /// A manifest or configuration.
    pub(super) fn document(&self, digest: &Digest) -> PathBuf {
        self.documents().join(digest.hex())
    }

    pub(super) fn documents(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    pub(super) fn layer(&self, diff_id: &Digest) -> PathBuf {
        self.layers().join(format!("{}.erofs", diff_id.hex()))
    }

    pub(super) fn recipe(&self, diff_id: &Digest) -> PathBuf {
        self.layers().join(format!("{}.recipe", diff_id.hex()))
    }

    pub(super) fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    pub(super) fn rootfs(&self, chain_id: &Digest) -> PathBuf {
        self.rootfses().join(format!("{}.erofs", chain_id.hex()))
    }

    pub(super) fn rootfses(&self) -> PathBuf {
        self.root.join("rootfs")
    }

    pub(super) fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }
}

pub(super) fn make_directory(path: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| Error::io("cannot create directory", path, e))
}

/// Opens (making it if need be) a lock file and locks it. `None`: another process has it.
pub(super) fn try_lock(path: &Path, operation: FlockOperation) -> Result<Option<File>> {
    let file = open_rw(path).map_err(|e| Error::io("cannot open lock", path, e))?;
    match flock(&file, operation) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(Error::io("cannot lock", path, e.into())),
    }
}

/// Locks a file, waiting for it.
pub(super) fn lock(path: &Path, operation: FlockOperation) -> Result<File> {
    let locked = try_lock(path, operation)?;
    locked.ok_or_else(|| Error::io("cannot lock", path, io::ErrorKind::WouldBlock.into()))
}

fn open_rw(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

/// A file being written, locked. Dropped without `publish` it is gone.
#[derive(Debug)]
pub(crate) struct Partial {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    published: bool,
}

impl Partial {
    /// The unfinished file that will become `target`; `None` while another process writes it. Empty, whatever was in it.
    pub(super) fn try_new(paths: &Paths, target: &Path) -> Result<Option<Self>> {
        // A layer and a root file system may have the same digest, so the directory is part of the name.
        let relative = target.strip_prefix(paths.root()).unwrap_or(target);
        let path = paths
            .tmp()
            .join(relative.to_string_lossy().replace('/', "-"));
        loop {
            let Some(file) = try_lock(&path, FlockOperation::NonBlockingLockExclusive)? else {
                return Ok(None);
            };
            // Between open and lock its writer may have published or removed it: then the path is another file, or none.
            if is_same_file(&file, &path) {
                file.set_len(0)
                    .map_err(|e| Error::io("cannot empty", &path, e))?;
                return Ok(Some(Self {
                    file,
                    path,
                    published: false,
                }));
            }
        }
    }

    /// Syncs the file and puts it at `target`.
    pub(super) fn publish(mut self, target: &Path) -> Result<()> {
        self.file
            .sync_data()
            .map_err(|e| Error::io("cannot sync", &self.path, e))?;
        std::fs::rename(&self.path, target)
            .map_err(|e| Error::io("cannot rename to", target, e))?;
        self.published = true;
        sync_directory(target.parent().unwrap_or(Path::new("/")))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.published {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn is_same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::symlink_metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

/// Makes a rename last.
pub(super) fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|d| d.sync_all())
        .map_err(|e| Error::io("cannot sync directory", path, e))
}

/// Replaces `target` by `bytes`, at once. The caller holds whatever lock orders writers.
pub(super) fn replace(paths: &Paths, target: &Path, bytes: &[u8]) -> Result<()> {
    loop {
        if let Some(mut partial) = Partial::try_new(paths, target)? {
            let failed = |path: &Path, e| Error::io("cannot write", path, e);
            partial
                .file
                .write_all(bytes)
                .map_err(|e| failed(&partial.path, e))?;
            return partial.publish(target);
        }
        // Another process writes the same document; it takes milliseconds.
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Removes unfinished files whose writers are gone. Returns how many, and their bytes.
pub(super) fn clean_tmp(paths: &Paths) -> Result<(usize, u64)> {
    let (mut count, mut bytes) = (0, 0);
    for path in list(&paths.tmp())? {
        let Ok(file) = OpenOptions::new().read(true).write(true).open(&path) else {
            continue;
        };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
            && is_same_file(&file, &path)
        {
            bytes += disk_bytes(&path);
            count += usize::from(std::fs::remove_file(&path).is_ok());
        }
    }
    Ok((count, bytes))
}

/// Files of a directory; those that vanish meanwhile are left out.
pub(super) fn list(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        std::fs::read_dir(directory).map_err(|e| Error::io("cannot list", directory, e))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

/// Bytes a file takes on disk.
pub(super) fn disk_bytes(path: &Path) -> u64 {
    std::fs::symlink_metadata(path).map_or(0, |metadata| metadata.blocks() * 512)
}

/// A whole small file.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::io("cannot read", path, e))
}
