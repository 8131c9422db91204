//! What the containers of a pod have of the host: put into the pod's share when they are made.
//!
//! The share's root is an empty directory of the sandbox's that can't be written to. A container gets a directory in it,
//! and its root and binds are mounted there, but only as the process that serves the share sees it: they are made apart
//! from all mounts (in a mount namespace that nobody else has), restricted, and attached in that process's namespace.
//! So the host has no mount that would have to be taken back: when the process ends, by whatever cause, they are gone.

#![allow(unsafe_code)] // unshare(2) has no safe wrapper

use super::share_server;
use crate::containerd::rootfs::mount_on;
use crate::files::gone_is_fine;
use crate::journal;
use crate::plan::{Placed, ReadOnly, What};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount,
    open_tree, unmount,
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

/// Most mounts of one container.
const MAX_PLACED: usize = 1024;

/// Why something can't be put there.
#[derive(Debug, thiserror::Error)]
#[error("can't have {what} in the pod's share")]
pub(super) struct PlaceError {
    what: String,
    source: io::Error,
}

fn failed(what: impl ToString) -> impl FnOnce(io::Error) -> PlaceError {
    move |source| PlaceError {
        what: what.to_string(),
        source,
    }
}

/// The places in one pod's share.
pub(super) struct Places {
    /// The share's root on the host.
    root: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// The mount namespace of the process that serves it.
    namespace: Option<Arc<OwnedFd>>,
    /// Directories given out so far: none is used twice, the guest may remember it.
    given: u64,
    /// What is mounted, by directory.
    mounted: BTreeMap<String, Vec<String>>,
}

impl Places {
    /// Of the share whose root is `root`, served by process `server` or a child of it.
    pub(super) fn new(root: PathBuf, server: u32) -> Result<Self, PlaceError> {
        let namespace = mounts_of(server).map_err(failed("mounts"))?;
        let inner = Inner {
            namespace: Some(Arc::new(namespace)),
            ..Inner::default()
        };
        Ok(Self {
            root,
            inner: Mutex::new(inner),
        })
    }

    /// A poisoned lock holds what was mounted: always usable.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A directory that none had; not the first container's.
    pub(super) fn next(&self) -> String {
        let mut inner = self.lock();
        inner.given += 1;
        format!("c{}", inner.given)
    }

    /// Puts things into a directory, all or none of them.
    pub(super) async fn put(
        self: &Arc<Self>,
        directory: &str,
        placed: &[Placed],
    ) -> Result<(), PlaceError> {
        let (places, name, placed) = (self.clone(), directory.to_owned(), placed.to_vec());
        let put = move || places.put_all(&name, &placed);
        let result = in_thread(put).await.map_err(failed("anything"))?;
        if result.is_err() {
            self.clear(directory).await;
        }
        result
    }

    fn put_all(&self, directory: &str, placed: &[Placed]) -> Result<(), PlaceError> {
        if placed.len() > MAX_PLACED {
            let error = io::Error::other(format!("at most {MAX_PLACED} are possible"));
            return Err(failed(format!("{} mounts", placed.len()))(error));
        }
        let gone = || io::Error::other("the sandbox is being ended");
        let namespace = self.lock().namespace.clone();
        let namespace = namespace.ok_or_else(gone).map_err(failed("anything"))?;
        let home = self.root.join(directory);
        std::fs::create_dir(&home).map_err(failed("a directory"))?;
        self.lock().mounted.insert(directory.to_owned(), Vec::new());
        apart().map_err(failed("mounts"))?;
        let trees = placed.iter().map(|placed| {
            let tree = tree(placed, &home.join(&placed.name));
            tree.map_err(failed(describe(placed)))
        });
        let trees = trees.collect::<Result<Vec<_>, _>>()?;
        enter(&namespace).map_err(failed("mounts"))?;
        for (placed, tree) in placed.iter().zip(trees) {
            let target = Path::new("/").join(directory).join(&placed.name);
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            move_mount(&tree, "", CWD, &target, flags)
                .map_err(|e| failed(describe(placed))(e.into()))?;
            if let Some(mounted) = self.lock().mounted.get_mut(directory) {
                mounted.push(placed.name.clone());
            }
        }
        Ok(())
    }

    /// Takes away what is in a directory. Whoever still uses it keeps it.
    pub(super) async fn clear(self: &Arc<Self>, directory: &str) {
        let (namespace, mounted) = {
            let mut inner = self.lock();
            let mounted = inner.mounted.remove(directory).unwrap_or_default();
            (inner.namespace.clone(), mounted)
        };
        let inside = Path::new("/").join(directory);
        let detach = move || {
            let Some(namespace) = namespace else {
                return Ok(());
            };
            enter(&namespace)?;
            mounted
                .iter()
                .rev()
                .try_for_each(|name| detach(&inside.join(name)))
        };
        let detached = in_thread(detach).await.and_then(|detached| detached);
        if let Err(error) = detached.and_then(|()| remove(&self.root.join(directory))) {
            // It goes with the sandbox.
            crate::rpc::complain(format_args!(
                "can't empty {directory} of the pod's share: {error}"
            ));
        }
    }

    /// Lets go of all.
    pub(super) fn close(&self) {
        let mut inner = self.lock();
        inner.namespace = None;
        inner.mounted.clear();
    }
}

/// Runs `work` in a thread that ends with it: a namespace belongs to a thread.
async fn in_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (tell, told) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().spawn(move || {
        let _ = tell.send(work());
    })?;
    told.await
        .map_err(|_| io::Error::other("the thread that does it panicked"))
}

/// The mount namespace of a share's server, which goes into one of its own before it serves.
fn mounts_of(server: u32) -> io::Result<OwnedFd> {
    let open = |of: &str| {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        rustix::fs::open(format!("/proc/{of}/ns/mnt"), flags, Mode::empty())
    };
    let id = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
    // Its child serves, if it has one.
    let process = journal::with_children(server).pop().unwrap_or(server);
    let namespace = open(&process.to_string())?;
    if id(&namespace)? == id(&open("self")?)? {
        let error = format!("process {process}, which serves the share, has no mounts of its own");
        return Err(io::Error::other(error));
    }
    Ok(namespace)
}

/// Sets this thread's mounts apart from all others.
fn apart() -> io::Result<()> {
    // SAFETY: this thread shares its descriptors as before: CLONE_FILES is not among the flags.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    Ok(mount_change("/", private)?)
}

/// Puts this thread into a mount namespace.
fn enter(namespace: &OwnedFd) -> io::Result<()> {
    // SAFETY: as above. Only a thread that shares its root and directory with nobody can enter one.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
    let kind = Some(LinkNameSpaceType::Mount);
    Ok(move_into_link_name_space(namespace.as_fd(), kind)?)
}

/// Makes what is placed as a mount that is nowhere yet, and a place for it at `target` on the host.
fn tree(placed: &Placed, target: &Path) -> io::Result<OwnedFd> {
    let clone = |path: &Path, recursive: bool| {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
        open_tree(CWD, path, flags)
    };
    let (tree, read_only) = match &placed.what {
        What::Bind {
            source,
            recursive,
            read_only,
        } => (clone(source, *recursive)?, *read_only),
        What::Mount(mount) => {
            std::fs::create_dir(target)?;
            mount_on(mount, target)?;
            return finish(clone(target, true)?, ReadOnly::Writable);
        }
    };
    let stat = rustix::fs::fstat(&tree)?;
    match rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() {
        true => std::fs::create_dir(target)?,
        false => drop(std::fs::File::create_new(target)?),
    }
    finish(tree, read_only)
}

fn finish(tree: OwnedFd, read_only: ReadOnly) -> io::Result<OwnedFd> {
    share_server::restrict_tree(&tree, read_only == ReadOnly::Recursive)?;
    if read_only == ReadOnly::Top {
        share_server::make_read_only(&tree)?;
    }
    Ok(tree)
}

fn detach(target: &Path) -> io::Result<()> {
    match unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Removes a container's directory and the empty places in it, and nothing that is in one.
fn remove(home: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(home) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        gone_is_fine(match entry.file_type()?.is_dir() {
            true => std::fs::remove_dir(entry.path()),
            false => std::fs::remove_file(entry.path()),
        })?;
    }
    gone_is_fine(std::fs::remove_dir(home))
}

fn describe(placed: &Placed) -> String {
    match &placed.what {
        What::Bind { source, .. } => source.display().to_string(),
        What::Mount(mount) => format!("the {} that is the container's root", mount.kind),
    }
}
