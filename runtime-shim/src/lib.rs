//! casemate: containers in microVMs of their own.
//!
//! Two programs share this library: the command line (`casemate`, module
//! [`cli`]) and the process that looks after one sandbox
//! (`containerd-shim-casemate-v2`, module [`shim`]). The command line is a thin
//! client: it builds an OCI spec and calls the shim's Task service, as containerd does (module [`containerd`]).

pub mod cgroup;
#[cfg(feature = "cli")]
pub mod cli;
pub mod containerd;
pub mod events;
pub mod fds;
pub mod files;
pub mod health;
pub mod journal;
pub mod log;
pub mod network;
pub mod paths;
pub mod plan;
pub mod random;
pub mod restart;
pub mod rpc;
pub mod scratch;
pub mod settings;
pub mod shim;
pub mod size;
pub mod state;
pub mod times;
pub mod update;
pub mod volume;
