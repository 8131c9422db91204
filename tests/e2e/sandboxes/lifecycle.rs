//! What is done to running containers from another command.

use casemate_tests::{Host, Running};
use std::time::{Duration, Instant};

const LISTENS: &str = "trap 'echo asked; exit 3' TERM; echo up; while :; do sleep 0.1; done";
const DEAF: &str = "trap '' TERM; echo up; while :; do sleep 0.1; done";

fn start(host: &Host, name: &str, script: &str) -> Running {
    let mut container = host.start_run(["--name", name, "busybox", "sh", "-c", script]);
    container.prints("up");
    container
}

#[test]
fn stop_asks_first_and_kills_then() {
    let host = Host::with_images();
    let listens = start(&host, "listens", LISTENS);
    host.casemate(["stop", "listens"])
        .succeeds()
        .prints("listens\n");
    listens.ends().ends_with(3).mentions("asked");

    let deaf = start(&host, "deaf", DEAF);
    let begun = Instant::now();
    host.casemate(["stop", "-t", "1", "deaf"])
        .succeeds()
        .prints("deaf\n");
    assert!(begun.elapsed() >= Duration::from_secs(1));
    deaf.ends().ends_with(137);
    host.is_clean();
}

#[test]
fn kill_sends_the_signal_asked_for() {
    let host = Host::with_images();
    let listens = start(&host, "listens", LISTENS);
    host.casemate(["kill", "-s", "SIGTERM", "listens"])
        .succeeds();
    listens.ends().ends_with(3);
    let deaf = start(&host, "deaf", DEAF);
    host.casemate(["kill", "--signal", "nonsense", "deaf"])
        .fails()
        .complains_of("nonsense");
    host.casemate(["kill", "deaf"]).succeeds();
    deaf.ends().ends_with(137);
    host.casemate(["kill", "deaf"]).fails().complains_of("deaf");
    host.is_clean();
}

#[test]
fn wait_prints_the_exit_code() {
    let host = Host::with_images();
    let container = start(&host, "box", "echo up; sleep 2; exit 11");
    let wait = host.start(["wait", "box"]);
    wait.ends().succeeds().prints("11\n");
    container.ends().ends_with(11);
    host.is_clean();
}

#[test]
fn pause_freezes_until_unpause() {
    let host = Host::with_images();
    let script = "echo up; n=0; while :; do n=$((n+1)); echo $n > /tmp/m; mv /tmp/m /tmp/n; sleep 0.05; done";
    let container = start(&host, "box", script);
    let count = |host: &Host| -> u64 {
        let out = host.casemate(["exec", "box", "cat", "/tmp/n"]);
        out.succeeds().word().parse().unwrap()
    };
    host.casemate(["pause", "box"]).succeeds().prints("box\n");
    host.casemate(["unpause", "box"]).succeeds();
    let before = count(&host);
    host.casemate(["pause", "box"]).succeeds();
    std::thread::sleep(Duration::from_secs(2));
    host.casemate(["unpause", "box"]).succeeds();
    // It counted while it ran, but not in the two seconds: that would have been some forty.
    let counted = count(&host) - before;
    assert!(counted < 30, "{counted}");
    host.casemate(["kill", "box"]).succeeds();
    container.ends().ends_with(137);
    host.is_clean();
}
