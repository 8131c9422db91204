//! Containers that are left to themselves: `run -d`, `create`, `start`, `restart`, `logs`, `attach`, `rename`.

use casemate_tests::{Host, Terminal};
use std::time::{Duration, Instant};

const LISTENS: &str = "trap 'echo asked; exit 3' TERM; echo up; while :; do sleep 0.1; done";

/// A container that was left to itself, by name.
fn detached(host: &Host, name: &str, options: &[&str], script: &str) -> String {
    let mut args = vec!["run", "--detach", "--name", name];
    args.extend_from_slice(options);
    args.extend_from_slice(&["busybox", "sh", "-c", script]);
    let id = host.casemate(args).succeeds().word();
    assert_eq!(id.len(), 64, "{id}");
    id
}

/// Waits until the log of a container holds `text`.
fn logs_hold(host: &Host, name: &str, text: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let log = host.casemate(["logs", name]).succeeds().text();
        if log.contains(text) {
            return;
        }
        assert!(Instant::now() < deadline, "{name}: {log}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn state(host: &Host, name: &str) -> String {
    let format = "{{.State.Status}} {{.State.ExitCode}} {{.RestartCount}}";
    let shown = host.casemate(["inspect", "--format", format, name]);
    shown.succeeds().text().trim().to_owned()
}

#[test]
fn container_outlives_the_command_and_its_output_is_kept() {
    let host = Host::with_images();
    let script = "echo to stdout; echo to stderr >&2; exec sleep 100000";
    detached(&host, "box", &[], script);
    logs_hold(&host, "box", "to stdout");
    let logs = host.casemate(["logs", "box"]);
    logs.succeeds().prints("to stdout\n");
    assert_eq!(logs.stderr_text(), "to stderr\n");
    host.casemate(["exec", "box", "echo", "still here"])
        .succeeds()
        .prints("still here\n");
    host.casemate(["ps"]).succeeds().mentions("Up ");
    host.casemate(["stop", "-t", "0", "box"]).succeeds();
    assert_eq!(state(&host, "box"), "exited 137 0");
    host.casemate(["logs", "box"]).prints("to stdout\n");
    host.casemate(["rm", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn container_with_rm_is_gone_with_its_end() {
    let host = Host::with_images();
    detached(&host, "box", &["--rm"], LISTENS);
    logs_hold(&host, "box", "up");
    host.casemate(["stop", "box"]).succeeds();
    host.casemate(["ps", "-a", "-q"]).succeeds().prints("");
    host.is_clean();
}

#[test]
fn command_that_is_missing_fails_and_leaves_nothing() {
    let host = Host::with_images();
    host.casemate(["run", "-d", "busybox", "no-such-command"])
        .ends_with(127)
        .complains_of("no-such-command");
    host.casemate(["ps", "-a", "-q"]).succeeds().prints("");
    host.is_clean();
}

#[test]
fn container_that_ended_starts_again_with_what_it_wrote() {
    let host = Host::with_images();
    let script = "echo $((1 + $(cat /n 2> /dev/null || echo 0))) > /n; cat /n; exit 4";
    host.casemate(["create", "--name", "box", "busybox", "sh", "-c", script])
        .succeeds();
    assert_eq!(state(&host, "box"), "created 0 0");
    host.casemate(["rmi", "busybox"])
        .fails()
        .complains_of("container box was made from it");
    for _ in 0..3 {
        host.casemate(["start", "box"]).succeeds().prints("box\n");
        host.casemate(["wait", "box"]).succeeds().prints("4\n");
    }
    host.casemate(["start", "--attach", "box"])
        .ends_with(4)
        .prints("4\n");
    host.casemate(["logs", "box"])
        .succeeds()
        .prints("1\n2\n3\n4\n");
    host.casemate(["logs", "--tail", "1", "box"])
        .succeeds()
        .prints("4\n");
    host.casemate(["rm", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn restart_stops_and_starts() {
    let host = Host::with_images();
    detached(&host, "box", &[], LISTENS);
    logs_hold(&host, "box", "up");
    host.casemate(["restart", "box"]).succeeds().prints("box\n");
    logs_hold(&host, "box", "up\nasked\nup");
    host.casemate(["rm", "box"]).fails().complains_of("running");
    host.casemate(["rm", "--force", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn policy_starts_a_failing_container_again_and_gives_up() {
    let host = Host::with_images();
    let policy = ["--restart", "on-failure:2"];
    detached(&host, "box", &policy, "echo up; exit 5");
    let deadline = Instant::now() + Duration::from_secs(90);
    while state(&host, "box") != "exited 5 2" {
        assert!(Instant::now() < deadline, "{}", state(&host, "box"));
        std::thread::sleep(Duration::from_millis(200));
    }
    host.casemate(["logs", "box"]).prints("up\nup\nup\n");
    host.casemate(["rm", "box"]).succeeds();

    let policy = ["--restart", "always"];
    detached(&host, "box", &policy, LISTENS);
    logs_hold(&host, "box", "up");
    host.casemate(["stop", "box"]).succeeds();
    assert_eq!(state(&host, "box"), "exited 3 0");
    host.casemate(["rm", "box"]).succeeds();
    host.casemate(["run", "--rm", "--restart", "always", "busybox", "true"])
        .ends_with(125);
    host.casemate(["run", "--restart", "always", "busybox", "true"])
        .ends_with(125)
        .complains_of("--detach");
    host.is_clean();
}

#[test]
fn stop_holds_at_any_moment_of_a_restart() {
    let host = Host::with_images();
    detached(&host, "box", &["--restart", "always"], "exit 1");
    for pause in [0, 150, 400, 900] {
        std::thread::sleep(Duration::from_millis(pause));
        host.casemate(["stop", "box"]).succeeds();
        let stopped = state(&host, "box");
        assert!(stopped.starts_with("exited 1"), "{stopped}");
        std::thread::sleep(Duration::from_millis(700));
        assert_eq!(state(&host, "box"), stopped);
        host.casemate(["start", "box"]).succeeds();
    }
    host.casemate(["rm", "-f", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn stats_show_what_a_container_uses() {
    let host = Host::with_images();
    detached(&host, "busy", &["--memory", "256m"], "while :; do :; done");
    let line = host.casemate(["stats", "--no-stream", "--format", "json"]);
    let row: serde_json::Value = serde_json::from_str(&line.succeeds().text()).unwrap();
    assert_eq!(row["Name"], "busy", "{row}");
    let share = row["CPUPerc"].as_str().unwrap().trim_end_matches('%');
    assert!(share.parse::<f64>().unwrap() > 5.0, "{row}");
    assert!(
        row["MemUsage"].as_str().unwrap().ends_with("/ 268MB"),
        "{row}"
    );
    assert!(row["PIDs"].as_u64().unwrap() >= 1, "{row}");
    host.casemate(["stats", "--no-stream", "nobody"])
        .fails()
        .complains_of("nobody");
    host.casemate(["rm", "-f", "busy"]).succeeds();
    host.is_clean();
}

#[test]
fn terminal_without_input_is_looked_at_only() {
    let host = Host::with_images();
    detached(
        &host,
        "box",
        &["-t"],
        "trap 'exit 9' INT; echo up; while :; do echo tick; sleep 0.1; done",
    );
    let mut terminal = Terminal::start(host.command(["attach", "box"]), 24, 80);
    // Three interrupts leave the container to itself. It works between two of them, so they don't become one.
    for _ in 0..3 {
        terminal.shows("tick").shows("tick").types("\u{3}");
    }
    assert_eq!(terminal.ends(), 0);
    assert_eq!(state(&host, "box"), "running 0 0");
    host.casemate(["rm", "-f", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn logs_follow_until_the_end_and_stay_within_their_bound() {
    let host = Host::with_images();
    let bound = ["--log-opt", "max-size=16k", "--log-opt", "max-file=2"];
    let script = "read go; seq 1 5000; echo the end";
    let mut options = vec!["-i"];
    options.extend(bound);
    detached(&host, "box", &options, script);
    let follower = host.start(["logs", "--follow", "box"]);
    let mut attached = host.start(["attach", "box"]);
    attached.says("go\n");
    attached.ends().ends_with(0);
    let followed = follower.ends();
    followed.succeeds();
    let text = followed.text();
    assert!(text.ends_with("5000\nthe end\n"), "{text}");
    let kept = host.casemate(["logs", "box"]).succeeds().text();
    assert!(kept.len() < 33_000 && kept.ends_with("the end\n"));
    let stamped = host.casemate(["logs", "-t", "-n", "1", "box"]).text();
    assert!(
        stamped.starts_with("20") && stamped.ends_with("Z the end\n"),
        "{stamped}"
    );
    host.casemate(["logs", "--since", "1h", "--until", "30m", "box"])
        .succeeds()
        .prints("");
    host.casemate(["rm", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn terminal_is_attached_to_and_left_again() {
    let host = Host::with_images();
    detached(
        &host,
        "box",
        &["-it"],
        "stty -echo; while read line; do echo \"<$line>\"; done",
    );
    let command = host.command(["attach", "box"]);
    let mut terminal = Terminal::start(command, 24, 80);
    terminal.types("one\r").shows("<one>");
    terminal.types("\u{10}\u{11}");
    assert_eq!(terminal.ends(), 0);
    assert_eq!(state(&host, "box"), "running 0 0");
    host.casemate(["rm", "-f", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn name_is_changed_and_the_old_one_free() {
    let host = Host::with_images();
    detached(&host, "old", &[], "exec sleep 100000");
    host.casemate(["rename", "old", "new"]).succeeds();
    host.casemate(["ps", "--format", "{{.Names}}"])
        .prints("new\n");
    host.casemate(["create", "--name", "old", "busybox", "true"])
        .succeeds();
    host.casemate(["rename", "old", "new"])
        .fails()
        .complains_of("\"new\"");
    host.casemate(["rename", "old", "../x"])
        .fails()
        .complains_of("../x");
    host.casemate(["rm", "-f", "old", "new"]).succeeds();
    host.is_clean();
}

#[test]
fn shim_killed_is_told_and_the_container_starts_again() {
    let host = Host::with_images();
    detached(&host, "box", &[], "echo up; exec sleep 100000");
    logs_hold(&host, "box", "up");
    let follower = host.start(["logs", "-f", "box"]);
    for shim in host.processes("containerd-shim-casemate-v2") {
        rustix::process::kill_process(shim, rustix::process::Signal::KILL).unwrap();
    }
    follower.ends().succeeds().prints("up\n");
    assert_eq!(state(&host, "box"), "exited 137 0");
    host.casemate(["start", "box"]).succeeds();
    logs_hold(&host, "box", "up\nup");
    host.casemate(["rm", "-f", "box"]).succeeds();
    host.is_clean();
}
