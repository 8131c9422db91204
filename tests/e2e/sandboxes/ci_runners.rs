//! docs/ci: called as the runners call it, by environment, arguments and standard input, stage by stage.

use casemate_tests::{Finished, Host, Running, paths};
use rustix::process::{Pid, Signal, kill_process_group};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

mod github;
mod gitlab;

/// A script below docs/ci, with what the administrator sets.
fn program(host: &Host, name: &str) -> Command {
    let mut command = Command::new(paths::repository().join("docs/ci").join(name));
    prepare(host, &mut command);
    command
}

fn prepare(host: &Host, command: &mut Command) {
    use std::os::unix::process::CommandExt;
    host.prepare(command);
    command
        .env("CASEMATE", paths::casemate())
        .env("CASEMATE_CI_OPTIONS", "--cpus 1 --memory 256m")
        .env("CASEMATE_CI_CACHE", "64m")
        .env("CASEMATE_CI_ARTIFACTS", artifacts(host))
        // Runners give each a group of its own, and signal that.
        .process_group(0);
}

fn artifacts(host: &Host) -> PathBuf {
    let dir = host.dir().join("artifacts of all jobs");
    std::fs::create_dir_all(&dir).expect("the scratch directory is writable");
    dir
}

fn ends(command: Command) -> Finished {
    Running::start(command).ends()
}

/// Ends a program as runners do at a job's time limit or when they are killed themselves.
fn signal_group(running: &Running, signal: Signal) {
    let group: Pid = running.pid();
    kill_process_group(group, signal).expect("the program still runs");
}

fn volumes(host: &Host) -> Vec<String> {
    let all = host.casemate(["volume", "ls", "-q"]).succeeds().text();
    all.lines().map(str::to_owned).collect()
}

/// What the project's cache holds in the file `who`; the cache's name is told by the label.
fn cached(host: &Host, project: &str) -> String {
    let label = format!("label=casemate.ci.cache={project}");
    let names = host
        .casemate(["volume", "ls", "-q", "--filter", &label])
        .succeeds()
        .text();
    let [name] = names.lines().collect::<Vec<_>>()[..] else {
        panic!("not one cache of {project}: {names:?}");
    };
    let volume = format!("{name}:/cache:ro");
    let read = ["-v", &volume, "busybox", "cat", "/cache/who"];
    host.run(read).succeeds().word()
}

/// Nothing of any job is there but the projects' caches.
#[track_caller]
fn only_caches_are_left(host: &Host) {
    let others: Vec<_> = volumes(host)
        .into_iter()
        .filter(|name| !name.starts_with("ci-cache-"))
        .collect();
    assert!(others.is_empty(), "left behind: {others:?}");
    host.casemate(["ps", "-aq"]).succeeds().prints("");
    host.is_clean();
}

/// Names of what is in a directory, sorted.
fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Sleeps until a signal would find the program at work.
fn a_moment() {
    std::thread::sleep(Duration::from_millis(500));
}
