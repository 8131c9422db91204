//! One microVM: memory, vCPUs, boot, virtio devices and the confinement of the
//! process that runs them. The binary `casemate-vmm` is a thin `main` over this.

pub mod config;
pub mod confine;
pub mod control;
pub mod exit_code;
pub mod virtio;
