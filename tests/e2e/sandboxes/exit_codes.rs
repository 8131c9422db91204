//! Exit codes are Docker's.

use casemate_tests::Host;

#[test]
fn exit_code_of_the_workload_is_that_of_the_command() {
    let host = Host::with_images();
    // Those that mean something on the way, and the ends. (All 256 are run by the agent's own tests.)
    for code in [0, 1, 125, 127, 137, 255] {
        host.script(&format!("exit {code}"))
            .ends_with(code)
            .is_silent();
    }
    host.is_clean();
}

#[test]
fn death_by_signal_is_128_and_the_signal() {
    let host = Host::with_images();
    // PID 1 of a container ignores signals it has no handler for, so a child dies and the shell tells.
    host.script("sh -c 'kill -9 $$'; exit $?").ends_with(137);
    host.script("sh -c 'kill -SEGV $$'; exit $?").ends_with(139);
}

#[test]
fn first_process_killed_from_outside_its_namespace_is_137() {
    // busybox cannot kill PID 1 of its own namespace: the kernel's OOM killer can.
    let host = Host::with_images();
    host.run(["--memory", "96m", "busybox", "guest-tool", "hog"])
        .ends_with(137);
    host.is_clean();
}

#[test]
fn unknown_command_is_127_and_named() {
    let host = Host::with_images();
    host.run(["busybox", "no-such-command"])
        .ends_with(127)
        .complains_of("no-such-command");
    host.run(["busybox", "/no/such/path"])
        .ends_with(127)
        .complains_of("/no/such/path");
    host.is_clean();
}

#[test]
fn file_that_cannot_be_executed_is_126_and_named() {
    let host = Host::with_images();
    host.run(["busybox", "/etc/not-executable"])
        .ends_with(126)
        .complains_of("/etc/not-executable");
    host.run(["busybox", "/etc"])
        .ends_with(126)
        .complains_of("/etc");
    host.is_clean();
}

#[test]
fn failure_of_casemate_itself_is_125() {
    let host = Host::with_images();
    host.run(["--pull", "never", "nosuch/image", "true"])
        .ends_with(125)
        .complains_of("nosuch/image");
    host.run(["--no-such-option", "busybox"])
        .ends_with(125)
        .complains_of("--no-such-option");
    host.is_clean();
}
