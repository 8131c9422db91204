//! Capabilities of a container: Docker's default set, `--cap-add`, `--cap-drop`.

use anyhow::bail;

/// All of Linux 6.12.
const ALL: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// What Docker gives a container that asks for nothing.
const DEFAULT: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// The set that results: drops of ALL first, then adds, then single drops, as Docker does.
pub(super) fn resolve(add: &[String], drop: &[String]) -> anyhow::Result<Vec<&'static str>> {
    let (adds_all, add) = known("--cap-add", add)?;
    let (drops_all, drop) = known("--cap-drop", drop)?;
    let base: &[&'static str] = match (adds_all, drops_all) {
        (true, _) => ALL,
        (false, true) => &[],
        (false, false) => DEFAULT,
    };
    Ok(ALL
        .iter()
        .copied()
        .filter(|cap| (base.contains(cap) || add.contains(cap)) && !drop.contains(cap))
        .collect())
}

/// Whether ALL is among `names`, and the others in full.
fn known(flag: &str, names: &[String]) -> anyhow::Result<(bool, Vec<&'static str>)> {
    let mut all = false;
    let mut caps = Vec::new();
    for name in names {
        let upper = name.to_ascii_uppercase();
        let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
        if short == "ALL" {
            all = true;
            continue;
        }
        match ALL
            .iter()
            .find(|cap| cap.strip_prefix("CAP_") == Some(short))
        {
            Some(cap) => caps.push(*cap),
            None => bail!("{flag}: {name:?} is not a capability; see capabilities(7)"),
        }
    }
    Ok((all, caps))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|n| n.to_string()).collect()
    }

    #[test]
    fn resolve_without_wishes_gives_dockers_set() {
        let mut got = resolve(&[], &[]).unwrap();
        let mut docker = DEFAULT.to_vec();
        got.sort_unstable();
        docker.sort_unstable();
        assert_eq!(got, docker);
    }

    #[test]
    fn resolve_with_all_and_exceptions_follows_docker() {
        let only = resolve(&names(&["net_admin"]), &names(&["ALL"])).unwrap();
        assert_eq!(only, ["CAP_NET_ADMIN"]);
        let but = resolve(&names(&["all"]), &names(&["CAP_MKNOD"])).unwrap();
        assert_eq!(but.len(), ALL.len() - 1);
        assert!(!but.contains(&"CAP_MKNOD"));
    }

    #[test]
    fn resolve_of_unknown_names_it() {
        let error = resolve(&names(&["fly"]), &[]).unwrap_err().to_string();
        assert!(
            error.contains("fly") && error.contains("--cap-add"),
            "{error}"
        );
    }
}
