//! Images, registries and comparisons for the store's tests.

pub(crate) mod images;
pub(crate) mod server;
pub(crate) mod trees;

use std::process::{Command, Output, Stdio};

/// Whether every one of these programs is installed; a test that needs others says so and passes.
pub(crate) fn have(programs: &[&str]) -> bool {
    programs.iter().all(|program| {
        let found = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .any(|directory| directory.join(program).is_file());
        if !found {
            eprintln!("left out: {program} is not installed");
        }
        found
    })
}

pub(crate) fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("left out: needs root");
    }
    root
}

/// Runs a program that must succeed.
#[track_caller]
pub(crate) fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
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
