//! What a process of a container gets, checked and prepared before the fork.

use std::collections::HashSet;
use std::ffi::CString;

use oci_spec::runtime::{
    Capabilities, Capability, IOPriorityClass, LinuxCapabilities, LinuxPersonality,
    LinuxSchedulerFlag, LinuxSchedulerPolicy, PosixRlimit, PosixRlimitType, Scheduler,
};
use rustix::process::{Resource, Rlimit};
use rustix::thread::CpuSet;

use super::spec::Process;
use crate::error::{Error, Result};
use crate::sys::SchedAttr;

/// Most bytes of a user string: names are short, so a long one is a mistake.
const MAX_USER: usize = 256;

/// Everything about a process but its namespaces, root and streams.
#[derive(Debug, Clone, Default)]
pub(crate) struct Plan {
    pub(crate) args: Vec<CString>,
    pub(crate) env: Vec<CString>,
    pub(crate) cwd: CString,
    /// `name|uid[:group|gid]` to look up in the container; empty: the numbers below.
    pub(crate) user: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) umask: u32,
    pub(crate) caps: CapSets,
    pub(crate) no_new_privileges: bool,
    pub(crate) rlimits: Vec<(Resource, Rlimit)>,
    pub(crate) oom_score_adj: Option<i32>,
    pub(crate) terminal: bool,
    pub(crate) scheduler: Option<SchedAttr>,
    /// Class and level.
    pub(crate) io_priority: Option<(u32, u32)>,
    pub(crate) cpus: Option<CpuSet>,
}

/// The five capability sets, as bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct CapSets {
    pub(crate) bounding: u64,
    pub(crate) effective: u64,
    pub(crate) inheritable: u64,
    pub(crate) permitted: u64,
    pub(crate) ambient: u64,
}

impl Plan {
    /// Reads `process`. `fallback` is the container's first process, for what an exec leaves out.
    pub(crate) fn of(process: &Process, user: &str, fallback: Option<&Plan>) -> Result<Self> {
        refuse_what_guests_lack(process)?;
        if user.len() > MAX_USER {
            return Err(Error::invalid(format!(
                "user of {} bytes: at most {MAX_USER}",
                user.len()
            )));
        }
        let args = strings(&process.args, "process.args")?;
        if args.is_empty() {
            return Err(Error::invalid("process.args: there is no command to run"));
        }
        if !process.cwd.is_absolute() {
            return Err(Error::invalid(format!(
                "process.cwd {:?} must be absolute",
                process.cwd
            )));
        }
        let spec_user = &process.user;
        let user = match (user, spec_user.username()) {
            ("", Some(name)) => name,
            _ => user,
        };
        let rlimits = match (&process.rlimits, fallback) {
            (Some(limits), _) => rlimits(limits)?,
            (None, Some(init)) => init.rlimits.clone(),
            (None, None) => Vec::new(),
        };
        Ok(Self {
            args,
            env: strings(&process.env, "process.env")?,
            cwd: string(&process.cwd.to_string_lossy(), "process.cwd")?,
            user: user.to_owned(),
            uid: spec_user.uid(),
            gid: spec_user.gid(),
            groups: spec_user.additional_gids().clone().unwrap_or_default(),
            umask: spec_user.umask().unwrap_or(0o022) & 0o777,
            caps: match (&process.capabilities, fallback) {
                (Some(caps), _) => CapSets::of(caps),
                (None, Some(init)) => init.caps,
                (None, None) => CapSets::default(),
            },
            no_new_privileges: process
                .no_new_privileges
                .unwrap_or_else(|| fallback.is_some_and(|p| p.no_new_privileges)),
            rlimits,
            oom_score_adj: oom_score_adj(
                process
                    .oom_score_adj
                    .or(fallback.and_then(|p| p.oom_score_adj)),
            )?,
            terminal: process.terminal,
            scheduler: process.scheduler.as_ref().map(scheduling).transpose()?,
            io_priority: process
                .io_priority
                .as_ref()
                .map(|io| io_priority(io.class(), io.priority()))
                .transpose()?,
            cpus: cpus(process)?,
        })
    }

    /// The value of `name` in the environment; the last one wins, as for execve's reader.
    pub(crate) fn env(&self, name: &str) -> Option<&str> {
        self.env
            .iter()
            .rev()
            .find_map(|entry| entry.to_str().ok()?.strip_prefix(name)?.strip_prefix('='))
    }
}

fn refuse_what_guests_lack(process: &Process) -> Result<()> {
    let given = |label: &Option<String>| label.as_ref().is_some_and(|l| !l.is_empty());
    if given(&process.apparmor_profile) {
        return Err(Error::unsupported(
            "process.apparmorProfile: the guest's kernel has no AppArmor",
        ));
    }
    if given(&process.selinux_label) {
        return Err(Error::unsupported(
            "process.selinuxLabel: the guest's kernel has no SELinux",
        ));
    }
    Ok(())
}

pub(crate) fn string(text: &str, what: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::invalid(format!("{what}: {text:?} holds a NUL")))
}

fn strings(list: &[String], what: &str) -> Result<Vec<CString>> {
    list.iter().map(|text| string(text, what)).collect()
}

fn oom_score_adj(value: Option<i32>) -> Result<Option<i32>> {
    match value {
        Some(adj) if !(-1000..=1000).contains(&adj) => Err(Error::invalid(format!(
            "process.oomScoreAdj {adj} is not within -1000 and 1000"
        ))),
        value => Ok(value),
    }
}

fn rlimits(limits: &[PosixRlimit]) -> Result<Vec<(Resource, Rlimit)>> {
    let mut seen = HashSet::new();
    let value = |n: u64| if n == u64::MAX { None } else { Some(n) };
    limits
        .iter()
        .map(|limit| {
            if !seen.insert(limit.typ().to_string()) {
                return Err(Error::invalid(format!(
                    "process.rlimits: {} is there twice",
                    limit.typ()
                )));
            }
            if limit.soft() > limit.hard() {
                return Err(Error::invalid(format!(
                    "process.rlimits: {}: soft {} is above hard {}",
                    limit.typ(),
                    limit.soft(),
                    limit.hard()
                )));
            }
            Ok((
                resource(limit.typ()),
                Rlimit {
                    current: value(limit.soft()),
                    maximum: value(limit.hard()),
                },
            ))
        })
        .collect()
}

fn resource(kind: PosixRlimitType) -> Resource {
    use PosixRlimitType as T;
    match kind {
        T::RlimitCpu => Resource::Cpu,
        T::RlimitFsize => Resource::Fsize,
        T::RlimitData => Resource::Data,
        T::RlimitStack => Resource::Stack,
        T::RlimitCore => Resource::Core,
        T::RlimitRss => Resource::Rss,
        T::RlimitNproc => Resource::Nproc,
        T::RlimitNofile => Resource::Nofile,
        T::RlimitMemlock => Resource::Memlock,
        T::RlimitAs => Resource::As,
        T::RlimitLocks => Resource::Locks,
        T::RlimitSigpending => Resource::Sigpending,
        T::RlimitMsgqueue => Resource::Msgqueue,
        T::RlimitNice => Resource::Nice,
        T::RlimitRtprio => Resource::Rtprio,
        T::RlimitRttime => Resource::Rttime,
    }
}

fn io_priority(class: IOPriorityClass, level: i64) -> Result<(u32, u32)> {
    let class = match class {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    match level {
        0..=7 => Ok((class, level as u32)),
        _ => Err(Error::invalid(format!(
            "process.ioPriority: priority {level} is not within 0 and 7"
        ))),
    }
}

fn cpus(process: &Process) -> Result<Option<CpuSet>> {
    let Some(affinity) = &process.exec_cpu_affinity else {
        return Ok(None);
    };
    let list = affinity.last.as_ref().or(affinity.initial.as_ref());
    list.map(|list| cpu_list(list)).transpose()
}

fn cpu_list(list: &str) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    for part in list
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (first.trim().parse::<usize>(), last.trim().parse::<usize>()) {
            (Ok(first), Ok(last)) if first <= last && last < CpuSet::MAX_CPU => {
                (first..=last).for_each(|cpu| set.set(cpu))
            }
            _ => {
                return Err(Error::invalid(format!(
                    "process.execCPUAffinity: {list:?} is no list of CPUs like \"0-3,7\""
                )));
            }
        }
    }
    Ok(set)
}

fn scheduling(scheduler: &Scheduler) -> Result<SchedAttr> {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => {
            return Err(Error::unsupported(
                "process.scheduler: Linux has no SCHED_ISO",
            ));
        }
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flags = scheduler.flags().iter().flatten().fold(0, |all, flag| {
        all | match flag {
            LinuxSchedulerFlag::SchedResetOnFork => 0x01,
            LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
            LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
            LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
            LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
            LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
            LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
        }
    });
    Ok(SchedAttr {
        size: 0, // the call states it
        policy,
        flags,
        nice: scheduler.nice().unwrap_or_default(),
        priority: u32::try_from(scheduler.priority().unwrap_or_default())
            .map_err(|_| Error::invalid("process.scheduler.priority must not be negative"))?,
        runtime: scheduler.runtime().unwrap_or_default(),
        deadline: scheduler.deadline().unwrap_or_default(),
        period: scheduler.period().unwrap_or_default(),
    })
}

/// The bits for personality(2).
pub(crate) fn personality(personality: &LinuxPersonality) -> Result<u64> {
    use oci_spec::runtime::LinuxPersonalityDomain as Domain;
    if let Some(flag) = personality.flags().iter().flatten().next() {
        return Err(Error::unsupported(format!(
            "linux.personality: the spec defines no flag {flag:?}"
        )));
    }
    Ok(match personality.domain() {
        Domain::PerLinux => 0,
        Domain::PerLinux32 => 8,
    })
}

impl CapSets {
    fn of(caps: &LinuxCapabilities) -> Self {
        let bits = |set: &Option<Capabilities>| {
            set.iter()
                .flatten()
                .fold(0, |bits, cap| bits | 1 << number(*cap))
        };
        Self {
            bounding: bits(caps.bounding()),
            effective: bits(caps.effective()),
            inheritable: bits(caps.inheritable()),
            permitted: bits(caps.permitted()),
            ambient: bits(caps.ambient()),
        }
    }
}

/// The last capability of kernel 6.12.
pub(crate) const LAST_CAPABILITY: u32 = 40;

fn number(cap: Capability) -> u32 {
    use Capability as C;
    match cap {
        C::Chown => 0,
        C::DacOverride => 1,
        C::DacReadSearch => 2,
        C::Fowner => 3,
        C::Fsetid => 4,
        C::Kill => 5,
        C::Setgid => 6,
        C::Setuid => 7,
        C::Setpcap => 8,
        C::LinuxImmutable => 9,
        C::NetBindService => 10,
        C::NetBroadcast => 11,
        C::NetAdmin => 12,
        C::NetRaw => 13,
        C::IpcLock => 14,
        C::IpcOwner => 15,
        C::SysModule => 16,
        C::SysRawio => 17,
        C::SysChroot => 18,
        C::SysPtrace => 19,
        C::SysPacct => 20,
        C::SysAdmin => 21,
        C::SysBoot => 22,
        C::SysNice => 23,
        C::SysResource => 24,
        C::SysTime => 25,
        C::SysTtyConfig => 26,
        C::Mknod => 27,
        C::Lease => 28,
        C::AuditWrite => 29,
        C::AuditControl => 30,
        C::Setfcap => 31,
        C::MacOverride => 32,
        C::MacAdmin => 33,
        C::Syslog => 34,
        C::WakeAlarm => 35,
        C::BlockSuspend => 36,
        C::AuditRead => 37,
        C::Perfmon => 38,
        C::Bpf => 39,
        C::CheckpointRestore => 40,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn plan(mut value: serde_json::Value) -> Result<Plan> {
        let base = json!({"cwd": "/", "args": ["x"], "user": {"uid": 0, "gid": 0}});
        for (key, default) in base.as_object().unwrap() {
            value
                .as_object_mut()
                .unwrap()
                .entry(key)
                .or_insert(default.clone());
        }
        Plan::of(&serde_json::from_value(value).unwrap(), "", None)
    }

    #[test]
    fn of_capabilities_become_the_kernels_bits() {
        let caps = plan(json!({"capabilities": {"bounding": ["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE"], "ambient": ["CAP_KILL"]}})).unwrap().caps;
        assert_eq!(
            (caps.bounding, caps.ambient, caps.effective),
            (1 | 1 << 40, 1 << 5, 0)
        );
    }

    #[test]
    fn of_rlimit_infinity_is_no_limit() {
        let p = plan(json!({"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 5, "hard": 18446744073709551615_u64}]})).unwrap();
        assert_eq!(
            p.rlimits[0].1,
            Rlimit {
                current: Some(5),
                maximum: None
            }
        );
    }

    #[test]
    fn of_broken_processes_are_refused_with_the_value() {
        for (value, word) in [
            (json!({"args": []}), "args"),
            (json!({"cwd": "relative"}), "relative"),
            (json!({"args": ["a\u{0}b"]}), "NUL"),
            (
                json!({"rlimits": [{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}]}),
                "soft 2",
            ),
            (
                json!({"rlimits": [{"type": "RLIMIT_CPU", "soft": 1, "hard": 1}, {"type": "RLIMIT_CPU", "soft": 1, "hard": 1}]}),
                "twice",
            ),
            (json!({"oomScoreAdj": 1001}), "1001"),
            (json!({"apparmorProfile": "docker-default"}), "AppArmor"),
            (
                json!({"ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 8}}),
                "8",
            ),
        ] {
            let error = plan(value).unwrap_err();
            assert!(error.text.contains(word), "{error}");
        }
    }

    #[test]
    fn of_exec_without_limits_takes_the_containers() {
        let init = plan(json!({"capabilities": {"bounding": ["CAP_KILL"]}, "rlimits": [{"type": "RLIMIT_CPU", "soft": 1, "hard": 1}], "oomScoreAdj": 7})).unwrap();
        let exec = json!({"cwd": "/", "args": ["x"], "user": {"uid": 0, "gid": 0}});
        let exec = Plan::of(&serde_json::from_value(exec).unwrap(), "", Some(&init)).unwrap();
        assert_eq!(
            (exec.caps, exec.rlimits, exec.oom_score_adj),
            (init.caps, init.rlimits, Some(7))
        );
    }

    #[test]
    fn env_last_entry_wins() {
        let p = plan(json!({"env": ["PATH=/a", "PATHX=/b", "PATH=/c"]})).unwrap();
        assert_eq!(p.env("PATH"), Some("/c"));
    }

    #[test]
    fn cpu_list_ranges_and_garbage() {
        let set = cpu_list("0-2, 5").unwrap();
        assert_eq!(
            (set.count(), set.is_set(5), set.is_set(3)),
            (4, true, false)
        );
        for bad in ["x", "3-1", "0-99999999"] {
            assert!(cpu_list(bad).is_err(), "{bad}");
        }
    }
}
