//! Directory trees on disk, compared with everything a program can see of them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::images::digest;
use super::run;

/// What can be seen of a file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    mode: u32,
    owner: (u32, u32),
    size: u64,
    mtime: (i64, i64),
    device: u64,
    links: u64,
    /// A file's digest, a link's target.
    content: String,
    xattrs: BTreeMap<OsString, Vec<u8>>,
    /// The first path of the same inode.
    first: PathBuf,
}

/// Everything below `root`, itself included.
pub(crate) fn see(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut all = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    let mut paths = Vec::new();
    while let Some(path) = pending.pop() {
        if path.symlink_metadata().unwrap().is_dir() {
            pending.extend(
                std::fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
        paths.push(path);
    }
    paths.sort();
    for path in paths {
        let metadata = path.symlink_metadata().unwrap();
        let kind = metadata.file_type();
        let relative = path.strip_prefix(root).unwrap().to_owned();
        let content = if kind.is_symlink() {
            path.read_link().unwrap().to_string_lossy().into_owned()
        } else if kind.is_file() {
            digest(&std::fs::read(&path).unwrap())
        } else {
            String::new()
        };
        let device = kind.is_block_device() || kind.is_char_device();
        let first = inodes
            .entry(metadata.ino())
            .or_insert_with(|| relative.clone())
            .clone();
        let seen = Seen {
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            // File systems give directories sizes of their own.
            size: if kind.is_dir() { 0 } else { metadata.size() },
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            device: if device { metadata.rdev() } else { 0 },
            links: metadata.nlink(),
            content,
            xattrs: xattrs(&path),
            first,
        };
        all.insert(relative, seen);
    }
    all
}

fn xattrs(path: &Path) -> BTreeMap<OsString, Vec<u8>> {
    use std::os::unix::ffi::OsStringExt as _;
    let mut names = vec![0; 64 * 1024];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap_or(0);
    let names = names[..length]
        .split(|&b| b == 0)
        .filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; 64 * 1024];
            let length = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
            (OsString::from_vec(name.to_vec()), value[..length].to_vec())
        })
        .collect()
}

/// Fails with the first differences.
#[track_caller]
pub(crate) fn assert_equal(ours: &Path, theirs: &Path) {
    let (ours, theirs) = (see(ours), see(theirs));
    let paths: std::collections::BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
    let differences: Vec<_> = paths
        .into_iter()
        .filter(|path| ours.get(*path) != theirs.get(*path))
        .collect();
    for path in differences.iter().take(5) {
        eprintln!(
            "{}:\n  ours   {:?}\n  theirs {:?}",
            path.display(),
            ours.get(*path),
            theirs.get(*path)
        );
    }
    assert!(
        differences.is_empty(),
        "{} of {} differ",
        differences.len(),
        theirs.len()
    );
}

/// A mounted root file system, as the guest sees it: all blobs end to end on one disk.
pub(crate) struct Mounted {
    pub(crate) path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Mounted {
    pub(crate) fn new(disk: &casemate_image::RootfsDisk) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk");
        let mut file = std::fs::File::create(&image).unwrap();
        for part in std::iter::once(&disk.metadata).chain(&disk.layers) {
            let mut part = std::fs::File::open(part).unwrap();
            assert_eq!(part.metadata().unwrap().len() % 4096, 0);
            std::io::copy(&mut part, &mut file).unwrap();
        }
        let path = directory.path().join("mnt");
        std::fs::create_dir(&path).unwrap();
        run(
            "mount",
            &[
                "-t",
                "erofs",
                "-o",
                "ro,loop",
                image.to_str().unwrap(),
                path.to_str().unwrap(),
            ],
        );
        Self {
            path,
            _directory: directory,
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &[self.path.to_str().unwrap()]);
    }
}

/// Whether this kernel mounts EROFS. Where it doesn't, the end-to-end tests still compare the trees in a guest.
pub(crate) fn can_mount() -> bool {
    super::need_root();
    let known = std::fs::read_to_string("/proc/filesystems").unwrap();
    let erofs = known.contains("\terofs");
    if !erofs {
        eprintln!("left out: this kernel has no EROFS");
    }
    erofs
}
