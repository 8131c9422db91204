//! Whatever is killed -9, whenever: the next command cleans up.

use std::time::{Duration, Instant};

use casemate_tests::Host;
use rustix::process::{Signal, kill_process};

const SHIM: &str = "containerd-shim-casemate-v2";
const SLEEPER: [&str; 4] = ["busybox", "sh", "-c", "echo up; exec sleep 100000"];

fn kill(host: &Host, executable: &str) -> usize {
    let found = host.processes(executable);
    for pid in &found {
        // It may have died with another one in the meantime.
        let _ = kill_process(*pid, Signal::KILL);
    }
    found.len()
}

/// A shim notices by itself that its command is gone, and ends.
fn shims_end(host: &Host) {
    let deadline = Instant::now() + Duration::from_secs(20);
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

#[test]
fn kill_at_any_moment_of_a_start_leaves_nothing_once_the_next_one_ran() {
    let host = Host::with_images();
    let begun = Instant::now();
    host.script("true").succeeds();
    let whole = begun.elapsed();
    // Moments spread over a whole run, each with another victim.
    for (step, victim) in ["casemate", SHIM, "casemate-vmm"]
        .iter()
        .cycle()
        .take(12)
        .enumerate()
    {
        let run = host.start_run(["busybox", "true"]);
        std::thread::sleep(whole.mul_f64(step as f64 / 12.0));
        kill(&host, victim);
        drop(run);
    }
    shims_end(&host);
    host.script("echo next").succeeds().prints("next\n");
    host.is_clean();
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
