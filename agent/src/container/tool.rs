//! The agent's own tools, run as processes of a container ([`casemate_protocol::tool`]).
//!
//! A tool is a copy of the agent that never executes anything else: the fork of a program with one thread may go on.

use std::io::{self, BufWriter, Write};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use casemate_archive::{ChangeKind, Ids, Layers, changes, pack, pack_changes, unpack};
use casemate_protocol::tool::{Running, Stat, Tool};

use super::guest_mounts::Overlay;
use crate::error::{Error, Result};
use crate::sys;

/// No request of ours is longer: two paths, or the mount points of a container.
const MAX_REQUEST: usize = 1 << 20;
/// Between a tool and its pump.
const BUFFER: usize = 64 << 10;

/// A tool with all that it needs, gathered before the fork.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) tool: Tool,
    pub(super) overlay: Option<Overlay>,
    pub(super) pids: Vec<u32>,
}

impl Job {
    /// Reads a request.
    pub(super) fn parse(json: &[u8]) -> Result<Tool> {
        if json.len() > MAX_REQUEST {
            return Err(Error::invalid(format!(
                "a tool's request of {} bytes: at most {MAX_REQUEST}",
                json.len()
            )));
        }
        let tool: Tool = serde_json::from_slice(json)
            .map_err(|error| Error::invalid(format!("this is no tool's request: {error}")))?;
        match &tool {
            Tool::Stat { path, .. } | Tool::Pack { path, .. } | Tool::Unpack { into: path, .. }
                if !path.is_absolute() =>
            {
                Err(Error::invalid(format!("path {path:?} must be absolute")))
            }
            _ => Ok(tool),
        }
    }

    /// Whether it looks at the guest from outside the container.
    pub(super) fn is_outside(&self) -> bool {
        matches!(
            self.tool,
            Tool::Changes { .. } | Tool::Layer { .. } | Tool::Processes
        )
    }

    /// Does it and tells the exit status.
    pub(super) fn run(&self) -> i32 {
        let output = BufWriter::with_capacity(BUFFER, Stream(1));
        match self.work(output) {
            Ok(()) => 0,
            Err(error) => {
                let _ = writeln!(Stream(2), "{error}");
                1
            }
        }
    }

    fn work(&self, mut output: impl Write) -> io::Result<()> {
        match &self.tool {
            Tool::Stat { path, follow } => stat(path, *follow, &mut output)?,
            Tool::Pack { path, name, follow } => {
                let path = match follow {
                    true => std::fs::canonicalize(path).map_err(named(path))?,
                    false => path.clone(),
                };
                pack(&path, name, &mut output)?;
            }
            Tool::Unpack { into, keep_ids } => {
                let ids = if *keep_ids { Ids::Keep } else { Ids::Mine };
                let unpacked = unpack(Stream(0), into, None, ids)?;
                for path in unpacked.left_out {
                    let path = path.display();
                    writeln!(Stream(2), "left out: {path} is no file, directory or link")?;
                }
            }
            Tool::Changes { mount_points } => {
                changes(self.layers(mount_points)?, |change| {
                    let kind = match change.kind {
                        ChangeKind::Added => b'A',
                        ChangeKind::Changed => b'C',
                        ChangeKind::Deleted => b'D',
                    };
                    output.write_all(&[kind, b' '])?;
                    output.write_all(change.path.as_os_str().as_encoded_bytes())?;
                    output.write_all(&[0])
                })?;
            }
            Tool::Layer { mount_points } => {
                pack_changes(self.layers(mount_points)?, &mut output)?;
            }
            Tool::Processes => {
                let running: Vec<Running> = self.pids.iter().filter_map(|p| running(*p)).collect();
                serde_json::to_writer(&mut output, &running)?;
            }
        }
        output.flush()
    }

    fn layers<'a>(&'a self, mount_points: &'a [PathBuf]) -> io::Result<Layers<'a>> {
        let overlay = self.overlay.as_ref().ok_or_else(|| {
            io::Error::other("the container's root is no overlay: its changes can't be told apart")
        })?;
        Ok(Layers {
            upper: &overlay.upper,
            lower: &overlay.lower,
            mount_points,
        })
    }
}

/// A standard stream.
struct Stream(i32);

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(sys::standard(self.0).as_fd(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl io::Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(sys::standard(self.0).as_fd(), buffer)?)
    }
}

fn named(path: &Path) -> impl FnOnce(io::Error) -> io::Error + '_ {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn stat(path: &Path, follow: bool, output: &mut impl Write) -> io::Result<()> {
    use io::ErrorKind::{NotADirectory, NotFound};
    let metadata = match follow {
        true => std::fs::metadata(path),
        false => std::fs::symlink_metadata(path),
    };
    let stat = match metadata {
        Ok(metadata) => Stat {
            directory: metadata.is_dir(),
            link: metadata.is_symlink(),
        },
        Err(e) if matches!(e.kind(), NotFound | NotADirectory) => return Ok(()),
        Err(e) => return Err(named(path)(e)),
    };
    Ok(serde_json::to_writer(output, &stat)?)
}

/// What /proc tells of a process of the container; `None` if it has ended.
fn running(pid: u32) -> Option<Running> {
    let read = |name: &str| {
        let bytes = std::fs::read(format!("/proc/{pid}/{name}")).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    };
    let (stat, status) = (read("stat")?, read("status")?);
    // The name, in parentheses, may itself hold spaces and parentheses.
    let (head, fields) = stat.rsplit_once(')')?;
    let name = head.split_once('(')?.1;
    // Counted as proc_pid_stat(5) does.
    let field = |number: usize| fields.split_ascii_whitespace().nth(number - 3);
    let number = |n: usize| field(n).and_then(|f| f.parse::<u64>().ok());
    let line = |key: &str| status.lines().find_map(|l| l.strip_prefix(key));
    let mut user = line("Uid:")?.split_ascii_whitespace();
    let command = read("cmdline")?.replace('\0', " ");
    Some(Running {
        uid: user.nth(1)?.parse().ok()?,
        pid: line("NSpid:")?
            .split_ascii_whitespace()
            .next_back()?
            .parse()
            .ok()?,
        ppid: parent(number(4)?),
        cpu_ticks: number(14)? + number(15)?,
        age_ticks: (sys::monotonic_ns() / 10_000_000).saturating_sub(number(22)?),
        tty: number(7)?.try_into().ok()?,
        command: match command.trim_end() {
            "" => format!("[{name}]"),
            command => command.to_owned(),
        },
    })
}

/// A parent's number in the container's namespace; 0 for one outside of it.
fn parent(pid: u64) -> i32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let numbers = status.lines().find_map(|l| l.strip_prefix("NSpid:"));
    let numbers = numbers.unwrap_or_default().split_ascii_whitespace();
    let inner = numbers.skip(1).last();
    inner.and_then(|n| n.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_of_relative_paths_and_garbage_is_refused() {
        for json in [
            r#"{"tool":"stat","path":"etc","follow":false}"#,
            r#"{"tool":"unpack","into":"","keep_ids":true}"#,
            r#"{"tool":"shell"}"#,
            "",
        ] {
            assert!(Job::parse(json.as_bytes()).is_err(), "{json}");
        }
        Job::parse(br#"{"tool":"stat","path":"/etc","follow":false}"#).unwrap();
        assert!(Job::parse(&vec![b' '; MAX_REQUEST + 1]).is_err());
    }

    #[test]
    fn running_of_ourselves_is_this_test() {
        let me = running(std::process::id()).unwrap();
        assert_eq!(me.pid, std::process::id() as i32);
        assert!(me.command.contains("casemate_agent"), "{me:?}");
        assert_eq!(running(u32::MAX), None);
    }

    proptest::proptest! {
        #[test]
        fn parse_of_anything_never_panics(json in ".{0,200}") {
            let _ = Job::parse(json.as_bytes());
        }
    }
}
