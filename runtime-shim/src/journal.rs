//! What a sandbox has taken from the host, so that anyone can give it back.
//!
//! A line of JSON for each thing, appended before a file is made and right
//! after a process is (a process that is never written down ends by itself when
//! its parent's sockets close). Appends of one line are atomic; a torn last
//! line, from a death while writing, is ignored.

use crate::files::{self, gone_is_fine};
use crate::network::cni::Attachment;
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Name of the file in the sandbox's directory.
pub const FILE_NAME: &str = "journal";
/// More is no journal of ours: a sandbox takes a few dozen things.
const MAX_BYTES: u64 = 1 << 20;

/// The role of the VMM's process.
pub const VMM_ROLE: &str = "vmm";

/// One thing taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "took", rename_all = "kebab-case")]
pub enum Taken {
    /// A process; the start time tells it from a later one with its number.
    Process {
        /// What it is for, for a person.
        role: String,
        /// Its number.
        pid: i32,
        /// Field 22 of `/proc/PID/stat`, in clock ticks since boot.
        start: u64,
        /// The boot that `start` counts from.
        boot: String,
    },
    /// A file outside the sandbox's directory that goes with the container.
    File {
        /// Absolute path.
        path: PathBuf,
    },
    /// A directory outside the sandbox's own that goes with the container, with all that is in it.
    Directory {
        /// Absolute path.
        path: PathBuf,
    },
    /// A volume without a name that was made for the container, and goes with it if it is to.
    Volume {
        /// Its directory.
        path: PathBuf,
    },
    /// A container's name: a file that holds its id, and another's once the name changed hands.
    Name {
        /// Absolute path.
        path: PathBuf,
        /// Whose name it is.
        id: String,
    },
    /// A mount of the host's.
    Mount {
        /// Where.
        path: PathBuf,
    },
    /// A network namespace.
    Netns {
        /// Where it is mounted.
        path: PathBuf,
    },
    /// A control group.
    Cgroup {
        /// Its directory.
        path: PathBuf,
    },
    /// An interface that CNI plugins made.
    Attachment {
        /// All that they need to take it back.
        attachment: Box<Attachment>,
    },
}

impl Taken {
    /// Whether [`crate::network::release`] gives it back.
    pub fn is_network(&self) -> bool {
        matches!(self, Self::Netns { .. } | Self::Attachment { .. })
    }
}

/// The journal of one sandbox.
#[derive(Debug, Clone)]
pub struct Journal {
    path: PathBuf,
}

impl Journal {
    /// The journal in a sandbox's directory.
    pub fn in_dir(dir: &Path) -> Self {
        Self {
            path: dir.join(FILE_NAME),
        }
    }

    /// The sandbox's directory.
    pub fn dir(&self) -> Option<&Path> {
        self.path.parent()
    }

    /// Writes down one thing.
    pub fn record(&self, taken: &Taken) -> io::Result<()> {
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&self.path)?;
        let mut line = Vec::new();
        // A torn last line must not take this one with it.
        let end = file.metadata()?.len();
        let mut last = [b'\n'];
        if end > 0 && file.read_at(&mut last, end - 1)? == 1 && last != *b"\n" {
            line.push(b'\n');
        }
        push_line(&mut line, taken)?;
        file.write_all(&line)
    }

    /// Writes down a process that just started.
    pub fn record_process(&self, role: &str, pid: i32) -> io::Result<()> {
        let start = start_time(pid)
            .ok_or_else(|| io::Error::other(format!("process {pid} ({role}) is gone")))?;
        self.record(&Taken::Process {
            role: role.to_owned(),
            pid,
            start,
            boot: boot_id(),
        })
    }

    /// Takes processes that are gone off the list, by their role: that of a container that starts again and again
    /// must not grow.
    pub fn forget_processes(&self, gone: impl Fn(&str) -> bool) -> io::Result<()> {
        self.forget(|taken| matches!(taken, Taken::Process { role, .. } if gone(role)))
    }

    /// Takes what was given back off the list.
    pub fn forget(&self, gone: impl Fn(&Taken) -> bool) -> io::Result<()> {
        let mut text = Vec::new();
        for taken in self.read()?.iter().filter(|taken| !gone(taken)) {
            push_line(&mut text, taken)?;
        }
        files::replace(&self.path, &text)
    }

    /// Everything taken, in order; an absent journal is an empty one.
    pub fn read(&self) -> io::Result<Vec<Taken>> {
        use io::Read;
        let mut text = String::new();
        match std::fs::File::open(&self.path) {
            Ok(file) => file.take(MAX_BYTES).read_to_string(&mut text)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        Ok(text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect())
    }
}

fn push_line(text: &mut Vec<u8>, taken: &Taken) -> io::Result<()> {
    serde_json::to_writer(&mut *text, taken)?;
    text.push(b'\n');
    Ok(())
}

/// Kills what is still alive of `taken` but for ourselves, and nothing else.
pub fn kill_processes(taken: &[Taken]) {
    let this_boot = boot_id();
    for item in taken {
        let Taken::Process {
            pid, start, boot, ..
        } = item
        else {
            continue;
        };
        let Some(raw) = Pid::from_raw(*pid).filter(|p| *p != rustix::process::getpid()) else {
            continue;
        };
        // Open first, compare then: the number can't be given to another process in between.
        let Ok(pidfd) = rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::empty())
        else {
            continue;
        };
        if *boot == this_boot && start_time(*pid) == Some(*start) {
            let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
        }
    }
}

/// Deletes the files of `taken`; those already gone are fine.
pub fn delete_files(taken: &[Taken]) -> io::Result<()> {
    for item in taken {
        gone_is_fine(match item {
            Taken::File { path } => std::fs::remove_file(path),
            Taken::Directory { path } => std::fs::remove_dir_all(path),
            Taken::Mount { path } => unmount(path),
            Taken::Name { path, id } if std::fs::read(path).is_ok_and(|o| o == id.as_bytes()) => {
                std::fs::remove_file(path)
            }
            Taken::Name { .. }
            | Taken::Process { .. }
            | Taken::Volume { .. }
            | Taken::Cgroup { .. }
            | Taken::Netns { .. }
            | Taken::Attachment { .. } => Ok(()),
        })?;
    }
    Ok(())
}

fn unmount(path: &Path) -> io::Result<()> {
    use rustix::mount::UnmountFlags;
    // Those who still use it keep it.
    match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // Nothing is mounted there.
        Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// When a process started, in ticks since boot; `None` when there is no such process.
pub fn start_time(pid: i32) -> Option<u64> {
    stat(pid, 22)
}

/// A process and its children.
pub fn with_children(pid: u32) -> Vec<u32> {
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parent = |pid: u32| stat(i32::try_from(pid).ok()?, 4);
    let children = pids.filter(|child| parent(*child) == Some(pid.into()));
    std::iter::once(pid).chain(children).collect()
}

/// A number of `/proc/PID/stat`, by its place in proc_pid_stat(5).
fn stat(pid: i32, field: usize) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name, in parentheses, may itself hold spaces and parentheses; the third field follows it.
    let after_name = &stat[stat.rfind(')')? + 1..];
    let mut fields = after_name.split_ascii_whitespace();
    fields.nth(field.checked_sub(3)?)?.parse().ok()
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|s| s.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_with_torn_last_line_keeps_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::in_dir(dir.path());
        let file = Taken::File {
            path: "/x/y".into(),
        };
        journal.record(&file).unwrap();
        let mut raw = OpenOptions::new().append(true).open(&journal.path).unwrap();
        raw.write_all(b"{\"took\":\"file\",\"pa").unwrap();
        assert_eq!(journal.read().unwrap(), std::slice::from_ref(&file));
        journal.record(&file).unwrap();
        assert_eq!(journal.read().unwrap(), [file.clone(), file]);
    }

    #[test]
    fn forget_processes_keeps_files_and_other_roles() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::in_dir(dir.path());
        let file = Taken::File {
            path: "/x/y".into(),
        };
        journal.record(&file).unwrap();
        let us = std::process::id() as i32;
        journal.record_process("shim", us).unwrap();
        journal.record_process(VMM_ROLE, us).unwrap();
        journal.forget_processes(|role| role == VMM_ROLE).unwrap();
        let left = journal.read().unwrap();
        assert_eq!(left[0], file);
        assert!(matches!(&left[1..], [Taken::Process { role, .. }] if role == "shim"));
    }

    #[test]
    fn read_without_file_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Journal::in_dir(dir.path()).read().unwrap(), []);
    }

    #[test]
    fn kill_processes_with_other_start_time_spares_the_process() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        let start = start_time(pid).unwrap();
        let taken = |start| {
            [Taken::Process {
                role: "test".into(),
                pid,
                start,
                boot: boot_id(),
            }]
        };
        kill_processes(&taken(start + 1));
        assert!(child.try_wait().unwrap().is_none());
        kill_processes(&taken(start));
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn delete_files_twice_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scratch");
        std::fs::write(&path, "x").unwrap();
        let taken = [Taken::File { path: path.clone() }];
        delete_files(&taken).unwrap();
        delete_files(&taken).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn delete_files_spares_a_name_that_changed_hands() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web");
        let id = |id: &str| Taken::Name {
            path: path.clone(),
            id: id.into(),
        };
        std::fs::write(&path, "bbb").unwrap();
        delete_files(&[id("aaa")]).unwrap();
        assert!(path.exists());
        delete_files(&[id("bbb")]).unwrap();
        assert!(!path.exists());
    }

    proptest::proptest! {
        #[test]
        fn read_of_anything_never_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(FILE_NAME), bytes).unwrap();
            let _ = Journal::in_dir(dir.path()).read();
        }
    }
}
