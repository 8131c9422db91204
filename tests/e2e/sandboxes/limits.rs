//! CPUs and memory are what was asked for.

use casemate_tests::Host;

#[test]
fn cpus_given_are_cpus_seen() {
    let host = Host::with_images();
    // No more than any KVM host of these tests has.
    for cpus in ["1", "2"] {
        host.run(["--cpus", cpus, "busybox", "nproc"])
            .succeeds()
            .prints(&format!("{cpus}\n"));
    }
}

#[test]
fn fraction_of_a_cpu_is_a_quota() {
    let host = Host::with_images();
    let out = host.run(["--cpus", "0.5", "busybox", "cat", "/sys/fs/cgroup/cpu.max"]);
    out.succeeds().prints("50000 100000\n");
}

#[test]
fn memory_given_is_memory_seen_and_the_limit_of_the_container() {
    let host = Host::with_images();
    let out = host.run([
        "--memory",
        "256m",
        "busybox",
        "cat",
        "/sys/fs/cgroup/memory.max",
    ]);
    out.succeeds().prints(&format!("{}\n", 256 << 20));
    let total = |memory: &str| -> u64 {
        let out = host.run([
            "--memory",
            memory,
            "busybox",
            "awk",
            "/MemTotal/ { print $2 }",
            "/proc/meminfo",
        ]);
        out.succeeds().word().parse().unwrap()
    };
    let (small, large) = (total("256m"), total("512m"));
    assert!(small >= 200 << 10, "{small} KiB of 256 MiB");
    assert!(
        (200 << 10..300 << 10).contains(&(large - small)),
        "{small} and {large} KiB"
    );
}

#[test]
fn workload_that_takes_too_much_memory_is_killed_alone() {
    let host = Host::with_images();
    let script = "guest-tool hog; echo died of $?";
    host.run(["--memory", "128m", "busybox", "sh", "-c", script])
        .succeeds()
        .prints("died of 137\n");
    host.is_clean();
}

#[test]
fn first_process_that_takes_too_much_memory_ends_with_137_and_the_reason() {
    let host = Host::with_images();
    host.run(["--memory", "128m", "busybox", "guest-tool", "hog"])
        .ends_with(137)
        .complains_of("for lack of memory");
    host.is_clean();
}

#[test]
fn labels_and_name_are_kept_while_it_runs() {
    let host = Host::with_images();
    let args = [
        "--name",
        "keep",
        "--label",
        "org.example.tier=gold",
        "busybox",
        "sh",
        "-c",
        "echo up; sleep 100000",
    ];
    let mut sleeper = host.start_run(args);
    sleeper.prints("up");
    host.casemate(["inspect", "keep"])
        .succeeds()
        .mentions("org.example.tier")
        .mentions("gold");
    host.run(["--name", "keep", "busybox", "true"])
        .ends_with(125)
        .complains_of("keep");
}
