//! The store with real registries, archives, disks and mounts.

mod commands;
mod common;
mod hostile;
mod mount;
mod pull;
mod survival;
mod tls;
