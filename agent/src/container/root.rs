//! The container's root, built by the child in its own mount namespace.
//!
//! The child pivots into the new root first and mounts afterwards, so that every target is resolved inside the
//! container: no symlink of an image can point out of it. What is needed of the guest meanwhile (sources of binds,
//! /dev/null to mask with) comes from descriptors and from the working directory, which stays in the old root
//! until that is detached.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, mknodat, openat};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
    mount_bind, mount_change,
};

use super::options::Options;
use crate::error::{Attempt, Error, Result};
use crate::sys::{self, MountAttr};

/// A mount of the spec, parsed before the fork.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    target: PathBuf,
    kind: String,
    source: PathBuf,
    options: Options,
}

/// What the container's root is made of, parsed before the fork.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) rootfs: PathBuf,
    pub(crate) read_only: bool,
    pub(crate) propagation: Option<MountPropagationFlags>,
    pub(crate) mounts: Vec<Entry>,
    pub(crate) devices: Vec<LinuxDevice>,
    /// Keys as paths below /proc/sys.
    pub(crate) sysctl: Vec<(String, String)>,
    pub(crate) masked: Vec<String>,
    pub(crate) read_only_paths: Vec<String>,
    /// Device nodes can't be made, so the guest's are bound.
    pub(crate) user_namespace: bool,
}

impl Entry {
    pub(crate) fn of(spec: &Mount) -> Result<Self> {
        let name = || format!("mount {}", spec.destination().display());
        let options =
            Options::parse(spec.options().iter().flatten().map(String::as_str)).map_err(|e| {
                Error {
                    text: format!("{}: {}", name(), e.text),
                    ..e
                }
            })?;
        if spec.uid_mappings().as_ref().is_some_and(|m| !m.is_empty())
            || spec.gid_mappings().as_ref().is_some_and(|m| !m.is_empty())
        {
            return Err(Error::unsupported(format!(
                "{}: id-mapped mounts are not supported",
                name()
            )));
        }
        if !spec.destination().is_absolute() {
            return Err(Error::invalid(format!(
                "{}: the destination must be absolute",
                name()
            )));
        }
        let kind = spec.typ().clone().unwrap_or_default();
        let bind = options.bind || kind == "bind";
        let source = spec
            .source()
            .clone()
            .unwrap_or_else(|| PathBuf::from("none"));
        if bind && !source.is_absolute() {
            return Err(Error::invalid(format!(
                "{}: source {} must be absolute",
                name(),
                source.display()
            )));
        }
        if !bind && kind.is_empty() {
            return Err(Error::invalid(format!(
                "{}: neither a type nor bind among the options",
                name()
            )));
        }
        // cgroup v1 is not in the guest; specs name the type so for both.
        let kind = if kind == "cgroup" {
            "cgroup2".into()
        } else {
            kind
        };
        Ok(Self {
            target: spec.destination().clone(),
            kind,
            source,
            options: Options { bind, ..options },
        })
    }
}

/// Paths of sysctls, `.` or `/` between the parts.
pub(crate) fn sysctls(map: &HashMap<String, String>) -> Result<Vec<(String, String)>> {
    let mut all: Vec<_> = map
        .iter()
        .map(|(key, value)| {
            let slashes = key.find('/') < key.find('.') && key.contains('/') || !key.contains('.');
            let path: String = if slashes {
                key.clone()
            } else {
                // In the dotted form a slash stands for a dot within a part (an interface's name).
                key.chars()
                    .map(|c| match c {
                        '.' => '/',
                        '/' => '.',
                        c => c,
                    })
                    .collect()
            };
            let sane = path.split('/').all(|part| !matches!(part, "" | "." | ".."))
                && !path.contains('\0');
            if sane {
                Ok((path, value.clone()))
            } else {
                Err(Error::invalid(format!("linux.sysctl: {key:?} is no key")))
            }
        })
        .collect::<Result<_>>()?;
    all.sort();
    Ok(all)
}

/// A terminal for the container's first process, made while its root is built.
pub(super) struct Terminal {
    pub(super) master: OwnedFd,
    pub(super) slave: OwnedFd,
}

/// Enters the container's root. `proc` is the guest's /proc.
pub(super) fn enter(layout: &Layout, proc: &OwnedFd, terminal: bool) -> Result<Option<Terminal>> {
    let trees = layout
        .mounts
        .iter()
        .map(open_source)
        .collect::<Result<Vec<_>>>()?;
    pivot(&layout.rootfs)?;
    for (entry, tree) in layout.mounts.iter().zip(trees) {
        attach(entry, tree).map_err(|e| Error {
            text: format!("mount {}: {}", entry.target.display(), e.text),
            ..e
        })?;
    }
    rustix::process::umask(Mode::empty());
    devices(layout)?;
    let terminal = if terminal {
        Some(open_terminal(true)?)
    } else {
        None
    };
    for (path, value) in &layout.sysctl {
        let file = openat(
            proc,
            format!("sys/{path}"),
            OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::empty(),
        );
        file.and_then(|file| rustix::io::write(file, value.as_bytes()))
            .attempt(|| format!("set sysctl {path} to {value:?}"))?;
    }
    protect(layout)?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)
        .attempt(|| "detach the guest's root".into())?;
    rustix::process::chdir("/").attempt(|| "enter the container's root".into())?;
    if let Some(propagation) = layout.propagation {
        mount_change("/", propagation).attempt(|| "apply linux.rootfsPropagation".into())?;
    }
    if layout.read_only {
        let root = open_path("/")?;
        sys::mount_setattr(
            root.as_fd(),
            false,
            &MountAttr {
                set: READ_ONLY,
                ..MountAttr::default()
            },
        )
        .attempt(|| "make the root read-only".into())?;
    }
    Ok(terminal)
}

const READ_ONLY: u64 = 1;

fn open_path(path: impl AsRef<Path>) -> Result<OwnedFd> {
    let path = path.as_ref();
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .attempt(|| format!("open {}", path.display()))
}

/// A detached copy of what is to be bound, taken while the guest's root is still in reach.
fn open_source(entry: &Entry) -> Result<Option<OwnedFd>> {
    if !entry.options.bind {
        return Ok(None);
    }
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, entry.options.recursive);
    let tree = rustix::mount::open_tree(CWD, &entry.source, flags).attempt(|| {
        format!(
            "mount {}: bind source {}",
            entry.target.display(),
            entry.source.display()
        )
    })?;
    Ok(Some(tree))
}

/// Leaves the working directory in the old root, which stays mounted below the new one for now.
fn pivot(rootfs: &Path) -> Result<()> {
    let what = |step: &str| format!("{step} {}", rootfs.display());
    // A mount of its own, so that read-only and propagation are the container's alone.
    rustix::mount::mount_bind_recursive(rootfs, rootfs).attempt(|| what("bind the root"))?;
    let dir = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let old = rustix::fs::open("/", dir, Mode::empty()).attempt(|| what("open / to pivot to"))?;
    rustix::process::chdir(rootfs).attempt(|| what("enter"))?;
    rustix::process::pivot_root(".", ".").attempt(|| what("pivot_root to"))?;
    rustix::process::fchdir(&old).attempt(|| what("return from"))?;
    // Nothing that happens below may come back to the guest.
    mount_change(
        ".",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .attempt(|| what("cut off the guest's mounts from"))
}

fn attach(entry: &Entry, tree: Option<OwnedFd>) -> Result<()> {
    let options = &entry.options;
    let target = &entry.target;
    let file = match &tree {
        Some(tree) => {
            let stat = rustix::fs::fstat(tree).attempt(|| "look at the source".into())?;
            !FileType::from_raw_mode(stat.st_mode).is_dir()
        }
        None => false,
    };
    make_target(target, file)?;
    match tree {
        Some(tree) => bind(options, target, &tree)?,
        None => file_system(entry)?,
    }
    if let Some(propagation) = options.propagation {
        mount_change(target.as_path(), propagation).attempt(|| "set the propagation".into())?;
    }
    if let Some(attr) = options.recursive_attr() {
        sys::mount_setattr(open_path(target)?.as_fd(), true, &attr)
            .attempt(|| "apply recursive options".into())?;
    }
    Ok(())
}

fn bind(options: &Options, target: &Path, tree: &OwnedFd) -> Result<()> {
    if let Some(attr) = options.attr() {
        sys::mount_setattr(tree.as_fd(), false, &attr).attempt(|| "apply options".into())?;
    }
    rustix::mount::move_mount(
        tree,
        "",
        CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS,
    )
    .attempt(|| "bind".into())
}

fn file_system(entry: &Entry) -> Result<()> {
    let Entry {
        target,
        kind,
        source,
        options,
    } = entry;
    if kind == "proc" || kind == "sysfs" {
        // Behind a symlink masked and read-only paths would miss what they protect.
        let stat = rustix::fs::lstat(target.as_path()).attempt(|| "look at the target".into())?;
        if !FileType::from_raw_mode(stat.st_mode).is_dir() {
            return Err(Error::invalid(format!(
                "{kind} must be mounted on a directory, not on a symlink"
            )));
        }
    }
    let data = std::ffi::CString::new(options.data.as_str())
        .map_err(|_| Error::invalid("options hold a NUL"))?;
    let saved = if options.copy_up {
        Some(open_path(target)?)
    } else {
        None
    };
    mount(
        source.as_path(),
        target.as_path(),
        kind.as_str(),
        options.flags,
        Some(data.as_c_str()),
    )
    .attempt(|| format!("{kind} ({:?}, {:?})", options.flags, options.data))?;
    match saved {
        Some(from) => super::copy_up::copy(from, open_path(target)?),
        None => Ok(()),
    }
}

fn make_target(target: &Path, file: bool) -> Result<()> {
    if rustix::fs::stat(target).is_ok() {
        return Ok(()); // a mismatch of file and directory is the kernel's to refuse
    }
    if !file {
        return std::fs::create_dir_all(target).attempt(|| "create the target".into());
    }
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent).attempt(|| format!("create {}", parent.display()))?;
    }
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::open(target, flags, Mode::from_raw_mode(0o644))
        .map(drop)
        .attempt(|| "create the target".into())
}

/// Nodes that every container has: name, major, minor.
const DEFAULT_NODES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

const DEFAULT_LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
];

fn devices(layout: &Layout) -> Result<()> {
    let dev = Path::new("/dev");
    // With the guest's or the user's own /dev bound there, nothing is to be made.
    let bound = layout
        .mounts
        .iter()
        .any(|m| m.target == dev && m.options.bind);
    if !bound {
        for (name, major, minor) in DEFAULT_NODES {
            let path = dev.join(name);
            if !layout.devices.iter().any(|device| device.path() == &path) {
                node(
                    layout,
                    &path,
                    FileType::CharacterDevice,
                    (major, minor),
                    0o666,
                )?;
            }
        }
        for (to, link) in DEFAULT_LINKS {
            match rustix::fs::symlink(to, link) {
                Ok(()) | Err(Errno::EXIST | Errno::ROFS) => {}
                result => result.attempt(|| format!("link {link} to {to}"))?,
            }
        }
    }
    for device in &layout.devices {
        let kind = match device.typ() {
            LinuxDeviceType::B => FileType::BlockDevice,
            LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
            LinuxDeviceType::P => FileType::Fifo,
            LinuxDeviceType::A => {
                return Err(Error::invalid(format!(
                    "device {}: type \"a\" is for rules only",
                    device.path().display()
                )));
            }
        };
        let number = |n: i64| {
            u32::try_from(n).map_err(|_| {
                Error::invalid(format!(
                    "device {}: number {n} is out of range",
                    device.path().display()
                ))
            })
        };
        let numbers = if kind == FileType::Fifo {
            (0, 0)
        } else {
            (number(device.major())?, number(device.minor())?)
        };
        node(
            layout,
            device.path(),
            kind,
            numbers,
            device.file_mode().unwrap_or(0o666) & 0o7777,
        )?;
        if device.uid().is_some() || device.gid().is_some() {
            let id = rustix::fs::Uid::from_raw(device.uid().unwrap_or_default());
            let group = rustix::fs::Gid::from_raw(device.gid().unwrap_or_default());
            rustix::fs::chown(device.path(), Some(id), Some(group))
                .attempt(|| format!("change the owner of device {}", device.path().display()))?;
        }
    }
    Ok(())
}

fn node(
    layout: &Layout,
    path: &Path,
    kind: FileType,
    (major, minor): (u32, u32),
    mode: u32,
) -> Result<()> {
    let what = || format!("make device {} ({major}:{minor})", path.display());
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).attempt(what)?;
    }
    if layout.user_namespace && kind != FileType::Fifo {
        // The working directory is the guest's root, whose /dev has every device by its kernel name.
        let source = path.strip_prefix("/").unwrap_or(path);
        make_target(path, true)?;
        return mount_bind(source, path).attempt(what);
    }
    let number = rustix::fs::makedev(major, minor);
    match mknodat(CWD, path, kind, Mode::from_raw_mode(mode), number) {
        Err(Errno::EXIST) => {
            let stat = rustix::fs::stat(path).attempt(what)?;
            let same = FileType::from_raw_mode(stat.st_mode) == kind
                && (kind == FileType::Fifo || stat.st_rdev == number);
            if same {
                Ok(())
            } else {
                Err(Error::invalid(format!(
                    "{}: something else is there",
                    what()
                )))
            }
        }
        result => result.attempt(what),
    }
}

/// Opens a new terminal in the container's devpts; binds it at /dev/console for the first process.
pub(super) fn open_terminal(console: bool) -> Result<Terminal> {
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, ptsname, unlockpt};
    let what = || "open a terminal in /dev/pts (does the spec mount devpts there?)".to_string();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = rustix::fs::open("/dev/pts/ptmx", flags, Mode::empty()).attempt(what)?;
    unlockpt(&master).attempt(what)?;
    let slave = ioctl_tiocgptpeer(
        &master,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )
    .attempt(what)?;
    if console {
        let name = ptsname(&master, Vec::new()).attempt(what)?;
        make_target(Path::new("/dev/console"), true)?;
        mount_bind(name.as_c_str(), "/dev/console")
            .attempt(|| "bind the terminal at /dev/console".into())?;
    }
    Ok(Terminal { master, slave })
}

/// Read-only and masked paths; those that don't exist need none.
fn protect(layout: &Layout) -> Result<()> {
    for path in &layout.read_only_paths {
        match mount_bind_recursive_self(path) {
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            result => result.attempt(|| format!("make {path} read-only"))?,
        }
        sys::mount_setattr(
            open_path(path)?.as_fd(),
            false,
            &MountAttr {
                set: READ_ONLY,
                ..MountAttr::default()
            },
        )
        .attempt(|| format!("make {path} read-only"))?;
    }
    let mut empty: Option<&str> = None; // the first masked directory; the others share its file system
    for path in &layout.masked {
        let what = || format!("mask {path}");
        let Ok(stat) = rustix::fs::statat(CWD, path, AtFlags::empty()) else {
            continue;
        };
        if !FileType::from_raw_mode(stat.st_mode).is_dir() {
            // Relative to the guest's root: the container's own /dev/null could be anything.
            mount_bind("dev/null", path).attempt(what)?;
        } else if let Some(first) = empty {
            mount_bind(first, path).attempt(what)?;
        } else {
            mount(
                "tmpfs",
                path,
                "tmpfs",
                MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
                Some(c"size=0k,nr_inodes=1"),
            )
            .attempt(what)?;
            empty = Some(path);
        }
    }
    Ok(())
}

fn mount_bind_recursive_self(path: &str) -> rustix::io::Result<()> {
    rustix::mount::mount_bind_recursive(path, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_both_forms_become_paths() {
        let map = |key: &str| HashMap::from([(key.to_owned(), "1".to_owned())]);
        let path = |key| sysctls(&map(key)).unwrap().remove(0).0;
        assert_eq!(path("net.ipv4.ip_forward"), "net/ipv4/ip_forward");
        assert_eq!(
            path("net/ipv4/conf/eth0.1/rp_filter"),
            "net/ipv4/conf/eth0.1/rp_filter"
        );
        assert_eq!(
            path("net.ipv4.conf.eth0/1.rp_filter"),
            "net/ipv4/conf/eth0.1/rp_filter"
        );
        for bad in ["", "..", "net..ipv4", "/net/x", "net/../../etc/passwd"] {
            assert!(sysctls(&map(bad)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn entry_bad_mounts_are_refused() {
        let of = |value: serde_json::Value| Entry::of(&serde_json::from_value(value).unwrap());
        for value in [
            serde_json::json!({"destination": "proc", "type": "proc"}),
            serde_json::json!({"destination": "/x"}),
            serde_json::json!({"destination": "/x", "type": "bind", "source": "relative"}),
            serde_json::json!({"destination": "/x", "type": "tmpfs", "options": ["idmap"]}),
        ] {
            assert!(of(value.clone()).is_err(), "{value}");
        }
    }
}
