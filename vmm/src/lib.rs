//! One microVM: memory, vCPUs, boot, virtio devices and the confinement of the
//! process that runs them. The binary `casemate-vmm` is a thin `main` over this.

pub mod arch;
pub mod bus;
pub mod config;
pub mod confine;
pub mod control;
pub mod control_socket;
pub mod devices;
pub mod elf;
pub mod ending;
pub mod event_loop;
pub mod exit_code;
mod fds;
pub mod gate;
pub mod guest_log;
pub mod memory;
pub mod phases;
pub mod poller;
pub mod power;
pub mod probe;
pub mod rate_limit;
mod run;
pub mod serial;
mod sync;
pub mod throttle;
pub mod vcpu;
pub mod virtio;
pub mod vm;

pub use run::{probe_confinement, read_config, run};
