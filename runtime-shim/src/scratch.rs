//! Disks with an empty file system: the private, writable one of a container, and volumes.
//!
//! A file system is made once per kind and size, and what is not zero of it is kept
//! as a template: some hundred KiB, written to each disk at their places. All else
//! of the file is a hole, on any file system of the host. The file's length is the
//! hard limit of what can be written to it.

use crate::fds;
use rustix::fs::{FlockOperation, MemfdFlags, Mode, OFlags, SeekFrom};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Ext4 below this has no room for its own metadata.
pub const MIN_SIZE: u64 = 16 << 20;
/// Beyond, 4 KiB blocks would want the 64-bit layout.
pub const MAX_SIZE: u64 = 16 << 40;
/// What a disk is for, and so what its file system can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A container's writable layer: without a journal, as it needs no crash consistency.
    Scratch,
    /// A volume: with a journal and checksums, as it outlives crashes.
    Volume,
}

/// Of every disk: no resize inode, no reserved blocks and lazily initialised tables keep the template to a few
/// hundred KiB, whatever its size.
const FORMAT: &[&str] = &[
    "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-I", "256",
];
const SCRATCH_FORMAT: &[&str] = &[
    "-L",
    "casemate-scratch",
    "-O",
    "^has_journal,^resize_inode,flex_bg,uninit_bg,^metadata_csum,extent,sparse_super",
    "-E",
    "lazy_itable_init=1,nodiscard,root_owner=0:0,packed_meta_blocks=1",
    "-U",
    "6a5e6a7e-0000-4000-8000-000000000001",
];
const VOLUME_FORMAT: &[&str] = &[
    "-L",
    "casemate-volume",
    "-O",
    "has_journal,^resize_inode,flex_bg,metadata_csum,extent,sparse_super",
    "-E",
    "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0,packed_meta_blocks=1",
    // After an error of the file system nothing more is written to it.
    "-e",
    "remount-ro",
    "-U",
    "6a5e6a7e-0000-4000-8000-000000000002",
];

impl Kind {
    /// Part of a template's name: the number changes with the format.
    fn label(self) -> &'static str {
        match self {
            Self::Scratch => "scratch-v2",
            Self::Volume => "volume-v2",
        }
    }

    fn format(self, size: u64) -> Vec<String> {
        let own = match self {
            Self::Scratch => SCRATCH_FORMAT,
            Self::Volume => VOLUME_FORMAT,
        };
        let mut all: Vec<String> = FORMAT.iter().chain(own).map(|o| (*o).to_owned()).collect();
        if self == Self::Volume {
            all.extend(["-J".to_owned(), format!("size={}", journal_mib(size))]);
        }
        all
    }

    /// The directories that it begins with.
    fn directories(self) -> &'static [&'static str] {
        match self {
            Self::Scratch => &["upper", "work"],
            Self::Volume => &["data"],
        }
    }
}

/// All of a journal is written to in time, so it is small beside the data: 4 MiB is the least that ext4 takes.
fn journal_mib(size: u64) -> u64 {
    (size >> 26).clamp(4, 32)
}

/// No template is larger: superblocks, bitmaps and the first tables of a disk of 16 TiB.
const MAX_TEMPLATE: u64 = 256 << 20;
/// How the directory of a template in the making begins.
const UNFINISHED: &str = ".new-";

/// Why a scratch disk can't be had.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// The size is out of bounds.
    #[error("a storage size of {size} bytes is outside {} MiB to {} TiB", MIN_SIZE >> 20, MAX_SIZE >> 40)]
    Size {
        /// What was asked for.
        size: u64,
    },
    /// `mke2fs` isn't installed.
    #[error("mke2fs is not installed; install the package e2fsprogs")]
    NoMke2fs,
    /// `mke2fs` failed.
    #[error("mke2fs failed on {path}: {message}")]
    Mke2fs {
        /// The template.
        path: PathBuf,
        /// What it said.
        message: String,
    },
    /// A file operation failed.
    #[error("can't {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

fn io_error<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> ScratchError + 'a {
    move |source| ScratchError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Checks a size and rounds it up to whole blocks.
pub fn checked_size(size: u64) -> Result<u64, ScratchError> {
    if (MIN_SIZE..=MAX_SIZE).contains(&size) {
        Ok(size.next_multiple_of(4096))
    } else {
        Err(ScratchError::Size { size })
    }
}

/// Makes `target`, a fresh disk of `size` bytes.
pub fn create(kind: Kind, data_dir: &Path, size: u64, target: &Path) -> Result<(), ScratchError> {
    let size = checked_size(size)?;
    let template = template(kind, data_dir, size)?;
    let parts = crate::files::read(&template, MAX_TEMPLATE).map_err(io_error("read", &template))?;
    fill_new(target, |disk| {
        rustix::fs::ftruncate(disk, size)?;
        write_parts(&parts, disk, size)
    })
}

/// Makes the file `target`; one that can't be filled is removed again.
fn fill_new(
    target: &Path,
    fill: impl FnOnce(&OwnedFd) -> io::Result<()>,
) -> Result<(), ScratchError> {
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent).map_err(io_error("create directory", parent))?;
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let disk = rustix::fs::open(target, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|e| io_error("create", target)(e.into()))?;
    fill(&disk).map_err(|e| {
        let _ = std::fs::remove_file(target);
        io_error("write the disk", target)(e)
    })
}

/// Makes `target`, a copy of the disk `from` that shares its blocks where the file system can, and has its holes.
pub fn copy(from: &Path, target: &Path) -> Result<(), ScratchError> {
    let original = rustix::fs::open(from, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| io_error("open", from)(e.into()))?;
    let size = rustix::fs::fstat(&original)
        .map_err(|e| io_error("look at", from)(e.into()))?
        .st_size as u64;
    fill_new(target, |copy| {
        match rustix::fs::ioctl_ficlone(copy, &original) {
            Ok(()) => Ok(()),
            Err(_) => copy_sparse(&original, copy, size),
        }
    })
}

/// Copies the data and leaves the holes.
fn copy_sparse(from: &OwnedFd, to: &OwnedFd, size: u64) -> io::Result<()> {
    rustix::fs::ftruncate(to, size)?;
    let mut at = 0;
    loop {
        let start = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data after this point.
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(start))?;
        copy_range(from, to, start, end)?;
        at = end;
    }
}

fn copy_range(from: &OwnedFd, to: &OwnedFd, start: u64, end: u64) -> io::Result<()> {
    let (mut source, mut target) = (start, start);
    while source < end {
        let left = (end - source) as usize;
        match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            // Not within this file system, or not at all: by hand.
            Err(_) => return copy_by_hand(from, to, source, end),
        }
    }
    Ok(())
}

fn copy_by_hand(from: &OwnedFd, to: &OwnedFd, start: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    let mut at = start;
    while at < end {
        let want = buffer.len().min((end - at) as usize);
        let got = rustix::io::pread(from, &mut buffer[..want], at)?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut written = 0;
        while written < got {
            written += rustix::io::pwrite(to, &buffer[written..got], at + written as u64)?;
        }
        at += got as u64;
    }
    Ok(())
}

/// The template of a size, made now if it isn't there.
fn template(kind: Kind, data_dir: &Path, size: u64) -> Result<PathBuf, ScratchError> {
    let dir = data_dir.join("templates");
    let path = dir.join(format!("{}-{size}.parts", kind.label()));
    if path.exists() {
        return Ok(path);
    }
    std::fs::create_dir_all(&dir).map_err(io_error("create directory", &dir))?;
    // One at a time, made aside and renamed: a death leaves no half template, and the next one sweeps its work away.
    let lock_path = dir.join("lock");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    let lock = rustix::fs::open(&lock_path, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|e| io_error("open", &lock_path)(e.into()))?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)
        .map_err(|e| io_error("lock", &lock_path)(e.into()))?;
    if path.exists() {
        return Ok(path);
    }
    remove_unfinished(&dir);
    let work = dir.join(format!("{UNFINISHED}{size}"));
    let made = make_template(kind, &work, size, &path);
    let _ = std::fs::remove_dir_all(&work);
    made.map(|()| path)
}

/// What makers of templates left behind when they died; the caller holds the lock.
fn remove_unfinished(dir: &Path) {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    for entry in entries {
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(UNFINISHED.as_bytes())
        {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn make_template(kind: Kind, work: &Path, size: u64, path: &Path) -> Result<(), ScratchError> {
    let tree = work.join("tree");
    for name in kind.directories() {
        let dir = tree.join(name);
        std::fs::create_dir_all(&dir).map_err(io_error("create directory", &dir))?;
    }
    // In memory, which knows its holes whatever file system the data directory is on.
    let image = Path::new("the template, in memory");
    let disk = rustix::fs::memfd_create("casemate-template", MemfdFlags::CLOEXEC)
        .and_then(|disk| rustix::fs::ftruncate(&disk, size).map(|()| disk))
        .map_err(|e| io_error("make", image)(e.into()))?;
    let mut command = mke2fs(&search_path());
    command
        .args(kind.format(size))
        .arg("-d")
        .arg(&tree)
        .arg(format!("/proc/self/fd/{}", disk.as_raw_fd()))
        // An inode count and times that don't depend on the day.
        .env("E2FSPROGS_FAKE_TIME", "1")
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let output = fds::spawn_with(&mut command, &[disk.as_fd()])
        .and_then(|child| child.wait_with_output())
        .map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => ScratchError::NoMke2fs,
            _ => io_error("run mke2fs on", image)(e),
        })?;
    if !output.status.success() {
        return Err(ScratchError::Mke2fs {
            path: path.to_owned(),
            message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    let whole = work.join("parts");
    let parts = parts_of(&disk).map_err(io_error("read", image))?;
    std::fs::write(&whole, parts).map_err(io_error("write", &whole))?;
    std::fs::rename(&whole, path).map_err(io_error("rename to", path))
}

/// What is not zero of a disk: for each part its place and length, little-endian, and its bytes.
fn parts_of(disk: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut parts = Vec::new();
    let mut at = 0;
    loop {
        let start = match rustix::fs::seek(disk, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(parts),
            Err(e) => return Err(e.into()),
        };
        at = rustix::fs::seek(disk, SeekFrom::Hole(start))?;
        let mut bytes = vec![0; (at - start) as usize];
        let mut read = 0;
        while read < bytes.len() {
            match rustix::io::pread(disk, &mut bytes[read..], start + read as u64)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                got => read += got,
            }
        }
        parts.extend(start.to_le_bytes());
        parts.extend((bytes.len() as u64).to_le_bytes());
        parts.extend(bytes);
    }
}

/// Puts the parts where they belong on an empty disk of `size` bytes.
fn write_parts(mut parts: &[u8], disk: &OwnedFd, size: u64) -> io::Result<()> {
    let damaged = || {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "its template is damaged: remove it",
        )
    };
    while let Some((place, rest)) = parts.split_first_chunk() {
        let (length, rest) = rest.split_first_chunk().ok_or_else(damaged)?;
        let (place, length) = (u64::from_le_bytes(*place), u64::from_le_bytes(*length));
        let end = place.checked_add(length).filter(|end| *end <= size);
        if end.is_none() || length > rest.len() as u64 {
            return Err(damaged());
        }
        let (bytes, rest) = rest.split_at(length as usize);
        let mut written = 0;
        while written < bytes.len() {
            written += rustix::io::pwrite(disk, &bytes[written..], place + written as u64)?;
        }
        parts = rest;
    }
    match parts.is_empty() {
        true => Ok(()),
        false => Err(damaged()),
    }
}

/// Whether `mke2fs` can be run: each new size of scratch disks needs it.
pub fn try_mke2fs(search_path: &str) -> io::Result<()> {
    mke2fs(search_path).arg("-V").output().map(drop)
}

fn mke2fs(search_path: &str) -> Command {
    let mut command = Command::new("mke2fs");
    // No /dev/null, which a bare /dev lacks: its absence would look like that of mke2fs.
    command.env("PATH", search_path).stdin(Stdio::piped());
    command
}

/// Where `mke2fs` may be: distributions keep it out of a user's PATH.
pub fn search_path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/sbin:/sbin:/usr/bin:/bin")
}

/// Deletes scratch disks and logs that no container owns any more, after a reboot took the state away.
pub fn remove_orphans(scratch_dir: &Path, owned: impl Fn(&str) -> bool) {
    let Ok(entries) = std::fs::read_dir(scratch_dir) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some((id, kind)) = name.to_str().and_then(|name| name.rsplit_once('.')) else {
            continue;
        };
        // What can't be deleted is met again after the next reboot.
        let _ = match kind {
            "img" if !owned(id) => std::fs::remove_file(entry.path()),
            "log" if !owned(id) => std::fs::remove_dir_all(entry.path()),
            _ => Ok(()),
        };
    }
}

/// Where the scratch disks of one state directory are: two state directories may share the data.
pub fn dir_of(data_dir: &Path, state_dir: &Path) -> PathBuf {
    // FNV-1a: only a name.
    let hash = state_dir
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
        });
    data_dir.join("scratch").join(format!("{hash:016x}"))
}

/// The writable layer of the container `id`.
pub fn file_of(data_dir: &Path, state_dir: &Path, id: &str) -> PathBuf {
    dir_of(data_dir, state_dir).join(format!("{id}.img"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn create_makes_a_sparse_clean_file_system() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("scratch/one.img");
        create(Kind::Scratch, dir.path(), 1 << 30, &target).unwrap();
        let meta = std::fs::metadata(&target).unwrap();
        assert_eq!(meta.len(), 1 << 30);
        assert!(meta.blocks() * 512 < 4 << 20, "{} blocks", meta.blocks());
        let check = Command::new("e2fsck")
            .args(["-fn"])
            .arg(&target)
            .env("PATH", search_path())
            .output()
            .unwrap();
        assert!(check.status.success(), "{check:?}");
    }

    #[test]
    fn create_from_a_damaged_template_says_so_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("one.img");
        create(Kind::Scratch, dir.path(), MIN_SIZE, &target).unwrap();
        std::fs::remove_file(&target).unwrap();
        let templates = dir.path().join("templates");
        let template = std::fs::read_dir(&templates)
            .unwrap()
            .flatten()
            .map(|e| e.path());
        let template = template.filter(|p| p.extension().is_some_and(|e| e == "parts"));
        let template = template.last().unwrap();
        let whole = std::fs::read(&template).unwrap();
        let far = [&u64::MAX.to_le_bytes()[..], &8_u64.to_le_bytes(), &[0; 8]].concat();
        for damaged in [&whole[..whole.len() - 1], &whole[..20], &whole[..3], &far] {
            std::fs::write(&template, damaged).unwrap();
            let refused = create(Kind::Scratch, dir.path(), MIN_SIZE, &target).unwrap_err();
            assert!(crate::rpc::chain(&refused).contains("damaged"), "{refused}");
            assert!(!target.exists());
        }
    }

    #[test]
    fn create_sweeps_away_what_a_killed_maker_left() {
        let dir = tempfile::tempdir().unwrap();
        let left = dir.path().join("templates/.new-4096-77/tree");
        std::fs::create_dir_all(&left).unwrap();
        create(
            Kind::Scratch,
            dir.path(),
            MIN_SIZE,
            &dir.path().join("one.img"),
        )
        .unwrap();
        assert!(!left.parent().unwrap().exists());
    }

    #[test]
    fn create_over_an_existing_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("one.img");
        std::fs::write(&target, "mine").unwrap();
        assert!(create(Kind::Scratch, dir.path(), MIN_SIZE, &target).is_err());
        assert_eq!(std::fs::read(&target).unwrap(), b"mine");
    }

    #[test]
    fn checked_size_out_of_bounds_names_the_value() {
        assert!(checked_size(4096).unwrap_err().to_string().contains("4096"));
        assert!(checked_size(u64::MAX).is_err());
        assert_eq!(checked_size(MIN_SIZE + 1).unwrap(), MIN_SIZE + 4096);
    }

    #[test]
    fn remove_orphans_keeps_the_owned() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a.img", "b.img", "note.txt"] {
            std::fs::write(dir.path().join(name), "x").unwrap();
        }
        remove_orphans(dir.path(), |id| id == "a");
        let mut left: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["a.img", "note.txt"]);
    }
}
