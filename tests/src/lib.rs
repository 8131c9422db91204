//! What the end-to-end tests and benches share: a host with a store of its
//! own, commands run on it, fixture images, registries good and bad.
//!
//! A test reads as sentences:
//!
//! ```no_run
//! # use casemate_tests::Host;
//! let host = Host::with_images();
//! host.run(["busybox", "echo", "hi"]).succeeds().prints("hi\n");
//! host.is_clean();
//! ```

pub mod fixture;
pub mod machine;
pub mod paths;
pub mod registry;
pub mod stream;

mod command;
mod host;
mod leftovers;
mod small_disk;
mod terminal;
mod tree;

pub use command::{Finished, Running};
pub use host::{Host, only_one};
pub use registry::Registry;
pub use small_disk::SmallDisk;
pub use terminal::Terminal;
pub use tree::list as list_tree;
