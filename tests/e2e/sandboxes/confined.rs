//! What a running VMM has of its host: nothing. (The confinement's own tests look closer.)

use std::fs;

use casemate_tests::Host;

#[test]
fn running_vmm_has_namespaces_of_its_own_no_rights_and_a_filter() {
    let host = Host::with_images();
    let mut sleeper = host.start_run(["busybox", "sh", "-c", "echo up; exec sleep 100000"]);
    sleeper.prints("up");
    let vmm = host
        .processes("casemate-vmm")
        .first()
        .expect("a VMM runs")
        .as_raw_nonzero();

    for kind in ["user", "mnt", "pid", "net", "ipc", "uts"] {
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_ne!(
            namespace(&vmm.to_string()),
            namespace("self"),
            "{kind} namespace is the host's"
        );
    }
    let root = format!("/proc/{vmm}/root/");
    let entries: Vec<_> = fs::read_dir(&root)
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    assert!(entries.is_empty(), "the VMM's root holds {entries:?}");
    for task in fs::read_dir(format!("/proc/{vmm}/task")).unwrap().flatten() {
        let status = fs::read_to_string(task.path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_else(|| panic!("no {name} in {status}"))
                .trim()
                .to_owned()
        };
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(set), "0000000000000000", "{set} of {}", field("Name"));
        }
        assert_eq!(field("NoNewPrivs"), "1", "{}", field("Name"));
        assert_eq!(field("Seccomp"), "2", "{}", field("Name"));
    }
    for fd in fs::read_dir(format!("/proc/{vmm}/fd")).unwrap().flatten() {
        let target = fs::read_link(fd.path()).unwrap();
        assert!(
            !target.is_dir(),
            "the VMM holds the directory {}",
            target.display()
        );
    }
}
