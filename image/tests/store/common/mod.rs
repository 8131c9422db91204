//! Images, registries and comparisons for the store's tests.

pub(crate) mod images;
pub(crate) mod server;
pub(crate) mod trees;

use std::process::{Command, Output, Stdio};

/// Only root mounts.
#[track_caller]
pub(crate) fn need_root() {
    assert!(rustix::process::geteuid().is_root(), "run this as root");
}

/// Runs a program that must succeed.
#[track_caller]
pub(crate) fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; scripts/setup test installs it"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// A runtime for one test.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// Names of everything below a store that is not one of its fixed files.
pub(crate) fn stored(data: &std::path::Path, directory: &str) -> Vec<String> {
    let entries = std::fs::read_dir(data.join(directory)).unwrap();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
