//! Trees of files as tar streams.
//!
//! Host and guest pass files to each other in this form, and a container's changes leave it as an image layer
//! (OCI image specification, layer.md). Both ends use the same code; neither believes the other: [`unpack`] leaves
//! the directory that it was given under no circumstances.

mod changes;
mod pack;
mod unpack;

pub use changes::{Change, ChangeKind, Layers, changes, pack_changes};
pub use pack::{Packed, pack};
pub use unpack::{Ids, Unpacked, unpack};

use std::io;
use std::path::Path;

/// An error that names the file it is about.
fn at(path: &Path) -> impl FnOnce(io::Error) -> io::Error + '_ {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
