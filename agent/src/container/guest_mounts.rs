//! What the agent mounts and writes for a container in the guest's own namespace, below `/run/casemate/ID/`.

use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_protocol::{GUEST_RUN_DIR, agent};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_change, unmount};

use super::options::Options;
use super::volume::Fill;
use crate::error::{Attempt, Error, Result};

/// Most mounts and files of a request.
const MAX_ENTRIES: usize = 1024;

/// Longest path, as the kernel's PATH_MAX.
const MAX_PATH: usize = 4095;

/// Largest file.
const MAX_FILE: usize = 1 << 20;

/// The mounts of one container; undone by [`GuestMounts::undo`].
#[derive(Debug)]
pub(crate) struct GuestMounts {
    home: PathBuf,
    done: Vec<PathBuf>,
    /// The disks of file systems that tell them what was deleted.
    discarding: Vec<PathBuf>,
    overlay: Option<Overlay>,
}

/// The directories of an overlay that has one lower.
#[derive(Debug, Clone, Default)]
pub(super) struct Overlay {
    pub(super) upper: PathBuf,
    pub(super) lower: PathBuf,
}

impl GuestMounts {
    /// None yet, for container `id` (checked already).
    pub(crate) fn new(id: &str) -> Self {
        Self {
            home: Path::new(GUEST_RUN_DIR).join(id),
            done: Vec::new(),
            discarding: Vec::new(),
            overlay: None,
        }
    }

    /// The container's root, if that is an overlay.
    pub(super) fn overlay(&self) -> Option<Overlay> {
        self.overlay.clone()
    }

    /// Does `mounts`, then writes `files`.
    pub(crate) fn apply(&mut self, mounts: &[agent::Mount], files: &[agent::File]) -> Result<()> {
        if mounts.len() > MAX_ENTRIES || files.len() > MAX_ENTRIES {
            return Err(Error::invalid(format!(
                "{} mounts and {} files: at most {MAX_ENTRIES} of each",
                mounts.len(),
                files.len()
            )));
        }
        mounts.iter().try_for_each(|mount| self.mount(mount))?;
        files.iter().try_for_each(|file| self.write(file))
    }

    /// The volumes among `mounts` that may have to be filled from the container's root.
    pub(crate) fn fills(&self, mounts: &[agent::Mount], rootfs: &str) -> Result<Vec<Fill>> {
        let wanted = mounts.iter().filter(|mount| !mount.copy_up.is_empty());
        wanted
            .map(|mount| {
                Ok(Fill {
                    volume: self.check(&mount.target)?,
                    rootfs: self.check(rootfs)?,
                    path: mount.copy_up.clone(),
                })
            })
            .collect()
    }

    /// Whether `path` is inside this container's directory.
    pub(crate) fn check(&self, path: &str) -> Result<PathBuf> {
        let inside = Path::new(path).strip_prefix(&self.home).is_ok_and(|rest| {
            rest.components().next().is_some()
                && rest.components().all(|c| matches!(c, Component::Normal(_)))
        });
        // Doubled slashes and dots would be normalised away by components(), so compare the text too.
        let plain = !path.split('/').any(|part| matches!(part, "." | ".."))
            && !path.contains('\0')
            && path.len() <= MAX_PATH;
        if inside && plain {
            Ok(PathBuf::from(path))
        } else {
            Err(Error::invalid(format!(
                "path {path:?} must be below {}/ without \"..\"",
                self.home.display()
            )))
        }
    }

    fn mount(&mut self, request: &agent::Mount) -> Result<()> {
        let target = self.check(&request.target)?;
        let what = || {
            format!(
                "mount {} {} at {}",
                request.type_, request.source, request.target
            )
        };
        let (overlay, options): (Vec<&str>, Vec<&str>) = request
            .options
            .iter()
            .map(String::as_str)
            .partition(|o| request.type_ == "overlay" && is_layer(o));
        let mut options = Options::parse(options).map_err(|e| Error {
            text: format!("{}: {}", what(), e.text),
            ..e
        })?;
        std::fs::create_dir_all(&target).attempt(what)?;
        if request.type_ == "overlay" {
            self.overlay = Some(Overlay::default());
        }
        for layer in overlay {
            self.check_layers(layer)?;
            match (self.overlay.as_mut(), layer.split_once('=')) {
                (Some(overlay), Some(("upperdir", path))) => overlay.upper = path.into(),
                (Some(overlay), Some(("lowerdir", path))) => overlay.lower = path.into(),
                _ => {}
            }
            options.data = [options.data.as_str(), layer]
                .iter()
                .filter(|s| !s.is_empty())
                .copied()
                .collect::<Vec<_>>()
                .join(",");
        }
        match request.type_.as_str() {
            "bind" => {
                let bind = if options.recursive {
                    mount_bind_recursive
                } else {
                    mount_bind
                };
                bind(request.source.as_str(), &target).attempt(what)?;
            }
            "erofs" | "ext4" | "tmpfs" | "overlay" | "virtiofs" => {
                let data = std::ffi::CString::new(options.data.as_str())
                    .map_err(|_| Error::invalid(format!("{}: NUL", what())))?;
                mount(
                    request.source.as_str(),
                    &target,
                    request.type_.as_str(),
                    options.flags,
                    Some(data.as_c_str()),
                )
                .attempt(what)?;
            }
            other => {
                return Err(Error::invalid(format!(
                    "mount type {other:?} is none of erofs, ext4, tmpfs, overlay, virtiofs, bind"
                )));
            }
        }
        self.done.push(target.clone());
        if request.options.iter().any(|option| option == "discard") {
            self.discarding.push(PathBuf::from(&request.source));
        }
        if let (Some(attr), "bind") = (options.attr(), request.type_.as_str()) {
            let tree = rustix::fs::open(&target, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .attempt(what)?;
            crate::sys::mount_setattr(std::os::fd::AsFd::as_fd(&tree), options.recursive, &attr)
                .attempt(what)?;
        }
        match options.propagation {
            Some(propagation) => mount_change(&target, propagation).attempt(what),
            None => Ok(()),
        }
    }

    /// An overlay's directories must be this container's; upper and work are made if missing.
    fn check_layers(&self, option: &str) -> Result<()> {
        let (key, paths) = option.split_once('=').unwrap_or((option, ""));
        for path in paths.split(':').filter(|path| !path.is_empty()) {
            let path = self.check(path)?;
            if key != "lowerdir" {
                std::fs::create_dir_all(&path).attempt(|| format!("create {}", path.display()))?;
            }
        }
        Ok(())
    }

    fn write(&self, file: &agent::File) -> Result<()> {
        let path = self.check(&file.path)?;
        let what = || format!("write {}", file.path);
        if file.content.len() > MAX_FILE {
            return Err(Error::invalid(format!(
                "{}: {} bytes, at most {MAX_FILE}",
                what(),
                file.content.len()
            )));
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).attempt(what)?;
        }
        let mode = Mode::from_raw_mode(if file.mode == 0 {
            0o644
        } else {
            file.mode & 0o7777
        });
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&path, flags, mode).attempt(what)?;
        rustix::fs::fchmod(&fd, mode).attempt(what)?; // whatever the umask
        std::io::Write::write_all(&mut std::fs::File::from(fd), &file.content).attempt(what)
    }

    /// The disks that what was deleted last may still have to be told: see [`released`]. Each is named once.
    pub(crate) fn take_discarding(&mut self) -> Vec<PathBuf> {
        std::mem::take(&mut self.discarding)
    }

    /// Unmounts what was mounted, last first, and removes the directory.
    pub(crate) fn undo(&mut self) -> Result<()> {
        let mut result = Ok(());
        while let Some(target) = self.done.pop() {
            // Someone may still be inside (a kernel thread writing back): then it goes once they leave.
            let gone = unmount(&target, UnmountFlags::NOFOLLOW)
                .or_else(|_| unmount(&target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW));
            if result.is_ok() {
                result = gone.attempt(|| format!("unmount {}", target.display()));
            }
        }
        // Only what the agent made is in there now; a mount left over makes this fail rather than delete data.
        if result.is_ok() && self.home.exists() {
            result = std::fs::remove_dir_all(&self.home)
                .attempt(|| format!("remove {}", self.home.display()));
        }
        result
    }
}

/// Waits, not for ever, until no file system has these disks any more.
///
/// An unmount takes one mount away. The file system ends with the last, which a process of the container may have
/// held to its end; only its own end sends the discards that are left, and the guest may be gone right after this.
pub(crate) async fn released(disks: &[PathBuf]) {
    const PATIENCE: Duration = Duration::from_secs(5);
    const PAUSE: Duration = Duration::from_millis(1);
    let until = Instant::now() + PATIENCE;
    for disk in disks {
        while is_taken(disk) && Instant::now() < until {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Whether a file system, or another exclusive user, has the block device.
fn is_taken(disk: &Path) -> bool {
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
    rustix::fs::open(disk, flags, Mode::empty()).is_err_and(|error| error == Errno::BUSY)
}

fn is_layer(option: &str) -> bool {
    ["lowerdir=", "upperdir=", "workdir="]
        .iter()
        .any(|key| option.starts_with(key))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn check_only_paths_below_home_pass() {
        let mounts = GuestMounts::new("c1");
        assert!(mounts.check("/run/casemate/c1/rootfs").is_ok());
        for bad in [
            "/run/casemate/c1",
            "/run/casemate/c1/",
            "/run/casemate/c2/rootfs",
            "/run/casemate/c1/../c2/x",
            "/run/casemate/c1/./x",
            "/run/casemate/c10/x",
            "run/casemate/c1/x",
            "/etc",
            "",
            "/run/casemate/c1/a\0b",
        ] {
            assert!(mounts.check(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn is_taken_what_no_file_system_has_is_free() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(!is_taken(file.path()));
        assert!(!is_taken(Path::new("/nowhere")));
    }

    proptest! {
        #[test]
        fn check_any_path_that_passes_stays_inside(path in "(/run/casemate/c1)?(/|\\.|\\.\\.|[a-z]){0,12}") {
            if let Ok(path) = GuestMounts::new("c1").check(&path) {
                prop_assert!(path.starts_with("/run/casemate/c1/") && !path.to_string_lossy().contains("/../"));
            }
        }
    }
}
