//! Control groups of the host (cgroup v2, Documentation/admin-guide/cgroup-v2.rst): one for each sandbox with limits,
//! below `/sys/fs/cgroup/casemate`. Only root has them: an ordinary user's own group holds processes, and can
//! therefore limit none below it.

use crate::files::gone_is_fine;
use crate::journal::{Journal, Taken};
use crate::plan::Limits;
use crate::state::DEFAULT_NAMESPACE;
use casemate_protocol::weight_of_shares;
use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const ROOT: &str = "/sys/fs/cgroup";
/// Of statfs(2).
const CGROUP2_MAGIC: u32 = 0x6367_7270;
/// All of ours are below.
const PARENT: &str = "casemate";
const CONTROLLERS: &str = "+cpu +memory";
/// Processes that were killed take a moment to go.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where the group of the container `id` in a sandbox's directory is to be; `None`: this user, or this host, has none.
pub fn path_for(id: &str, dir: Option<&Path>) -> Option<PathBuf> {
    let is_v2 = rustix::fs::statfs(ROOT).is_ok_and(|fs| fs.f_type as u32 == CGROUP2_MAGIC);
    if !is_v2 || !rustix::process::geteuid().is_root() {
        return None;
    }
    let namespace = dir.and_then(|dir| dir.parent()?.file_name()?.to_str());
    let name = match namespace {
        Some(DEFAULT_NAMESPACE) | None => id.to_owned(),
        // The command line's ids are random numbers; an engine's are an engine's, and each of its namespaces has its own.
        Some(namespace) => format!("{namespace}-{id}-{:08x}", random()),
    };
    Some(Path::new(ROOT).join(PARENT).join(name))
}

fn random() -> u32 {
    // Without any the name is what it is.
    u32::from_ne_bytes(crate::random::bytes().unwrap_or_default())
}

fn failed(what: &str, path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    let text = format!("can't {what} {}", path.display());
    move |error| io::Error::new(error.kind(), format!("{text}: {error}"))
}

fn write(group: &Path, file: &str, value: &str) -> io::Result<()> {
    let path = group.join(file);
    std::fs::write(&path, value).map_err(failed(&format!("write {value:?} to"), &path))
}

/// Makes a group, with the controllers that limits need. One that is there already is fine.
pub fn create(path: &Path) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new(ROOT));
    for dir in [parent, path] {
        match std::fs::create_dir(dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("make the control group", dir)(e));
            }
            _ => {}
        }
    }
    if path.join("memory.max").exists() && path.join("cpu.max").exists() {
        return Ok(());
    }
    for dir in [Path::new(ROOT), parent] {
        write(dir, "cgroup.subtree_control", CONTROLLERS)?;
    }
    Ok(())
}

/// Its `cgroup.procs`: a process that writes "0" there is in the group.
pub fn members(path: &Path) -> io::Result<OwnedFd> {
    let file = path.join("cgroup.procs");
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::open(&file, flags, Mode::empty()).map_err(|e| failed("open", &file)(e.into()))
}

/// Applies what `limits` says of memory.
pub fn limit_memory(path: &Path, limits: &Limits) -> io::Result<()> {
    let max = limits.memory.map(|bytes| bytes.to_string());
    write(path, "memory.max", max.as_deref().unwrap_or("max"))
}

/// Applies what `limits` says of processor time.
pub fn limit_cpu(path: &Path, limits: &Limits) -> io::Result<()> {
    let max = match limits.quota {
        Some((quota, period)) => format!("{quota} {period}"),
        None => "max".to_owned(),
    };
    write(path, "cpu.max", &max)?;
    let weight = limits.shares.map_or(100, weight_of_shares);
    write(path, "cpu.weight", &weight.to_string())
}

/// Ends whatever is left in the groups that a journal names and removes them.
pub fn release(journal: &Journal) -> io::Result<()> {
    let taken = journal.read()?;
    let groups = || {
        taken.iter().filter_map(|taken| match taken {
            Taken::Cgroup { path } => Some(path.as_path()),
            _ => None,
        })
    };
    if groups().next().is_none() {
        return Ok(());
    }
    groups().try_for_each(remove)?;
    journal.forget(|taken| matches!(taken, Taken::Cgroup { .. }))
}

fn remove(path: &Path) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        match gone_is_fine(std::fs::remove_dir(path)) {
            // Somebody is in there.
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && begun.elapsed() < PATIENCE => {
                gone_is_fine(write(path, "cgroup.kill", "1"))?;
                std::thread::sleep(Duration::from_millis(2));
            }
            done => return done.map_err(failed("remove the control group", path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_of_a_group_that_is_gone_forgets_it() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::in_dir(dir.path());
        let path = dir.path().join("gone");
        journal.record(&Taken::Cgroup { path }).unwrap();
        release(&journal).unwrap();
        assert_eq!(journal.read().unwrap(), []);
    }
}
