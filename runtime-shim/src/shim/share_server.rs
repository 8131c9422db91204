//! The process that serves one share: sees to what virtiofsd can see, then becomes it.
//!
//! In a mount namespace of its own (and as a user in a user namespace, where that user is root) the shared directory
//! is cloned onto a directory of the sandbox's, read-only if it is to be; a single file is put alone into an empty
//! tmpfs. virtiofsd then makes that its root, in further namespaces, and filters its own system calls.

#![allow(unsafe_code)] // unshare(2) and mount_setattr(2) have no safe wrapper

use crate::plan::SHARED_FILE;
use anyhow::Context;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags};
use rustix::thread::UnshareFlags;
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Guest ids that are all mapped to the one user: every 32-bit id but the last, which is none.
const ALL_IDS: u32 = u32::MAX;

/// What such a process is told.
#[derive(Debug)]
pub struct ServeShare {
    /// The program.
    pub virtiofsd: PathBuf,
    /// What of the host is shared.
    pub source: PathBuf,
    /// An empty directory to mount it on.
    pub place: PathBuf,
    /// A listening socket, for one connection.
    pub listener: OwnedFd,
    /// Nothing may be changed.
    pub read_only: bool,
    /// Nothing of it may be changed but what is mounted in it later.
    pub read_only_base: bool,
}

/// Becomes the server of a share.
pub fn serve_share(share: &ServeShare) -> anyhow::Result<Infallible> {
    let is_root = rustix::process::geteuid().is_root();
    // Looked up before anything is covered.
    let tree = clone_of(&share.source)?;
    drop(tree);
    enter_namespaces(is_root)?;
    let tree = clone_of(&share.source)?;
    let stat = rustix::fs::fstat(&tree)?;
    let is_directory = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir();
    restrict(&tree, share.read_only || share.read_only_base)?;
    match is_directory {
        true => attach(&tree, &share.place)?,
        false => attach_alone(&tree, &share.place)?,
    }
    // It lives on in the program that follows.
    rustix::io::fcntl_setfd(&share.listener, rustix::io::FdFlags::empty())?;
    let error = command(share, is_root).exec();
    Err(error).with_context(|| format!("can't start {}", share.virtiofsd.display()))
}

fn clone_of(path: &Path) -> anyhow::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLOEXEC;
    // Without privileges a path can be opened, but no tree be cloned.
    let flags = match rustix::process::geteuid().is_root() {
        true => flags | OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_RECURSIVE,
        false => flags,
    };
    let tree = rustix::mount::open_tree(CWD, path, flags);
    tree.with_context(|| format!("can't share {}", path.display()))
}

/// A mount namespace; a user's, in which that user is root, comes with it.
fn enter_namespaces(is_root: bool) -> anyhow::Result<()> {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    let flags = match is_root {
        true => UnshareFlags::NEWNS,
        false => UnshareFlags::NEWNS | UnshareFlags::NEWUSER,
    };
    // SAFETY: the descriptors stay shared with nobody: CLONE_FILES is not among the flags.
    unsafe { rustix::thread::unshare_unsafe(flags) }.context(
        "can't share a directory without namespaces: the host must allow user namespaces \
         (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone)",
    )?;
    if !is_root {
        std::fs::write("/proc/self/setgroups", "deny").context("can't map the user")?;
        let (uid, gid) = (uid.as_raw(), gid.as_raw());
        std::fs::write("/proc/self/uid_map", format!("0 {uid} 1")).context("can't map the user")?;
        std::fs::write("/proc/self/gid_map", format!("0 {gid} 1"))
            .context("can't map the group")?;
    }
    let apart = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", apart).context("can't set the mounts apart")?;
    Ok(())
}

/// As the kernel has it in `linux/mount.h`.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

const ATTR_RDONLY: u64 = 0x1;
const ATTR_NOSUID: u64 = 0x2;
const ATTR_NODEV: u64 = 0x4;

/// What virtiofsd itself can't do with the mount and all below it, whatever the guest makes of it.
pub(super) fn restrict_tree(tree: &OwnedFd, read_only: bool) -> io::Result<()> {
    let read_only = if read_only { ATTR_RDONLY } else { 0 };
    set_attributes(tree, ATTR_NOSUID | ATTR_NODEV | read_only, true)
}

/// Makes the mount read-only, and none below it.
pub(super) fn make_read_only(tree: &OwnedFd) -> io::Result<()> {
    set_attributes(tree, ATTR_RDONLY, false)
}

fn restrict(tree: &OwnedFd, read_only: bool) -> anyhow::Result<()> {
    restrict_tree(tree, read_only).context("can't restrict the mount")
}

fn set_attributes(tree: &OwnedFd, set: u64, recursive: bool) -> io::Result<()> {
    let attr = MountAttr {
        set,
        clear: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is empty, and the struct's size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn attach(tree: &OwnedFd, place: &Path) -> anyhow::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(tree, "", CWD, place, flags)
        .with_context(|| format!("can't mount on {}", place.display()))
}

/// Puts a file where nothing else is.
fn attach_alone(tree: &OwnedFd, place: &Path) -> anyhow::Result<()> {
    let what = || format!("can't make a place for the file in {}", place.display());
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("tmpfs", place, "tmpfs", flags, Some(c"mode=755,size=4k"))
        .with_context(what)?;
    let file = place.join(SHARED_FILE);
    std::fs::write(&file, "").with_context(what)?;
    attach(tree, &file)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let empty = rustix::fs::open(place, flags, Mode::empty()).with_context(what)?;
    make_read_only(&empty).context("can't restrict the mount")
}

fn command(share: &ServeShare, is_root: bool) -> Command {
    let mut command = Command::new(&share.virtiofsd);
    command
        .env_clear()
        .arg("--fd")
        .arg(share.listener.as_raw_fd().to_string())
        .arg("--shared-dir")
        .arg(&share.place)
        .args(["--sandbox", "namespace", "--log-level", "error", "--xattr"])
        // With handles it would keep CAP_DAC_READ_SEARCH, by which all of the file system can be opened, shared or not.
        .arg("--inode-file-handles=never")
        // The guest makes no devices on the host.
        .arg("--modcaps=-mknod");
    if share.read_only {
        command.arg("--readonly");
    }
    if is_root {
        command.arg("--posix-acl=auto");
    } else {
        // There is one user on the host: whoever a process is in the guest, its files are that user's, and root's in the guest.
        for translate in ["--translate-uid", "--translate-gid"] {
            command.args([translate, &format!("squash-guest:0:0:{ALL_IDS}")]);
        }
    }
    command
}
