//! Talking to registries.

mod config;

pub use config::{RegistryConfig, RegistryHost};
