//! What is told of all there is: `ps --filter`, `events`, `info`, `system df` and `prune`; and `update`.

use casemate_tests::Host;

fn created(host: &Host, name: &str, options: &[&str]) {
    let mut args = vec!["create", "--name", name];
    args.extend_from_slice(options);
    args.extend_from_slice(&["busybox", "sh", "-c", "exit 3"]);
    host.casemate(args).succeeds();
}

fn names(host: &Host, options: &[&str]) -> Vec<String> {
    let mut args = vec!["ps", "--format", "{{.Names}}"];
    args.extend_from_slice(options);
    let names = host.casemate(args).succeeds().text();
    names.lines().map(str::to_owned).collect()
}

#[test]
fn ps_shows_what_the_filters_want() {
    let host = Host::with_images();
    created(&host, "made", &["--label", "tier=back"]);
    created(&host, "ended", &[]);
    host.casemate(["start", "-a", "ended"]).ends_with(3);
    host.casemate([
        "run",
        "-d",
        "--name",
        "runs",
        "--label",
        "tier=front",
        "busybox",
        "sleep",
        "100000",
    ])
    .succeeds();
    for (options, expected) in [
        (&[][..], &["runs"][..]),
        (&["-a"], &["runs", "ended", "made"]),
        (&["-n", "2"], &["runs", "ended"]),
        (&["--latest"], &["runs"]),
        (&["-f", "status=exited"], &["ended"]),
        (
            &["-f", "status=created", "-f", "status=running"],
            &["runs", "made"],
        ),
        (&["-f", "exited=3"], &["ended"]),
        (&["-f", "exited=0"], &[]),
        (&["-a", "-f", "label=tier"], &["runs", "made"]),
        (&["-a", "-f", "label=tier=back"], &["made"]),
        (&["-a", "-f", "name=e", "-f", "since=made"], &["ended"]),
        (&["-a", "-f", "before=ended"], &["made"]),
        (
            &["-a", "-f", "ancestor=busybox", "-f", "name=runs"],
            &["runs"],
        ),
        (&["-a", "-f", "ancestor=debian"], &[]),
    ] {
        assert_eq!(names(&host, options), expected, "{options:?}");
    }
    host.casemate(["ps", "-f", "colour=red"])
        .fails()
        .complains_of("colour");
    host.casemate(["rm", "-f", "made", "ended", "runs"])
        .succeeds();
    host.is_clean();
}

#[test]
fn events_tell_a_containers_life() {
    let host = Host::with_images();
    let mut live = host.start([
        "events",
        "--since",
        "10m",
        "--filter",
        "type=container",
        "--format",
        "{{.Action}}",
    ]);
    created(&host, "box", &[]);
    live.prints("create\n");
    host.casemate(["start", "-a", "box"]).ends_with(3);
    host.casemate(["rename", "box", "other"]).succeeds();
    host.casemate(["rm", "other"]).succeeds();
    live.prints("create\nstart\ndie\nrename\ndestroy\n");
    live.gets(rustix::process::Signal::TERM);
    live.ends();
    let since = ["events", "--since", "10m", "--until", "0s"];
    let past = |more: &[&str]| {
        let args: Vec<&str> = since.iter().chain(more).copied().collect();
        host.casemate(args).succeeds().text()
    };
    let died = past(&["-f", "event=die"]);
    assert!(
        died.contains("container die") && died.contains("exitCode=3"),
        "{died}"
    );
    assert!(died.contains("image=busybox, name=box)"), "{died}");
    assert_eq!(past(&["-f", "event=die", "-f", "container=nobody"]), "");
    let json = past(&["-f", "event=rename", "--format", "json"]);
    assert!(
        json.contains("\"oldName\":\"box\"") && json.contains("\"timeNano\":"),
        "{json}"
    );
    host.casemate(["events", "--since", "yesterday"])
        .fails()
        .complains_of("yesterday");
    host.is_clean();
}

#[test]
fn system_tells_what_is_taken_and_gives_it_back() {
    let host = Host::with_images();
    created(&host, "ended", &["-v", "/nameless", "-v", "kept:/kept"]);
    host.casemate(["start", "-a", "ended"]).ends_with(3);
    host.casemate(["run", "-d", "--name", "runs", "busybox", "sleep", "100000"])
        .succeeds();
    let counts = host.casemate([
        "system",
        "df",
        "--format",
        "{{.Type}} {{.Total}} {{.Active}}",
    ]);
    counts
        .succeeds()
        .mentions("Containers 2 1\n")
        .mentions("Local Volumes 2 2\n");
    let info = host.casemate([
        "info",
        "--format",
        "{{.Containers}} {{.ContainersRunning}} {{.ContainersStopped}}",
    ]);
    info.succeeds().prints("2 1 1\n");
    host.casemate(["info"])
        .succeeds()
        .mentions("Guest Kernel: ");
    host.casemate(["system", "prune"])
        .fails()
        .complains_of("--force");
    host.casemate(["system", "prune", "--force"])
        .succeeds()
        .mentions("Deleted: ")
        .mentions("Total reclaimed space: ");
    assert_eq!(names(&host, &["-a"]), ["runs"]);
    let volumes = || host.casemate(["volume", "ls", "-q"]).text().lines().count();
    assert_eq!(volumes(), 2);
    host.casemate([
        "system",
        "df",
        "--format",
        "{{.Type}} {{.Active}} {{.Reclaimable}}",
    ])
    .mentions("Local Volumes 0 ")
    .mentions("(100%)");
    host.casemate(["system", "prune", "--force", "--volumes"])
        .succeeds()
        .mentions("Deleted: ");
    host.casemate(["volume", "ls", "-q"]).prints("kept\n");
    host.casemate(["volume", "rm", "kept"]).succeeds();
    host.casemate(["rm", "-f", "runs"]).succeeds();
    host.is_clean();
}

#[test]
fn update_changes_limits_now_or_at_the_next_start() {
    let host = Host::with_images();
    let script = "while :; do sleep 0.1; done";
    host.casemate([
        "run", "-d", "--name", "box", "--memory", "128m", "--cpus", "1", "busybox", "sh", "-c",
        script,
    ])
    .succeeds();
    let limit = |expected: &str| {
        let inside = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max; grep -c ^processor /proc/cpuinfo";
        host.casemate(["exec", "box", "sh", "-c", inside])
            .succeeds()
            .prints(expected);
    };
    limit("134217728\n100000 100000\n1\n");
    host.casemate(["update", "--memory", "64m", "--cpus", "0.5", "box"])
        .succeeds()
        .prints("box\n");
    limit("67108864\n50000 100000\n1\n");
    host.casemate(["update", "--cpus", "2", "box"])
        .fails()
        .complains_of("booted with");
    host.casemate(["update", "--memory", "9999999g", "box"])
        .fails();
    host.casemate(["update", "box"])
        .fails()
        .complains_of("nothing to change");
    host.casemate(["stop", "-t", "0", "box"]).succeeds();
    host.casemate(["update", "--cpus", "2", "--restart", "always", "box"])
        .succeeds();
    host.casemate(["start", "box"]).succeeds();
    limit("67108864\n200000 100000\n2\n");
    host.casemate([
        "inspect",
        "--format",
        "{{.HostConfig.RestartPolicy.Name}}",
        "box",
    ])
    .prints("always\n");
    host.casemate(["rm", "-f", "box"]).succeeds();
    host.is_clean();
}
