//! No free disk on the host: an error that says so, nothing left behind, and all is well once there is room.

use std::fs;

use casemate_tests::{Host, Registry, SmallDisk, paths};

fn load_busybox(host: &Host) {
    let archive = paths::fixtures().join("busybox.tar");
    host.casemate(["load", "-i", &archive.to_string_lossy()])
        .succeeds();
}

#[test]
fn pull_onto_a_full_disk_says_so_and_goes_on_once_there_is_room() {
    let host = Host::new();
    let disk = SmallDisk::on(&host.data(), "4m");
    let registry = Registry::of_fixtures();
    let image = registry.name("museum");

    let out = host.casemate(["pull", &image]);

    out.fails()
        .complains_of("no space left")
        .complains_of(&host.data().to_string_lossy());
    host.casemate(["images", "-q"]).succeeds().prints("");
    host.run([&image, "true"])
        .ends_with(125)
        .complains_of("no space left");
    host.is_clean();
    disk.grows_to("100m");
    host.casemate(["pull", &image]).succeeds();
    host.casemate(["inspect", &image]).succeeds();
}

#[test]
fn load_onto_a_full_disk_says_so_and_leaves_nothing() {
    let host = Host::new();
    let disk = SmallDisk::on(&host.data(), "2m");
    let archive = paths::fixtures().join("museum.tar");
    host.casemate(["load", "-i", &archive.to_string_lossy()])
        .fails()
        .complains_of("no space left");
    host.casemate(["images", "-q"]).succeeds().prints("");
    host.is_clean();
    disk.grows_to("100m");
    load_busybox(&host);
}

#[test]
fn run_on_a_full_disk_says_so_and_leaves_nothing() {
    let host = Host::new();
    let disk = SmallDisk::on(&host.data(), "64m");
    load_busybox(&host);
    for templates in ["not yet made", "made"] {
        let filler = disk.fills_up();
        let out = host.run(["busybox", "true"]);
        assert_eq!(
            out.code(),
            125,
            "template {templates}: {}",
            out.stderr_text()
        );
        out.complains_of("no space left");
        host.is_clean();
        fs::remove_file(filler).unwrap();
        host.script("echo room").succeeds().prints("room\n");
    }
    host.is_clean();
}

#[test]
fn run_with_a_full_state_directory_says_so_and_leaves_nothing() {
    let host = Host::with_images();
    host.script("true").succeeds();
    let disk = SmallDisk::on(&host.state(), "1m");
    let filler = disk.fills_up();
    host.run(["busybox", "true"])
        .ends_with(125)
        .complains_of("no space left")
        .complains_of(&host.state().to_string_lossy());
    host.is_clean();
    fs::remove_file(filler).unwrap();
    host.script("echo room").succeeds().prints("room\n");
    host.is_clean();
}

#[test]
fn workload_that_fills_the_hosts_disk_gets_an_error_and_the_sandbox_lives_on() {
    let host = Host::new();
    let _disk = SmallDisk::on(&host.data(), "48m");
    load_busybox(&host);
    let script = "dd if=/dev/zero of=/fill bs=1M count=100 conv=fsync 2>/dev/null; echo dd $?; \
                  cat /etc/hostname >/dev/null && echo alive; exit 5";
    let out = host.run(["--storage-size", "1g", "busybox", "sh", "-c", script]);
    out.ends_with(5).prints("dd 1\nalive\n");
    host.is_clean();
    host.script("echo next").succeeds().prints("next\n");
}
