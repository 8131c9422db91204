//! The workload's own view: arguments, environment, user, directory, name.

use std::fs;

use casemate_tests::Host;

#[test]
fn arguments_reach_the_workload_untouched() {
    let host = Host::with_images();
    let odd = ["a b", "", "*", "$HOME", "'\"", "é☃", "--rm", "-x"];
    let args = [
        "busybox",
        "sh",
        "-c",
        "for arg; do echo \"[$arg]\"; done",
        "sh",
    ]
    .into_iter()
    .chain(odd);
    let expected: String = odd.iter().map(|arg| format!("[{arg}]\n")).collect();
    host.run(args).succeeds().prints(&expected);
}

#[test]
fn environment_is_the_image_then_the_file_then_the_options() {
    let host = Host::with_images();
    let file = host.dir().join("env");
    fs::write(
        &file,
        "# a comment\n\nFROM_FILE=two words\nOVERRIDE=file\nEMPTY=\n",
    )
    .unwrap();
    let file = file.to_string_lossy();
    let out = host.run([
        "--env-file",
        &file,
        "-e",
        "OVERRIDE=option",
        "-e",
        "SPACED=a b = c",
        "--entrypoint",
        "env",
        "configured",
    ]);
    out.succeeds();
    for line in [
        "FROM_IMAGE=one",
        "FROM_FILE=two words",
        "EMPTY=",
        "OVERRIDE=option",
        "SPACED=a b = c",
    ] {
        assert!(
            out.text().lines().any(|found| found == line),
            "no {line:?} in {}",
            out.text()
        );
    }
    assert!(!out.text().contains("a comment"));
}

#[test]
fn environment_named_without_a_value_is_taken_from_the_caller() {
    let host = Host::with_images();
    let mut command = host.command([
        "run",
        "--rm",
        "-e",
        "HANDED_ON",
        "-e",
        "NOT_SET",
        "busybox",
        "env",
    ]);
    command
        .env("HANDED_ON", "from the caller")
        .env("SECRET", "x");
    let out = casemate_tests::Running::start(command).ends();
    out.succeeds().mentions("HANDED_ON=from the caller\n");
    assert!(
        !out.text().contains("NOT_SET") && !out.text().contains("SECRET"),
        "{}",
        out.text()
    );
}

#[test]
fn image_configuration_is_what_runs_without_options() {
    let host = Host::with_images();
    host.run(["configured"]).succeeds().prints("entry cmd\n");
    host.run(["configured", "arg"])
        .succeeds()
        .prints("entry arg\n");
    let whoami = [
        "--entrypoint",
        "sh",
        "configured",
        "-c",
        "id -un; pwd; echo $HOME",
    ];
    host.run(whoami)
        .succeeds()
        .prints("alice\n/home/alice\n/home/alice\n");
}

#[test]
fn options_go_before_the_image_configuration() {
    let host = Host::with_images();
    let out = host.run([
        "-w",
        "/var/tmp",
        "-u",
        "0",
        "--entrypoint",
        "sh",
        "configured",
        "-c",
        "pwd; id -u",
    ]);
    out.succeeds().prints("/var/tmp\n0\n");
}

#[test]
fn working_directory_that_is_missing_is_made() {
    let host = Host::with_images();
    host.run(["-w", "/a/new/place", "busybox", "pwd"])
        .succeeds()
        .prints("/a/new/place\n");
}

#[test]
fn user_is_found_by_name_and_by_number() {
    let host = Host::with_images();
    let id = "echo $(id -u):$(id -g) $(id -G)";
    let user = |user: &str| {
        host.run(["-u", user, "busybox", "sh", "-c", id])
            .succeeds()
            .word()
    };
    assert_eq!(user("alice"), "1000:1000 1000 10");
    assert_eq!(user("1000"), "1000:1000 1000 10");
    assert_eq!(user("alice:wheel").split(' ').next(), Some("1000:10"));
    assert_eq!(user("4711").split(' ').next(), Some("4711:0"));
    assert_eq!(user("4711:4712").split(' ').next(), Some("4711:4712"));
}

#[test]
fn user_that_the_image_has_not_is_refused_by_name() {
    let host = Host::with_images();
    host.run(["-u", "mallory", "busybox", "true"])
        .fails()
        .complains_of("mallory");
    host.is_clean();
}

#[test]
fn hostname_is_the_one_asked_for() {
    let host = Host::with_images();
    let out = host.run([
        "--hostname",
        "keep.example",
        "busybox",
        "sh",
        "-c",
        "hostname; cat /etc/hostname",
    ]);
    out.succeeds().prints("keep.example\nkeep.example\n");
}

#[test]
fn workload_is_the_first_process_of_its_namespace() {
    let host = Host::with_images();
    host.script("echo $$").succeeds().prints("1\n");
    let shown = host.script("ls -d /proc/[0-9]* | wc -l");
    let count: u32 = shown.succeeds().word().parse().unwrap();
    assert!(count <= 3, "{count} processes in the container");
}

#[test]
fn zombies_of_the_workload_end_with_it() {
    let host = Host::with_images();
    host.script("for i in 1 2 3 4 5; do (sleep 0.01 &) ; done; sleep 0.2; echo done")
        .succeeds()
        .prints("done\n");
    host.is_clean();
}

#[test]
fn loopback_is_the_only_network() {
    let host = Host::with_images();
    host.run(["busybox", "ls", "/sys/class/net"])
        .succeeds()
        .prints("lo\n");
    // The listener needs its moment until it listens.
    let script = "nc -l -p 7777 -e echo hello & \
                  until nc 127.0.0.1 7777 </dev/null 2>/dev/null; do sleep 0.1; done";
    host.script(script).succeeds().prints("hello\n");
}
