//! Pods: which container is a pod's first, which joins one, and what those that join get of it.
//!
//! A pod has one share. What its containers need of the host, their roots among it, is put into the share when they are
//! made (see `shim::places`): the VM takes no further devices while it runs.

use super::{Found, Inside, PlanError, RootfsMount};
use casemate_protocol::GUEST_RUN_DIR;
use casemate_protocol::agent::Mount as AgentMount;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType as Kind, Spec};
use std::path::{Path, PathBuf};

/// The tag of a pod's share, and its directory's name in the sandbox's own.
pub const POD_SHARE: &str = "pod";
/// What is at `/dev/shm` of all containers of a pod: as large as containerd makes its own.
const SHM: &str = "shm";
const SHM_SIZE: &str = "size=65536k";
/// The name of a container's root in the share.
const ROOT: &str = "rootfs";

const CONTAINER_TYPE: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];
const SANDBOX_ID: [&str; 2] = [
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
];

/// What a container is in a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// In none.
    Alone,
    /// The first, whose sandbox the others join.
    Sandbox,
    /// In the sandbox of that id.
    Member(String),
}

impl Role {
    /// From a spec's annotations, in containerd's words or CRI-O's.
    pub fn of<'a>(annotation: impl Fn(&str) -> Option<&'a str>) -> Self {
        let any = |keys: [&str; 2]| keys.into_iter().find_map(&annotation);
        match any(CONTAINER_TYPE) {
            Some("sandbox") => Self::Sandbox,
            Some("container") => match any(SANDBOX_ID) {
                Some(id) => Self::Member(id.to_owned()),
                None => Self::Alone,
            },
            _ => Self::Alone,
        }
    }
}

/// Something of the host that a container finds in the pod's share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// In the container's own directory of the share.
    pub name: String,
    /// What it is.
    pub what: What,
}

impl Placed {
    /// Whether it can't be changed but for what is mounted below it.
    pub(super) fn is_read_only_at_top(&self) -> bool {
        matches!(
            self.what,
            What::Bind {
                recursive: true,
                read_only: ReadOnly::Top,
                ..
            }
        )
    }
}

/// What is put into a share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A file or directory.
    Bind {
        /// On the host.
        source: PathBuf,
        /// With what is mounted below it.
        recursive: bool,
        /// What of it can't be changed.
        read_only: ReadOnly,
    },
    /// A mount that is to be made: a container's root as a snapshotter describes it.
    Mount(RootfsMount),
}

/// What of a bind can't be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadOnly {
    /// Nothing.
    Writable,
    /// All but what is mounted below it.
    Top,
    /// All.
    Recursive,
}

/// A container's place in a pod.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The pod's first container.
    pub sandbox: &'a str,
    /// The container's directory in the share: one that no other container of the pod has had.
    pub directory: &'a str,
    /// What it joins; `None`: it is the first.
    pub joins: Option<&'a Joins<'a>>,
}

/// What a container joins.
#[derive(Debug, Clone, Copy)]
pub struct Joins<'a> {
    /// The namespaces of the pod's first container, as its spec had them.
    pub namespaces: &'a [LinuxNamespace],
    /// By what process of the host the engine names the sandbox.
    pub host_pid: u32,
    /// The first process of the pod's first container, in the guest.
    pub guest_pid: u32,
}

/// Where a container finds the pod's share in the guest.
fn share_of(id: &str) -> String {
    format!("{GUEST_RUN_DIR}/{id}/{POD_SHARE}")
}

impl Place<'_> {
    /// Where container `id` finds what is placed under a name.
    pub(super) fn path(&self, id: &str, name: &str) -> String {
        format!("{}/{}/{name}", share_of(id), self.directory)
    }

    /// What all containers of the pod have at `/dev/shm`.
    pub(super) fn shm(&self) -> String {
        format!("{GUEST_RUN_DIR}/{}/{SHM}", self.sandbox)
    }

    /// What the agent mounts for container `id` before anything else.
    pub(super) fn mounts(&self, id: &str) -> Vec<AgentMount> {
        let mount = |kind: &str, source: &str, target, options: &[&str]| AgentMount {
            type_: kind.to_owned(),
            source: source.to_owned(),
            target,
            options: options.iter().map(|o| (*o).to_owned()).collect(),
            ..Default::default()
        };
        if self.joins.is_some() {
            // Linux 6.12, asked to mount a tag again, may give the file system of a mount within the share.
            return vec![mount("bind", &share_of(self.sandbox), share_of(id), &[])];
        }
        let shm = ["nosuid", "nodev", "noexec", "mode=1777", SHM_SIZE];
        vec![
            mount("virtiofs", POD_SHARE, share_of(id), &["rw"]),
            mount("tmpfs", SHM, self.shm(), &shm),
        ]
    }

    /// The container's root; `None`: it is on disks.
    pub(super) fn root(
        &self,
        bundle: &Path,
        spec: &Spec,
        rootfs: &[RootfsMount],
    ) -> Result<Option<Placed>, PlanError> {
        let what = match rootfs {
            [] => What::Bind {
                source: root_of(bundle, spec),
                recursive: true,
                read_only: ReadOnly::Writable,
            },
            [mount] if mount.is_of_directories() => What::Mount(mount.clone()),
            _ if self.joins.is_some() => return Err(PlanError::MemberDisks),
            _ => return Ok(None),
        };
        let name = ROOT.to_owned();
        Ok(Some(Placed { name, what }))
    }
}

/// Where the spec's root is on the host.
fn root_of(bundle: &Path, spec: &Spec) -> PathBuf {
    match spec.root() {
        Some(root) => bundle.join(root.path()),
        None => bundle.join(ROOT),
    }
}

impl RootfsMount {
    /// Whether it is made of directories of the host.
    pub fn is_of_directories(&self) -> bool {
        match self.kind.as_str() {
            "overlay" => !self.options.iter().any(|o| o.contains("{{")),
            "bind" => true,
            _ => false,
        }
    }
}

/// The namespaces that a spec names.
pub(super) fn namespaces(spec: &Spec) -> Vec<LinuxNamespace> {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().clone());
    all.unwrap_or_default()
}

/// Puts namespaces of the guest in the place of the host's: new ones, or those that it `joins`.
pub(super) fn settle(inside: &mut Inside, joins: Option<&Joins<'_>>) -> Result<(), PlanError> {
    let wanted = namespaces(&inside.guest_spec);
    // The host's own are out of reach. Of processes there is more than one idea: those of the guest are not the host's.
    for kind in [Kind::Ipc, Kind::Network] {
        if !wanted.iter().any(|n| n.typ() == kind) {
            return Err(PlanError::HostNamespace(kind));
        }
    }
    inside.shares_pids = !wanted
        .iter()
        .any(|n| n.typ() == Kind::Pid && n.path().is_none());
    let mut settled = Vec::new();
    for mut namespace in wanted {
        let joined = match (namespace.path().as_deref(), joins) {
            (None, _) => false,
            (Some(path), Some(joins)) => {
                if !joins.has(namespace.typ(), path) {
                    return Err(PlanError::Namespace {
                        kind: namespace.typ(),
                        path: path.to_owned(),
                    });
                }
                true
            }
            // An engine that makes them itself gives the first container those that the others will name.
            (Some(_), None) => {
                namespace.set_path(None);
                inside.shares_pids &= namespace.typ() != Kind::Pid;
                false
            }
        };
        match (namespace.typ(), joins) {
            // The guest's own.
            (Kind::Network, _) => continue,
            (kind, Some(joins)) if joined => {
                let path = format!("/proc/{}/ns/{}", joins.guest_pid, file_name(kind));
                namespace.set_path(Some(path.into()));
                if kind == Kind::Uts {
                    // They are the sandbox's.
                    inside.guest_spec.set_hostname(None);
                    inside.guest_spec.set_domainname(None);
                }
            }
            _ => {}
        }
        settled.push(namespace);
    }
    if let Some(linux) = inside.guest_spec.linux_mut() {
        linux.set_namespaces(Some(settled));
    }
    Ok(())
}

impl Joins<'_> {
    /// Whether a path of the host is how the engine names the sandbox's namespace of that kind.
    fn has(&self, kind: Kind, path: &Path) -> bool {
        let by_process = format!("/proc/{}/ns/{}", self.host_pid, file_name(kind));
        let by_name = |n: &&LinuxNamespace| n.typ() == kind && n.path().as_deref() == Some(path);
        path == Path::new(&by_process) || self.namespaces.iter().any(|n| by_name(&n))
    }
}

/// As in `/proc/PID/ns`.
fn file_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Mount => "mnt",
        Kind::Cgroup => "cgroup",
        Kind::Uts => "uts",
        Kind::Ipc => "ipc",
        Kind::User => "user",
        Kind::Pid => "pid",
        Kind::Network => "net",
        Kind::Time => "time",
    }
}

/// Which of a pod's binds `/dev/shm` is, whose place the guest's own takes. The host's own can't be had.
pub(super) fn is_shm(destination: &Path, source: &Path) -> Result<bool, PlanError> {
    let shm = Path::new("/dev/shm");
    match destination == shm {
        true if source == shm => Err(PlanError::HostNamespace(Kind::Ipc)),
        is => Ok(is),
    }
}

/// Something that a spec binds, under the name that it gets.
pub(super) fn bind(number: usize, source: PathBuf, options: &[String], found: Found) -> Placed {
    let has = |name: &str| options.iter().any(|o| o == name);
    let last = options.iter().rfind(|o| *o == "ro" || *o == "rw");
    let read_only = match (has("rro"), last.is_some_and(|o| o == "ro")) {
        (true, _) => ReadOnly::Recursive,
        (_, true) => ReadOnly::Top,
        _ => ReadOnly::Writable,
    };
    Placed {
        name: format!("bind{number}"),
        what: What::Bind {
            source,
            recursive: found == Found::Directory && has("rbind"),
            read_only,
        },
    }
}
