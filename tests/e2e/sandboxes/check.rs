//! `casemate check` names what a host lacks and how to mend it, in each state that it knows.

use std::process::Command;

use casemate_tests::{Finished, Host, Running, paths};
use serde_json::Value;

/// Neither root nor anybody in /etc/passwd.
const SOMEBODY: &str = "61234";

/// What a processor says of itself, for printf.
fn cpuinfo(flags: &str) -> String {
    format!(r"processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu sse2 {flags}\n")
}

/// `casemate check` in a mount namespace that a shell script changed before; `$0` is the program.
fn check_after(host: &Host, changes: &str, check: &str) -> Finished {
    let script = format!("set -e\n{changes}\nexec {check}");
    let mut command = Command::new("unshare");
    host.prepare(&mut command);
    command
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .arg(paths::casemate());
    Running::start(command).ends()
}

/// A machine with these flags of its processor, these modules and this in its /dev.
fn machine(flags: &str, modules: &[&str], device: &str) -> String {
    let mut script = format!(
        "printf '{}' > cpuinfo; mount --bind cpuinfo /proc/cpuinfo\n\
         mount -t tmpfs none /sys/module\nmount -t tmpfs none /dev\n{device}\n",
        cpuinfo(flags)
    );
    for module in modules {
        script += &format!("mkdir /sys/module/{module}\n");
    }
    script
}

#[test]
fn host_that_runs_guests_is_told_to_be_well() {
    let host = Host::new();
    host.casemate(["check"]).succeeds().mentions("KVM");
    host.casemate(["check", "--quiet"]).succeeds().prints("");
    let document = host
        .casemate(["check", "--format", "json"])
        .succeeds()
        .text();
    let document: Value = serde_json::from_str(&document).unwrap();
    assert_eq!(document["Ok"], true, "{document}");
    assert!(
        document["Checks"]
            .as_array()
            .is_some_and(|checks| checks.len() >= 7),
        "{document}"
    );
    host.casemate(["check", "--format", "{{.Check}}={{.Result}}"])
        .succeeds()
        .mentions("guest kernel=ok\n");
    host.casemate(["check", "--format", "table"])
        .succeeds()
        .mentions("CHECK")
        .mentions("MEND");
}

#[test]
fn host_without_a_usable_kvm_is_told_what_is_missing_and_how_to_mend_it() {
    const NODE: &str = "mknod -m 666 /dev/kvm c 10 232";
    for (state, changes, told) in [
        (
            "no device, KVM loaded",
            machine("svm", &["kvm_amd"], ""),
            [
                "/dev/kvm does not exist, though KVM is loaded",
                "--device /dev/kvm",
            ],
        ),
        (
            "KVM not loaded, or locked by the firmware",
            machine("svm", &[], ""),
            ["KVM is not loaded", "modprobe kvm_amd"],
        ),
        (
            "virtualization off in the BIOS",
            machine("", &[], ""),
            ["the processor offers no virtualization", "(BIOS)"],
        ),
        (
            "nested virtualization off",
            machine("hypervisor", &[], ""),
            ["without nested virtualization", "kvm_amd.nested=1"],
        ),
        (
            "another device in its place",
            machine("svm", &["kvm_amd"], "mknod -m 666 /dev/kvm c 1 3"),
            ["API version", "Update the host's kernel"],
        ),
    ] {
        let host = Host::new();
        let out = check_after(&host, &changes, "\"$0\" check");
        assert_eq!(out.code(), 1, "{state}: {}", out.text());
        for part in told {
            assert!(
                out.text().contains(part),
                "{state}: no {part:?} in {}",
                out.text()
            );
        }
        check_after(&host, &changes, "\"$0\" check --quiet")
            .ends_with(1)
            .is_silent()
            .prints("");
    }
    // The same machine with its device is well: the tests above change what they say they do.
    let host = Host::new();
    check_after(&host, &machine("svm", &["kvm_amd"], NODE), "\"$0\" check").succeeds();
}

#[test]
fn user_without_permission_is_told_the_group() {
    let host = Host::new();
    let changes = machine("svm", &["kvm_amd"], "mknod -m 600 /dev/kvm c 10 232");
    let user = format!("setpriv --reuid {SOMEBODY} --regid {SOMEBODY} --clear-groups \"$0\" check");
    check_after(&host, &changes, &user)
        .ends_with(1)
        .mentions("/dev/kvm may not be opened by this user")
        .mentions("usermod -aG kvm");
}

#[test]
fn kvm_that_is_there_but_cannot_run_a_guest_is_told_so() {
    // What emulates a processor badly fails in a vCPU: so does every call on one here.
    let host = Host::new();
    let failing =
        "strace -f -qq -o trace -P anon_inode:kvm-vcpu:0 -e inject=ioctl:error=EIO \"$0\" check";
    check_after(
        &host,
        &machine("svm", &["kvm_amd"], "mknod -m 666 /dev/kvm c 10 232"),
        failing,
    )
    .ends_with(1)
    .mentions("does not run a normal guest")
    .mentions("Update the host's kernel and the firmware");
    check_after(
        &host,
        &machine(
            "svm hypervisor",
            &["kvm_amd"],
            "mknod -m 666 /dev/kvm c 10 232",
        ),
        failing,
    )
    .ends_with(1)
    .mentions("check nested virtualization there");
}

#[test]
fn installation_with_something_missing_is_told_the_file() {
    for key in ["kernel", "initrd", "vmm", "shim"] {
        let host = Host::new().configured(&format!("{key} = \"/no/such/{key}\"\n"));
        host.casemate(["check"])
            .ends_with(1)
            .mentions(&format!("/no/such/{key}"))
            .mentions("install casemate again");
    }
    Host::new()
        .configured("kvm = \"/no/such/kvm\"\n")
        .casemate(["check"])
        .ends_with(1)
        .mentions("/no/such/kvm does not exist")
        .mentions("correct the configuration");
    let host = Host::new();
    let mut command = host.command(["check"]);
    command.env("CASEMATE_DATA", "/proc/no/such");
    Running::start(command)
        .ends()
        .ends_with(1)
        .mentions("/proc/no/such")
        .mentions("CASEMATE_DATA");
}
