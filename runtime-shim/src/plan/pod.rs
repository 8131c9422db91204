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

/// Whether a bind is the pod's `/dev/shm` as its engine makes it, whose place the guest's own takes: containerd's is
/// `…/sandboxes/ID/shm`, CRI-O's `…/userdata/shm`. A volume at that place stays one. The host's own can't be had.
pub(super) fn is_shm(destination: &Path, source: &Path) -> Result<bool, PlanError> {
    /// Of the directories that the kubelet keeps volumes in.
    const VOLUMES: &str = "kubernetes.io~";
    let shm = Path::new("/dev/shm");
    if destination != shm {
        return Ok(false);
    }
    if source == shm {
        return Err(PlanError::HostNamespace(Kind::Ipc));
    }
    let parent = source.parent().and_then(Path::file_name);
    let of_volumes = parent.is_some_and(|name| name.to_string_lossy().starts_with(VOLUMES));
    Ok(source.file_name() == Some(SHM.as_ref()) && !of_volumes)
}

/// Refuses what would have to follow later mounts: a silent half would be worse.
pub(super) fn check_propagation(destination: &Path, options: &[String]) -> Result<(), PlanError> {
    const FOLLOW: [&str; 4] = ["shared", "rshared", "slave", "rslave"];
    match options.iter().find(|o| FOLLOW.contains(&o.as_str())) {
        Some(option) => Err(PlanError::Propagation {
            destination: destination.to_owned(),
            option: option.clone(),
        }),
        None => Ok(()),
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

#[cfg(test)]
mod tests {
    use super::super::tests::{DEFAULTS, HOST};
    use super::super::{Plan, join, plan};
    use super::*;
    use serde_json::{Value, json};

    fn look(path: &Path) -> Found {
        match path.extension().and_then(|e| e.to_str()) {
            Some("dir") => Found::Directory,
            Some("file") => Found::File,
            _ => Found::Nothing,
        }
    }

    fn spec(kind: &str, namespaces: Value, mounts: Value, more: &[(&str, &str)]) -> Spec {
        let mut annotations = json!({
            "io.kubernetes.cri.container-type": kind,
            "io.kubernetes.cri.sandbox-id": "p",
        });
        for (key, value) in more {
            annotations[key] = json!(value);
        }
        serde_json::from_value(json!({
            "ociVersion": "1.1.0",
            "hostname": "pod",
            "root": {"path": "rootfs"},
            "mounts": mounts,
            "annotations": annotations,
            "linux": {"namespaces": namespaces, "resources": {"cpu": {"shares": 2}}},
        }))
        .unwrap()
    }

    fn own() -> Value {
        json!([
            {"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"},
            {"type": "network", "path": "/run/netns/n"},
        ])
    }

    fn overlay() -> Vec<RootfsMount> {
        vec![RootfsMount {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: vec!["lowerdir=/l".into(), "upperdir=/u".into()],
        }]
    }

    fn first(spec: &Spec, rootfs: &[RootfsMount]) -> Result<Plan, PlanError> {
        plan("p", Path::new("/b"), spec, rootfs, HOST, DEFAULTS, look)
    }

    fn member(
        namespaces: Value,
        mounts: Value,
        rootfs: &[RootfsMount],
    ) -> Result<Inside, PlanError> {
        let of_first = namespaces_of(&own());
        let joins = Joins {
            namespaces: &of_first,
            host_pid: 77,
            guest_pid: 9,
        };
        let place = Place {
            sandbox: "p",
            directory: "c1",
            joins: Some(&joins),
        };
        let spec = spec("container", namespaces, mounts, &[]);
        join("c", Path::new("/b"), &spec, rootfs, &place, look)
    }

    fn namespaces_of(value: &Value) -> Vec<LinuxNamespace> {
        serde_json::from_value(value.clone()).unwrap()
    }

    #[test]
    fn role_is_in_either_engines_words() {
        let of = |pairs: &[(&str, &'static str)]| {
            let pairs: Vec<_> = pairs.iter().map(|(k, v)| ((*k).to_owned(), *v)).collect();
            Role::of(move |key| pairs.iter().find(|(k, _)| k == key).map(|(_, v)| *v))
        };
        assert_eq!(of(&[]), Role::Alone);
        assert_eq!(of(&[(CONTAINER_TYPE[0], "sandbox")]), Role::Sandbox);
        assert_eq!(of(&[(CONTAINER_TYPE[1], "sandbox")]), Role::Sandbox);
        assert_eq!(of(&[(CONTAINER_TYPE[0], "container")]), Role::Alone);
        for n in [0, 1] {
            let role = of(&[(CONTAINER_TYPE[n], "container"), (SANDBOX_ID[n], "p")]);
            assert_eq!(role, Role::Member("p".into()));
        }
    }

    #[test]
    fn sandbox_has_one_share_for_its_root_and_all_that_it_binds() {
        let mounts = json!([
            {"destination": "/dev/shm", "type": "bind", "source": "/s/sandboxes/p/shm", "options": ["rbind", "ro"]},
            {"destination": "/etc/hosts", "type": "bind", "source": "/s/hosts.file", "options": ["rbind", "ro"]},
        ]);
        let plan = first(&spec("sandbox", own(), mounts, &[]), &overlay()).unwrap();
        assert!(plan.disks.is_empty() && plan.is_lasting());
        assert_eq!(plan.shares.len(), 1);
        assert!(plan.shares[0].is_pods);
        assert_eq!(plan.netns.as_deref(), Some(Path::new("/run/netns/n")));
        assert_eq!(plan.inside.rootfs, "/run/casemate/p/pod/c0/rootfs");
        let kinds: Vec<_> = plan
            .inside
            .mounts
            .iter()
            .map(|m| m.type_.as_str())
            .collect();
        assert_eq!(kinds, ["virtiofs", "tmpfs"]);
        let placed = &plan.inside.placed;
        assert_eq!(placed[0].what, What::Mount(overlay().remove(0)));
        assert_eq!(placed[1].name, "bind1");
        assert_eq!(placed.len(), 2);
        let mounts = plan.inside.guest_spec.mounts().clone().unwrap();
        assert_eq!(
            mounts[0].source().as_deref(),
            Some(Path::new("/run/casemate/p/shm"))
        );
        assert_eq!(
            mounts[1].source().as_deref(),
            Some(Path::new("/run/casemate/p/pod/c0/bind1"))
        );
        // The guest's network is the pod's; the pause container's weight isn't the pod's.
        let left = namespaces(&plan.inside.guest_spec);
        assert!(
            left.iter()
                .all(|n| n.typ() != Kind::Network && n.path().is_none())
        );
        assert_eq!(plan.limits.shares, None);
    }

    #[test]
    fn sandbox_is_sized_by_what_the_cri_says_of_its_pod() {
        let key = |name| format!("io.kubernetes.cri.sandbox-{name}");
        let (memory, quota, period) = (key("memory"), key("cpu-quota"), key("cpu-period"));
        let sized = |pairs: &[(&str, &str)]| {
            first(&spec("sandbox", own(), json!([]), pairs), &overlay())
                .map(|plan| (plan.memory_mib, plan.vcpus))
        };
        assert_eq!(sized(&[]), Ok((512, 1)));
        let zero = [(&*memory, "0"), (&*quota, "0"), (&*period, "nonsense")];
        assert_eq!(sized(&zero), Ok((512, 1)));
        let two = [
            (&*memory, "134217728"),
            (&*quota, "150000"),
            (&*period, "100000"),
        ];
        assert_eq!(sized(&two), Ok((170, 2)));
        assert!(sized(&[(&*quota, "900000"), (&*period, "100000")]).is_err());
        assert!(sized(&[(&*memory, "9223372036854775807")]).is_err());
    }

    #[test]
    fn member_joins_the_namespaces_that_are_its_sandboxs_and_no_others() {
        let joined = json!([
            {"type": "mount"}, {"type": "pid"},
            {"type": "ipc", "path": "/proc/77/ns/ipc"},
            {"type": "uts", "path": "/proc/77/ns/uts"},
            {"type": "network", "path": "/proc/77/ns/net"},
        ]);
        let inside = member(joined.clone(), json!([]), &overlay()).unwrap();
        assert_eq!(inside.rootfs, "/run/casemate/c/pod/c1/rootfs");
        assert!(!inside.shares_pids);
        assert_eq!(inside.guest_spec.hostname(), &None);
        assert_eq!(
            namespaces(&inside.guest_spec),
            namespaces_of(&json!([
                {"type": "mount"}, {"type": "pid"},
                {"type": "ipc", "path": "/proc/9/ns/ipc"},
                {"type": "uts", "path": "/proc/9/ns/uts"},
            ]))
        );
        let mut by_name = joined.clone();
        by_name[4]["path"] = json!("/run/netns/n");
        by_name[1]["path"] = json!("/proc/77/ns/pid");
        assert!(member(by_name, json!([]), &overlay()).unwrap().shares_pids);
        for (index, path) in [
            (2, "/proc/1/ns/ipc"),
            (2, "/proc/77/ns/uts"),
            (3, "/proc/77/../77/ns/uts"),
            (4, "/run/netns/other"),
            (1, "/proc/self/ns/pid"),
            (0, "/proc/1/ns/mnt"),
        ] {
            let mut other = joined.clone();
            other[index]["path"] = json!(path);
            let result = member(other, json!([]), &overlay());
            assert!(matches!(result, Err(PlanError::Namespace { .. })), "{path}");
        }
        let without = json!([{"type": "mount"}, {"type": "pid"}, {"type": "network"}]);
        let result = member(without, json!([]), &overlay());
        assert_eq!(result, Err(PlanError::HostNamespace(Kind::Ipc)));
    }

    #[test]
    fn member_binds_are_placed_as_writable_as_they_are_to_be() {
        let bind = |source: &str, options: &[&str]| json!({"destination": "/x", "type": "bind", "source": source, "options": options});
        let mounts = json!([
            bind("/v.dir", &["rbind", "rw"]),
            bind("/v.dir", &["rbind", "ro"]),
            bind("/v.dir", &["rbind", "rro"]),
            bind("/log.file", &["bind"]),
        ]);
        let inside = member(own(), mounts, &overlay()).unwrap();
        let placed: Vec<_> = inside.placed[1..]
            .iter()
            .map(|placed| match &placed.what {
                What::Bind {
                    recursive,
                    read_only,
                    ..
                } => (placed.name.as_str(), *recursive, *read_only),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(
            placed,
            [
                ("bind0", true, ReadOnly::Writable),
                ("bind1", true, ReadOnly::Top),
                ("bind2", true, ReadOnly::Recursive),
                ("bind3", false, ReadOnly::Writable),
            ]
        );
        let host_shm = json!([{"destination": "/dev/shm", "type": "bind", "source": "/dev/shm"}]);
        let result = member(own(), host_shm, &overlay());
        assert_eq!(result, Err(PlanError::HostNamespace(Kind::Ipc)));
        let shm = Path::new("/dev/shm");
        for (source, is) in [
            ("/run/c/userdata/shm", true),
            (
                "/var/lib/kubelet/pods/x/volumes/kubernetes.io~empty-dir/shm",
                false,
            ),
            ("/v.dir", false),
        ] {
            assert_eq!(is_shm(shm, Path::new(source)), Ok(is), "{source}");
        }
        for option in ["rslave", "rshared", "slave", "shared"] {
            let result = member(
                own(),
                json!([bind("/v.dir", &["rbind", option])]),
                &overlay(),
            );
            assert!(
                matches!(result, Err(PlanError::Propagation { .. })),
                "{option}"
            );
        }
        let missing = json!([bind("/no/such", &[])]);
        assert!(matches!(
            member(own(), missing, &overlay()),
            Err(PlanError::Bind { .. })
        ));
    }

    #[test]
    fn member_with_disks_and_member_without_sandbox_are_refused() {
        let disk = RootfsMount {
            kind: "ext4".into(),
            source: "/disk".into(),
            options: Vec::new(),
        };
        let on_disk = member(own(), json!([]), std::slice::from_ref(&disk));
        assert_eq!(on_disk, Err(PlanError::MemberDisks));
        let volume = json!([{"destination": "/v", "type": "ext4", "source": "/disk"}]);
        assert_eq!(
            member(own(), volume, &overlay()),
            Err(PlanError::MemberDisks)
        );
        let alone = spec("container", own(), json!([]), &[]);
        assert_eq!(
            first(&alone, &overlay()),
            Err(PlanError::NoSandbox("p".into()))
        );
        // A pod's first container can have its root on a disk.
        let plan = first(&spec("sandbox", own(), json!([]), &[]), &[disk]).unwrap();
        assert_eq!((plan.disks.len(), plan.shares.len()), (1, 1));
        assert_eq!(plan.inside.rootfs, "/run/casemate/p/rootfs");
    }

    proptest::proptest! {
        #[test]
        fn member_never_gets_a_path_of_the_host(
            kind in "(ipc|uts|pid|network|user|cgroup|time|mount)",
            path in "(/proc/(77|1|self)/ns/(ipc|uts|pid|net|user|cgroup|time|mnt)|/run/netns/n|.{0,20})",
            source in "(/x\\.(dir|file)|\\.\\./x\\.dir|.{0,20})",
            destination in "(/dev/shm|/x|.{0,20})",
        ) {
            let namespaces = json!([
                {"type": "mount"}, {"type": "ipc"}, {"type": "network"},
                {"type": kind, "path": path},
            ]);
            let mounts = json!([{"destination": destination, "type": "bind", "source": source}]);
            if let Ok(inside) = member(namespaces, mounts, &overlay()) {
                for namespace in super::namespaces(&inside.guest_spec) {
                    let path = namespace.path().as_deref().unwrap_or(Path::new("/proc/9/ns/x"));
                    proptest::prop_assert!(path.starts_with("/proc/9/ns"), "{path:?}");
                }
                for mount in inside.guest_spec.mounts().iter().flatten() {
                    let source = mount.source().clone().unwrap_or_default();
                    proptest::prop_assert!(source.starts_with("/run/casemate"), "{source:?}");
                    proptest::prop_assert!(!source.components().any(|c| c == std::path::Component::ParentDir));
                }
            }
        }
    }
}
