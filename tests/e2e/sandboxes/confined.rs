//! What the processes of a running VMM have of their host: nothing. (`vmm/tests/confine` looks closer still, and
//! at every way to be started.)

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use casemate_tests::{Host, Running};
use rustix::process::{Pid, Signal, kill_process};

/// Neither root nor anybody in /etc/passwd.
const SOMEBODY: u32 = 61_234;
/// What a VMM that root started becomes.
const NOBODY: u32 = 0x7000_0000;

/// A container that stays, and the processes of its VMM.
struct Confined {
    _run: Running,
    /// Holds the guest.
    vmm: u32,
    /// Stands for it outside its PID namespace.
    waiter: u32,
}

fn start(host: &Host) -> Confined {
    let mut run = host.start_run([
        "--cpus",
        "2",
        "busybox",
        "sh",
        "-c",
        "echo up; exec sleep 100000",
    ]);
    run.prints("up");
    let pids: Vec<u32> = host
        .processes("casemate-vmm")
        .into_iter()
        .map(|pid| pid.as_raw_nonzero().get() as u32)
        .collect();
    // The one that is PID 1 of a namespace below the host's.
    let (vmms, waiters): (Vec<_>, Vec<_>) = pids
        .iter()
        .partition(|pid| status(Path::new(&format!("/proc/{pid}")), "NSpid").ends_with("\t1"));
    assert_eq!((vmms.len(), waiters.len()), (1, 1), "of {pids:?}");
    Confined {
        _run: run,
        vmm: vmms[0],
        waiter: waiters[0],
    }
}

/// A field of a process's or thread's status.
fn status(process: &Path, field: &str) -> String {
    let status = fs::read_to_string(process.join("status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {field} in {status}"))
        .trim()
        .to_owned()
}

fn threads(pid: u32) -> Vec<std::path::PathBuf> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.map(|task| task.unwrap().path()).collect()
}

/// Namespaces, root, privileges and limits of one process; `uid` is who it is on the host.
fn assert_confined(pid: u32, uid: u32, pid_namespace: &str) {
    let proc = Path::new("/proc").join(pid.to_string());
    let own = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
    for kind in ["user", "mnt", "net", "ipc", "uts", "cgroup", pid_namespace] {
        assert_ne!(
            fs::read_link(proc.join("ns").join(kind)).unwrap(),
            own(kind),
            "{kind} namespace of {pid} is the host's"
        );
    }
    let ids = format!("{uid}\t{uid}\t{uid}\t{uid}");
    assert_eq!(
        (status(&proc, "Uid"), status(&proc, "Gid")),
        (ids.clone(), ids)
    );
    assert_eq!(status(&proc, "Groups"), "");
    for map in ["uid_map", "gid_map"] {
        assert_eq!(fs::read_to_string(proc.join(map)).unwrap(), "", "{map}");
    }
    let entries: Vec<_> = fs::read_dir(proc.join("root/")).unwrap().collect();
    assert!(entries.is_empty(), "the root of {pid} holds {entries:?}");
    let mounts = fs::read_to_string(proc.join("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(
        mounts.contains(" / ro,nosuid,nodev,noexec,") && mounts.contains(" - tmpfs "),
        "{mounts}"
    );
    let devices = fs::read_to_string(proc.join("net/dev")).unwrap();
    let devices: Vec<_> = devices
        .lines()
        .filter_map(|line| Some(line.split_once(':')?.0.trim()))
        .collect();
    assert_eq!(devices, ["lo"]);
    for thread in threads(pid) {
        let name = status(&thread, "Name");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status(&thread, set), "0000000000000000", "{set} of {name}");
        }
        assert_eq!(status(&thread, "NoNewPrivs"), "1", "{name}");
        // A filter, and not the strict mode.
        assert_eq!(status(&thread, "Seccomp"), "2", "{name}");
    }
    let limits = fs::read_to_string(proc.join("limits")).unwrap();
    for limit in [
        "Max core file size",
        "Max locked memory",
        "Max msgqueue size",
        "Max nice priority",
        "Max realtime priority",
    ] {
        assert_eq!(soft_and_hard(&limits, limit), [0, 0], "{limit} of {pid}");
    }
    let [soft, hard] = soft_and_hard(&limits, "Max open files");
    // As many as its devices and the most connections of a vsock device can need.
    assert!(soft == hard && hard <= 640, "{hard} open files for {pid}");
}

fn soft_and_hard(limits: &str, name: &str) -> [u64; 2] {
    let line = limits.lines().find_map(|line| line.strip_prefix(name));
    let words = line
        .unwrap_or_else(|| panic!("no {name} in {limits}"))
        .split_whitespace();
    let numbers: Vec<u64> = words.map_while(|word| word.parse().ok()).collect();
    [numbers[0], numbers[1]]
}

/// What the VMM holds: anonymous objects, and of files only those that its configuration named.
fn assert_descriptors(host: &Host, vmm: u32) {
    let mut seen = BTreeSet::new();
    for fd in fs::read_dir(format!("/proc/{vmm}/fd")).unwrap() {
        let fd = fd.unwrap();
        let target = fs::read_link(fd.path()).unwrap();
        let target = target.to_string_lossy();
        let info = format!("/proc/{vmm}/fdinfo/{}", fd.file_name().to_string_lossy());
        let info = fs::read_to_string(info).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = u32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
        let writable = flags & 0b11 != 0;
        let inside = |dir: &str| target.starts_with(&*host.data().join(dir).to_string_lossy());
        let kind = match &*target {
            "/dev/null" | "/dev/kvm" => target.to_string(),
            _ if inside("scratch") => "the scratch disk".into(),
            _ if inside("") && !writable => "a layer, read-only".into(),
            "/memfd:vmm-stderr (deleted)" => "its last words, bounded".into(),
            _ => match target.split_once(':') {
                Some((kind @ ("socket" | "pipe"), _)) => kind.into(),
                Some(("anon_inode", kind)) => kind.to_owned(),
                _ => panic!("the VMM holds {target} (flags {flags:o})"),
            },
        };
        seen.insert(kind);
    }
    for kind in ["a layer, read-only", "the scratch disk", "socket", "kvm-vm"] {
        assert!(seen.contains(kind), "no {kind} among {seen:?}");
    }
}

#[test]
fn processes_of_a_running_vmm_have_nothing_of_the_host() {
    let host = Host::with_images();
    let confined = start(&host);

    assert_confined(confined.vmm, NOBODY, "pid");
    assert_confined(confined.waiter, NOBODY, "pid_for_children");
    assert_descriptors(&host, confined.vmm);
    let limits = fs::read_to_string(format!("/proc/{}/limits", confined.vmm)).unwrap();
    assert_eq!(soft_and_hard(&limits, "Max processes"), [0, 0]);
    assert_eq!(
        fs::read_dir(format!("/proc/{}/fd", confined.waiter))
            .unwrap()
            .count(),
        0,
        "descriptors of the process that waits"
    );
    let names: BTreeSet<_> = threads(confined.vmm)
        .iter()
        .map(|thread| status(thread, "Name"))
        .collect();
    assert!(
        names.is_superset(
            &["casemate-vmm", "vcpu0", "vcpu1", "blk"]
                .map(str::to_owned)
                .into()
        ),
        "{names:?}"
    );
}

#[test]
fn unprivileged_users_vmm_has_nothing_of_the_host_either() {
    let host = Host::with_images().of_user(SOMEBODY);
    let confined = start(&host);

    assert_confined(confined.vmm, SOMEBODY, "pid");
    assert_confined(confined.waiter, SOMEBODY, "pid_for_children");
    assert_descriptors(&host, confined.vmm);
}

#[test]
fn each_process_of_a_vmm_dies_with_the_other() {
    for waiter_first in [false, true] {
        let host = Host::with_images();
        let confined = start(&host);
        let victim = if waiter_first {
            confined.waiter
        } else {
            confined.vmm
        };
        kill_process(Pid::from_raw(victim as i32).unwrap(), Signal::KILL).unwrap();
        confined
            ._run
            .ends()
            .ends_with(125)
            .complains_of("killed by signal 9");
        host.is_clean();
    }
}
