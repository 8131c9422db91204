//! The container has a kernel of its own, and next to no rights even there.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use casemate_tests::{Finished, Host};

#[test]
fn kernel_of_the_container_is_not_the_hosts() {
    let host = Host::with_images();
    let own = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let one = host.run(["busybox", "cat", "/proc/sys/kernel/random/boot_id"]);
    let two = host.run(["busybox", "cat", "/proc/sys/kernel/random/boot_id"]);
    assert_ne!(one.succeeds().text(), own);
    assert_ne!(
        one.text(),
        two.succeeds().text(),
        "two sandboxes had one kernel"
    );
}

#[test]
fn processes_of_the_container_are_not_on_the_host() {
    let host = Host::with_images();
    let mut sleeper = host.start_run(["busybox", "sh", "-c", "echo up; exec sleep 98765"]);
    sleeper.prints("up");
    let seen = fs::read_dir("/proc").unwrap().flatten().any(|process| {
        fs::read(process.path().join("cmdline")).is_ok_and(|line| line == b"sleep\x0098765\0")
    });
    assert!(!seen, "the workload is a process of the host");
    // One that holds the guest, one that waits for it.
    assert_eq!(host.processes("casemate-vmm").len(), 2);
}

#[test]
fn random_numbers_differ_between_sandboxes() {
    let host = Host::with_images();
    let draw = || {
        host.run(["busybox", "sh", "-c", "head -c 32 /dev/urandom | sha256sum"])
            .succeeds()
            .word()
    };
    assert_ne!(draw(), draw());
}

#[test]
fn clock_of_the_container_is_the_hosts() {
    let host = Host::with_images();
    let before = now();
    let inside: u64 = host
        .run(["busybox", "date", "+%s"])
        .succeeds()
        .word()
        .parse()
        .unwrap();
    assert!(
        (before..=now()).contains(&inside),
        "{inside} is not between {before} and {}",
        now()
    );
}

fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap_or(Duration::ZERO).as_secs()
}

fn status(out: &Finished) -> BTreeMap<String, String> {
    let text = out.succeeds().text();
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs
        .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
        .collect()
}

/// The fourteen that Docker leaves a container: chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap,
/// net_bind_service, net_raw, sys_chroot, mknod, audit_write, setfcap.
const DOCKERS: &str = "00000000a80425fb";

#[test]
fn capabilities_are_dockers_fourteen() {
    let host = Host::with_images();
    let status = status(&host.run(["busybox", "cat", "/proc/self/status"]));
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(status[set], DOCKERS, "{set}");
    }
    assert_eq!(status["CapAmb"], "0000000000000000");
}

#[test]
fn capabilities_are_added_and_dropped_as_asked() {
    let host = Host::with_images();
    let bounding = |options: &[&str]| {
        let args = options
            .iter()
            .copied()
            .chain(["busybox", "cat", "/proc/self/status"]);
        status(&host.run(args))["CapBnd"].clone()
    };
    assert_eq!(bounding(&["--cap-drop", "ALL"]), "0000000000000000");
    assert_eq!(
        bounding(&["--cap-drop", "ALL", "--cap-add", "CAP_CHOWN"]),
        "0000000000000001"
    );
    assert_eq!(bounding(&["--cap-add", "net_admin"]), "00000000a80435fb");
    assert_eq!(bounding(&["--cap-drop", "NET_RAW"]), "00000000a80405fb");
    assert_eq!(bounding(&["--cap-add", "all"]), "000001ffffffffff");
}

#[test]
fn capability_that_does_not_exist_is_named() {
    let host = Host::with_images();
    host.run(["--cap-add", "CAP_FLY", "busybox", "true"])
        .fails()
        .complains_of("FLY");
    host.is_clean();
}

#[test]
fn unprivileged_user_in_the_container_has_no_capabilities() {
    let host = Host::with_images();
    let status = status(&host.run(["-u", "1000", "busybox", "cat", "/proc/self/status"]));
    assert_eq!(status["CapEff"], "0000000000000000");
}

#[test]
fn sensitive_files_of_proc_are_masked_or_read_only() {
    let host = Host::with_images();
    host.script("wc -c < /proc/kcore; ls /proc/scsi 2>/dev/null | wc -l")
        .succeeds();
    host.script("echo 1 > /proc/sys/kernel/sysrq").fails();
    host.script("echo b > /proc/sysrq-trigger").fails();
    host.script("mount -t tmpfs tmpfs /mnt 2>&1 || mkdir /x && mount -t tmpfs tmpfs /x")
        .fails();
    host.script("mknod /disk b 254 0 && cat /disk > /dev/null")
        .fails();
}

#[test]
fn devices_of_the_container_are_the_harmless_ones() {
    let host = Host::with_images();
    let out = host.script("for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done; ls /dev/vda");
    assert_eq!(out.text(), "", "{}", out.stderr_text());
    out.fails();
}
