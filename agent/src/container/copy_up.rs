//! Fills a new tmpfs with what the image has at its place (`tmpcopyup`).

use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Stat, chownat, mkdirat, openat, readlinkat, statat, symlinkat,
};

use crate::error::{Attempt, Error, Result};

/// Deepest tree that is copied.
const DEPTH: usize = 128;

/// Copies directories, files and symlinks with their owners and modes from `from` to `to`.
pub(super) fn copy(from: OwnedFd, to: OwnedFd) -> Result<()> {
    let from = reopen(&from)?;
    let to = reopen(&to)?;
    tree(&from, &to, DEPTH)
}

/// A directory to read, from a descriptor that only names it.
fn reopen(dir: &OwnedFd) -> Result<OwnedFd> {
    openat(
        dir,
        ".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .attempt(|| "tmpcopyup: open".into())
}

fn tree(from: &OwnedFd, to: &OwnedFd, depth: usize) -> Result<()> {
    if depth == 0 {
        return Err(Error::invalid(format!(
            "tmpcopyup: directories are nested deeper than {DEPTH}"
        )));
    }
    let entries = rustix::fs::Dir::read_from(from).attempt(|| "tmpcopyup: list".into())?;
    for entry in entries {
        let entry = entry.attempt(|| "tmpcopyup: list".into())?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let what = || format!("tmpcopyup: copy {name:?}");
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW).attempt(what)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                mkdirat(to, name, mode(&stat)).attempt(what)?;
                let below = (
                    openat(from, name, flags, Mode::empty()).attempt(what)?,
                    openat(to, name, flags, Mode::empty()).attempt(what)?,
                );
                tree(&below.0, &below.1, depth - 1)?;
            }
            FileType::Symlink => {
                let target = readlinkat(from, name, Vec::new()).attempt(what)?;
                symlinkat(target, to, name).attempt(what)?;
            }
            FileType::RegularFile => {
                let source = openat(
                    from,
                    name,
                    OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                )
                .attempt(what)?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let copy = openat(to, name, flags, mode(&stat)).attempt(what)?;
                std::io::copy(
                    &mut std::fs::File::from(source),
                    &mut std::fs::File::from(copy),
                )
                .attempt(what)?;
            }
            _ => continue, // devices and sockets have no place in a tmpfs of data
        }
        let owner = (
            rustix::fs::Uid::from_raw(stat.st_uid),
            rustix::fs::Gid::from_raw(stat.st_gid),
        );
        chownat(
            to,
            name,
            Some(owner.0),
            Some(owner.1),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .attempt(what)?;
    }
    Ok(())
}

fn mode(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & 0o7777)
}
