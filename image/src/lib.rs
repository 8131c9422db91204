//! Container images as EROFS: pulled from registries or archives, kept by digest, and put together into one read-only disk.
//!
//! A layer becomes an EROFS blob once, while it downloads. A root file system is a small EROFS image of merged metadata whose
//! device table points into the layers' blobs, so that mounting costs the same with one layer or a hundred, and layers are
//! shared between images on disk and between sandboxes in the page cache.
#![forbid(unsafe_code)]

mod archive;
mod blob;
mod convert;
mod digest;
mod erofs;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod layer;
mod limits;
mod merge;
mod platform;
mod progress;
mod recipe;
mod reference;
mod registry;
mod store;
mod tar;
#[cfg(test)]
mod testing;
mod text;
mod tree;

pub use digest::Digest;
pub use error::{Error, Result};
pub use limits::Limits;
pub use oci_spec::distribution::Reference;
pub use platform::Platform;
pub use progress::{Event, NoProgress, Progress};
pub use reference::parse_reference;
pub use registry::{RegistryConfig, RegistryHost};
pub use store::{
    Image, Lease, LoadOptions, LoadSource, Pruned, PullOptions, PullPolicy, Removed, RootfsDisk,
    SaveTarget, Store,
};
