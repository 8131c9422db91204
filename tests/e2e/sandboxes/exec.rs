//! Further processes in a running container.

use casemate_tests::{Host, Running, Terminal};

/// A container that stays, called "box".
fn start(host: &Host) -> Running {
    let mut container = host.start_run([
        "--name",
        "box",
        "-e",
        "FROM=run",
        "-w",
        "/tmp",
        "busybox",
        "sh",
        "-c",
        "echo up; sleep 100000",
    ]);
    container.prints("up");
    container
}

fn exec<'a>(host: &Host, args: impl IntoIterator<Item = &'a str>) -> casemate_tests::Finished {
    host.casemate(["exec"].into_iter().chain(args))
}

#[test]
fn process_sees_the_container_and_its_exit_code_is_that_of_the_command() {
    let host = Host::with_images();
    let _container = start(&host);
    exec(
        &host,
        [
            "box",
            "sh",
            "-c",
            "echo $FROM $PWD; grep -c sleep /proc/1/cmdline; exit 7",
        ],
    )
    .ends_with(7)
    .prints("run /tmp\n1\n");
    exec(
        &host,
        [
            "-e",
            "FROM=exec",
            "-w",
            "/",
            "box",
            "sh",
            "-c",
            "echo $FROM $PWD >&2",
        ],
    )
    .succeeds()
    .complains_of("exec /");
    exec(&host, ["box", "no-such-command"])
        .ends_with(127)
        .complains_of("no-such-command");
    exec(&host, ["box", "/etc/passwd"])
        .ends_with(126)
        .complains_of("/etc/passwd");
    exec(&host, ["box", "sh", "-c", "kill -9 $$"]).ends_with(137);
}

#[test]
fn standard_streams_pass_unchanged_both_ways() {
    let host = Host::with_images();
    let _container = start(&host);
    let mut cat = Running::start(host.command(["exec", "-i", "box", "cat"]));
    let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    cat.says(&bytes).hangs_up();
    let out = cat.ends();
    out.succeeds();
    assert!(out.stdout == bytes, "{} bytes came back", out.stdout.len());
}

#[test]
fn user_is_found_by_name_and_privileges_are_given_when_asked_for() {
    let host = Host::with_images();
    let _container = start(&host);
    exec(&host, ["-u", "nobody", "box", "id", "-un"])
        .succeeds()
        .prints("nobody\n");
    exec(&host, ["-u", "1234:5", "box", "sh", "-c", "id -u; id -g"])
        .succeeds()
        .prints("1234\n5\n");
    exec(&host, ["-u", "ghost", "box", "true"])
        .fails()
        .complains_of("ghost");
    let rights = ["grep", "CapEff", "/proc/self/status"];
    exec(&host, ["box"].into_iter().chain(rights))
        .succeeds()
        .mentions("00000000a80425fb");
    exec(&host, ["--privileged", "box"].into_iter().chain(rights))
        .succeeds()
        .mentions("000001ffffffffff");
}

#[test]
fn terminal_of_a_process_has_the_size_of_ours() {
    let host = Host::with_images();
    let _container = start(&host);
    let mut terminal = Terminal::start(host.command(["exec", "-it", "box", "sh"]), 33, 101);
    terminal
        .shows("# ")
        .types("stty size\n")
        .shows("33 101")
        .types("exit 4\n");
    assert_eq!(terminal.ends(), 4);
}

#[test]
fn many_at_once_keep_their_output_apart() {
    let host = Host::with_images();
    let _container = start(&host);
    let all: Vec<Running> = (0..20)
        .map(|n| {
            let script = format!("echo {n}; exit {n}");
            Running::start(host.command(["exec", "box", "sh", "-c", script.as_str()]))
        })
        .collect();
    for (n, run) in all.into_iter().enumerate() {
        run.ends().ends_with(n as i32).prints(&format!("{n}\n"));
    }
}

#[test]
fn container_that_does_not_run_is_named() {
    let host = Host::with_images();
    exec(&host, ["nobody-here", "true"])
        .fails()
        .complains_of("nobody-here");
    host.casemate(["run", "--name", "past", "busybox", "true"])
        .succeeds();
    exec(&host, ["past", "true"])
        .fails()
        .complains_of("past is not running");
    host.casemate(["rm", "past"]).succeeds();
    host.is_clean();
}

#[test]
fn process_that_is_detached_goes_on_by_itself() {
    let host = Host::with_images();
    host.casemate(["run", "-d", "--name", "box", "busybox", "sleep", "100000"])
        .succeeds();
    let script = "sleep 1; echo done > /done; sleep 100000";
    host.casemate(["exec", "-d", "box", "sh", "-c", script])
        .succeeds()
        .is_silent();
    let looks = "until test -e /done; do sleep 0.1; done; cat /done";
    host.casemate(["exec", "box", "sh", "-c", looks])
        .succeeds()
        .prints("done\n");
    host.casemate(["exec", "-d", "box", "no-such-command"])
        .ends_with(127);
    host.casemate(["rm", "-f", "box"]).succeeds();
    host.is_clean();
}
