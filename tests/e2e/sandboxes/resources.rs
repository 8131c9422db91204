//! A container takes no more of the host than it was given, and the host shows it.

use casemate_tests::Host;
use rustix::process::Pid;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Starts a container that sleeps, and gives its id.
fn detached(host: &Host, name: &str, options: &[&str], command: &[&str]) -> String {
    let first = ["run", "-d", "--name", name];
    let args = [&first[..], options, &["busybox"], command].concat();
    host.casemate(args).succeeds().word()
}

/// The VMM's processes: the one with the guest, and the one that waits for it.
fn vmm(host: &Host) -> Vec<Pid> {
    let all = host.processes("casemate-vmm");
    assert_eq!(all.len(), 2, "a VMM runs");
    all
}

/// Who is in a sandbox's group, in order.
fn members(id: &str) -> Vec<i32> {
    let text = fs::read_to_string(group(id).join("cgroup.procs")).expect("the group is there");
    let mut all: Vec<i32> = text.lines().filter_map(|pid| pid.parse().ok()).collect();
    all.sort_unstable();
    all
}

fn numbers(pids: Vec<Pid>) -> Vec<i32> {
    let mut all: Vec<i32> = pids
        .into_iter()
        .map(|pid| pid.as_raw_nonzero().get())
        .collect();
    all.sort_unstable();
    all
}

fn status(pid: Pid, field: &str) -> String {
    let path = format!("/proc/{}/status", pid.as_raw_nonzero());
    let text = fs::read_to_string(path).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.expect("the field")
        .trim_start_matches(':')
        .trim()
        .to_owned()
}

fn group(id: &str) -> PathBuf {
    PathBuf::from("/sys/fs/cgroup/casemate").join(id)
}

/// A figure of the group's `cpu.stat`.
fn cpu_stat(id: &str, key: &str) -> u64 {
    let text = fs::read_to_string(group(id).join("cpu.stat")).expect("the group is there");
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|n| n.trim().parse().ok()).expect("a figure")
}

#[test]
fn cpu_hog_gets_what_it_was_given_and_its_neighbour_too() {
    let host = Host::with_images();
    let hog = ["sh", "-c", "while :; do :; done"];
    let hog = detached(&host, "hog", &["--cpus", "0.5"], &hog);
    let max = || fs::read_to_string(group(&hog).join("cpu.max")).expect("the group is there");
    assert_eq!(max(), "50000 100000\n");
    let (begun, used) = (Instant::now(), cpu_stat(&hog, "usage_usec"));
    // The neighbour starts, works and ends beside it.
    host.run(["busybox", "sh", "-c", "seq 2000 | sha256sum"])
        .succeeds()
        .mentions("  -");
    let used = cpu_stat(&hog, "usage_usec") - used;
    let share = used as f64 / begun.elapsed().as_micros() as f64;
    assert!(share < 0.65, "{share} of a CPU");
    assert!(cpu_stat(&hog, "nr_throttled") > 0);

    host.casemate(["update", "--cpus", "0.25", "hog"])
        .succeeds();
    assert_eq!(max(), "25000 100000\n");
    host.casemate(["rm", "-f", "hog"]).succeeds();
    assert!(!group(&hog).exists());
    host.is_clean();
}

/// Processor time that processes have used, in seconds.
fn used(pids: &[Pid]) -> f64 {
    let ticks = |pid: &Pid| -> u64 {
        let path = format!("/proc/{}/stat", pid.as_raw_nonzero());
        let text = fs::read_to_string(path).expect("it runs");
        let fields = text.rsplit(") ").next().expect("its state and more");
        let times = fields.split(' ').skip(11).take(2); // utime, stime
        times.map(|n| n.parse::<u64>().expect("a number")).sum()
    };
    pids.iter().map(ticks).sum::<u64>() as f64 / rustix::param::clock_ticks_per_second() as f64
}

#[test]
fn users_guest_that_lifts_its_own_quota_gets_no_more() {
    let host = Host::with_images().of_user(65_534);
    let script =
        "echo max > /sys/fs/cgroup/cpu.max; cat /sys/fs/cgroup/cpu.max; while :; do :; done";
    let options = ["--privileged", "--cpus", "0.2"];
    detached(&host, "hog", &options, &["sh", "-c", script]);
    let vmm = vmm(&host);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !host.casemate(["logs", "hog"]).text().starts_with("max ") {
        assert!(Instant::now() < deadline, "the quota inside is still there");
    }
    let share = |host: &Host| {
        let (begun, before) = (Instant::now(), used(&vmm));
        // In most of this time its vCPU waits, which hinders nobody.
        host.casemate(["pause", "hog"]).succeeds();
        host.casemate(["unpause", "hog"]).succeeds();
        host.casemate(["exec", "hog", "true"]).succeeds();
        while begun.elapsed() < Duration::from_secs(3) {
            std::thread::sleep(Duration::from_millis(100));
        }
        (used(&vmm) - before) / begun.elapsed().as_secs_f64()
    };
    let first = share(&host);
    assert!(first < 0.3, "{first} of a CPU");

    host.casemate(["update", "--cpus", "0.1", "hog"]).succeeds();
    host.casemate([
        "exec",
        "hog",
        "sh",
        "-c",
        "echo max > /sys/fs/cgroup/cpu.max",
    ])
    .succeeds();
    let second = share(&host);
    assert!(second < 0.2, "{second} of a CPU");
    host.casemate(["stop", "-t", "1", "hog"]).succeeds();
    host.casemate(["rm", "hog"]).succeeds();
    host.is_clean();
}

#[test]
fn memory_of_all_its_processes_is_bounded_on_the_host() {
    let host = Host::with_images();
    let options = ["--memory", "128m", "--memory-reservation", "64m"];
    let id = detached(&host, "box", &options, &["sleep", "100000"]);
    let max = || -> u64 {
        let text = fs::read_to_string(group(&id).join("memory.max")).expect("the group is there");
        text.trim().parse().expect("a number")
    };
    let booted = max();
    assert!((128 << 20..300 << 20).contains(&booted));
    assert_eq!(members(&id), numbers(vmm(&host)));
    // The guest has all of its memory in use, and is then given less: its VM lives on.
    let fill = "dd if=/dev/zero of=/file bs=1M count=90 2> /dev/null; cat /file > /dev/null";
    host.casemate(["exec", "box", "sh", "-c", fill]).succeeds();
    let less = [
        "update",
        "--memory",
        "64m",
        "--memory-reservation",
        "32m",
        "box",
    ];
    host.casemate(less).succeeds();
    assert_eq!(max(), booted);
    host.casemate([
        "exec",
        "box",
        "cat",
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory.low",
    ])
    .succeeds()
    .prints("67108864\n33554432\n");
    // Whoever looks after it is killed: the next command gives the group back.
    let shim = host.processes("containerd-shim-casemate-v2")[0];
    rustix::process::kill_process(shim, rustix::process::Signal::KILL).expect("it runs");
    host.casemate(["rm", "-f", "box"]).succeeds();
    assert!(!group(&id).exists());
    host.is_clean();
}

#[test]
fn container_without_limits_has_no_group_until_it_gets_one() {
    let host = Host::with_images();
    let id = detached(&host, "box", &[], &["sleep", "100000"]);
    assert!(!group(&id).exists());
    host.casemate(["update", "--cpus", "0.5", "box"]).succeeds();
    assert_eq!(members(&id), numbers(vmm(&host)));
    host.casemate(["stop", "-t", "0", "box"]).succeeds();
    assert!(!group(&id).exists());
    host.casemate(["rm", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn cpuset_is_where_its_threads_run() {
    let host = Host::with_images();
    let ours = status(rustix::process::getpid(), "Cpus_allowed_list");
    let last = ours.rsplit([',', '-']).next().expect("a CPU").to_owned();
    detached(
        &host,
        "box",
        &["--cpuset-cpus", &last],
        &["sleep", "100000"],
    );
    for process in vmm(&host) {
        assert_eq!(status(process, "Cpus_allowed_list"), last);
    }
    host.casemate(["exec", "box", "nproc"]).prints("1\n");
    host.casemate(["rm", "-f", "box"]).succeeds();
    host.run(["--cpuset-cpus", &last, "--cpus", "2", "busybox", "true"])
        .ends_with(125)
        .complains_of("only 1 CPUs available");
    host.is_clean();
}

#[test]
fn fork_bomb_reaches_its_limit_and_no_further() {
    let host = Host::with_images();
    let bomb = "bomb() { bomb | bomb & }; bomb; sleep 100000";
    detached(&host, "bomb", &["--pids-limit", "50"], &["sh", "-c", bomb]);
    host.run(["busybox", "echo", "a neighbour"])
        .succeeds()
        .prints("a neighbour\n");
    host.casemate(["kill", "bomb"]).succeeds();
    host.casemate(["rm", "-f", "bomb"]).succeeds();
    host.run([
        "--pids-limit",
        "50",
        "busybox",
        "cat",
        "/sys/fs/cgroup/pids.max",
    ])
    .prints("50\n");
    host.is_clean();
}

#[test]
fn ulimits_and_shm_are_as_asked_for() {
    let host = Host::with_images();
    let script = "ulimit -n; ulimit -Hn; df -k /dev/shm | awk 'NR == 2 { print $2 }'";
    let options = ["--ulimit", "nofile=100:200", "--shm-size", "2m"];
    host.run([&options[..], &["busybox", "sh", "-c", script]].concat())
        .succeeds()
        .prints("100\n200\n2048\n");
}

#[test]
fn memory_that_the_guest_frees_goes_back_to_the_host() {
    let host = Host::with_images();
    let script = "dd if=/dev/zero of=/dev/shm/big bs=1M count=64; echo full; read line; rm /dev/shm/big; echo freed; read line";
    let options = ["-i", "--memory", "256m", "--shm-size", "80m"];
    let mut run = host.start_run([&options[..], &["busybox", "sh", "-c", script]].concat());
    let resident = || -> u64 {
        let kib = |pid| status(pid, "VmRSS").split(' ').next()?.parse::<u64>().ok();
        vmm(&host).into_iter().filter_map(kib).sum()
    };
    run.prints("full");
    let full = resident();
    run.says("\n").prints("freed");
    // The guest reports what is free in its own time.
    let deadline = Instant::now() + Duration::from_secs(60);
    while resident() + (48 << 10) > full {
        assert!(
            Instant::now() < deadline,
            "{} KiB of {full} KiB",
            resident()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    run.says("\n").hangs_up();
    run.ends().succeeds();
    host.is_clean();
}

/// The block device that holds a directory.
fn device_of(dir: &std::path::Path) -> String {
    use std::os::unix::fs::MetadataExt;
    let dev = fs::metadata(dir).expect("it is there").dev();
    let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
    let event = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"));
    let event = event.expect("the tests' files are on a block device");
    let name = event.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    format!("/dev/{}", name.expect("a name"))
}

#[test]
fn disk_writes_keep_to_their_rate() {
    let host = Host::with_images();
    let limit = format!("{}:1m", device_of(&host.data()));
    let begun = Instant::now();
    let write = "dd if=/dev/zero of=/file bs=64k count=64 conv=fsync 2> /dev/null && echo done";
    host.run(["--device-write-bps", &limit, "busybox", "sh", "-c", write])
        .succeeds()
        .prints("done\n");
    // 4 MiB, of which the first second's are free.
    assert!(
        begun.elapsed() > Duration::from_secs(3),
        "{:?}",
        begun.elapsed()
    );
    host.run(["--device-write-bps", "/dev/loop0:1m", "busybox", "true"])
        .ends_with(125)
        .complains_of("--device-write-bps");
    host.is_clean();
}

#[test]
fn unprivileged_user_has_limits_and_power_inside() {
    let host = Host::with_images().of_user(65_534);
    let script = "cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max; mount -t tmpfs none /mnt && echo mounted";
    let options = [
        "--privileged",
        "--cpus",
        "0.5",
        "--memory",
        "64m",
        "--pids-limit",
        "9",
    ];
    host.run(
        [
            &options[..],
            &["busybox", "sh", "-c", &format!("mkdir /mnt; {script}")],
        ]
        .concat(),
    )
    .succeeds()
    .prints("50000 100000\n9\nmounted\n");
    host.is_clean();
}
