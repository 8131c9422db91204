//! From an OCI spec and the rootfs mounts to what the VMM and the agent are told.
//!
//! [`plan`] is a pure function: it opens nothing and asks the host nothing but what [`look`] tells.
//! It is the only place that decides sizes, disks and mount points.

mod limits;
mod outside;
mod pod;
#[cfg(test)]
mod tests;

pub use limits::{Limits, NETWORK_RATE, asks_for_fixed, cpus as processor_list, rate};
pub use outside::{COPY_UP, SHARED_FILE};
pub use pod::{Joins, POD_SHARE, Place, Placed, ReadOnly, Role, What};

use crate::shim::timing;
use crate::size::MIB;
use casemate_protocol::GUEST_RUN_DIR;
use casemate_protocol::agent::Mount as AgentMount;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use std::path::{Path, PathBuf};

/// A config.json beyond this doesn't fit into a message to the agent.
pub const MAX_SPEC: u64 = 2 << 20;
/// Holds the user as an image's config names it: "name|uid[:group|gid]".
pub const USER_ANNOTATION: &str = "io.casemate.user";
/// What the guest's kernel and agent take before the container gets anything: added to `--memory`.
const GUEST_BASE_MIB: u64 = 40;
/// The kernel keeps 64 bytes for each page of 4 KiB.
const PAGE_TABLE_SHARE: u64 = 64;
/// The kind of a rootfs mount whose source is a directory of the host, shared with the guest; its tag, too.
pub const ROOT_SHARE: &str = "virtiofs";
/// Docker's own minimum; a shell needs about half of it.
pub const MIN_MEMORY: u64 = 6 * MIB;
/// The VMM's bound on possible vCPUs.
pub const MAX_VCPUS: u32 = 32;
/// Mounts in a rootfs: more is no snapshotter's doing.
const MAX_MOUNTS: usize = 16;
/// A root that no image is needed for: the guest's own, which can't be written to. Not for what the user runs.
pub const GUEST_ROOT: &str = "casemate/guest";
/// The first container's directory in its pod's share.
pub const FIRST_PLACE: &str = "c0";
/// Files laid end to end on one disk: layers of an image and their metadata.
const MAX_SEGMENTS: usize = 512;

/// One mount of a rootfs as containerd's snapshotters and our image store describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootfsMount {
    /// "erofs", "ext4", "tmpfs" or "overlay".
    pub kind: String,
    /// A file of the host for a disk.
    pub source: String,
    /// As in mount(8), plus `device=` for further EROFS blobs.
    pub options: Vec<String>,
}

/// What the host has to give.
#[derive(Debug, Clone, Copy)]
pub struct Host {
    /// CPUs that this process may use.
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
}

impl Host {
    /// The host this runs on.
    pub fn here() -> Self {
        let info = rustix::system::sysinfo();
        let cpus = rustix::thread::sched_getaffinity(None).map_or(1, |set| set.count());
        Self {
            cpus: cpus.max(1),
            memory: info.totalram as u64 * u64::from(info.mem_unit.max(1)),
        }
    }
}

/// What a spec without limits gets.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    /// Guest memory in bytes.
    pub memory: u64,
    /// vCPUs.
    pub cpus: u32,
}

/// One virtual disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The serial that the guest sees.
    pub id: String,
    /// Files of the host, laid end to end.
    pub files: Vec<PathBuf>,
    /// Whether the guest may write.
    pub read_only: bool,
    /// It outlives the container: it is locked, and what is written to it is kept.
    pub volume: bool,
}

/// A small file of the host whose content the guest gets in place of a bind mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopiedFile {
    /// On the host.
    pub source: PathBuf,
    /// In the guest.
    pub target: String,
}

/// A file or directory of the host that the guest sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The name by which the guest mounts it.
    pub tag: String,
    /// On the host.
    pub source: PathBuf,
    /// Whether nothing of it may be changed.
    pub read_only: bool,
    /// It is a pod's: what its containers need is put into it later.
    pub is_pods: bool,
}

/// What is at a path of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// A directory.
    Directory,
    /// Something else.
    File,
    /// Nothing, or nothing that we may see.
    Nothing,
}

/// Looks at a path of the host: what [`plan`] is given to do so.
pub fn look(path: &Path) -> Found {
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_dir() => Found::Directory,
        Ok(_) => Found::File,
        Err(_) => Found::Nothing,
    }
}

/// Everything decided about a container in its guest.
#[derive(Debug, Clone, PartialEq)]
pub struct Inside {
    /// What the agent mounts, in order.
    pub mounts: Vec<AgentMount>,
    /// The container's root in the guest.
    pub rootfs: String,
    /// The spec as the guest shall apply it.
    pub guest_spec: Spec,
    /// What `guest_spec` expects to find in the guest.
    pub files: Vec<CopiedFile>,
    /// The user as an image's config names it, to be looked up in the container; empty: as in the spec.
    pub user: String,
    /// What is put into the pod's share for it.
    pub placed: Vec<Placed>,
    /// The end of its first process isn't that of the others.
    pub shares_pids: bool,
}

/// Everything decided about a sandbox and its first container.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The guest's memory.
    pub memory_mib: u32,
    /// The guest's vCPUs.
    pub vcpus: u8,
    /// `/dev/vda` onwards.
    pub disks: Vec<Disk>,
    /// What of the host the guest sees.
    pub shares: Vec<Share>,
    /// The container.
    pub inside: Inside,
    /// The namespaces that the spec names, if it is a pod's sandbox.
    pub pod: Option<Vec<LinuxNamespace>>,
    /// More for the guest kernel's command line.
    pub kernel_args: &'static str,
    /// The network namespace whose interfaces the guest gets; `None`: it has no network.
    pub netns: Option<PathBuf>,
    /// What the host keeps it to.
    pub limits: Limits,
}

impl Plan {
    /// Whether something that the container writes outlives it.
    pub fn is_lasting(&self) -> bool {
        self.disks.iter().any(|disk| disk.volume && !disk.read_only)
            || self.shares.iter().any(|share| !share.read_only)
    }
}

/// Why a spec can't be run.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The memory limit is too small.
    #[error("a memory limit of {limit} bytes is below the minimum of {} MiB", MIN_MEMORY / MIB)]
    MemoryTooSmall {
        /// What was asked for.
        limit: i64,
    },
    /// The host has less memory.
    #[error(
        "a memory limit of {limit} bytes needs a guest of {guest_mib} MiB, and the host has {host_mib} MiB"
    )]
    MemoryTooLarge {
        /// What was asked for.
        limit: u64,
        /// With the guest's own share.
        guest_mib: u64,
        /// What there is.
        host_mib: u64,
    },
    /// More CPUs than there are.
    #[error(
        "range of CPUs is from 0.01 to {have}.00, as there are only {have} CPUs available; {asked} were asked for"
    )]
    TooManyCpus {
        /// Rounded up.
        asked: u64,
        /// What there is.
        have: u32,
    },
    /// The CPU limit makes no sense.
    #[error("a CPU quota of {quota} µs in periods of {period} µs is not valid")]
    CpuQuota {
        /// From the spec.
        quota: i64,
        /// From the spec.
        period: u64,
    },
    /// No list of processors.
    #[error("{0:?} is not a list of processors like 0-2,7")]
    Cpuset(String),
    /// No device has such numbers.
    #[error("a limit is for the device {major}:{minor}, which can't be")]
    Device {
        /// From the spec.
        major: i64,
        /// From the spec.
        minor: i64,
    },
    /// No network passes so many bytes.
    #[error("{0:?} is not a network rate in bytes per second")]
    NetworkRate(String),
    /// A rootfs mount of a kind that isn't supported.
    #[error(
        "rootfs mount {index} has the type {kind:?}; a sandbox takes erofs, ext4, tmpfs and overlay"
    )]
    MountKind {
        /// Which.
        index: usize,
        /// Its type.
        kind: String,
    },
    /// A rootfs mount that refers to nothing.
    #[error("rootfs mount {index}: option {option:?} refers to a mount that is not before it")]
    MountReference {
        /// Which.
        index: usize,
        /// The option.
        option: String,
    },
    /// No rootfs, or an unreasonable one.
    #[error("a rootfs of {0} mounts is not valid")]
    MountCount(usize),
    /// Too many files on one disk.
    #[error("rootfs mount {index} names {count} files; at most {MAX_SEGMENTS} fit on a disk")]
    Segments {
        /// Which.
        index: usize,
        /// How many.
        count: usize,
    },
    /// A bind mount of nothing.
    #[error("mount {destination:?}: the bind source path does not exist: {source_path:?}")]
    Bind {
        /// In the container.
        destination: PathBuf,
        /// On the host.
        source_path: PathBuf,
    },
    /// A volume that isn't a disk's image.
    #[error(
        "mount {destination:?}: {source_path:?} is not the absolute path of a file system's image"
    )]
    Volume {
        /// In the container.
        destination: PathBuf,
        /// On the host.
        source_path: PathBuf,
    },
    /// Too many shares.
    #[error("at most {0} files and directories of the host fit into this sandbox")]
    Shares(usize),
    /// Too many volumes.
    #[error("at most {0} volumes fit into this sandbox")]
    Disks(usize),
    /// A member of a pod comes first.
    #[error("container belongs into the sandbox {0:?}, which does not run here")]
    NoSandbox(String),
    /// A disk for a guest that runs.
    #[error(
        "a container that joins a pod can't have disks: its root must be an overlay or a bind of directories, and it can have no volumes"
    )]
    MemberDisks,
    /// A namespace of the host's.
    #[error("the host's {0} namespace can't be had in a VM")]
    HostNamespace(LinuxNamespaceType),
    /// A namespace that isn't the pod's.
    #[error(
        "the {kind} namespace {path:?} is not that of the container's sandbox, and no other can be joined"
    )]
    Namespace {
        /// Its kind.
        kind: LinuxNamespaceType,
        /// From the spec.
        path: PathBuf,
    },
    /// A mount that is to follow the host's.
    #[error(
        "mount {destination:?}: {option} can't be had: mounts of the host and of a VM don't propagate to each other"
    )]
    Propagation {
        /// In the container.
        destination: PathBuf,
        /// From the spec.
        option: String,
    },
    /// A source that is no absolute path.
    #[error("rootfs mount {index}: {source_path:?} is not an absolute path")]
    Source {
        /// Which.
        index: usize,
        /// The path.
        source_path: String,
    },
}

/// Decides everything about the sandbox of container `id`.
///
/// `bundle` is the directory of the spec: files in it are copied into the guest, others that the spec binds are shared
/// with it. `look` tells what is at a path of the host.
pub fn plan(
    id: &str,
    bundle: &Path,
    spec: &Spec,
    rootfs: &[RootfsMount],
    host: Host,
    defaults: Defaults,
    look: fn(&Path) -> Found,
) -> Result<Plan, PlanError> {
    let role = Role::of(|key| annotation(spec, key));
    if let Role::Member(sandbox) = role {
        return Err(PlanError::NoSandbox(sandbox));
    }
    let place = (role == Role::Sandbox).then_some(Place {
        sandbox: id,
        directory: FIRST_PLACE,
        joins: None,
    });
    let gathered = gather(id, bundle, spec, rootfs, place.as_ref(), look)?;
    let size = pod_size(spec, role == Role::Sandbox);
    let sized = size.as_ref().unwrap_or(spec);
    let (memory_mib, vcpus) = sizes(sized, host, defaults)?;
    Ok(Plan {
        memory_mib,
        vcpus,
        disks: gathered.disks,
        shares: gathered.shares,
        inside: gathered.inside,
        pod: place.map(|_| pod::namespaces(spec)),
        kernel_args: match annotation(spec, timing::ANNOTATION) {
            Some(timing::INITCALLS) => "initcall_debug loglevel=8",
            _ => "",
        },
        netns: netns(spec),
        limits: limits::limits(sized)?,
    })
}

/// Decides everything about container `id`, which joins a pod.
pub fn join(
    id: &str,
    bundle: &Path,
    spec: &Spec,
    rootfs: &[RootfsMount],
    place: &Place<'_>,
    look: fn(&Path) -> Found,
) -> Result<Inside, PlanError> {
    let gathered = gather(id, bundle, spec, rootfs, Some(place), look)?;
    match gathered.disks.is_empty() && gathered.shares.is_empty() {
        true => Ok(gathered.inside),
        false => Err(PlanError::MemberDisks),
    }
}

/// A container, and what its sandbox must have for it from the start.
struct Gathered {
    inside: Inside,
    disks: Vec<Disk>,
    shares: Vec<Share>,
}

fn gather(
    id: &str,
    bundle: &Path,
    spec: &Spec,
    rootfs: &[RootfsMount],
    place: Option<&Place<'_>>,
    look: fn(&Path) -> Found,
) -> Result<Gathered, PlanError> {
    let placed = match place {
        Some(place) => place.root(bundle, spec, rootfs)?,
        None => None,
    };
    let (storage, root) = match (place, &placed) {
        (Some(place), Some(root)) => (Storage::default(), place.path(id, &root.name)),
        _ => {
            let storage = storage(id, rootfs)?;
            let root = storage.mounts.last().map(|m| m.target.clone());
            (storage, root.ok_or(PlanError::MountCount(0))?)
        }
    };
    let Storage {
        mut disks,
        mut shares,
        mut mounts,
    } = storage;
    if let Some(place) = place {
        mounts.splice(0..0, place.mounts(id));
        if place.joins.is_none() {
            shares.push(Share {
                tag: POD_SHARE.to_owned(),
                source: PathBuf::from(POD_SHARE),
                read_only: false,
                is_pods: true,
            });
        }
    }
    let outside = outside::outside(id, bundle, spec, disks.len(), place, look)?;
    disks.extend(outside.disks);
    mounts.extend(outside.mounts);
    shares.extend(outside.shares);
    let mut inside = Inside {
        mounts,
        rootfs: root,
        guest_spec: outside.spec,
        files: outside.files,
        user: annotation(spec, USER_ANNOTATION)
            .unwrap_or_default()
            .to_owned(),
        placed: placed.into_iter().chain(outside.placed).collect(),
        shares_pids: false,
    };
    limits::without_hosts(&mut inside.guest_spec);
    match place {
        Some(place) => pod::settle(&mut inside, place.joins)?,
        None => without_netns(&mut inside.guest_spec),
    }
    Ok(Gathered {
        inside,
        disks,
        shares,
    })
}

/// The network namespace of the host that the spec names.
fn netns(spec: &Spec) -> Option<PathBuf> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    let network = namespaces
        .iter()
        .find(|n| n.typ() == LinuxNamespaceType::Network)?;
    network.path().clone()
}

/// The container shares the guest's own network, which stands for the namespace that the spec names.
fn without_netns(spec: &mut Spec) {
    let linux = spec.linux_mut().as_mut();
    let namespaces = linux.and_then(|linux| linux.namespaces_mut().as_mut());
    if let Some(namespaces) = namespaces {
        namespaces.retain(|n| n.typ() != LinuxNamespaceType::Network || n.path().is_none());
    }
}

/// The guest's memory in MiB and its vCPUs.
pub fn sizes(spec: &Spec, host: Host, defaults: Defaults) -> Result<(u32, u8), PlanError> {
    Ok((
        memory_mib(spec, host, defaults)?,
        vcpus(spec, host, defaults)?,
    ))
}

/// An annotation's value.
pub fn annotation<'a>(spec: &'a Spec, key: &str) -> Option<&'a str> {
    spec.annotations().as_ref()?.get(key).map(String::as_str)
}

/// Where the guest has the file that stands for the spec's bind mount of that number.
pub fn file_target(id: &str, index: usize) -> String {
    format!("{GUEST_RUN_DIR}/{id}/file{index}")
}

/// Guest memory for a container that may use `limit` bytes.
pub fn guest_mib(limit: u64) -> u64 {
    let mib = limit.div_ceil(MIB);
    mib + GUEST_BASE_MIB + mib / PAGE_TABLE_SHARE
}

/// What the CRI says of a pod's size, as the resources of a spec; `None`: nothing.
fn pod_size(spec: &Spec, is_pod: bool) -> Option<Spec> {
    let number = |key: &str| {
        annotation(spec, key)?
            .parse::<i64>()
            .ok()
            .filter(|n| *n > 0)
    };
    if !is_pod {
        return None;
    }
    let memory = number("io.kubernetes.cri.sandbox-memory");
    let quota = number("io.kubernetes.cri.sandbox-cpu-quota");
    let period = number("io.kubernetes.cri.sandbox-cpu-period");
    let shares = number("io.kubernetes.cri.sandbox-cpu-shares");
    let mut sized = spec.clone();
    let linux = sized.linux_mut().get_or_insert_default();
    let resources = linux.resources_mut().get_or_insert_default();
    if memory.is_some() {
        resources
            .memory_mut()
            .get_or_insert_default()
            .set_limit(memory);
    }
    let cpu = resources.cpu_mut().get_or_insert_default();
    // Those of its first container are not the pod's.
    cpu.set_quota(quota);
    cpu.set_period(period.map(i64::unsigned_abs));
    cpu.set_shares(shares.map(i64::unsigned_abs));
    Some(sized)
}

fn memory_mib(spec: &Spec, host: Host, defaults: Defaults) -> Result<u32, PlanError> {
    let limit = spec
        .linux()
        .as_ref()
        .and_then(|l| l.resources().as_ref())
        .and_then(|r| r.memory().as_ref())
        .and_then(|m| m.limit())
        // The spec's way to say "no limit".
        .filter(|limit| *limit != -1);
    let host_mib = host.memory / MIB;
    let Some(limit) = limit else {
        // A small host gets a small default rather than an error.
        return Ok((defaults.memory / MIB).min(host_mib).max(64) as u32);
    };
    if limit < MIN_MEMORY as i64 {
        return Err(PlanError::MemoryTooSmall { limit });
    }
    let guest = guest_mib(limit as u64);
    if guest > host_mib || guest > u64::from(u32::MAX) {
        return Err(PlanError::MemoryTooLarge {
            limit: limit as u64,
            guest_mib: guest,
            host_mib,
        });
    }
    Ok(guest as u32)
}

fn vcpus(spec: &Spec, host: Host, defaults: Defaults) -> Result<u8, PlanError> {
    let cpu = spec
        .linux()
        .as_ref()
        .and_then(|l| l.resources().as_ref())
        .and_then(|r| r.cpu().as_ref());
    let have = limits::processors(spec, host)?.clamp(1, MAX_VCPUS);
    let quota = cpu.and_then(|c| c.quota()).filter(|q| *q != -1);
    let Some(quota) = quota else {
        return Ok(defaults.cpus.clamp(1, have) as u8);
    };
    let period = cpu.and_then(|c| c.period()).unwrap_or(100_000);
    if quota <= 0 || period == 0 {
        return Err(PlanError::CpuQuota { quota, period });
    }
    let asked = (quota as u64).div_ceil(period);
    if asked > u64::from(have) {
        return Err(PlanError::TooManyCpus { asked, have });
    }
    Ok(asked as u8)
}

/// What a rootfs comes to.
#[derive(Default)]
struct Storage {
    disks: Vec<Disk>,
    shares: Vec<Share>,
    mounts: Vec<AgentMount>,
}

/// Turns rootfs mounts into disks, or a share, and the mounts that the agent does on them.
fn storage(id: &str, rootfs: &[RootfsMount]) -> Result<Storage, PlanError> {
    if rootfs.is_empty() || rootfs.len() > MAX_MOUNTS {
        return Err(PlanError::MountCount(rootfs.len()));
    }
    let mut disks: Vec<Disk> = Vec::new();
    let mut shares: Vec<Share> = Vec::new();
    let mut mounts: Vec<AgentMount> = Vec::new();
    for (index, mount) in rootfs.iter().enumerate() {
        let last = index + 1 == rootfs.len();
        let target = match last {
            true => format!("{GUEST_RUN_DIR}/{id}/rootfs"),
            false => format!("{GUEST_RUN_DIR}/{id}/m{index}"),
        };
        let (source, options) = match mount.kind.as_str() {
            "erofs" | "ext4" => {
                let disk = disk(index, mount, disks.len())?;
                let options = disk_options(mount, disk.read_only);
                let source = format!("/dev/vd{}", (b'a' + disks.len() as u8) as char);
                disks.push(disk);
                (source, options)
            }
            ROOT_SHARE if shares.is_empty() => {
                shares.push(Share {
                    tag: ROOT_SHARE.to_owned(),
                    source: absolute(index, &mount.source)?,
                    read_only: false,
                    is_pods: false,
                });
                (ROOT_SHARE.to_owned(), Vec::new())
            }
            "tmpfs" => ("none".to_owned(), mount.options.clone()),
            GUEST_ROOT if rootfs.len() == 1 => {
                let options = ["bind", "ro"].map(str::to_owned);
                ("/".to_owned(), options.to_vec())
            }
            "overlay" | "format/overlay" | "format/mkdir/overlay" => {
                ("none".to_owned(), overlay_options(index, mount, &mounts)?)
            }
            kind => {
                return Err(PlanError::MountKind {
                    index,
                    kind: kind.to_owned(),
                });
            }
        };
        let kind = match mount.kind.as_str() {
            GUEST_ROOT => "bind",
            kind => kind.rsplit('/').next().unwrap_or(kind),
        };
        mounts.push(AgentMount {
            type_: kind.to_owned(),
            source,
            target,
            options,
            ..Default::default()
        });
    }
    Ok(Storage {
        disks,
        shares,
        mounts,
    })
}

fn absolute(index: usize, path: &str) -> Result<PathBuf, PlanError> {
    let path = PathBuf::from(path);
    match path.is_absolute() {
        true => Ok(path),
        false => Err(PlanError::Source {
            index,
            source_path: path.display().to_string(),
        }),
    }
}

fn disk(index: usize, mount: &RootfsMount, position: usize) -> Result<Disk, PlanError> {
    let further = mount
        .options
        .iter()
        .filter_map(|o| o.strip_prefix("device="));
    let files: Vec<PathBuf> = std::iter::once(mount.source.as_str())
        .chain(further)
        .map(|path| absolute(index, path))
        .collect::<Result<_, _>>()?;
    if files.len() > MAX_SEGMENTS {
        return Err(PlanError::Segments {
            index,
            count: files.len(),
        });
    }
    let asks_read_only = mount.options.iter().any(|o| o == "ro");
    Ok(Disk {
        id: format!("{}{position}", mount.kind),
        files,
        read_only: mount.kind == "erofs" || asks_read_only,
        volume: false,
    })
}

/// What is left for the guest's mount call.
fn disk_options(mount: &RootfsMount, read_only: bool) -> Vec<String> {
    let mut options: Vec<String> = mount
        .options
        .iter()
        .filter(|o| !o.starts_with("device=") && !matches!(o.as_str(), "loop" | "ro" | "rw"))
        .cloned()
        .collect();
    options.insert(0, if read_only { "ro" } else { "rw" }.to_owned());
    if mount.kind == "ext4" && !read_only {
        // The tables are lazily initialised; filling them in would be work for nothing.
        options.push("noinit_itable".to_owned());
    }
    options
}

/// Replaces `{{ mount N }}` by where mount N is.
fn overlay_options(
    index: usize,
    mount: &RootfsMount,
    before: &[AgentMount],
) -> Result<Vec<String>, PlanError> {
    let fill_in = |option: &String| -> Result<String, PlanError> {
        let bad = || PlanError::MountReference {
            index,
            option: option.clone(),
        };
        let mut out = String::new();
        let mut rest = option.as_str();
        while let Some(start) = rest.find("{{") {
            let end = rest[start..].find("}}").ok_or_else(bad)? + start;
            let number = rest[start + 2..end]
                .trim()
                .strip_prefix("mount ")
                .and_then(|n| n.trim().parse::<usize>().ok())
                .ok_or_else(bad)?;
            let target = &before.get(number).ok_or_else(bad)?.target;
            out.push_str(&rest[..start]);
            out.push_str(target);
            rest = &rest[end + 2..];
        }
        out.push_str(rest);
        Ok(out)
    };
    mount
        .options
        .iter()
        // An instruction to containerd's own mount manager; the agent makes the directories.
        .filter(|o| !o.starts_with("X-containerd."))
        .map(fill_in)
        .collect()
}
