//! The root file system: writable but private, bounded, or read-only.

use casemate_tests::Host;

#[test]
fn writes_stay_in_the_sandbox_that_made_them() {
    let host = Host::with_images();
    host.script("echo mine > /etc/passwd; rm /bin/vi; cat /etc/passwd; ls /bin/vi")
        .ends_with(1)
        .prints("mine\n");
    host.script("head -1 /etc/passwd; ls /bin/vi")
        .succeeds()
        .prints("root:x:0:0:root:/root:/bin/sh\n/bin/vi\n");
    host.is_clean();
}

#[test]
fn disk_that_is_full_says_so_and_harms_nothing_else() {
    let host = Host::with_images();
    let script =
        "dd if=/dev/zero of=/fill bs=1M count=500; echo dd $?; rm /fill; echo again > /x && cat /x";
    let out = host.run(["--storage-size", "64m", "busybox", "sh", "-c", script]);
    out.succeeds()
        .prints("dd 1\nagain\n")
        .complains_of("no space left");
    // A second sandbox on the same host has all of its own.
    host.script("dd if=/dev/zero of=/fill bs=1M count=20 2>/dev/null; echo $?")
        .succeeds()
        .prints("0\n");
    host.is_clean();
}

#[test]
fn read_only_root_refuses_writes_but_tmpfs_takes_them() {
    let host = Host::with_images();
    host.run(["--read-only", "busybox", "sh", "-c", "echo x > /file"])
        .fails()
        .complains_of("read-only file system");
    let script = "echo ok > /run/here && cat /run/here; grep ' /run ' /proc/mounts";
    let out = host.run([
        "--read-only",
        "--tmpfs",
        "/run:size=1m,mode=700",
        "busybox",
        "sh",
        "-c",
        script,
    ]);
    out.succeeds()
        .mentions("ok\n")
        .mentions("size=1024k")
        .mentions("mode=700");
    host.is_clean();
}

#[test]
fn tmpfs_ends_at_its_size() {
    let host = Host::with_images();
    let script = "dd if=/dev/zero of=/cache/x bs=1M count=8; echo $?";
    let out = host.run(["--tmpfs", "/cache:size=2m", "busybox", "sh", "-c", script]);
    out.succeeds().prints("1\n").complains_of("no space left");
}

#[test]
fn usual_mounts_are_there() {
    let host = Host::with_images();
    let out = host.script("cut -d' ' -f2,3 /proc/mounts");
    out.succeeds();
    for mount in [
        "/ overlay",
        "/proc proc",
        "/dev tmpfs",
        "/dev/pts devpts",
        "/dev/shm tmpfs",
        "/sys sysfs",
    ] {
        assert!(
            out.text().lines().any(|line| line == mount),
            "no {mount:?} in\n{}",
            out.text()
        );
    }
}

#[test]
fn shared_memory_is_writable() {
    let host = Host::with_images();
    host.script("echo x > /dev/shm/x && stat -c %a /dev/shm")
        .succeeds()
        .prints("1777\n");
}
