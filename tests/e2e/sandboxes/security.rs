//! How much power a container has inside its VM.

use casemate_tests::Host;
use std::fs;

#[test]
fn default_profile_filters_and_unconfined_does_not() {
    let host = Host::with_images();
    let script = "grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status";
    host.run(["busybox", "sh", "-c", script])
        .prints("NoNewPrivs:\t0\nSeccomp:\t2\n");
    let options = [
        "--security-opt",
        "seccomp=unconfined",
        "--security-opt",
        "no-new-privileges",
    ];
    host.run([&options[..], &["busybox", "sh", "-c", script]].concat())
        .prints("NoNewPrivs:\t1\nSeccomp:\t0\n");
    host.run(["busybox", "sh", "-c", "unshare -U true; echo $?"])
        .complains_of("Operation not permitted")
        .prints("1\n");
    host.run([
        "--security-opt",
        "seccomp=unconfined",
        "busybox",
        "unshare",
        "-U",
        "true",
    ])
    .succeeds();
    // An added process has the same filter.
    host.casemate(["run", "-d", "--name", "box", "busybox", "sleep", "100000"])
        .succeeds();
    host.casemate(["exec", "box", "sh", "-c", script])
        .prints("NoNewPrivs:\t0\nSeccomp:\t2\n");
    host.casemate(["rm", "-f", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn profile_in_a_file_is_applied() {
    let host = Host::with_images();
    let file = host.dir().join("profile.json");
    let profile = r#"{"defaultAction": "SCMP_ACT_ALLOW", "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": []}],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 30},
                     {"names": ["rmdir"], "action": "SCMP_ACT_ERRNO", "includes": {"caps": ["CAP_SYS_ADMIN"]}}]}"#;
    fs::write(&file, profile).expect("written");
    let option = format!("seccomp={}", file.display());
    host.run([
        "--security-opt",
        &option,
        "busybox",
        "sh",
        "-c",
        "mkdir /x; rmdir /srv /nothing",
    ])
    .complains_of("'/x': Read-only file system")
    .complains_of("No such file");
    fs::write(&file, "{\"defaultAction\": \"SCMP_ACT_SING\"}").expect("written");
    host.run(["--security-opt", &option, "busybox", "true"])
        .ends_with(125)
        .complains_of("profile.json");
    host.is_clean();
}

#[test]
fn privileged_has_the_guest_and_nothing_of_the_host() {
    let host = Host::with_images();
    let script = "awk '/^CapEff/ { print $2 }' /proc/self/status; grep Seccomp: /proc/self/status
        mkdir /m && mount -t tmpfs none /m && echo mounted
        echo 1 > /proc/sys/vm/overcommit_memory && echo written
        mkdir /sys/fs/cgroup/mine && echo grouped
        test -b /dev/vda && test -c /dev/fuse && test -c /dev/null && echo devices
        ls /dev/pts/ptmx";
    host.run(["--privileged", "busybox", "sh", "-c", script])
        .succeeds()
        .prints(
            "000001ffffffffff\nSeccomp:\t0\nmounted\nwritten\ngrouped\ndevices\n/dev/pts/ptmx\n",
        );
    host.run(["--privileged", "-u", "65534", "busybox", "id", "-u"])
        .prints("65534\n");
    // Its root may do to its kernel what it likes: the host's is another.
    let mine = fs::read_to_string("/proc/sys/kernel/panic").expect("read");
    host.run([
        "--privileged",
        "busybox",
        "sh",
        "-c",
        "echo 77 > /proc/sys/kernel/panic",
    ])
    .succeeds();
    assert_eq!(
        fs::read_to_string("/proc/sys/kernel/panic").expect("read"),
        mine
    );
    host.is_clean();
}

#[test]
fn exec_goes_on_where_the_container_has_groups_of_its_own() {
    let host = Host::with_images();
    let script = "cd /sys/fs/cgroup; mkdir first; echo 1 > first/cgroup.procs
        echo +pids > cgroup.subtree_control && echo ready; exec sleep 100000";
    let mut run = host.start_run([
        "--privileged",
        "--name",
        "box",
        "busybox",
        "sh",
        "-c",
        script,
    ]);
    run.prints("ready");
    host.casemate(["exec", "box", "cat", "/proc/self/cgroup"])
        .succeeds()
        .prints("0::/first\n");
    host.casemate(["rm", "-f", "box"]).succeeds();
    run.ends();
    host.is_clean();
}

#[test]
fn user_namespace_of_its_own_keeps_files_and_loses_the_kernel() {
    let host = Host::with_images();
    let script = "id -u; tr -s ' ' < /proc/self/uid_map; echo x > /file && stat -c %u /file
        mknod /node b 254 0 || echo refused; test -d /sys/class && test -f /sys/fs/cgroup/pids.max && echo sys";
    let options = [
        "--userns",
        "private",
        "--security-opt",
        "systempaths=unconfined",
        "--cap-add",
        "ALL",
    ];
    host.run([&options[..], &["busybox", "sh", "-c", script]].concat())
        .prints("0\n 0 0 4294967295\n0\nrefused\nsys\n");
    host.is_clean();
}
