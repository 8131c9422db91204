//! The private, writable disk of a container.
//!
//! A file system is made once per size, sparse and without a journal, and kept
//! as a template; each container gets a copy that shares its blocks with the
//! template where the host's file system can, and is sparse anyway. The file's
//! length is the hard limit of what the container can write.

use rustix::fs::{FlockOperation, Mode, OFlags, SeekFrom};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Ext4 below this has no room for its own metadata.
pub const MIN_SIZE: u64 = 16 << 20;
/// Beyond, 4 KiB blocks would want the 64-bit layout.
pub const MAX_SIZE: u64 = 16 << 40;
/// Part of a template's name: change it when `FORMAT` changes.
const FORMAT_VERSION: u32 = 1;
/// No journal: a scratch disk needs no crash consistency. No resize inode, no reserved blocks and
/// lazily initialised tables keep the template to a few hundred KiB, whatever its size.
const FORMAT: &[&str] = &[
    "-q",
    "-F",
    "-t",
    "ext4",
    "-b",
    "4096",
    "-m",
    "0",
    "-I",
    "256",
    "-L",
    "casemate-scratch",
    "-O",
    "^has_journal,^resize_inode,flex_bg,uninit_bg,^metadata_csum,extent,sparse_super",
    "-E",
    "lazy_itable_init=1,nodiscard,root_owner=0:0,packed_meta_blocks=1",
    "-U",
    "6a5e6a7e-0000-4000-8000-000000000001",
];

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

/// Makes `target`, a fresh scratch disk of `size` bytes.
pub fn create(data_dir: &Path, size: u64, target: &Path) -> Result<(), ScratchError> {
    let size = checked_size(size)?;
    let template_path = template(data_dir, size)?;
    let template = rustix::fs::open(
        &template_path,
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|e| io_error("open", &template_path)(e.into()))?;
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent).map_err(io_error("create directory", parent))?;
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let copy = rustix::fs::open(target, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|e| io_error("create", target)(e.into()))?;
    let copied = match rustix::fs::ioctl_ficlone(&copy, &template) {
        Ok(()) => Ok(()),
        Err(_) => copy_sparse(&template, &copy, size),
    };
    copied.map_err(|e| {
        let _ = std::fs::remove_file(target);
        io_error("copy the scratch template to", target)(e)
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
fn template(data_dir: &Path, size: u64) -> Result<PathBuf, ScratchError> {
    let dir = data_dir.join("templates");
    let path = dir.join(format!("scratch-{size}-v{FORMAT_VERSION}.img"));
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
    let made = make_template(&work, size, &path);
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

fn make_template(work: &Path, size: u64, path: &Path) -> Result<(), ScratchError> {
    let tree = work.join("tree");
    for name in ["upper", "work"] {
        let dir = tree.join(name);
        std::fs::create_dir_all(&dir).map_err(io_error("create directory", &dir))?;
    }
    let image = work.join("image");
    let file = std::fs::File::create(&image).map_err(io_error("create", &image))?;
    file.set_len(size).map_err(io_error("create", &image))?;
    let output = mke2fs(&search_path())
        .args(FORMAT)
        .arg("-d")
        .arg(&tree)
        .arg(&image)
        // An inode count and times that don't depend on the day.
        .env("E2FSPROGS_FAKE_TIME", "1")
        .output()
        .map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => ScratchError::NoMke2fs,
            _ => io_error("run mke2fs on", &image)(e),
        })?;
    if !output.status.success() {
        return Err(ScratchError::Mke2fs {
            path: path.to_owned(),
            message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    std::fs::rename(&image, path).map_err(io_error("rename to", path))
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
        create(dir.path(), 1 << 30, &target).unwrap();
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
    fn create_sweeps_away_what_a_killed_maker_left() {
        let dir = tempfile::tempdir().unwrap();
        let left = dir.path().join("templates/.new-4096-77/tree");
        std::fs::create_dir_all(&left).unwrap();
        create(dir.path(), MIN_SIZE, &dir.path().join("one.img")).unwrap();
        assert!(!left.parent().unwrap().exists());
    }

    #[test]
    fn create_over_an_existing_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("one.img");
        std::fs::write(&target, "mine").unwrap();
        assert!(create(dir.path(), MIN_SIZE, &target).is_err());
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
