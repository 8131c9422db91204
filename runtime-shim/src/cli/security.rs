//! How much power a container has inside its VM. Outside it has none, whatever is said here.

use super::caps;
use crate::files;
use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use oci_spec::runtime::LinuxSeccomp;
use serde_json::{Value, json};
use std::path::Path;

/// Far more than a profile that names each system call with conditions.
const MAX_PROFILE: u64 = 1 << 20;
/// Hidden from containers as Docker does.
const MASKED: &[&str] = &[
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
/// Not to be written by containers, as with Docker.
const READ_ONLY: &[&str] = &[
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// The options.
#[derive(Debug, Default, Args)]
pub(super) struct SecurityArgs {
    /// Add a capability, or ALL
    #[arg(long, value_name = "CAP")]
    cap_add: Vec<String>,
    /// Drop a capability, or ALL
    #[arg(long, value_name = "CAP")]
    cap_drop: Vec<String>,
    /// seccomp=FILE|unconfined, no-new-privileges or systempaths=unconfined
    #[arg(long, value_name = "OPTION")]
    security_opt: Vec<String>,
    /// Full power inside its VM, and none outside: all capabilities and devices of the guest
    #[arg(long)]
    privileged: bool,
    /// Its user namespace: the guest's, or one of its own, where its root has no power over the guest's kernel
    #[arg(long, value_enum, value_name = "NAMESPACE")]
    userns: Option<Userns>,
}

/// `--userns`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Userns {
    /// The guest's
    Host,
    /// One of its own
    Private,
}

/// What the options come to.
#[derive(Debug)]
pub(super) struct Security {
    /// Its capabilities.
    pub(super) caps: Vec<&'static str>,
    /// All devices, all of /proc and /sys.
    pub(super) privileged: bool,
    /// It has a user namespace of its own.
    pub(super) own_users: bool,
    no_new_privileges: bool,
    all_paths: bool,
    seccomp: Option<Value>,
}

impl SecurityArgs {
    /// Reads and checks the options.
    pub(super) fn resolve(&self) -> anyhow::Result<Security> {
        let add: &[String] = match self.privileged {
            true => &["ALL".to_owned()],
            false => &self.cap_add,
        };
        let drop: &[String] = if self.privileged { &[] } else { &self.cap_drop };
        let caps = caps::resolve(add, drop)?;
        let mut no_new_privileges = false;
        let mut all_paths = self.privileged;
        let mut seccomp = match self.privileged {
            true => None,
            false => Some(default_profile(&caps)),
        };
        for option in &self.security_opt {
            let what = || format!("--security-opt {option:?}");
            let (name, value) = option.split_once(['=', ':']).unwrap_or((option, ""));
            match (name, value) {
                ("no-new-privileges", "" | "true") => no_new_privileges = true,
                ("no-new-privileges", "false") => no_new_privileges = false,
                ("seccomp", "unconfined") => seccomp = None,
                ("seccomp", "" | "builtin") => seccomp = Some(default_profile(&caps)),
                ("seccomp", file) => seccomp = Some(profile(file, &caps).with_context(what)?),
                ("systempaths", "unconfined") => all_paths = true,
                // There is nothing that would confine it.
                ("apparmor", "unconfined") | ("label", "disable") => {}
                ("apparmor" | "label", _) => {
                    bail!(
                        "{}: the guest's kernel has neither AppArmor nor SELinux",
                        what()
                    )
                }
                _ => bail!(
                    "{}: known are seccomp=FILE|unconfined, no-new-privileges and systempaths=unconfined",
                    what()
                ),
            }
        }
        Ok(Security {
            caps,
            privileged: self.privileged,
            own_users: self.userns == Some(Userns::Private),
            no_new_privileges,
            all_paths,
            seccomp,
        })
    }
}

impl Security {
    /// Puts what was resolved into a spec's `process`.
    pub(super) fn of_process(&self, process: &mut Value) {
        if self.no_new_privileges {
            process["noNewPrivileges"] = true.into();
        }
    }

    /// Puts it into a spec's `linux`.
    pub(super) fn of_linux(&self, linux: &mut Value) {
        if !self.all_paths {
            linux["maskedPaths"] = json!(MASKED);
            linux["readonlyPaths"] = json!(READ_ONLY);
        }
        if let Some(seccomp) = &self.seccomp {
            linux["seccomp"] = seccomp.clone();
        }
        if self.own_users {
            // The same numbers inside and outside: files keep their owners, and only the power over the kernel is gone.
            let same = json!([{"containerID": 0, "hostID": 0, "size": u32::MAX}]);
            linux["uidMappings"] = same.clone();
            linux["gidMappings"] = same;
        }
    }
}

/// System calls that a container does without unless it has one of the capabilities: those that reach deep into the
/// kernel and that programs don't miss. Others that need a capability are left to the kernel's own check.
const REFUSED: &[(&[&str], &[&str])] = &[
    // Keyrings aren't namespaced.
    (&["add_key", "keyctl", "request_key"], &[]),
    // Where kernels had most of their holes.
    (
        &[
            "io_uring_setup",
            "io_uring_enter",
            "io_uring_register",
            "userfaultfd",
        ],
        &["CAP_SYS_ADMIN"],
    ),
    // It tells where the kernel is, and what others did.
    (&["syslog"], &["CAP_SYSLOG", "CAP_SYS_ADMIN"]),
    (&["bpf"], &["CAP_SYS_ADMIN", "CAP_BPF"]),
    (&["perf_event_open"], &["CAP_SYS_ADMIN", "CAP_PERFMON"]),
    (
        &["kexec_load", "kexec_file_load", "reboot"],
        &["CAP_SYS_BOOT"],
    ),
    (
        &["init_module", "finit_module", "delete_module"],
        &["CAP_SYS_MODULE"],
    ),
    (&["iopl", "ioperm"], &["CAP_SYS_RAWIO"]),
    (
        &["open_by_handle_at", "name_to_handle_at"],
        &["CAP_DAC_READ_SEARCH", "CAP_SYS_ADMIN"],
    ),
    // A new user namespace brings all capabilities in it, and with them most of the kernel within reach.
    (
        &[
            "mount",
            "umount2",
            "setns",
            "unshare",
            "pivot_root",
            "fsopen",
            "fsconfig",
            "fsmount",
            "fspick",
            "move_mount",
            "open_tree",
            "mount_setattr",
            "swapon",
            "swapoff",
            "quotactl",
            "quotactl_fd",
            "lookup_dcookie",
            "fanotify_init",
            "nfsservctl",
            "uselib",
            "ustat",
            "sysfs",
            "_sysctl",
        ],
        &["CAP_SYS_ADMIN"],
    ),
];
/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET.
const NEW_NAMESPACES: [u64; 7] = [
    0x0002_0000,
    0x0200_0000,
    0x0400_0000,
    0x0800_0000,
    0x1000_0000,
    0x2000_0000,
    0x4000_0000,
];
/// AF_VSOCK: by it the agent talks to the host.
const VSOCK: u64 = 40;

/// The profile of a container that names none: what isn't refused is allowed, as its kernel is its own.
fn default_profile(caps: &[&str]) -> Value {
    let refuse = |names: &[&str], errno: u32, args: Value| json!({"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": errno, "args": args});
    let has = |any: &[&str]| any.iter().any(|cap| caps.contains(cap));
    let mut rules: Vec<Value> = REFUSED
        .iter()
        .filter(|(_, unless)| !has(unless))
        .map(|(names, _)| refuse(names, EPERM, json!([])))
        .collect();
    rules.push(refuse(
        &["socket"],
        EPERM,
        json!([{"index": 0, "value": VSOCK, "op": "SCMP_CMP_EQ"}]),
    ));
    if !has(&["CAP_SYS_ADMIN"]) {
        for flag in NEW_NAMESPACES {
            let set =
                json!([{"index": 0, "value": flag, "valueTwo": flag, "op": "SCMP_CMP_MASKED_EQ"}]);
            rules.push(refuse(&["clone"], EPERM, set));
        }
        // Its flags are in memory, where a filter can't look: without it programs use clone.
        rules.push(refuse(&["clone3"], ENOSYS, json!([])));
    }
    json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"], "syscalls": rules})
}

/// A profile in a file: the runtime spec's, or Docker's, whose rules depend on capabilities and architectures.
fn profile(file: &str, caps: &[&str]) -> anyhow::Result<Value> {
    let path = Path::new(file);
    let bytes = files::read(path, MAX_PROFILE).with_context(|| format!("can't read {file}"))?;
    let mut profile: Value =
        serde_json::from_slice(&bytes).with_context(|| format!("{file} is no JSON"))?;
    resolve_docker(&mut profile, caps);
    let checked: Result<LinuxSeccomp, _> = serde_json::from_value(profile.clone());
    checked.with_context(|| format!("{file} is not a seccomp profile"))?;
    Ok(profile)
}

/// Docker's `archMap`, `includes` and `excludes` are gone afterwards.
fn resolve_docker(profile: &mut Value, caps: &[&str]) {
    let names = |value: &Value| -> Vec<String> {
        let list = value.as_array().into_iter().flatten();
        list.filter_map(|name| name.as_str().map(str::to_owned))
            .collect()
    };
    if let Some(map) = profile.as_object_mut().and_then(|p| p.remove("archMap")) {
        let ours = map
            .as_array()
            .into_iter()
            .flatten()
            .find(|m| m["architecture"] == "SCMP_ARCH_X86_64");
        let mut all = vec!["SCMP_ARCH_X86_64".to_owned()];
        all.extend(
            ours.map(|m| names(&m["subArchitectures"]))
                .unwrap_or_default(),
        );
        profile["architectures"] = json!(all);
    }
    let Some(rules) = profile.get_mut("syscalls").and_then(Value::as_array_mut) else {
        return;
    };
    let holds = |condition: &Value, all: bool| {
        let has = |cap: &String| caps.contains(&cap.as_str());
        let wanted = names(&condition["caps"]);
        let arches = names(&condition["arches"]);
        let of_caps = match all {
            true => wanted.iter().all(has),
            false => wanted.iter().any(has),
        };
        let of_arch = arches.iter().any(|a| a == "amd64" || a == "x86_64");
        match all {
            true => of_caps && (arches.is_empty() || of_arch),
            false => of_caps || of_arch,
        }
    };
    rules.retain(|rule| holds(&rule["includes"], true) && !holds(&rule["excludes"], false));
    for rule in rules.iter_mut().filter_map(Value::as_object_mut) {
        for key in ["includes", "excludes", "comment"] {
            rule.remove(key);
        }
        if let Some(name) = rule.remove("name") {
            rule.insert("names".into(), json!([name]));
        }
        if rule.get("args").is_some_and(Value::is_null) {
            rule.remove("args");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::CreateArgs;

    fn resolved(line: &str) -> anyhow::Result<Security> {
        CreateArgs::of(&format!("{line} image")).security.resolve()
    }

    fn linux(security: &Security) -> Value {
        let mut linux = json!({});
        security.of_linux(&mut linux);
        linux
    }

    /// The errno with which a profile refuses a system call without arguments.
    fn refused(seccomp: &Value, name: &str) -> Option<u64> {
        let rules = seccomp["syscalls"].as_array().unwrap();
        let rule = rules.iter().find(|rule| {
            rule["names"].as_array().unwrap().iter().any(|n| n == name) && rule["args"] == json!([])
        });
        rule.map(|rule| rule["errnoRet"].as_u64().unwrap())
    }

    #[test]
    fn default_profile_lets_capabilities_through() {
        let usual = linux(&resolved("").unwrap());
        assert_eq!(refused(&usual["seccomp"], "mount"), Some(1));
        assert_eq!(refused(&usual["seccomp"], "clone3"), Some(38));
        assert_eq!(refused(&usual["seccomp"], "openat"), None);
        let admin = linux(&resolved("--cap-add SYS_ADMIN").unwrap());
        assert_eq!(refused(&admin["seccomp"], "mount"), None);
        assert_eq!(refused(&admin["seccomp"], "keyctl"), Some(1));
        let profile: LinuxSeccomp = serde_json::from_value(usual["seccomp"].clone()).unwrap();
        assert!(
            profile
                .syscalls()
                .as_ref()
                .is_some_and(|rules| rules.len() > 10)
        );
    }

    #[test]
    fn privileged_has_everything() {
        let security = resolved("--privileged --cap-drop ALL").unwrap();
        assert!(security.caps.contains(&"CAP_SYS_ADMIN"));
        assert_eq!(linux(&security), json!({}));
    }

    #[test]
    fn options_are_what_they_say() {
        let security =
            resolved("--security-opt seccomp=unconfined --security-opt no-new-privileges").unwrap();
        let mut process = json!({});
        security.of_process(&mut process);
        assert_eq!(process["noNewPrivileges"], true);
        assert!(linux(&security)["seccomp"].is_null());
        let open = linux(&resolved("--security-opt systempaths=unconfined").unwrap());
        assert!(open["maskedPaths"].is_null());
        let own = linux(&resolved("--userns private").unwrap());
        assert_eq!(own["uidMappings"][0]["size"], u32::MAX);
    }

    #[test]
    fn options_that_cannot_be_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("profile.json");
        std::fs::write(&file, "{\"defaultAction\": \"SCMP_ACT_SING\"}").unwrap();
        let of_file = format!("seccomp={}", file.display());
        let list = dir.path().join("list.json");
        std::fs::write(&list, "[]").unwrap();
        let of_list = format!("seccomp={}", list.display());
        for option in [
            &of_list,
            "apparmor=strict",
            "label=type:x",
            "magic",
            "seccomp=/no/such/file",
            &of_file,
            "no-new-privileges=maybe",
        ] {
            let error = resolved(&format!("--security-opt {option}")).unwrap_err();
            assert!(format!("{error:#}").contains(option), "{option}: {error:#}");
        }
    }

    #[test]
    fn profile_of_dockers_form_depends_on_capabilities() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("profile.json");
        let docker = json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
            "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
            "syscalls": [
                {"names": ["read"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
                {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
                {"names": ["arm_fadvise64_64"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm"]}},
                {"name": "chroot", "action": "SCMP_ACT_ALLOW", "args": null, "comment": "", "includes": {}},
            ],
        });
        std::fs::write(&file, docker.to_string()).unwrap();
        let names = |line: &str| {
            let line = format!("{line} --security-opt seccomp={}", file.display());
            let linux = linux(&resolved(&line).unwrap());
            let rules = linux["seccomp"]["syscalls"].as_array().unwrap().clone();
            let name = |rule: &Value| rule["names"][0].as_str().unwrap().to_owned();
            rules.iter().map(name).collect::<Vec<_>>()
        };
        assert_eq!(names(""), ["read", "clone3", "chroot"]);
        assert_eq!(names("--cap-add SYS_ADMIN"), ["read", "mount", "chroot"]);
    }
}
