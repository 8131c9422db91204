//! What of a container's root is mounted on the host: what a snapshotter describes with directories of the host.
//!
//! Disks (`erofs`, `ext4`, and an overlay of them) go to the guest as they are. An overlay of directories, or a bind, is
//! mounted in the bundle as containerd's own shim does, and shared with the guest.

use crate::journal::{self, Journal, Taken};
use crate::plan::{ROOT_SHARE, RootfsMount};
use rustix::mount::{MountFlags, MountPropagationFlags};
use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

/// Why a root can't be had.
#[derive(Debug, thiserror::Error)]
#[error("can't have the container's root at {target}")]
pub struct RootfsError {
    target: PathBuf,
    source: io::Error,
}

/// The mounts as a sandbox takes them, after what the host has to mount is there. `root` is where the spec expects it.
pub fn prepare(
    mounts: Vec<RootfsMount>,
    root: &Path,
    journal: &Journal,
) -> Result<Vec<RootfsMount>, RootfsError> {
    let shared = || RootfsMount {
        kind: ROOT_SHARE.to_owned(),
        source: root.display().to_string(),
        options: Vec::new(),
    };
    let failed = |source| RootfsError {
        target: root.to_owned(),
        source,
    };
    let mount = match &mounts[..] {
        // Mounted already by whoever asks.
        [] => {
            std::fs::read_dir(root).map_err(failed)?;
            return Ok(vec![shared()]);
        }
        [mount] if mount.is_of_directories() => mount,
        _ => return Ok(mounts),
    };
    let made = || {
        match std::fs::create_dir(root) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let taken = Taken::Mount {
            path: root.to_owned(),
        };
        journal.record(&taken)?;
        mount_on(mount, root)
    };
    made().map_err(failed)?;
    Ok(vec![shared()])
}

/// Unmounts what is mounted. A mount that is still used goes with its last user.
pub fn release(journal: &Journal) {
    let taken = journal.read().unwrap_or_default();
    let mounts = |taken: &Taken| matches!(taken, Taken::Mount { .. });
    let mounted: Vec<_> = taken.into_iter().filter(mounts).collect();
    // What fails stays in the journal, for `delete`.
    if !mounted.is_empty() && journal::delete_files(&mounted).is_ok() {
        let _ = journal.forget(mounts);
    }
}

/// Makes one mount.
pub fn mount_on(mount: &RootfsMount, target: &Path) -> io::Result<()> {
    let (flags, data) = split(&mount.options);
    let data = CString::new(data)?;
    if mount.kind == "bind" {
        rustix::mount::mount_bind_recursive(&mount.source, target)?;
        let apart = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change(target, apart)?;
        if flags.contains(MountFlags::RDONLY) {
            rustix::mount::mount_remount(target, MountFlags::BIND | flags, c"")?;
        }
        return Ok(());
    }
    rustix::mount::mount(&mount.source, target, &mount.kind, flags, Some(&*data))?;
    Ok(())
}

/// Options as mount(2) takes them: flags, and a file system's own.
fn split(options: &[String]) -> (MountFlags, String) {
    let (mut flags, mut own) = (MountFlags::empty(), Vec::new());
    for option in options {
        match option.as_str() {
            "ro" => flags |= MountFlags::RDONLY,
            "rw" => flags -= MountFlags::RDONLY,
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "noatime" => flags |= MountFlags::NOATIME,
            "bind" | "rbind" => {}
            other => own.push(other),
        }
    }
    (flags, own.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, options: &[&str]) -> RootfsMount {
        RootfsMount {
            kind: kind.into(),
            source: "/source".into(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
        }
    }

    #[test]
    fn disks_are_left_to_the_guest_and_no_mounts_are_the_specs_root() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::in_dir(dir.path());
        for mounts in [
            vec![mount("ext4", &["rw"])],
            vec![
                mount("erofs", &["ro"]),
                mount("ext4", &[]),
                mount("format/mkdir/overlay", &["lowerdir={{ mount 0 }}"]),
            ],
        ] {
            let prepared = prepare(mounts.clone(), Path::new("/b/rootfs"), &journal).unwrap();
            assert_eq!(prepared, mounts);
        }
        let root = dir.path();
        let [shared] = &prepare(Vec::new(), root, &journal).unwrap()[..] else {
            panic!()
        };
        assert_eq!(shared.kind, ROOT_SHARE);
        assert_eq!(Path::new(&shared.source), root);
        assert!(prepare(Vec::new(), Path::new("/no/such"), &journal).is_err());
        let bind = vec![mount("bind", &["rbind"])];
        assert!(prepare(bind, Path::new("/no/such"), &journal).is_err());
        assert_eq!(journal.read().unwrap(), []);
    }

    #[test]
    fn options_are_flags_or_the_file_systems_own() {
        let options = ["ro", "index=off", "nodev", "lowerdir=/a:/b"].map(str::to_owned);
        let (flags, own) = split(&options);
        assert_eq!(flags, MountFlags::RDONLY | MountFlags::NODEV);
        assert_eq!(own, "index=off,lowerdir=/a:/b");
    }
}
