//! A user with access to /dev/kvm and nothing else runs everything.

use std::fs;
use std::os::unix::fs::MetadataExt;

use casemate_tests::{Host, Registry};

/// Neither root nor anybody in /etc/passwd.
const SOMEBODY: u32 = 61_234;

#[test]
fn unprivileged_user_pulls_runs_and_removes() {
    let host = Host::new().of_user(SOMEBODY);
    let registry = Registry::of_fixtures();
    let image = registry.name("busybox");
    host.casemate(["pull", &image]).succeeds();
    host.run([
        &image,
        "sh",
        "-c",
        "id -u; echo x > /file; cat /file; exit 3",
    ])
    .ends_with(3)
    .prints("0\nx\n");
    host.casemate(["rmi", &image]).succeeds();
    host.is_clean();
}

#[test]
fn unprivileged_user_needs_no_option_no_variable_and_no_further_ids() {
    let subids =
        ["/etc/subuid", "/etc/subgid"].map(|file| fs::read_to_string(file).unwrap_or_default());
    assert!(
        !subids.concat().contains(&SOMEBODY.to_string()),
        "{subids:?}"
    );
    let host = Host::new().in_the_users_places().of_user(SOMEBODY);
    let registry = Registry::of_fixtures();
    let image = registry.name("museum");

    let script = "chown 7:8 /tmp && stat -c %u:%g /tmp /museum/twin-1; id -u; exit 3";
    host.run([&image, "sh", "-c", script])
        .ends_with(3)
        .prints("7:8\n7:8\n0\n");

    host.is_clean();
    for dir in [host.state(), host.data()] {
        let meta = fs::metadata(&dir).unwrap();
        assert_eq!(
            (meta.uid(), meta.mode() & 0o7777),
            (SOMEBODY, 0o700),
            "{}",
            dir.display()
        );
    }
    host.casemate(["check"]).succeeds();
    host.casemate(["rmi", &image]).succeeds();
}

#[test]
fn unprivileged_user_has_owners_devices_and_attributes_in_the_image() {
    let host = Host::with_images().of_user(SOMEBODY);
    let out = host.run([
        "museum",
        "sh",
        "-c",
        "cd museum; stat -c %u:%g twin-1; ls -l null; echo > null && echo wrote",
    ]);
    out.succeeds()
        .mentions("7:8\n")
        .mentions("1,   3")
        .mentions("wrote\n");
}

#[test]
fn unprivileged_user_has_pipes_and_signals() {
    let host = Host::with_images().of_user(SOMEBODY);
    let mut cat = host.start_run(["-i", "busybox", "cat"]);
    cat.says("hi\n");
    cat.ends().succeeds().prints("hi\n");
    let mut sleeper = host.start_run([
        "busybox",
        "sh",
        "-c",
        "trap 'exit 4' TERM; echo up; while :; do sleep 0.1; done",
    ]);
    sleeper.prints("up").gets(rustix::process::Signal::TERM);
    sleeper.ends().ends_with(4);
    host.is_clean();
}

#[test]
fn unprivileged_users_vmm_runs_as_that_user() {
    let host = Host::with_images().of_user(SOMEBODY);
    let mut sleeper = host.start_run(["busybox", "sh", "-c", "echo up; exec sleep 100000"]);
    sleeper.prints("up");
    for name in ["casemate-vmm", "containerd-shim-casemate-v2"] {
        for pid in host.processes(name) {
            let status =
                fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap();
            let uid = status
                .lines()
                .find(|line| line.starts_with("Uid:"))
                .unwrap();
            assert!(
                !uid.split_whitespace().skip(1).any(|uid| uid == "0"),
                "{name}: {uid}"
            );
        }
    }
}
