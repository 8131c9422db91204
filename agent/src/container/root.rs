//! The container's root, built by the child in its own mount namespace.
//!
//! The child takes what it needs of the guest (sources of binds, device nodes) as detached mounts, pivots into the
//! new root, lets go of the old one, and only then mounts: every target is resolved inside the container, and no
//! symlink of an image can point out of it. The old root must be gone by then, not merely covered: while it is
//! stacked on the new one, `/..` leads into it.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, mknodat, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsmount, fsopen, mount, mount_bind,
    mount_bind_recursive, mount_change,
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
    let sources = layout
        .mounts
        .iter()
        .map(|entry| source(entry, layout.user_namespace))
        .collect::<Result<Vec<_>>>()?;
    let nodes = guest_nodes(layout)?;
    // The container's own could be anything.
    let null = match layout.masked.is_empty() {
        true => None,
        false => Some(
            clone_tree(Path::new("/dev/null"), false)
                .attempt(|| "take /dev/null from the guest".into())?,
        ),
    };
    pivot(&layout.rootfs)?;
    for (entry, source) in layout.mounts.iter().zip(sources) {
        attach(entry, source).map_err(|e| Error {
            text: format!("mount {}: {}", entry.target.display(), e.text),
            ..e
        })?;
    }
    rustix::process::umask(Mode::empty());
    devices(layout, &nodes)?;
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
    protect(layout, null)?;
    if let Some(propagation) = layout.propagation {
        mount_change("/", propagation).attempt(|| "apply linux.rootfsPropagation".into())?;
    }
    if layout.read_only {
        let root = open_path("/")?;
        sys::mount_setattr(root.as_fd(), false, &READ_ONLY_ATTR)
            .attempt(|| "make the root read-only".into())?;
    }
    Ok(terminal)
}

const READ_ONLY_ATTR: MountAttr = MountAttr {
    set: 1,
    clear: 0,
    propagation: 0,
    userns_fd: 0,
};

fn open_path(path: impl AsRef<Path>) -> Result<OwnedFd> {
    let path = path.as_ref();
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .attempt(|| format!("open {}", path.display()))
}

/// What is to be mounted, as a detached mount, if that must be taken while the guest's root is in reach.
fn source(entry: &Entry, user_namespace: bool) -> Result<Option<OwnedFd>> {
    let what = || {
        format!(
            "mount {}: source {}",
            entry.target.display(),
            entry.source.display()
        )
    };
    if entry.options.bind {
        return clone_tree(&entry.source, entry.options.recursive)
            .attempt(what)
            .map(Some);
    }
    // A user namespace may have a new proc or sysfs only where it sees a whole one already: the guest's. Where that sysfs
    // is the container's too, only a detached cgroup2 goes over the one that is in it.
    if user_namespace
        && matches!(entry.kind.as_str(), "proc" | "sysfs" | "cgroup2")
        && entry.options.data.is_empty()
    {
        let context = match fsopen(entry.kind.as_str(), FsOpenFlags::FSOPEN_CLOEXEC) {
            // A new sysfs shows a network namespace, which here is the guest's own.
            Err(Errno::PERM) if entry.kind == "sysfs" => {
                return clone_tree(Path::new("/sys"), true).attempt(what).map(Some);
            }
            opened => opened.attempt(what)?,
        };
        fsconfig_create(&context).attempt(what)?;
        return fsmount(
            &context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::empty(),
        )
        .attempt(what)
        .map(Some);
    }
    Ok(None)
}

fn clone_tree(path: &Path, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    rustix::mount::open_tree(CWD, path, flags)
}

/// In a user namespace nodes can't be made: the guest's, which devtmpfs names as the kernel does, are bound.
fn guest_nodes(layout: &Layout) -> Result<HashMap<PathBuf, OwnedFd>> {
    if !layout.user_namespace {
        return Ok(HashMap::new());
    }
    let defaults = DEFAULT_NODES
        .iter()
        .map(|(name, ..)| Path::new("/dev").join(name));
    let paths = defaults.chain(layout.devices.iter().map(|device| device.path().clone()));
    paths
        .map(|path| {
            let tree = clone_tree(&path, false)
                .attempt(|| format!("take device {} from the guest", path.display()))?;
            Ok((path, tree))
        })
        .collect()
}

/// Makes `rootfs` the root, and lets go of the old one.
fn pivot(rootfs: &Path) -> Result<()> {
    let what = |step: &str| format!("{step} {}", rootfs.display());
    // A mount of its own, so that read-only and propagation are the container's alone.
    mount_bind_recursive(rootfs, rootfs).attempt(|| what("bind the root"))?;
    let dir = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let old = rustix::fs::open("/", dir, Mode::empty()).attempt(|| what("open / to pivot to"))?;
    rustix::process::chdir(rootfs).attempt(|| what("enter"))?;
    rustix::process::pivot_root(".", ".").attempt(|| what("pivot_root to"))?;
    rustix::process::fchdir(&old).attempt(|| what("return from"))?;
    // The unmounting must not come back to the guest.
    let private = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change(".", private).attempt(|| what("cut off the guest's mounts from"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)
        .attempt(|| what("detach the guest's root from"))?;
    rustix::process::chdir("/").attempt(|| what("enter"))
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
    if matches!(entry.kind.as_str(), "proc" | "sysfs") && !options.bind {
        // Behind a symlink masked and read-only paths would miss what they protect.
        let stat = rustix::fs::lstat(target).attempt(|| "look at the target".into())?;
        if !FileType::from_raw_mode(stat.st_mode).is_dir() {
            return Err(Error::invalid(format!(
                "{} must be mounted on a directory, not on a symlink",
                entry.kind
            )));
        }
    }
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
    move_mount(tree, target).attempt(|| "attach".into())
}

fn file_system(entry: &Entry) -> Result<()> {
    let Entry {
        target,
        kind,
        source,
        options,
    } = entry;
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
        return make_directory(target, MAX_SYMLINKS).attempt(|| "create the target".into());
    }
    if let Some(parent) = target.parent() {
        make_directory(parent, MAX_SYMLINKS).attempt(|| format!("create {}", parent.display()))?;
    }
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::open(target, flags, Mode::from_raw_mode(0o644))
        .map(drop)
        .attempt(|| "create the target".into())
}

/// As many as the kernel follows.
const MAX_SYMLINKS: u32 = 40;

/// Makes a directory and those above it; a symlink to nowhere gets its directory made (`/var/run` to `/run`).
fn make_directory(path: &Path, links: u32) -> rustix::io::Result<()> {
    if rustix::fs::stat(path).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_dir()) {
        return Ok(());
    }
    let parent = path.parent().ok_or(Errno::NOTDIR)?;
    make_directory(parent, links)?;
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Err(Errno::EXIST) if links > 0 => {
            let link = rustix::fs::readlink(path, Vec::new()).map_err(|_| Errno::NOTDIR)?;
            let link = std::ffi::OsStr::from_bytes(link.as_bytes()).to_owned();
            make_directory(&parent.join(link), links - 1)
        }
        Err(Errno::EXIST) => Err(Errno::LOOP),
        result => result,
    }
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

fn devices(layout: &Layout, nodes: &HashMap<PathBuf, OwnedFd>) -> Result<()> {
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
                    nodes,
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
            nodes,
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
    nodes: &HashMap<PathBuf, OwnedFd>,
    path: &Path,
    kind: FileType,
    (major, minor): (u32, u32),
    mode: u32,
) -> Result<()> {
    let what = || format!("make device {} ({major}:{minor})", path.display());
    if let Some(parent) = path.parent() {
        make_directory(parent, MAX_SYMLINKS).attempt(what)?;
    }
    if let (Some(guest), true) = (nodes.get(path), kind != FileType::Fifo) {
        make_target(path, true)?;
        return move_mount(guest, path).attempt(what);
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

/// Read-only and masked paths; those that don't exist need none. `null` is the guest's /dev/null.
fn protect(layout: &Layout, null: Option<OwnedFd>) -> Result<()> {
    for path in &layout.read_only_paths {
        let what = || format!("make {path} read-only");
        match mount_bind_recursive(path, path) {
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            result => result.attempt(what)?,
        }
        sys::mount_setattr(open_path(path)?.as_fd(), false, &READ_ONLY_ATTR).attempt(what)?;
    }
    // The first masked file and directory get a mount that the others share.
    let mut null = null.map(Mask::New);
    let mut empty: Option<&str> = None;
    for path in &layout.masked {
        let what = || format!("mask {path}");
        let Ok(stat) = rustix::fs::statat(CWD, path, AtFlags::empty()) else {
            continue;
        };
        if FileType::from_raw_mode(stat.st_mode).is_dir() {
            match empty {
                Some(first) => mount_bind(first, path).attempt(what)?,
                None => empty_directory(path).attempt(what)?,
            }
            empty = empty.or(Some(path));
        } else {
            null = match null {
                Some(Mask::New(tree)) => {
                    move_mount(&tree, path).attempt(what)?;
                    Some(Mask::At(path))
                }
                Some(Mask::At(first)) => {
                    mount_bind(first, path).attempt(what)?;
                    Some(Mask::At(first))
                }
                None => None,
            };
        }
    }
    Ok(())
}

/// Where the guest's /dev/null is.
enum Mask<'a> {
    /// Nowhere yet.
    New(OwnedFd),
    /// On this masked file.
    At(&'a str),
}

fn empty_directory(path: &str) -> rustix::io::Result<()> {
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", path, "tmpfs", flags, Some(c"size=0k,nr_inodes=1"))
}

/// Attaches a detached mount.
fn move_mount(tree: &OwnedFd, target: impl AsRef<Path>) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    rustix::mount::move_mount(tree, "", CWD, target.as_ref(), flags)
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
