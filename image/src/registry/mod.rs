//! Talking to registries. Nothing here runs for an image that the store has.

mod auth;
mod client;
mod config;
mod helper;
mod manifest;
mod pace;
mod pull;
mod token;

pub use config::{RegistryConfig, RegistryHost};
pub(crate) use manifest::{Descriptor, Manifest, Select, parse, select};
