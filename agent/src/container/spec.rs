//! The spec's top levels, as far as Linux has them.
//!
//! `oci-spec` reads the rest. Its own `Spec` and `Process` would bring Windows, Solaris, z/OS, and a regular expression engine of
//! 450 KB that checks one list of CPUs.

use std::path::PathBuf;

use oci_spec::runtime::{
    Linux, LinuxCapabilities, LinuxIOPriority, Mount, PosixRlimit, Root, Scheduler, User,
};
use serde::{Deserialize, Deserializer};

/// `config.json`.
#[derive(Debug, Deserialize)]
pub(super) struct Spec {
    pub(super) process: Option<Process>,
    pub(super) root: Option<Root>,
    pub(super) hostname: Option<String>,
    pub(super) domainname: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) mounts: Vec<Mount>,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) hooks: Hooks,
    pub(super) linux: Option<Linux>,
}

/// The hooks that would run in the container; the others are the host's.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Hooks {
    #[serde(default, deserialize_with = "nullable")]
    pub(super) create_container: Vec<serde::de::IgnoredAny>,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) start_container: Vec<serde::de::IgnoredAny>,
}

/// `process`, of the spec or of an exec.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Process {
    #[serde(default, deserialize_with = "nullable")]
    pub(super) terminal: bool,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) user: User,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) args: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) env: Vec<String>,
    pub(super) cwd: PathBuf,
    pub(super) capabilities: Option<LinuxCapabilities>,
    pub(super) rlimits: Option<Vec<PosixRlimit>>,
    pub(super) no_new_privileges: Option<bool>,
    pub(super) apparmor_profile: Option<String>,
    pub(super) selinux_label: Option<String>,
    pub(super) oom_score_adj: Option<i32>,
    pub(super) scheduler: Option<Scheduler>,
    pub(super) io_priority: Option<LinuxIOPriority>,
    #[serde(rename = "execCPUAffinity")]
    pub(super) exec_cpu_affinity: Option<CpuAffinity>,
}

/// `process.execCPUAffinity`.
#[derive(Debug, Deserialize)]
pub(super) struct CpuAffinity {
    pub(super) initial: Option<String>,
    #[serde(rename = "final")]
    pub(super) last: Option<String>,
}

/// Reads `null` as what is left out: programs that write specs differ in that.
fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
