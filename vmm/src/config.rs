//! The one configuration of a VMM process.
//!
//! The shim builds it (a pure function of OCI spec and host), opens everything
//! in it and passes it as JSON over an inherited file descriptor. The VMM never
//! opens a path: every resource is an open descriptor, named by its number.

use serde::{Deserialize, Serialize};

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
    /// Token buckets; `None`: unlimited.
    pub rate_limit: Option<RateLimit>,
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
