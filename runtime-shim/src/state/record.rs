//! What is written down about a container.

use crate::health;
use crate::log;
use crate::restart::Policy;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What a container is: written once, when it is made.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// 64 hex digits.
    pub id: String,
    /// Unique in its namespace.
    pub name: String,
    /// The image as the user named it.
    pub image: String,
    /// The image's id.
    pub image_id: String,
    /// The command line inside.
    pub command: Vec<String>,
    /// Nanoseconds since the epoch.
    pub created: u64,
    /// Goes away when it ends.
    pub auto_remove: bool,
    /// What `stop` sends; `None`: SIGTERM.
    #[serde(default)]
    pub stop_signal: Option<String>,
    /// Seconds that `stop` waits before it kills.
    #[serde(default)]
    pub stop_timeout: Option<u32>,
    /// What to do when it ends by itself.
    #[serde(default)]
    pub restart: Policy,
    /// What it writes is logged, within these bounds.
    #[serde(default)]
    pub log: Option<log::Limits>,
    /// Its standard input can be written to.
    #[serde(default)]
    pub interactive: bool,
    /// It has a terminal.
    #[serde(default)]
    pub tty: bool,
    /// Its root file system is read-only.
    #[serde(default)]
    pub read_only: bool,
    /// What tells whether it is well.
    #[serde(default)]
    pub health: Option<health::Check>,
    /// The user's labels and the image's.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What it sees of outside its image.
    #[serde(default)]
    pub mounts: Vec<MountPoint>,
}

impl Meta {
    /// Whether a volume is mounted in it.
    pub fn uses_volume(&self, name: &str) -> bool {
        self.mounts.iter().any(|mount| mount.volume == name)
    }
}

/// What a container sees of outside its image: a volume, or a file or directory of the host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MountPoint {
    /// The volume's name; empty: something of the host.
    #[serde(default)]
    pub volume: String,
    /// The volume's directory, or what of the host.
    pub source: PathBuf,
    /// Where in the container.
    pub target: String,
    /// It can't be written to.
    #[serde(default)]
    pub read_only: bool,
    /// Nobody named the volume: it was made for this container.
    #[serde(default)]
    pub anonymous: bool,
    /// The volume, if it is empty, gets what the image has there.
    #[serde(default)]
    pub copy_up: bool,
    /// Further options of the mount: nosuid, nodev, noexec.
    #[serde(default)]
    pub options: Vec<String>,
}

/// How a container is: replaced at each change.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// What it is doing.
    pub state: State,
    /// The VMM's process while it runs.
    #[serde(default)]
    pub pid: u32,
    /// Once exited.
    #[serde(default)]
    pub exit_code: u32,
    /// Nanoseconds since the epoch, 0: not yet.
    #[serde(default)]
    pub started: u64,
    /// Nanoseconds since the epoch, 0: not yet.
    #[serde(default)]
    pub finished: u64,
    /// Its processes are frozen.
    #[serde(default)]
    pub paused: bool,
    /// How often it was started again by itself.
    #[serde(default)]
    pub restarts: u32,
    /// The guest's kernel killed it for lack of memory.
    #[serde(default)]
    pub oom_killed: bool,
    /// What its health checks came to.
    #[serde(default)]
    pub health: Option<health::Health>,
    /// Why it ended, when that was not the workload's doing.
    #[serde(default)]
    pub error: String,
}

/// A container's life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Made, never started.
    #[default]
    Created,
    /// Started.
    Running,
    /// Ended, and about to start again.
    Restarting,
    /// Ended.
    Exited,
}

impl State {
    /// Whether somebody looks after it.
    pub fn is_alive(self) -> bool {
        matches!(self, Self::Running | Self::Restarting)
    }
}

/// A container as the state directory shows it.
#[derive(Debug, Clone, Serialize)]
pub struct Container {
    /// What it is.
    #[serde(flatten)]
    pub meta: Meta,
    /// How it is.
    pub status: Status,
    /// Its directory.
    #[serde(skip)]
    pub dir: PathBuf,
}
