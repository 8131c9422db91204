//! Fills a new tmpfs (`tmpcopyup`) or a volume with what the image has at its place: directories, files, symlinks, FIFOs and
//! devices with their owners, modes, times and extended attributes; hard links stay links, holes stay holes.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, chownat,
    linkat, mkdirat, mknodat, openat, readlinkat, statat, symlinkat, utimensat,
};
use rustix::io::Errno;

use crate::error::{Attempt, Error, Result};

/// Deepest tree that is copied.
const DEPTH: usize = 128;
/// A block of zeros of this size is a hole of the copy.
const BLOCK: usize = 64 << 10;
/// As the kernel bounds the list of a file's attributes and a value.
const MAX_XATTR: usize = 64 << 10;

/// Copies what is in `from` to `to`.
pub(super) fn copy(from: OwnedFd, to: OwnedFd) -> Result<()> {
    let (from, to) = (reopen(&from)?, reopen(&to)?);
    Copier::new(&to)?.tree(&from, &to, b"", DEPTH)
}

/// The same, with the owner, the mode, the times and the attributes of `from` itself.
pub(super) fn copy_with_root(from: OwnedFd, to: OwnedFd) -> Result<()> {
    let what = || "copy the directory's attributes".to_string();
    Copier::new(&to)?.tree(&from, &to, b"", DEPTH)?;
    let stat = rustix::fs::fstat(&from).attempt(what)?;
    rustix::fs::fchown(
        &to,
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    )
    .attempt(what)?;
    rustix::fs::fchmod(&to, mode(&stat)).attempt(what)?;
    copy_xattrs(&from, &to).attempt(what)?;
    rustix::fs::futimens(&to, &times(&stat)).attempt(what)
}

/// A directory to read, from a descriptor that only names it.
fn reopen(dir: &OwnedFd) -> Result<OwnedFd> {
    openat(
        dir,
        ".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .attempt(|| "copy-up: open".into())
}

struct Copier {
    /// Where the copy is.
    root: OwnedFd,
    /// Files with several names that were copied: where in the copy.
    links: HashMap<(u64, u64), CString>,
}

impl Copier {
    fn new(root: &OwnedFd) -> Result<Self> {
        Ok(Self {
            root: reopen(root)?,
            links: HashMap::new(),
        })
    }

    /// `path` is that of `to` in the copy, empty or with a slash at its end.
    fn tree(&mut self, from: &OwnedFd, to: &OwnedFd, path: &[u8], depth: usize) -> Result<()> {
        if depth == 0 {
            return Err(Error::invalid(format!(
                "copy-up: directories are nested deeper than {DEPTH}"
            )));
        }
        let entries = rustix::fs::Dir::read_from(from).attempt(|| "copy-up: list".into())?;
        for entry in entries {
            let entry = entry.attempt(|| "copy-up: list".into())?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let below = [path, name.to_bytes()].concat();
            self.entry(from, to, name, &below, depth)?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        name: &CStr,
        path: &[u8],
        depth: usize,
    ) -> Result<()> {
        let what = || format!("copy-up: copy {name:?}");
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW).attempt(what)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind != FileType::Directory && stat.st_nlink > 1 {
            let place = CString::new(path).unwrap_or_default();
            if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                return linkat(&self.root, first, to, name, AtFlags::empty()).attempt(what);
            }
            self.links.insert((stat.st_dev, stat.st_ino), place);
        }
        let nofollow = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut opened = None;
        match kind {
            FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | nofollow;
                mkdirat(to, name, Mode::RWXU).attempt(what)?;
                let source = openat(from, name, flags, Mode::empty()).attempt(what)?;
                let copy = openat(to, name, flags, Mode::empty()).attempt(what)?;
                let below = [path, b"/"].concat();
                self.tree(&source, &copy, &below, depth - 1)?;
                opened = Some((source, copy));
            }
            FileType::RegularFile => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | nofollow;
                let source =
                    openat(from, name, OFlags::RDONLY | nofollow, Mode::empty()).attempt(what)?;
                let copy = openat(to, name, flags, Mode::RUSR | Mode::WUSR).attempt(what)?;
                let (mut source, mut copy) = (File::from(source), File::from(copy));
                copy_data(&mut source, &mut copy).attempt(what)?;
                opened = Some((source.into(), copy.into()));
            }
            FileType::Symlink => {
                let target = readlinkat(from, name, Vec::new()).attempt(what)?;
                symlinkat(target, to, name).attempt(what)?;
            }
            FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice => {
                mknodat(to, name, kind, mode(&stat), stat.st_rdev).attempt(what)?;
            }
            _ => return Ok(()), // a socket is of no use without who listens
        }
        let owner = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        chownat(to, name, Some(owner.0), Some(owner.1), flags).attempt(what)?;
        // A change of the owner takes the set-user-id bit and capabilities away.
        if kind != FileType::Symlink {
            rustix::fs::chmodat(to, name, mode(&stat), AtFlags::empty()).attempt(what)?;
        }
        if let Some((source, copy)) = &opened {
            copy_xattrs(source, copy).attempt(what)?;
        }
        utimensat(to, name, &times(&stat), flags).attempt(what)
    }
}

fn copy_data(from: &mut File, to: &mut File) -> std::io::Result<()> {
    let mut buffer = vec![0; BLOCK];
    let mut length = 0;
    loop {
        let mut got = 0;
        while got < BLOCK {
            match from.read(&mut buffer[got..])? {
                0 => break,
                more => got += more,
            }
        }
        if got == 0 {
            return to.set_len(length);
        }
        length += got as u64;
        if buffer[..got].iter().all(|byte| *byte == 0) {
            to.seek(SeekFrom::Current(got as i64))?;
        } else {
            to.write_all(&buffer[..got])?;
        }
    }
}

/// A file system that can't have an attribute does without.
fn copy_xattrs(from: &OwnedFd, to: &OwnedFd) -> rustix::io::Result<()> {
    let mut names = vec![0u8; MAX_XATTR];
    let length = match rustix::fs::flistxattr(from, &mut names) {
        Err(Errno::NOTSUP) => return Ok(()),
        result => result?,
    };
    let mut value = Vec::new();
    for name in names[..length].split_inclusive(|byte| *byte == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else {
            continue;
        };
        value.resize(MAX_XATTR, 0);
        let size = rustix::fs::fgetxattr(from, name, &mut value[..])?;
        match rustix::fs::fsetxattr(to, name, &value[..size], XattrFlags::empty()) {
            Ok(()) | Err(Errno::NOTSUP) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn mode(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & 0o7777)
}

fn times(stat: &Stat) -> Timestamps {
    let time = |seconds: i64, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds as i64,
    };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    }
}
