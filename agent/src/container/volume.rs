//! Fills a fresh volume with what the image has at its place.
//!
//! A volume's files are in its directory `data`. What is copied is gathered beside it, written to the disk and
//! renamed: whenever the guest dies, `data` is empty or whole.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::{CWD, Dir, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;

use super::copy_up;
use crate::error::{Attempt, Error, Result};

/// What the container sees.
const DATA: &str = "data";
/// What is being gathered.
const NEW: &str = "new";

/// A volume that may have to be filled.
#[derive(Debug)]
pub(crate) struct Fill {
    /// Where the volume is mounted in the guest.
    pub(crate) volume: PathBuf,
    /// The container's root.
    pub(crate) rootfs: PathBuf,
    /// What to look at in there: every symlink is followed as the container would, never out of its root.
    pub(crate) path: String,
}

impl Fill {
    /// Copies, if the volume is empty and the image has a directory there.
    pub(crate) fn fill(&self) -> Result<()> {
        self.fill_if_empty().map_err(|e| Error {
            text: format!(
                "fill the volume at {} from the image: {}",
                self.path, e.text
            ),
            ..e
        })
    }

    fn fill_if_empty(&self) -> Result<()> {
        let volume = open_directory(&self.volume)?;
        if !is_empty(&volume)? {
            return Ok(());
        }
        let Some(source) = self.source()? else {
            return Ok(());
        };
        let left = self.volume.join(NEW);
        match std::fs::remove_dir_all(&left) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).attempt(|| "remove a copy that was not finished".into());
            }
            _ => {}
        }
        let copied = gather(&volume, source);
        if copied.is_err() {
            let _ = std::fs::remove_dir_all(&left);
        }
        copied
    }

    /// The image's directory, if it has one there.
    fn source(&self) -> Result<Option<OwnedFd>> {
        let root = open_directory(&self.rootfs)?;
        let path = self.path.trim_start_matches('/');
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        match openat2(&root, path, flags, Mode::empty(), resolve) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(error) => Err(error).attempt(|| "look at the image's directory".into()),
        }
    }
}

fn open_directory(path: &std::path::Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty()).attempt(|| format!("open {}", path.display()))
}

fn is_empty(volume: &OwnedFd) -> Result<bool> {
    let what = || "look into the volume (has it a directory \"data\"?)".to_string();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let data = openat(volume, DATA, flags, Mode::empty()).attempt(what)?;
    for entry in Dir::new(data).attempt(what)? {
        let entry = entry.attempt(what)?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

fn gather(volume: &OwnedFd, source: OwnedFd) -> Result<()> {
    rustix::fs::mkdirat(volume, NEW, Mode::RWXU).attempt(|| "make a directory".into())?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let new = openat(volume, NEW, flags, Mode::empty()).attempt(|| "open it".into())?;
    copy_up::copy_with_root(source, new)?;
    rustix::fs::syncfs(volume).attempt(|| "write to the volume's disk".into())?;
    // Over an empty directory, and over nothing else.
    rustix::fs::renameat(volume, NEW, volume, DATA).attempt(|| "put in place".into())?;
    rustix::fs::fsync(volume).attempt(|| "write to the volume's disk".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    fn fill_of(path: &str) -> (tempfile::TempDir, Fill) {
        let dir = tempfile::tempdir().unwrap();
        let fill = Fill {
            volume: dir.path().join("volume"),
            rootfs: dir.path().join("rootfs"),
            path: path.into(),
        };
        std::fs::create_dir_all(fill.volume.join(DATA)).unwrap();
        std::fs::create_dir_all(fill.rootfs.join("srv/sub")).unwrap();
        (dir, fill)
    }

    #[test]
    fn fill_of_an_empty_volume_copies_everything() {
        let (_dir, fill) = fill_of("/srv");
        let srv = fill.rootfs.join("srv");
        std::fs::write(srv.join("one"), "1").unwrap();
        std::fs::hard_link(srv.join("one"), srv.join("sub/two")).unwrap();
        std::os::unix::fs::symlink("../nowhere", srv.join("link")).unwrap();
        std::fs::set_permissions(&srv, std::fs::Permissions::from_mode(0o1777)).unwrap();
        std::fs::set_permissions(srv.join("one"), std::fs::Permissions::from_mode(0o4751)).unwrap();
        let sparse = std::fs::File::create(srv.join("sparse")).unwrap();
        sparse.set_len(8 << 20).unwrap();

        fill.fill().unwrap();

        let data = fill.volume.join(DATA);
        let meta = |name: &str| std::fs::symlink_metadata(data.join(name)).unwrap();
        assert_eq!(meta(".").mode() & 0o7777, 0o1777);
        assert_eq!(meta("one").mode() & 0o7777, 0o4751);
        assert_eq!(meta("one").ino(), meta("sub/two").ino());
        assert_eq!(
            meta("one").mtime(),
            srv.join("one").metadata().unwrap().mtime()
        );
        assert_eq!(std::fs::read(data.join("sub/two")).unwrap(), b"1");
        assert_eq!(
            std::fs::read_link(data.join("link")).unwrap().to_str(),
            Some("../nowhere")
        );
        assert_eq!(
            (meta("sparse").len(), meta("sparse").blocks()),
            (8 << 20, 0)
        );
        assert!(!fill.volume.join(NEW).exists());
    }

    #[test]
    fn fill_of_a_volume_with_something_in_it_leaves_it() {
        let (_dir, fill) = fill_of("/srv");
        std::fs::write(fill.volume.join("data/mine"), "").unwrap();
        fill.fill().unwrap();
        assert!(!fill.volume.join("data/sub").exists());
    }

    #[test]
    fn fill_after_a_copy_that_was_not_finished_begins_anew() {
        let (_dir, fill) = fill_of("/srv");
        std::fs::create_dir_all(fill.volume.join("new/half")).unwrap();
        fill.fill().unwrap();
        assert!(fill.volume.join("data/sub").exists());
        assert!(!fill.volume.join("data/half").exists());
        assert!(!fill.volume.join("new").exists());
    }

    #[test]
    fn fill_of_what_the_image_lacks_is_nothing() {
        for path in ["/nothing/there", "/srv/sub/../../../../etc/passwd"] {
            let (_dir, fill) = fill_of(path);
            fill.fill().unwrap();
            assert!(
                is_empty(&open_directory(&fill.volume).unwrap()).unwrap(),
                "{path}"
            );
        }
    }

    #[test]
    fn fill_follows_symlinks_within_the_root_only() {
        let (dir, fill) = fill_of("/out");
        std::fs::create_dir_all(dir.path().join("secret/inside")).unwrap();
        std::os::unix::fs::symlink("../../secret", fill.rootfs.join("out")).unwrap();
        fill.fill().unwrap();
        assert!(!fill.volume.join("data/inside").exists());
        std::fs::create_dir_all(fill.rootfs.join("secret/own")).unwrap();
        fill.fill().unwrap();
        assert!(fill.volume.join("data/own").exists());
    }
}
