//! Guests that do not start, do not answer, or end in ways of their own.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use casemate_tests::{Host, paths};

/// A guest that ends by itself has as long as every other.
fn with_initrd(name: &str) -> Host {
    let initrd = paths::fixtures().join(format!("initrd-{name}.cpio"));
    Host::with_images().configured(&format!("initrd = \"{}\"\n", initrd.display()))
}

/// A guest that does not end has to be given up.
fn with_silent_initrd(name: &str) -> Host {
    let initrd = paths::fixtures().join(format!("initrd-{name}.cpio"));
    Host::with_images().configured(&format!(
        "initrd = \"{}\"\nstart_timeout = 15\n",
        initrd.display()
    ))
}

fn with_file(key: &str, content: &[u8]) -> Host {
    let host = Host::with_images();
    let file = host.dir().join("broken");
    fs::write(&file, content).unwrap();
    host.configured(&format!(
        "{key} = \"{}\"\nstart_timeout = 20\n",
        file.display()
    ))
}

fn installed(name: &str) -> Vec<u8> {
    let file = Path::new("share/casemate").join(name);
    fs::read(paths::prefix().join(file)).unwrap()
}

#[test]
fn guest_that_never_answers_is_given_up_with_its_last_words() {
    for (name, last_words) in [("silent", "nothing to say"), ("halts", "System halted")] {
        let host = with_silent_initrd(name);
        let run = host
            .start_run(["busybox", "true"])
            .within(Duration::from_secs(60));
        run.ends()
            .ends_with(125)
            .complains_of("answer")
            .complains_of("15s")
            .complains_of("the guest's last lines")
            .complains_of(last_words);
        host.is_clean();
    }
}

#[test]
fn guest_that_panics_says_so() {
    let host = with_initrd("ends");
    let out = host.run(["busybox", "true"]);
    out.ends_with(125)
        .complains_of("panic")
        .complains_of("the guest's last lines")
        .complains_of("Attempted to kill init! exitcode=0x00000700");
    host.is_clean();
}

#[test]
fn guest_that_resets_before_it_answers_is_an_error_with_its_last_words() {
    let host = with_initrd("resets");
    host.run(["busybox", "true"])
        .ends_with(125)
        .complains_of("reset")
        .complains_of("the guest's last lines")
        .complains_of("Restarting system");
    host.is_clean();
}

#[test]
fn guest_that_powers_off_before_it_answers_is_an_error_with_its_last_words() {
    let host = with_initrd("powers-off");
    host.run(["busybox", "true"])
        .ends_with(125)
        .complains_of("the guest powered off")
        .complains_of("the guest's last lines")
        .complains_of("going down");
    host.is_clean();
}

#[test]
fn guest_out_of_memory_says_so() {
    let host = with_initrd("hogs");
    host.run(["--memory", "64m", "busybox", "true"])
        .ends_with(125)
        .complains_of("the guest's last lines")
        .complains_of("deadlocked on memory");
    host.is_clean();
}

#[test]
fn kernel_that_is_no_kernel_is_refused() {
    for (content, what) in [
        (&b""[..], "empty"),
        (b"#!/bin/sh\n", "script"),
        (&[0x7f; 100_000], "noise"),
    ] {
        let host = with_file("kernel", content);
        let out = host.run(["busybox", "true"]);
        assert_eq!(out.code(), 125, "{what}: {}", out.stderr_text());
        out.complains_of("kernel");
        host.is_clean();
    }
}

#[test]
fn kernel_cut_short_or_scribbled_over_fails_within_bounds() {
    let kernel = installed("vmlinux");
    let host = with_file("kernel", &kernel[..kernel.len() / 2]);
    host.run(["busybox", "true"]).ends_with(125).fails();
    host.is_clean();

    let mut scribbled = kernel;
    let middle = scribbled.len() / 4;
    scribbled[middle..middle + (1 << 20)].fill(0xcc);
    let host = with_file("kernel", &scribbled);
    host.start_run(["busybox", "true"])
        .within(Duration::from_secs(60))
        .ends()
        .ends_with(125)
        .fails();
    host.is_clean();
}

#[test]
fn initrd_that_is_none_fails_within_bounds() {
    let host = with_file("initrd", &[0x55; 50_000]);
    let run = host
        .start_run(["busybox", "true"])
        .within(Duration::from_secs(60));
    run.ends().ends_with(125).fails();
    host.is_clean();

    let initrd = installed("initrd.cpio");
    let host = with_file("initrd", &initrd[..initrd.len() / 2]);
    let run = host
        .start_run(["busybox", "true"])
        .within(Duration::from_secs(60));
    run.ends().ends_with(125).fails();
    host.is_clean();
}

#[test]
fn kernel_or_vmm_that_is_missing_is_named() {
    for key in ["kernel", "initrd", "vmm"] {
        let host = Host::with_images().configured(&format!("{key} = \"/no/such/{key}\"\n"));
        host.run(["busybox", "true"])
            .ends_with(125)
            .complains_of(&format!("/no/such/{key}"));
        host.is_clean();
    }
}

#[test]
fn kvm_that_cannot_be_had_is_named_with_the_way_to_learn_more() {
    let host = Host::with_images().of_user(61_234);
    let locked = host.dir().join("kvm");
    fs::write(&locked, "").unwrap();
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o600)).unwrap();
    let mut host = host;
    for kvm in [Path::new("/no/such/kvm"), &locked] {
        host = host.configured(&format!("kvm = \"{}\"\n", kvm.display()));
        host.run(["busybox", "true"])
            .ends_with(125)
            .complains_of(&kvm.to_string_lossy())
            .complains_of("casemate check");
        host.is_clean();
    }
    // A device that is none of KVM's.
    let host = host.configured("kvm = \"/dev/zero\"\n");
    host.run(["busybox", "true"])
        .ends_with(125)
        .complains_of("KVM");
    host.is_clean();
}

#[test]
fn workload_that_reboots_or_crashes_its_kernel_harms_only_itself() {
    let host = Host::with_images();
    let out = host.run([
        "--cap-add",
        "all",
        "busybox",
        "sh",
        "-c",
        "reboot -f; sleep 1000",
    ]);
    assert_ne!(out.code(), 0, "{}", out.stderr_text());
    host.is_clean();
    host.script("echo still fine")
        .succeeds()
        .prints("still fine\n");
}
