//! What the agent does itself as a process of a container, instead of executing one: nothing is expected of the image.
//!
//! A tool runs as root of the guest with every file of the container in reach, also before the container was started
//! and while it is frozen. Its streams are those of a process: what it has to say goes to standard output, why it
//! failed to standard error, and 1 is the exit status of a failure.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The type of a tool's request where the Task API expects a process's spec.
pub const TYPE_URL: &str = "casemate.io/tool";

/// A tool and what it is asked for. Paths are resolved inside the container's root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "tool", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Tool {
    /// Tells what is at a path: a [`Stat`] in JSON, or nothing if there is nothing.
    Stat {
        /// Absolute.
        path: PathBuf,
        /// What a symbolic link leads to, rather than the link.
        follow: bool,
    },
    /// Writes a file or tree as a tar stream.
    Pack {
        /// Absolute.
        path: PathBuf,
        /// What it is called in the stream; empty: what is in the directory, without itself.
        name: PathBuf,
        /// What a symbolic link leads to, rather than the link.
        follow: bool,
    },
    /// Takes a tar stream from its standard input.
    Unpack {
        /// An absolute path, of a directory.
        into: PathBuf,
        /// Owners and modes are kept; otherwise root owns all.
        keep_ids: bool,
    },
    /// Lists what the container changed of its image, a line for each: `A`, `C` or `D`, a space and the path, ended by NUL.
    Changes {
        /// Relative paths that are there to be mounted on.
        mount_points: Vec<PathBuf>,
    },
    /// Writes the same as an image layer.
    Layer {
        /// Relative paths that are there to be mounted on.
        mount_points: Vec<PathBuf>,
    },
    /// Tells of the container's processes: an array of [`Running`] in JSON.
    Processes,
}

/// What a path leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    /// It is a directory.
    pub directory: bool,
    /// It is a symbolic link.
    pub link: bool,
}

/// A process of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// Its effective user in the container.
    pub uid: u32,
    /// In the container.
    pub pid: i32,
    /// Its parent's, 0: none in the container.
    pub ppid: i32,
    /// Processor time used, in hundredths of a second.
    pub cpu_ticks: u64,
    /// When it was started, in hundredths of a second before now.
    pub age_ticks: u64,
    /// The number of its terminal's device, 0: none.
    pub tty: u32,
    /// The command line, or the name of a process without one.
    pub command: String,
}
