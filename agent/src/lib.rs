//! The guest's PID 1: builds containers as the shim asks, moves their streams, reaps.
//!
//! One thread, one tokio runtime. That makes fork safe to use as fork (see [`sys`]), and start-up cheap: the agent
//! answers the host before it has mounted anything.
//!
//! | module | role |
//! |---|---|
//! | `server` | the ttrpc service |
//! | `container` | spec to processes: plan, fork, the child's way, mounts |
//! | `cgroup`, `seccomp` | limits and filters |
//! | `conn`, `pump`, `control` | streams to the host |
//! | `forward` | connections of the host to the guest's loopback |
//! | `network`, `names` | interfaces, addresses, routes; the containers' resolver |
//! | `pause` | what holds the namespaces of a pod without an image for it |
//! | `reaper`, `boot` | PID 1's duties |

mod arch;
mod boot;
mod cgroup;
mod conn;
mod container;
mod control;
mod error;
mod forward;
mod names;
mod network;
mod pause;
mod pump;
mod reaper;
pub mod seccomp;
mod server;
mod sys;

pub use boot::{end_guest, log, log_panics};
pub use conn::{Conn, Host};
pub use container::{check_process, check_resources, check_spec};
pub use error::{Error, Kind, Result};
pub use pause::pause;
pub use server::serve;

/// CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_ns() -> u64 {
    sys::monotonic_ns()
}
