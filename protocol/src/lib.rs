//! What the shim and the agent say to each other, once, for both.
//!
//! Control is ttrpc (`agent_ttrpc`, feature `rpc`) on one vsock connection that the agent
//! opens to the host at [`CONTROL_PORT`]; each standard stream is a vsock
//! connection of its own to a one-shot port that the shim chose.

#[cfg(feature = "rpc")]
#[allow(missing_docs, clippy::all, unused)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

#[cfg(feature = "rpc")]
pub use generated::{agent, agent_ttrpc, cri};
pub use shares::weight_of_shares;

#[cfg(feature = "netlink")]
pub mod netlink;
mod shares;
pub mod text;
#[cfg(feature = "rpc")]
pub mod tool;

/// CID of the host (virtio 1.2, section 5.10.4; `VMADDR_CID_HOST`).
pub const HOST_CID: u32 = 2;

/// Every guest's CID: the device ends in Unix sockets, so it need not be unique.
pub const GUEST_CID: u32 = 3;

/// Host port on which the agent serves its ttrpc connection.
pub const CONTROL_PORT: u32 = 1024;

/// Host port of the sandbox's resolver.
pub const NAMES_PORT: u32 = 1025;

/// Where the guest's programs find the resolver, as with Docker.
pub const RESOLVER: [u8; 4] = [127, 0, 0, 11];

/// First host port for the standard streams of a sandbox's first process; each is used once. Those of later ones are random.
pub const FIRST_STREAM_PORT: u32 = 0x1_0000;

/// Largest ttrpc message either side accepts, in bytes (ttrpc's own limit).
pub const MAX_MESSAGE: usize = 4 << 20;

/// The agent's program, seen from the guest's root.
pub const INIT: &str = "/init";

/// Its argument where it only holds a pod's namespaces.
pub const PAUSE: &str = "pause";

/// Directory in the guest below which everything of a container is mounted.
pub const GUEST_RUN_DIR: &str = "/run/casemate";

/// x86 I/O port of the power device: the guest writes one of [`power`]'s bytes.
pub const POWER_PORT: u16 = 0x600;

/// Bytes written to [`POWER_PORT`].
pub mod power {
    /// Orderly power-off: the VMM ends with `exit_code::SHUTDOWN`.
    pub const OFF: u8 = 1;
    /// Reset: the VMM ends with `exit_code::RESET`.
    pub const RESET: u8 = 2;
}
