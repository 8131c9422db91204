//! A process as `/proc` shows it.

#![allow(unsafe_code)] // kill(2) and ptrace(2)

use libtest_mimic::Failed;
use std::collections::BTreeSet;
use std::fs;
use std::os::fd::RawFd;
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

    /// What each descriptor is, by its number.
    pub(crate) fn descriptor_targets(&self) -> Vec<(String, String)> {
        let numbers = self.descriptors().into_iter();
        numbers
            .map(|fd| (fd.clone(), self.descriptor_target(fd.parse().unwrap())))
            .collect()
    }

    pub(crate) fn descriptor_target(&self, fd: RawFd) -> String {
        let link = fs::read_link(self.proc.join("fd").join(fd.to_string())).unwrap();
        link.into_os_string().into_string().unwrap()
    }

    pub(crate) fn threads(&self) -> Vec<Process> {
        self.list("task")
            .map(|entry| Process {
                pid: entry.file_name().to_str().unwrap().parse().unwrap(),
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

    /// Makes this thread, wherever it waits in the kernel, make system call `number` next.
    pub(crate) fn inject_call(&self, number: libc::c_long) -> Result<(), Failed> {
        const SYSCALL: libc::c_long = 0x050f; // the instruction's two bytes
        let trace = |request, address: libc::c_long, data: *mut libc::user_regs_struct| {
            // SAFETY: `data` is null or points at registers, as the request wants; all else is another process's.
            unsafe { libc::ptrace(request, self.pid, address, data) }
        };
        let failed =
            |what: &str| Failed::from(format!("{what}: {}", std::io::Error::last_os_error()));
        let nothing = std::ptr::null_mut();
        if trace(libc::PTRACE_ATTACH, 0, nothing) != 0 {
            return Err(failed("attach"));
        }
        // SAFETY: the status isn't wanted.
        if unsafe { libc::waitpid(self.pid, nothing.cast(), libc::__WALL) } != self.pid {
            return Err(failed("wait for the stop"));
        }
        // SAFETY: all zeros are valid registers.
        let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        if trace(libc::PTRACE_GETREGS, 0, &raw mut registers) != 0 {
            return Err(failed("read the registers"));
        }
        registers.rip -= 2; // back to the instruction that brought it into the kernel
        if trace(
            libc::PTRACE_PEEKTEXT,
            registers.rip as libc::c_long,
            nothing,
        ) & 0xffff
            != SYSCALL
        {
            return Err("the thread isn't in a system call".into());
        }
        registers.orig_rax = u64::MAX; // what it waits in isn't restarted
        registers.rax = number as u64;
        if trace(libc::PTRACE_SETREGS, 0, &raw mut registers) != 0 {
            return Err(failed("write the registers"));
        }
        match trace(libc::PTRACE_DETACH, 0, nothing) {
            0 => Ok(()),
            _ => Err(failed("detach")),
        }
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
