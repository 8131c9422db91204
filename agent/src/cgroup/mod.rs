//! A container's cgroup (v2): made, limited, measured, frozen, emptied.

mod devices;
mod resources;
mod stats;

use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxResources};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::process::Pid;

pub(crate) use stats::Stats;

use crate::conn::Events;
use crate::error::{Attempt, Error, Kind, Result};

/// Where the guest's hierarchy is mounted.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";

/// Controllers that a container gets, as far as the kernel has them.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "memory", "pids", "io", "hugetlb"];

/// How long the kernel may take to freeze or empty a cgroup: it waits for no user code, only for scheduling and I/O.
const PATIENCE: Duration = Duration::from_secs(30);

/// Most bytes read of one control file; `cgroup.procs` of a fork bomb is the largest.
const MAX_FILE: u64 = 4 << 20;

/// Gives child cgroups their controllers; once per boot.
pub(crate) fn enable_controllers() -> Result<()> {
    let root = Path::new(ROOT);
    let have = std::fs::read_to_string(root.join("cgroup.controllers"))
        .attempt(|| format!("read {ROOT}/cgroup.controllers"))?;
    let enable: String = have
        .split_whitespace()
        .filter(|c| CONTROLLERS.contains(c))
        .flat_map(|c| ["+", c, " "])
        .collect();
    std::fs::write(root.join("cgroup.subtree_control"), &enable)
        .attempt(|| format!("enable cgroup controllers {enable}"))
}

/// Whether `resources` can be turned into settings and device rules; applies nothing.
pub(crate) fn check(resources: &LinuxResources) -> Result<()> {
    resources::settings(resources, || 0)?;
    let rules = resources.devices().as_deref().unwrap_or_default();
    devices::program(rules, false).map(drop)
}

/// One container's cgroup.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    dir: OwnedFd,
    device_program: Option<OwnedFd>,
}

impl Cgroup {
    /// Makes the cgroup of container `id`, which must be new.
    pub(crate) fn create(id: &str) -> Result<Self> {
        // The prefix keeps ids apart from the kernel's own file names.
        let path = Path::new(ROOT).join(format!("casemate-{id}"));
        std::fs::create_dir(&path).attempt(|| format!("create cgroup {}", path.display()))?;
        let dir = rustix::fs::open(
            &path,
            OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .attempt(|| format!("open cgroup {}", path.display()))?;
        Ok(Self {
            path,
            dir,
            device_program: None,
        })
    }

    /// Applies limits and device rules; what can't be applied is an error.
    pub(crate) fn apply(&mut self, resources: Option<&LinuxResources>) -> Result<()> {
        if let Some(resources) = resources {
            self.update(resources)?;
        }
        let rules = resources
            .and_then(|r| r.devices().as_deref())
            .unwrap_or_default();
        self.set_devices(rules)
    }

    /// Applies limits alone.
    pub(crate) fn update(&self, resources: &LinuxResources) -> Result<()> {
        let usage = || self.number("memory.current").unwrap_or_default();
        for setting in resources::settings(resources, usage)? {
            self.set(&setting)?;
        }
        Ok(())
    }

    /// Replaces the device rules.
    pub(crate) fn set_devices(&mut self, rules: &[LinuxDeviceCgroup]) -> Result<()> {
        let Some(program) = devices::program(rules, self.device_program.is_some())? else {
            return Ok(()); // everything is allowed
        };
        let replace = self.device_program.as_ref().map(AsFd::as_fd);
        let attached =
            crate::sys::bpf_device(&program, self.dir.as_fd(), replace).attempt(|| {
                "load the device rules (linux.resources.devices) as a BPF program".into()
            })?;
        self.device_program = Some(attached);
        Ok(())
    }

    fn set(&self, setting: &resources::Setting) -> Result<()> {
        let resources::Setting { file, value, .. } = setting;
        match self.write(file, value) {
            Err(Errno::NOENT) if setting.optional => Ok(()),
            Err(Errno::NOENT) => Err(Error::unsupported(format!(
                "set {file} to {value}: the guest's kernel has no such control file, so this limit can't be applied"
            ))),
            result => result.attempt(|| format!("set {file} to {value}")),
        }
    }

    fn write(&self, file: &str, value: &str) -> rustix::io::Result<()> {
        write(&self.dir, file, value)
    }

    fn read(&self, file: &str) -> rustix::io::Result<String> {
        let fd = openat(
            &self.dir,
            file,
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            Mode::empty(),
        )?;
        let mut text = String::new();
        std::io::Read::read_to_string(
            &mut std::io::Read::take(std::fs::File::from(fd), MAX_FILE),
            &mut text,
        )
        .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
        Ok(text)
    }

    fn number(&self, file: &str) -> Option<u64> {
        self.read(file).ok()?.trim().parse().ok()
    }

    /// A descriptor of the directory, for clone3.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Where a process is added: in the group itself or, once it has groups with controllers below and so may hold
    /// none (systemd and Docker's daemon make such), in that of the container's first process.
    pub(crate) fn place_beside(&self, first: Pid) -> Result<OwnedFd> {
        let first = first.as_raw_nonzero();
        let what = || format!("find the cgroup of process {first}");
        let is_leaf = self
            .read("cgroup.subtree_control")
            .is_ok_and(|c| c.trim().is_empty());
        if is_leaf {
            return self.dir.try_clone().attempt(what);
        }
        let text = std::fs::read_to_string(format!("/proc/{first}/cgroup")).attempt(what)?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
        let place = Path::new(ROOT).join(path.unwrap_or_default());
        if !place.starts_with(&self.path) {
            return Err(Error::new(
                Kind::Internal,
                format!("{}: it is {}", what(), place.display()),
            ));
        }
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        rustix::fs::open(&place, flags, Mode::empty()).attempt(what)
    }

    /// The processes in it and below.
    pub(crate) fn pids(&self) -> Result<Vec<u32>> {
        let mut pids = Vec::new();
        self.walk(&self.path, &mut |dir| {
            let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
        });
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Visits every directory, children first.
    fn walk(&self, dir: &Path, visit: &mut dyn FnMut(&Path)) {
        // A container may nest cgroups; the kernel's own limit is far beyond any use, so no recursion deeper than this.
        const DEPTH: usize = 64;
        if dir.components().count() < self.path.components().count() + DEPTH {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    self.walk(&entry.path(), visit);
                }
            }
        }
        visit(dir);
    }

    /// Kills every process, at once and without a race.
    pub(crate) fn kill(&self) -> Result<()> {
        self.write("cgroup.kill", "1")
            .attempt(|| format!("kill the processes of {}", self.path.display()))
    }

    /// For freezing and waiting, which take time and so don't hold the cgroup.
    pub(crate) fn freezer(&self) -> Result<Freezer> {
        let dir = self
            .dir
            .try_clone()
            .attempt(|| format!("open cgroup {}", self.path.display()))?;
        Ok(Freezer {
            name: self.path.display().to_string(),
            dir,
        })
    }

    /// Removes it and what the container made below it. It must be empty of processes.
    pub(crate) fn remove(&self) -> Result<()> {
        let mut result = Ok(());
        self.walk(&self.path, &mut |dir| {
            let removed = rustix::fs::rmdir(dir);
            if result.is_ok() && removed != Err(Errno::NOENT) {
                result = removed.attempt(|| format!("remove cgroup {}", dir.display()));
            }
        });
        result
    }

    /// Whether its processes are stopped, or about to be.
    pub(crate) fn is_frozen(&self) -> bool {
        self.number("cgroup.freeze") == Some(1)
    }

    /// How often the OOM killer struck in it.
    pub(crate) fn oom_kills(&self) -> u64 {
        self.read("memory.events")
            .ok()
            .and_then(|text| stats::field(&text, "oom_kill"))
            .unwrap_or_default()
    }

    /// What it uses.
    pub(crate) fn stats(&self) -> Stats {
        Stats::read(|file| self.read(file).unwrap_or_default())
    }
}

fn write(dir: &OwnedFd, file: &str, value: &str) -> rustix::io::Result<()> {
    let fd = openat(
        dir,
        file,
        OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
    )?;
    let mut file = std::fs::File::from(fd);
    file.write_all(value.as_bytes())
        .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
}

/// Freezes a cgroup and waits for its events.
#[derive(Debug)]
pub(crate) struct Freezer {
    name: String,
    dir: OwnedFd,
}

impl Freezer {
    /// Stops or resumes every process; returns once the kernel has done it.
    pub(crate) async fn set(&self, frozen: bool) -> Result<()> {
        let value = if frozen { "1" } else { "0" };
        write(&self.dir, "cgroup.freeze", value)
            .attempt(|| format!("set cgroup.freeze of {} to {value}", self.name))?;
        self.until(if frozen { "frozen 1" } else { "frozen 0" })
            .await
    }

    /// Waits until no process is left.
    pub(crate) async fn until_empty(&self) -> Result<()> {
        self.until("populated 0").await
    }

    async fn until(&self, line: &str) -> Result<()> {
        let what = || format!("wait for \"{line}\" in cgroup.events of {}", self.name);
        let file = openat(
            &self.dir,
            "cgroup.events",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .attempt(what)?;
        let reached = async {
            let mut events: Option<Events> = None; // watched only if the first look doesn't do
            loop {
                let mut text = [0; 128];
                let length = rustix::io::pread(&file, &mut text, 0).attempt(what)?;
                if String::from_utf8_lossy(&text[..length])
                    .lines()
                    .any(|l| l == line)
                {
                    return Ok(());
                }
                match &mut events {
                    None => {
                        events = Some(Events::new(file.try_clone().attempt(what)?).attempt(what)?)
                    }
                    Some(events) => events.changed().await.attempt(what)?,
                }
            }
        };
        tokio::time::timeout(PATIENCE, reached)
            .await
            .unwrap_or_else(|_| {
                Err(Error::new(
                    Kind::Internal,
                    format!("{}: not reached within {} s", what(), PATIENCE.as_secs()),
                ))
            })
    }
}
