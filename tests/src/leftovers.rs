//! What sandboxes left behind on a host: processes, state, scratch disks.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Pid;

/// What is still there once nothing is, or once `patience` is over.
pub(crate) fn after(patience: Duration, dir: &Path, state: &Path, data: &Path) -> Vec<String> {
    let deadline = Instant::now() + patience;
    loop {
        let mut found: Vec<String> = processes(dir, None)
            .into_iter()
            .map(|pid| {
                format!(
                    "process {pid:?} {}",
                    executable(&pid.as_raw_nonzero().to_string())
                )
            })
            .collect();
        found.extend(sandboxes(state));
        found.extend(disks(&data.join("scratch")));
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

/// Processes that belong to the host in `dir`: it stands in their environment, arguments or open files.
pub(crate) fn processes(dir: &Path, wanted: Option<&str>) -> Vec<Pid> {
    let marker = dir
        .file_name()
        .expect("a host's directory has a name")
        .as_bytes();
    let own = std::process::id().to_string();
    let Ok(all) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    all.flatten()
        .filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let pid = name.parse().ok().and_then(Pid::from_raw)?;
            let ours = name != own && belongs(&name, marker);
            let right = wanted.is_none_or(|wanted| executable(&name) == wanted);
            (ours && right).then_some(pid)
        })
        .collect()
}

fn belongs(pid: &str, marker: &[u8]) -> bool {
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

fn executable(pid: &str) -> String {
    fs::read_link(format!("/proc/{pid}/exe"))
        .ok()
        .and_then(|exe| Some(exe.file_name()?.to_string_lossy().into_owned()))
        .unwrap_or_default()
}
