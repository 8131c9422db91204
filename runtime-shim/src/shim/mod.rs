//! The shim: the process that looks after one sandbox and serves containerd's Task API for it.
//!
//! It opens what the guest needs, starts the VMM with it, talks to the agent and
//! pumps the standard streams. Whatever comes from the guest is bounded and checked.

mod agent;
mod bounds;
mod container;
mod disks;
mod dns;
mod forward;
mod gate;
mod health;
mod launch;
mod link;
mod logger;
mod names;
mod network;
mod passt;
mod places;
mod ports;
mod process;
mod recorder;
mod sandbox;
mod sandbox_api;
mod serve;
mod service;
mod share_server;
mod shares;
mod stats;
mod stdio;
pub mod timing;
mod unattended;
mod vm;

pub use agent::FILL;
pub use serve::{Engine, Serve, run};
pub use share_server::{ServeShare, serve_share};
