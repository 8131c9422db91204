//! The one configuration of a VMM process.
//!
//! The shim builds it (a pure function of OCI spec and host), opens everything
//! in it and passes it as JSON over an inherited file descriptor. The VMM never
//! opens a path: every resource is an open descriptor, named by its number.

use crate::arch::current::layout;
use crate::memory;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io::Read;

/// Most bytes of a configuration: 100 times what a large one takes.
const MAX_CONFIG: u64 = 1 << 20;
/// Most vCPUs: what the MP table's place holds.
const MAX_VCPUS: u8 = 32;
/// Longest addition to the command line.
const MAX_CMDLINE: usize = 1024;
/// Longest disk serial: VIRTIO_BLK_ID_BYTES.
const MAX_SERIAL: usize = 20;
/// Most devices: one interrupt line each, and one for the console.
const MAX_DEVICES: usize = (layout::LAST_IRQ - layout::FIRST_VIRTIO_IRQ) as usize;
/// Longest name of a share: its place in the configuration space, with a NUL.
const MAX_TAG: usize = 35;
/// Smallest MTU of IPv4.
const MIN_MTU: u16 = 68;
/// Context ids below are the hypervisor's, the loopback's and the host's.
const MIN_CID: u32 = 3;

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be read.
    #[error("configuration: can't be read")]
    Read(#[source] std::io::Error),
    /// It isn't the JSON of a [`VmConfig`].
    #[error("configuration")]
    Parse(#[source] serde_json::Error),
    /// A value is out of its range.
    #[error("configuration: {key} is {value}: {expected}")]
    Value {
        /// Which key.
        key: &'static str,
        /// What it holds.
        value: String,
        /// What it may hold.
        expected: String,
    },
}

/// Number of an inherited, open file descriptor.
pub type Fd = i32;

/// Everything a VMM process is told, once, at start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// `/dev/kvm`, opened read-write.
    pub kvm: Fd,
    /// Guest memory in MiB, 32 ..= 1 TiB.
    pub memory_mib: u32,
    /// Possible vCPUs, 1 ..= 32; the guest starts with one and the agent brings up the rest.
    pub vcpus: u8,
    /// Uncompressed vmlinux (ELF), read-only.
    pub kernel: Fd,
    /// Initrd, read-only.
    pub initrd: Option<Fd>,
    /// Appended to the command line that the VMM itself builds; at most 1024 bytes.
    #[serde(default)]
    pub cmdline: String,
    /// `/dev/vda` onwards, in this order.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// `eth0` onwards, in this order.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// Directories of the host. With any, guest memory is shared with those who serve them.
    #[serde(default)]
    pub shares: Vec<ShareConfig>,
    /// The vsock device; `None`: none.
    pub vsock: Option<VsockConfig>,
    /// Balloon with free page reporting.
    #[serde(default)]
    pub balloon: bool,
    /// Where the serial console writes; `None`: the guest has no UART at all.
    pub console: Option<Fd>,
    /// A `SOCK_SEQPACKET` socket that carries [`crate::control`] messages.
    pub control: Option<Fd>,
    /// How the process confines itself.
    #[serde(default)]
    pub confinement: Confinement,
}

impl VmConfig {
    /// Reads and checks a configuration.
    pub fn read(source: impl Read) -> Result<Self, Error> {
        let mut text = Vec::new();
        source
            .take(MAX_CONFIG)
            .read_to_end(&mut text)
            .map_err(Error::Read)?;
        let config: Self = serde_json::from_slice(&text).map_err(Error::Parse)?;
        config.validate()?;
        Ok(config)
    }

    /// Checks every value that the types leave open.
    pub fn validate(&self) -> Result<(), Error> {
        within(
            "memory_mib",
            self.memory_mib,
            memory::MIN_MIB,
            memory::MAX_MIB,
        )?;
        within("vcpus", self.vcpus, 1, MAX_VCPUS)?;
        within("length of cmdline", self.cmdline.len(), 0, MAX_CMDLINE)?;
        let plain = |c: char| c == ' ' || c.is_ascii_graphic();
        if !self.cmdline.chars().all(plain) {
            return Err(bad("cmdline", &self.cmdline, "printable ASCII is needed"));
        }
        within("number of devices", self.devices(), 0, MAX_DEVICES)?;
        let mut serials = BTreeSet::new();
        for disk in &self.disks {
            let fits = (1..=MAX_SERIAL).contains(&disk.id.len());
            if !fits || !disk.id.bytes().all(|b| b.is_ascii_graphic()) {
                let expected = format!("1 to {MAX_SERIAL} printable ASCII characters are needed");
                return Err(bad("a disk's id", &disk.id, expected));
            }
            if !serials.insert(&disk.id) {
                return Err(bad("a disk's id", &disk.id, "two disks have it"));
            }
        }
        for net in &self.nets {
            within("mtu", net.mtu, MIN_MTU, u16::MAX)?;
            if net.mac[0] & 1 != 0 {
                return Err(bad(
                    "mac",
                    format!("{:02x?}", net.mac),
                    "it is a group address",
                ));
            }
        }
        let mut tags = BTreeSet::new();
        for share in &self.shares {
            let fits = (1..=MAX_TAG).contains(&share.tag.len());
            if !fits || !share.tag.bytes().all(|b| b.is_ascii_graphic()) {
                let expected = format!("1 to {MAX_TAG} printable ASCII characters are needed");
                return Err(bad("a share's tag", &share.tag, expected));
            }
            if !tags.insert(&share.tag) {
                return Err(bad("a share's tag", &share.tag, "two shares have it"));
            }
        }
        if let Some(vsock) = &self.vsock {
            within("cid", vsock.cid, MIN_CID, u32::MAX - 1)?;
            let mut ports = BTreeSet::new();
            if let Some(twice) = vsock.ports.iter().find(|port| !ports.insert(port.port)) {
                return Err(bad("a vsock port", twice.port, "it is listed twice"));
            }
        }
        let mut seen = BTreeSet::new();
        for fd in self.descriptors() {
            if fd < 0 || !seen.insert(fd) {
                return Err(bad("a descriptor", fd, "each is needed once and open"));
            }
        }
        Ok(())
    }

    /// Every descriptor that the configuration names.
    pub fn descriptors(&self) -> Vec<Fd> {
        let vsock = self.vsock.iter().flat_map(|vsock| &vsock.ports);
        [self.kvm, self.kernel]
            .into_iter()
            .chain(self.initrd)
            .chain(self.console)
            .chain(self.control)
            .chain(self.disks.iter().flat_map(|disk| &disk.segments).copied())
            .chain(self.nets.iter().map(|net| net.tap))
            .chain(self.shares.iter().map(|share| share.socket))
            .chain(vsock.map(|port| port.fd))
            .collect()
    }

    /// Virtio devices; every guest has an rng.
    pub fn devices(&self) -> usize {
        let optional = usize::from(self.vsock.is_some()) + usize::from(self.balloon);
        self.disks.len() + self.nets.len() + self.shares.len() + optional + 1
    }
}

fn within<T: PartialOrd + std::fmt::Display>(
    key: &'static str,
    value: T,
    low: T,
    high: T,
) -> Result<(), Error> {
    if value < low || value > high {
        return Err(bad(key, value, format!("{low} to {high} is possible")));
    }
    Ok(())
}

fn bad(key: &'static str, value: impl ToString, expected: impl Into<String>) -> Error {
    Error::Value {
        key,
        value: value.to_string(),
        expected: expected.into(),
    }
}

/// One virtio-blk disk: files laid end to end, each padded to the disk's next 4 KiB block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The serial that the guest sees (VIRTIO_BLK_T_GET_ID), at most 20 bytes.
    pub id: String,
    /// At least one for a disk with content; empty: a placeholder of `empty_size`.
    pub segments: Vec<Fd>,
    /// Refuses writes with VIRTIO_BLK_S_IOERR and offers VIRTIO_BLK_F_RO.
    pub read_only: bool,
    /// Nobody reads it after the VM's end: what the guest flushes needn't be made durable.
    #[serde(default)]
    pub volatile: bool,
    /// `None`: unlimited.
    #[serde(default)]
    pub limits: Option<DiskLimits>,
}

/// What a disk may do in each direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskLimits {
    /// What the guest reads.
    pub read: RateLimit,
    /// What it writes, discards and zeroes.
    pub write: RateLimit,
}

/// Token-bucket limits, refilled each second; 0: unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes per second.
    pub bytes_per_second: u64,
    /// Requests per second.
    pub ops_per_second: u64,
}

/// One virtio-net device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// A tap opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR.
    pub tap: Fd,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// MTU offered to the guest, 68 ..= 65535.
    pub mtu: u16,
    /// Limits for each direction; `None`: unlimited.
    pub rate_limit: Option<RateLimit>,
}

/// One virtio-fs device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// The name by which the guest mounts it, at most 35 bytes.
    pub tag: String,
    /// A Unix stream socket to a vhost-user backend, connected.
    pub socket: Fd,
}

/// The vsock device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 or more.
    pub cid: u32,
    /// Ports of the host that the guest may connect to, each once.
    pub ports: Vec<VsockPort>,
}

/// A host port that accepts one connection from the guest, then is gone.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockPort {
    /// Port on the host's CID.
    pub port: u32,
    /// A connected stream socket (one end of a socketpair) that is the connection's host side.
    pub fd: Fd,
}

/// How much of the host the process keeps once it runs the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Confinement {
    /// Namespaces, empty root, no capabilities, rlimits, seccomp; Landlock where namespaces can't be had.
    #[default]
    Full,
    /// None at all: for debugging and benchmarks of what it costs. Never the default.
    Off,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn minimal() -> VmConfig {
        VmConfig {
            kvm: 3,
            memory_mib: 128,
            vcpus: 1,
            kernel: 4,
            initrd: Some(5),
            cmdline: String::new(),
            disks: vec![disk("root", 6), disk("scratch", 7)],
            nets: vec![NetConfig {
                tap: 8,
                mac: [2, 0, 0, 0, 0, 1],
                mtu: 1500,
                rate_limit: None,
            }],
            shares: vec![ShareConfig {
                tag: "share0".into(),
                socket: 11,
            }],
            vsock: Some(VsockConfig {
                cid: 3,
                ports: vec![VsockPort { port: 1024, fd: 9 }],
            }),
            balloon: true,
            console: None,
            control: Some(10),
            confinement: Confinement::Full,
        }
    }

    fn disk(id: &str, fd: Fd) -> DiskConfig {
        DiskConfig {
            id: id.into(),
            segments: vec![fd],
            read_only: true,
            volatile: false,
            limits: None,
        }
    }

    /// The error of `minimal` after a change.
    fn error_of(change: impl FnOnce(&mut VmConfig)) -> String {
        let mut config = minimal();
        change(&mut config);
        let error = config.validate().expect_err("invalid");
        error.to_string()
    }

    #[test]
    fn validate_bad_tags_of_shares_are_refused() {
        for tag in ["", "with space", &"x".repeat(36)] {
            let error = error_of(|config| config.shares[0].tag = tag.to_owned());
            assert!(error.contains("tag"), "{error}");
        }
        let error = error_of(|config| {
            let mut twin = config.shares[0].clone();
            twin.socket = 12;
            config.shares.push(twin);
        });
        assert!(error.contains("two shares"), "{error}");
    }

    #[test]
    fn validate_minimal_is_accepted() {
        minimal().validate().expect("valid");
    }

    #[test]
    fn validate_names_key_value_and_range() {
        assert_eq!(
            error_of(|c| c.memory_mib = 16),
            "configuration: memory_mib is 16: 32 to 1048576 is possible"
        );
        assert!(error_of(|c| c.vcpus = 0).contains("vcpus is 0"));
        assert!(error_of(|c| c.vcpus = 33).contains("vcpus is 33"));
    }

    #[test]
    fn validate_refuses_what_could_mislead_the_guest() {
        assert!(
            error_of(|c| c.cmdline = "a\nb".replace("\\n", "\n") + "\u{7}").contains("printable")
        );
        assert!(error_of(|c| c.cmdline = "x".repeat(1025)).contains("1025"));
        assert!(error_of(|c| c.disks[1].id = "root".into()).contains("two disks"));
        assert!(error_of(|c| c.disks[0].id = String::new()).contains("characters"));
        assert!(error_of(|c| c.disks[0].id = "x".repeat(21)).contains("characters"));
        assert!(error_of(|c| c.nets[0].mtu = 67).contains("mtu is 67"));
        assert!(error_of(|c| c.nets[0].mac[0] = 1).contains("group address"));
    }

    #[test]
    fn validate_refuses_bad_vsock() {
        let vsock = |cid, ports: &[u32]| {
            Some(VsockConfig {
                cid,
                ports: ports
                    .iter()
                    .zip(20..)
                    .map(|(&port, fd)| VsockPort { port, fd })
                    .collect(),
            })
        };

        assert!(error_of(|c| c.vsock = vsock(2, &[])).contains("cid is 2"));
        assert!(error_of(|c| c.vsock = vsock(u32::MAX, &[])).contains("cid"));
        assert!(error_of(|c| c.vsock = vsock(3, &[5, 5])).contains("listed twice"));
    }

    #[test]
    fn validate_refuses_descriptors_named_twice_or_negative() {
        assert!(error_of(|c| c.kernel = 3).contains("a descriptor is 3"));
        assert!(error_of(|c| c.control = Some(-1)).contains("a descriptor is -1"));
    }

    #[test]
    fn validate_refuses_more_devices_than_lines() {
        let disks = (0..20).map(|i| disk(&format!("d{i}"), 20 + i)).collect();

        assert!(error_of(|c| c.disks = disks).contains("number of devices is 25"));
    }

    #[test]
    fn read_unknown_key_is_an_error() {
        let mut value = serde_json::to_value(minimal()).expect("serializable");
        value["colour"] = "red".into();

        let error = VmConfig::read(value.to_string().as_bytes()).expect_err("unknown key");

        let source = std::error::Error::source(&error).expect("source");
        assert!(source.to_string().contains("colour"), "{source}");
    }

    #[test]
    fn read_what_was_written_is_equal() {
        let text = serde_json::to_string(&minimal()).expect("serializable");

        assert_eq!(VmConfig::read(text.as_bytes()).expect("valid"), minimal());
    }

    proptest! {
        #[test]
        fn read_anything_never_panics(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = VmConfig::read(&text[..]);
        }
    }
}
