//! Signals sent to the command reach the workload.

use casemate_tests::Host;
use rustix::process::Signal;

const TRAPS: &str = "for s in INT TERM HUP USR1 USR2 WINCH; do trap \"echo got $s; exit 9\" $s; done; \
                     echo up; while :; do sleep 0.1; done";

#[test]
fn signals_are_handed_on_to_the_workload() {
    let host = Host::with_images();
    for (signal, name) in [
        (Signal::INT, "INT"),
        (Signal::TERM, "TERM"),
        (Signal::HUP, "HUP"),
        (Signal::USR1, "USR1"),
    ] {
        let mut run = host.start_run(["busybox", "sh", "-c", TRAPS]);
        run.prints("up").gets(signal);
        run.ends().ends_with(9).prints(&format!("up\ngot {name}\n"));
    }
    host.is_clean();
}

#[test]
fn workload_without_a_handler_dies_of_sigterm() {
    // A first process ignores signals that it does not handle; its child does not, and the shell passes the code on.
    let host = Host::with_images();
    let mut run = host.start_run([
        "busybox",
        "sh",
        "-c",
        "trap 'kill $!' TERM; sleep 1000 & echo up; wait $!; wait $!",
    ]);
    run.prints("up").gets(Signal::TERM);
    run.ends().ends_with(143);
    host.is_clean();
}

#[test]
fn workload_deaf_to_signals_is_killed_at_the_third() {
    let host = Host::with_images();
    let mut run = host.start_run([
        "busybox",
        "sh",
        "-c",
        "trap '' INT TERM; echo up; while :; do sleep 0.1; done",
    ]);
    run.prints("up");
    for _ in 0..3 {
        run.gets(Signal::TERM);
        // Time to take each: two that wait together become one.
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
    run.ends().ends_with(137);
    host.is_clean();
}
