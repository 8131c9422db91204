//! Whatever is killed -9, whenever: the next command cleans up.

use std::fs;
use std::time::{Duration, Instant};

use casemate_tests::{Host, machine};
use rustix::process::Signal;

const SHIM: &str = "containerd-shim-casemate-v2";
const SLEEPER: [&str; 4] = ["busybox", "sh", "-c", "echo up; exec sleep 100000"];

/// Kills what runs of it.
fn kill(host: &Host, executable: &str) -> usize {
    machine::kill(&host.processes(executable))
}

/// A shim notices by itself that its command is gone, and ends.
fn shims_end(host: &Host) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !host.processes(SHIM).is_empty() {
        assert!(Instant::now() < deadline, "the shim outlives its command");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn vmm_killed_ends_the_command_with_an_error_and_leaves_nothing() {
    let host = Host::with_images();
    let mut run = host.start_run(SLEEPER);
    run.prints("up");
    assert_eq!(kill(&host, "casemate-vmm"), 2);
    run.ends().fails();
    host.is_clean();
}

#[test]
fn exec_whose_vmm_is_killed_says_why() {
    let host = Host::with_images();
    let long = ["run", "-d", "--name", "box", "busybox", "sleep", "100000"];
    host.casemate(long).succeeds();
    let mut exec = host.start(["exec", "box", "sh", "-c", "echo up; exec sleep 100000"]);
    exec.prints("up");
    kill(&host, "casemate-vmm");
    exec.ends()
        .ends_with(137)
        .complains_of("container box ended");
    host.casemate(["rm", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn shim_killed_ends_the_vmm_and_the_next_command_cleans_up() {
    let host = Host::with_images();
    let mut run = host.start_run(SLEEPER);
    run.prints("up");
    assert!(kill(&host, SHIM) >= 1);
    run.ends().fails();
    host.script("echo next").succeeds().prints("next\n");
    host.is_clean();
}

#[test]
fn command_killed_leaves_nothing_once_the_next_one_ran() {
    let host = Host::with_images();
    let mut run = host.start_run(SLEEPER);
    run.prints("up").gets(Signal::KILL);
    run.ends().ends_with(137);
    shims_end(&host);
    host.script("echo next").succeeds().prints("next\n");
    host.is_clean();
}

#[test]
fn all_killed_at_once_leave_nothing_once_the_next_one_ran() {
    let host = Host::with_images();
    let mut run = host.start_run(SLEEPER);
    run.prints("up").gets(Signal::KILL);
    kill(&host, SHIM);
    kill(&host, "casemate-vmm");
    run.ends().ends_with(137);
    host.script("echo next").succeeds().prints("next\n");
    host.is_clean();
}

/// Kills `victims` once each at moments spread over `whole`, then has the next command clean up.
fn sweep(host: &Host, whole: Duration, steps: u32, victims: &[&[&str]], prepare: impl Fn()) {
    // Other moments each time.
    let shift = f64::from(std::process::id() % 100) / 100.0;
    for step in 0..steps {
        prepare();
        let run = host.start_run(["busybox", "true"]);
        std::thread::sleep(whole.mul_f64((f64::from(step) + shift) / f64::from(steps)));
        for victim in victims[step as usize % victims.len()] {
            kill(host, victim);
        }
        drop(run);
    }
    shims_end(host);
    // Any command does it, not only a run.
    host.casemate(["ps", "--all", "--quiet"])
        .succeeds()
        .prints("");
    host.is_clean();
    host.script("echo next").succeeds().prints("next\n");
    host.is_clean();
}

#[test]
fn kill_at_any_moment_of_a_start_leaves_nothing_once_the_next_command_ran() {
    let host = Host::with_images();
    host.script("true").succeeds();
    let begun = Instant::now();
    host.script("true").succeeds();
    let victims: [&[&str]; 4] = [
        &["casemate"],
        &[SHIM],
        &["casemate-vmm"],
        &["casemate", SHIM],
    ];
    sweep(&host, begun.elapsed(), 8, &victims, || ());
}

#[test]
fn kill_at_any_moment_of_the_first_start_leaves_no_half_made_disk() {
    let host = Host::with_images();
    let templates = host.data().join("templates");
    let begun = Instant::now();
    host.script("true").succeeds();
    // Most of a first start makes the template of its disk.
    sweep(
        &host,
        begun.elapsed() / 2,
        4,
        &[&["casemate"], &["casemate", "mke2fs"]],
        || {
            let _ = fs::remove_dir_all(&templates);
        },
    );
    let left: Vec<_> = fs::read_dir(&templates)
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with("scratch-") && name != "lock")
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn name_of_a_killed_sandbox_is_free_again() {
    let host = Host::with_images();
    let mut run = host.start_run(["--name", "phoenix"].into_iter().chain(SLEEPER));
    run.prints("up").gets(Signal::KILL);
    kill(&host, SHIM);
    run.ends().ends_with(137);
    host.run(["--name", "phoenix", "busybox", "echo", "risen"])
        .succeeds()
        .prints("risen\n");
    host.is_clean();
}
