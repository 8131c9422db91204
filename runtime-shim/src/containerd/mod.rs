//! The front door for containerd: shim v2.
//!
//! containerd starts `containerd-shim-casemate-v2 … start` in the bundle of a container. That makes a sandbox (its
//! directory, locked, and its socket), leaves a shim behind that serves it, and prints where. `… delete` gives back
//! what a shim that died has left.
//!
//! | module | role |
//! |---|---|
//! | `args` | containerd's command line |
//! | `bootstrap` | its standard input, and the form of the answer |
//! | `info` | what the runtime can do |
//! | `start` | from a bundle to a shim that serves |
//! | `delete` | after a crash |
//! | `events` | what is told to containerd |
//! | `rootfs` | what of a container's root is mounted on the host |

mod args;
mod bootstrap;
mod delete;
pub mod events;
mod info;
pub mod rootfs;
mod start;

use crate::journal::Journal;
use crate::settings::Settings;
use crate::state::{DEFAULT_NAMESPACE, StateRoot};
use anyhow::Context;
use args::{Action, Args};
use std::io::Write;
use std::path::PathBuf;

/// Where a shim listens, in its sandbox's directory and (for containerd 1.6) in the bundle.
const ADDRESS: &str = "address";

/// Does what containerd's command line says.
pub fn main(args: impl Iterator<Item = String>) -> anyhow::Result<()> {
    let args = Args::parse(args)?;
    let answer = match args.action {
        Action::Version => format!(
            "containerd-shim-casemate-v2 {}\n",
            env!("CARGO_PKG_VERSION")
        )
        .into_bytes(),
        Action::Info => info::info()?,
        Action::Start => start::start(&args)?,
        Action::Delete => delete::delete(&args)?,
    };
    let mut stdout = std::io::stdout();
    stdout.write_all(&answer)?;
    stdout.flush().context("can't answer containerd")
}

/// Begins the names of directories of containerd's namespaces; the command line's are elsewhere.
const NAMESPACE: &str = "containerd-";

/// The engine's namespace of the sandbox whose journal this is.
pub fn namespace_of(journal: &Journal) -> String {
    let name = journal
        .dir()
        .and_then(|dir| dir.parent()?.file_name()?.to_str());
    let name = name.unwrap_or(DEFAULT_NAMESPACE);
    name.strip_prefix(NAMESPACE).unwrap_or(name).to_owned()
}

/// The sandboxes of one of containerd's namespaces.
fn state(settings: &Settings, args: &Args) -> anyhow::Result<StateRoot> {
    let namespace = format!("{NAMESPACE}{}", args.namespace);
    Ok(StateRoot::open(&settings.state_dir, &namespace)?)
}

/// containerd starts its shims in the bundle.
fn bundle() -> anyhow::Result<PathBuf> {
    std::env::current_dir().context("can't find the bundle")
}
