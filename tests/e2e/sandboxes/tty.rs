//! A real terminal in front of a sandbox.

use casemate_tests::{Host, Running, Terminal};
use rustix::process::Signal;

fn shell(host: &Host) -> Terminal {
    Terminal::start(
        host.command(["run", "--rm", "-it", "busybox", "sh"]),
        31,
        77,
    )
}

#[test]
fn terminal_is_a_terminal_of_the_same_size() {
    let host = Host::with_images();
    let mut terminal = shell(&host);
    terminal
        .shows("# ")
        .types("tty; stty size\n")
        .shows("/dev/")
        .shows("31 77");
    terminal.types("exit 6\n");
    assert_eq!(terminal.ends(), 6);
    host.is_clean();
}

#[test]
fn window_that_changes_its_size_tells_the_workload() {
    let host = Host::with_images();
    let script = "trap 'echo size $(stty size)' WINCH; echo up; while :; do sleep 0.2; done";
    let mut terminal = Terminal::start(
        host.command(["run", "--rm", "-it", "busybox", "sh", "-c", script]),
        31,
        77,
    );
    terminal.shows("up").resizes(50, 132).shows("size 50 132");
    terminal.types("\x03");
    terminal.ends();
}

#[test]
fn ctrl_c_interrupts_the_foreground_and_not_the_shell() {
    let host = Host::with_images();
    let mut terminal = shell(&host);
    terminal
        .shows("# ")
        .types("sleep 1000\n")
        .shows("sleep 1000");
    std::thread::sleep(std::time::Duration::from_millis(500));
    terminal
        .types("\x03")
        .shows("# ")
        .types("echo code=$?\n")
        .shows("code=130");
    terminal.types("exit\n");
    assert_eq!(terminal.ends(), 0);
}

#[test]
fn ctrl_c_reaches_a_workload_that_has_no_terminal_itself() {
    // The terminal sends SIGINT to every process of its foreground group, not to the command alone.
    let host = Host::with_images();
    let script = "trap 'echo interrupted; exit 9' INT; echo up; while :; do sleep 0.1; done";
    let mut terminal = Terminal::start(
        host.command(["run", "--rm", "busybox", "sh", "-c", script]),
        24,
        80,
    );
    terminal.shows("up").types("\x03").shows("interrupted");
    assert_eq!(terminal.ends(), 9);
    host.is_clean();
}

#[test]
fn ctrl_d_ends_the_shell() {
    let host = Host::with_images();
    let mut terminal = shell(&host);
    terminal.shows("# ").types("\x04");
    assert_eq!(terminal.ends(), 0);
    host.is_clean();
}

#[test]
fn terminal_is_as_before_once_the_command_ended() {
    let host = Host::with_images();
    let script = "stty -a > before; $0 run --rm -it busybox true; stty -a > after; cmp before after && echo same";
    let mut command = std::process::Command::new("sh");
    host.prepare(&mut command);
    command
        .args(["-c", script])
        .arg(casemate_tests::paths::casemate());
    let mut terminal = Terminal::start(command, 24, 80);
    terminal.shows("same");
    assert_eq!(terminal.ends(), 0);
}

#[test]
fn sigterm_to_the_command_ends_the_shell_at_the_terminal() {
    let host = Host::with_images();
    let mut terminal = Terminal::start(
        host.command([
            "run",
            "--rm",
            "-it",
            "busybox",
            "sh",
            "-c",
            "trap 'exit 8' TERM; echo up; while :; do sleep 0.1; done",
        ]),
        24,
        80,
    );
    terminal.shows("up").gets(Signal::TERM);
    assert_eq!(terminal.ends(), 8);
}

#[test]
fn terminal_asked_for_without_one_is_refused() {
    let host = Host::with_images();
    let out = Running::start(host.command(["run", "--rm", "-it", "busybox", "true"])).ends();
    out.fails().complains_of("terminal");
    host.is_clean();
}
