//! Which namespaces a container gets new, and which it joins.

use std::path::PathBuf;

use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType};

use crate::error::{Error, Result};

pub(crate) const NEWTIME: u64 = 0x80;
pub(crate) const NEWNS: u64 = 0x0002_0000;
pub(crate) const NEWCGROUP: u64 = 0x0200_0000;
pub(crate) const NEWUTS: u64 = 0x0400_0000;
pub(crate) const NEWIPC: u64 = 0x0800_0000;
pub(crate) const NEWUSER: u64 = 0x1000_0000;
pub(crate) const NEWPID: u64 = 0x2000_0000;
pub(crate) const NEWNET: u64 = 0x4000_0000;

/// A container's namespaces, by their CLONE_NEW* flags.
#[derive(Debug, Clone, Default)]
pub(crate) struct Namespaces {
    /// Made for the container.
    pub(crate) create: u64,
    /// Joined: files of nsfs in the guest.
    pub(crate) join: Vec<(u64, PathBuf)>,
}

impl Namespaces {
    /// Reads and checks `linux.namespaces` and what depends on them.
    pub(crate) fn of(linux: &Linux) -> Result<Self> {
        let mut namespaces = Self::default();
        for namespace in linux.namespaces().iter().flatten() {
            let flag = flag(namespace.typ());
            if namespaces.all() & flag != 0 {
                return Err(Error::invalid(format!(
                    "linux.namespaces: {} is there twice",
                    namespace.typ()
                )));
            }
            match namespace.path() {
                None => namespaces.create |= flag,
                Some(path) if path.is_absolute() => namespaces.join.push((flag, path.clone())),
                Some(path) => {
                    return Err(Error::invalid(format!(
                        "linux.namespaces: path {} must be absolute",
                        path.display()
                    )));
                }
            }
        }
        if namespaces.all() & NEWNS == 0 {
            return Err(Error::unsupported(
                "linux.namespaces: a container without a mount namespace would take over the guest's root",
            ));
        }
        if namespaces.create & NEWNS == 0 {
            return Err(Error::unsupported(
                "linux.namespaces: a mount namespace can't be joined by path: the container's root would be ignored",
            ));
        }
        let mapped = has_entries(linux.uid_mappings()) || has_entries(linux.gid_mappings());
        if mapped && namespaces.create & NEWUSER == 0 {
            return Err(Error::invalid(
                "linux.uidMappings and gidMappings need a new user namespace",
            ));
        }
        if namespaces.create & NEWUSER != 0
            && !(has_entries(linux.uid_mappings()) && has_entries(linux.gid_mappings()))
        {
            return Err(Error::invalid(
                "a new user namespace needs linux.uidMappings and gidMappings",
            ));
        }
        if linux.time_offsets().as_ref().is_some_and(|o| !o.is_empty())
            && namespaces.create & NEWTIME == 0
        {
            return Err(Error::invalid(
                "linux.timeOffsets need a new time namespace",
            ));
        }
        Ok(namespaces)
    }

    /// New and joined ones.
    pub(crate) fn all(&self) -> u64 {
        self.join
            .iter()
            .fold(self.create, |all, (flag, _)| all | flag)
    }

    /// The path of the one of kind `flag` that is joined.
    pub(crate) fn joined(&self, flag: u64) -> Option<&PathBuf> {
        self.join
            .iter()
            .find(|(f, _)| *f == flag)
            .map(|(_, path)| path)
    }
}

fn has_entries(mappings: &Option<Vec<LinuxIdMapping>>) -> bool {
    mappings.as_ref().is_some_and(|m| !m.is_empty())
}

fn flag(kind: LinuxNamespaceType) -> u64 {
    match kind {
        LinuxNamespaceType::Mount => NEWNS,
        LinuxNamespaceType::Cgroup => NEWCGROUP,
        LinuxNamespaceType::Uts => NEWUTS,
        LinuxNamespaceType::Ipc => NEWIPC,
        LinuxNamespaceType::User => NEWUSER,
        LinuxNamespaceType::Pid => NEWPID,
        LinuxNamespaceType::Network => NEWNET,
        LinuxNamespaceType::Time => NEWTIME,
    }
}

/// The text of `/proc/PID/uid_map` or `gid_map`.
pub(crate) fn id_map(mappings: &[LinuxIdMapping]) -> String {
    mappings
        .iter()
        .map(|m| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size()))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(value: serde_json::Value) -> Result<Namespaces> {
        Namespaces::of(&serde_json::from_value(value).unwrap())
    }

    #[test]
    fn of_new_and_joined_are_told_apart() {
        let n = of(json!({"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "network", "path": "/proc/7/ns/net"}]})).unwrap();
        assert_eq!(n.create, NEWNS | NEWPID);
        assert_eq!(n.joined(NEWNET).unwrap(), &PathBuf::from("/proc/7/ns/net"));
        assert_eq!(n.all(), NEWNS | NEWPID | NEWNET);
    }

    #[test]
    fn of_broken_sets_are_refused() {
        for value in [
            json!({}),
            json!({"namespaces": [{"type": "pid"}]}),
            json!({"namespaces": [{"type": "mount"}, {"type": "mount"}]}),
            json!({"namespaces": [{"type": "mount", "path": "/proc/1/ns/mnt"}]}),
            json!({"namespaces": [{"type": "mount"}, {"type": "pid", "path": "ns/pid"}]}),
            json!({"namespaces": [{"type": "mount"}, {"type": "user"}]}),
            json!({"namespaces": [{"type": "mount"}], "uidMappings": [{"hostID": 0, "containerID": 0, "size": 1}]}),
            json!({"namespaces": [{"type": "mount"}], "timeOffsets": {"boottime": {"secs": 1}}}),
        ] {
            assert!(of(value.clone()).is_err(), "{value}");
        }
    }
}
