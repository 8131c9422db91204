//! A process as `/proc` shows it.

#![allow(unsafe_code)] // kill(2)

use libtest_mimic::Failed;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What every confined thread has in `/proc/PID/status`.
pub(crate) const SETTINGS: [(&str, &str); 7] = [
    ("NoNewPrivs", "1"),
    ("Seccomp", "2"),
    ("CapInh", "0000000000000000"),
    ("CapPrm", "0000000000000000"),
    ("CapEff", "0000000000000000"),
    ("CapBnd", "0000000000000000"),
    ("CapAmb", "0000000000000000"),
];

/// A process or one of its threads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    proc: PathBuf,
}

impl Process {
    pub(crate) fn new(pid: i32) -> Self {
        Self {
            pid,
            proc: format!("/proc/{pid}").into(),
        }
    }

    pub(crate) fn own() -> Self {
        Self::new(std::process::id() as i32)
    }

    fn read(&self, file: &str) -> String {
        let path = self.proc.join(file);
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    fn list(&self, directory: &str) -> impl Iterator<Item = fs::DirEntry> {
        let path = self.proc.join(directory);
        let entries = fs::read_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        entries.map(Result::unwrap)
    }

    /// A field of `status`.
    pub(crate) fn status(&self, field: &str) -> String {
        let status = self.read("status");
        let value = status
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        value
            .unwrap_or_else(|| panic!("no {field} in {status}"))
            .trim()
            .to_owned()
    }

    /// Real, effective, saved and file system id, each once.
    pub(crate) fn ids(&self, field: &str) -> BTreeSet<u32> {
        self.status(field)
            .split_whitespace()
            .map(|id| id.parse().unwrap())
            .collect()
    }

    pub(crate) fn owner(&self) -> u32 {
        fs::metadata(self.proc.join("status")).unwrap().uid()
    }

    pub(crate) fn namespace(&self, kind: &str) -> PathBuf {
        fs::read_link(self.proc.join("ns").join(kind)).unwrap()
    }

    pub(crate) fn root_entries(&self) -> Vec<String> {
        self.list("root/")
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect()
    }

    /// Mount point, options and type of each mount.
    pub(crate) fn mounts(&self) -> Vec<String> {
        let table = self.read("mountinfo");
        let mounts = table.lines().map(|line| {
            let fields: Vec<_> = line.split(' ').collect();
            let kind = fields.iter().position(|&field| field == "-").unwrap() + 1;
            format!("{} {} {}", fields[4], fields[5], fields[kind])
        });
        mounts.collect()
    }

    pub(crate) fn id_map(&self, file: &str) -> Vec<String> {
        self.read(file)
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    }

    pub(crate) fn network_devices(&self) -> Vec<String> {
        let table = self.read("net/dev");
        table
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, _)| name.trim().to_owned())
            .collect()
    }

    pub(crate) fn descriptors(&self) -> BTreeSet<String> {
        self.list("fd")
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect()
    }

    pub(crate) fn threads(&self) -> Vec<Process> {
        self.list("task")
            .map(|entry| Process {
                pid: self.pid,
                proc: entry.path(),
            })
            .collect()
    }

    /// Soft and hard limit.
    pub(crate) fn limit(&self, name: &str) -> [String; 2] {
        let limits = self.read("limits");
        let line = limits
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        let mut values = line.split_whitespace().map(str::to_owned);
        [values.next().unwrap(), values.next().unwrap()]
    }

    /// Its only child.
    pub(crate) fn only_child(&self) -> Process {
        let children: Vec<_> = fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| parent(*pid) == Some(self.pid))
            .collect();
        assert_eq!(children.len(), 1, "children of {}: {children:?}", self.pid);
        Process::new(children[0])
    }

    pub(crate) fn kill(&self, signal: i32) {
        // SAFETY: no memory is involved.
        let done = unsafe { libc::kill(self.pid, signal) };
        assert_eq!(done, 0, "kill({}, {signal})", self.pid);
    }

    /// A zombie that nobody has reaped yet is gone, too.
    pub(crate) fn wait_until_gone(&self) -> Result<(), Failed> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            match fs::read_to_string(self.proc.join("stat")) {
                Err(_) => return Ok(()),
                Ok(stat) if stat.contains(") Z ") => return Ok(()),
                Ok(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        Err(format!("process {} lives on", self.pid).into())
    }
}

fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(1)?
        .parse()
        .ok()
}
