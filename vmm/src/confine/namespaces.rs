//! Namespaces of its own and a root with nothing in it.
//!
//! No user or group id is mapped into the user namespace. None is needed (nothing is ever
//! opened), it saves three files under /proc, and it leaves even uid 0 of nothing
//! out of reach: every id reads as the overflow id, and setuid(2) fails.

#![allow(unsafe_code)] // unshare(2), which is unsafe for the sake of CLONE_FILES

use super::{ConfineError, Isolation};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsmount, fsopen, mount_change, move_mount, unmount,
};
use rustix::process::{fchdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Why there is no empty root.
pub(super) struct Failure {
    pub(super) reason: ConfineError,
    /// Namespaces were entered all the same: a child will be PID 1 of a new one.
    pub(super) unshared: bool,
}

/// Enters new namespaces, then an empty root.
pub(super) fn enter() -> Result<Isolation, Failure> {
    let isolation = unshare().map_err(|reason| Failure {
        reason,
        unshared: false,
    })?;
    empty_root(isolation).map_err(|reason| Failure {
        reason,
        unshared: true,
    })?;
    Ok(isolation)
}

fn unshare() -> Result<Isolation, ConfineError> {
    let without_user = UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: CLONE_FILES isn't among the flags.
    let refused = match unsafe { unshare_unsafe(UnshareFlags::NEWUSER | without_user) } {
        Ok(()) => return Ok(Isolation::Namespaces),
        Err(e) => e,
    };
    // Root doesn't need the user namespace for the others.
    // SAFETY: as above.
    match unsafe { unshare_unsafe(without_user) } {
        Ok(()) => Ok(Isolation::NamespacesWithoutUser),
        Err(_) => Err(ConfineError::advised(
            "unshare(user, mount, pid, net, ipc, uts, cgroup)",
            refused,
            match refused {
                Errno::PERM | Errno::ACCESS => {
                    "; allow user namespaces: kernel.unprivileged_userns_clone=1 (Debian), \
                     kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), or in a container a seccomp profile with unshare"
                }
                Errno::NOSPC | Errno::USERS => {
                    "; raise user.max_user_namespaces and its siblings in sysctl"
                }
                Errno::INVAL => {
                    "; the kernel lacks a kind of namespace, or the process has more than one thread"
                }
                _ => "",
            },
        )),
    }
}

/// Replaces the root by a read-only tmpfs that holds nothing, and lets go of the host's.
fn empty_root(isolation: Isolation) -> Result<(), ConfineError> {
    if isolation == Isolation::NamespacesWithoutUser {
        // A new user namespace cuts propagation to the host by itself.
        mount_change(
            "/",
            MountPropagationFlags::REC | MountPropagationFlags::PRIVATE,
        )
        .map_err(|e| ConfineError::step("mount(/, MS_REC | MS_PRIVATE)", e))?;
    }
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|e| ConfineError::step("fsopen(tmpfs)", e))?;
    fsconfig_create(&context).map_err(|e| ConfineError::step("fsconfig(tmpfs)", e))?;
    let root = fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
    .map_err(|e| ConfineError::step("fsmount(tmpfs)", e))?;
    move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|e| ConfineError::step("move_mount(tmpfs, /)", e))?;
    fchdir(&root).map_err(|e| ConfineError::step("fchdir(tmpfs)", e))?;
    // The old root ends up on top of the new one, and is taken off from there.
    pivot_root(".", ".").map_err(|e| {
        ConfineError::advised(
            "pivot_root",
            e,
            "; a host that runs from its initramfs must switch_root first",
        )
    })?;
    unmount(".", UnmountFlags::DETACH)
        .map_err(|e| ConfineError::step("umount2(old root, MNT_DETACH)", e))
}
