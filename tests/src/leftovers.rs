//! What sandboxes left behind on a host: processes, state, scratch disks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Pid;

/// Programs whose relatives are a sandbox's too.
const OURS: [&str; 5] = [
    "containerd-shim-casemate-v2",
    "casemate-vmm",
    "virtiofsd",
    "passt",
    "passt.avx2",
];

/// What is still there once nothing is, or once `patience` is over.
pub(crate) fn after(patience: Duration, dir: &Path, state: &Path, data: &Path) -> Vec<String> {
    let deadline = Instant::now() + patience;
    loop {
        let mut found = named_processes(dir);
        found.extend(sandboxes(state));
        found.extend(addresses(&state.join("addresses")));
        found.extend(disks(&data.join("scratch")));
        found.extend(mounts(dir));
        found.extend(cgroups(Path::new("/sys/fs/cgroup/casemate")));
        if found.is_empty() || Instant::now() > deadline {
            return found;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Directories of sandboxes: `state/<namespace>/<id>`; the names in use are in a directory beside them.
fn sandboxes(state: &Path) -> Vec<String> {
    let Ok(namespaces) = fs::read_dir(state) else {
        return Vec::new();
    };
    namespaces
        .flatten()
        .filter(|namespace| namespace.file_name() != "addresses")
        .flat_map(|namespace| {
            fs::read_dir(namespace.path())
                .into_iter()
                .flatten()
                .flatten()
        })
        .filter(|sandbox| sandbox.path().is_dir() && sandbox.file_name() != "names")
        .map(|sandbox| sandbox.path().display().to_string())
        .collect()
}

/// Addresses of networks that are in use: `addresses/<network>/<address>`, beside a lock and the last one given.
fn addresses(dir: &Path) -> Vec<String> {
    let networks = fs::read_dir(dir).into_iter().flatten().flatten();
    networks
        .flat_map(|network| fs::read_dir(network.path()).into_iter().flatten().flatten())
        .map(|entry| entry.path())
        .filter(|path| path.file_name().is_some_and(|name| name != "lock"))
        .filter(|path| !path.to_string_lossy().contains("last_reserved_ip"))
        .map(|path| path.display().to_string())
        .collect()
}

/// Scratch disks, wherever below the directory they are.
fn disks(scratch: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(scratch) else {
        return Vec::new();
    };
    entries
        .flatten()
        .flat_map(|entry| match entry.path() {
            path if path.is_dir() => disks(&path),
            path => vec![path.display().to_string()],
        })
        .collect()
}

/// Mounts below the host's directories, but for those that are the test's own disks.
fn mounts(dir: &Path) -> Vec<String> {
    let below = |line: &&str| line.contains(&*dir.to_string_lossy()) && !line.starts_with("small ");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().filter(below).map(str::to_owned).collect()
}

/// Control groups of sandboxes in which nobody is any more.
fn cgroups(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| fs::read(path.join("cgroup.procs")).is_ok_and(|members| members.is_empty()))
        .map(|path| path.display().to_string())
        .collect()
}

/// Processes that belong to the host in `dir`: it stands in their environment, arguments or open files, or they
/// are ours and a child or the parent of one that does. (A VMM has two processes, of which one holds nothing.)
pub(crate) fn processes(dir: &Path, wanted: Option<&str>) -> Vec<Pid> {
    let marker = dir
        .file_name()
        .expect("a host's directory has a name")
        .as_bytes();
    let own = std::process::id();
    let parents: BTreeMap<u32, u32> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != own)
        .filter_map(|pid| Some((pid, parent(pid)?)))
        .collect();
    let mut found: BTreeSet<u32> = parents
        .keys()
        .copied()
        .filter(|pid| belongs(*pid, marker))
        .collect();
    let related = |found: &BTreeSet<u32>| {
        let unseen = parents
            .iter()
            .filter(|(pid, parent)| found.contains(pid) != found.contains(parent));
        let unseen = unseen.flat_map(|(pid, parent)| [*pid, *parent]);
        let pids: Vec<u32> = unseen
            .filter(|pid| !found.contains(pid) && OURS.contains(&executable(*pid).as_str()))
            .collect();
        pids
    };
    loop {
        let more = related(&found);
        if more.is_empty() {
            break;
        }
        found.extend(more);
    }
    found
        .into_iter()
        .filter(|pid| wanted.is_none_or(|wanted| executable(*pid) == wanted))
        .filter_map(|pid| Pid::from_raw(pid as i32))
        .collect()
}

/// All of them, each with its number and executable.
pub(crate) fn named_processes(dir: &Path) -> Vec<String> {
    let name = |pid: Pid| executable(pid.as_raw_nonzero().get() as u32);
    let found = processes(dir, None).into_iter();
    found
        .map(|pid| format!("process {} {}", pid.as_raw_nonzero(), name(pid)))
        .collect()
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(1)?.parse().ok()
}

fn belongs(pid: u32, marker: &[u8]) -> bool {
    let holds = |bytes: &[u8]| bytes.windows(marker.len()).any(|window| window == marker);
    let file =
        |name: &str| fs::read(format!("/proc/{pid}/{name}")).is_ok_and(|bytes| holds(&bytes));
    file("cmdline")
        || file("environ")
        || fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten()
            .any(|fd| {
                fs::read_link(fd.path()).is_ok_and(|target| holds(target.as_os_str().as_bytes()))
            })
}

fn executable(pid: u32) -> String {
    fs::read_link(format!("/proc/{pid}/exe"))
        .ok()
        .and_then(|exe| Some(exe.file_name()?.to_string_lossy().into_owned()))
        .unwrap_or_default()
}
