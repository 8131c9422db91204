//! One VMM process: started, watched, asked and ended.

use super::bounds::Bounds;
use crate::fds;
use crate::journal::{Journal, VMM_ROLE};
use casemate_protocol::text::{printable_lines, tail};
use casemate_vmm::config::VmConfig;
use casemate_vmm::control::{Answer, Command, MAX_MESSAGE, Message, Phase, Request};
use rustix::net::{RecvFlags, SendFlags};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};

/// The guest's log in an error: enough for a panic with its trace.
const MAX_LOG: usize = 16 << 10;
/// A VMM tells each phase once.
const MAX_PHASES: usize = 16;
/// A VMM answers from memory; more time means that it hangs.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// How a VMM's process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ended {
    /// Its exit code; `None`: killed by a signal.
    pub(super) code: Option<i32>,
    /// For a person.
    pub(super) reason: String,
    /// Last lines of the guest's kernel log, made printable.
    pub(super) guest_log: String,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.reason)?;
        if !self.guest_log.is_empty() {
            write!(
                f,
                "\nthe guest's last lines:\n{}",
                self.guest_log.trim_end()
            )?;
        }
        Ok(())
    }
}

/// Why a request to the VMM failed.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum VmError {
    /// The process is gone.
    #[error("the VMM is gone: {0}")]
    Gone(Ended),
    /// The VMM refused.
    #[error("the VMM refused: {0}")]
    Refused(String),
    /// No answer in time.
    #[error("the VMM did not answer within {0:?}")]
    Timeout(Duration),
    /// The socket failed.
    #[error("can't talk to the VMM: {0}")]
    Socket(String),
    /// No port for a stream.
    #[error("no random number for a port: {0}")]
    Random(String),
}

type Pending = HashMap<u64, oneshot::Sender<Result<Answer, String>>>;

/// What the watcher shares with callers. Lock order: one at a time.
#[derive(Debug, Default)]
struct Shared {
    pending: Mutex<Pending>,
    phases: Mutex<Vec<(Phase, u64)>>,
    /// Why we killed it.
    blame: Mutex<Option<String>>,
}

/// Kills a VMM and says why.
pub(super) struct Killer {
    pidfd: OwnedFd,
    shared: Arc<Shared>,
}

impl Killer {
    /// The reason becomes that of the VM's end.
    pub(super) fn kill_because(&self, reason: String) {
        locked(&self.shared.blame).get_or_insert(reason);
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
    }
}

/// A running (or ended) VMM.
#[derive(Debug)]
pub(super) struct Vm {
    pid: u32,
    pidfd: OwnedFd,
    control: Arc<AsyncFd<OwnedFd>>,
    shared: Arc<Shared>,
    next_id: std::sync::atomic::AtomicU64,
    ended: watch::Receiver<Option<Ended>>,
}

/// A poisoned lock holds a map or a list: always usable.
fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Vm {
    /// Starts `binary` with `config`, whose control socket is filled in here.
    ///
    /// `passed` are the descriptors that `config` names.
    pub(super) fn start(
        binary: &Path,
        mut config: VmConfig,
        passed: &[BorrowedFd<'_>],
        stderr: std::fs::File,
        bounds: &Bounds,
        journal: &Journal,
    ) -> io::Result<Self> {
        let (ours, theirs) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        config.control = Some(theirs.as_raw_fd());
        let config_fd = fds::memory_file("vm-config", &serde_json::to_vec(&config)?)?;

        let mut all = passed.to_vec();
        all.extend([theirs.as_fd(), config_fd.as_fd()]);
        let mut command = std::process::Command::new(binary);
        command
            .arg("--config-fd")
            .arg(config_fd.as_raw_fd().to_string())
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        bounds.hold(&mut command);
        let child = fds::spawn_with(&mut command, &all)?;
        drop(theirs);
        let pid = child.id();
        // Best effort: a VMM that is gone already is noticed by the watcher.
        let _ = journal.record_process(VMM_ROLE, pid as i32);
        Self::watch(child, ours)
    }

    fn watch(child: Child, control: OwnedFd) -> io::Result<Self> {
        let pid = child.id();
        let raw = rustix::process::Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::NONBLOCK)?;
        let control = Arc::new(fds::watched(
            control,
            Interest::READABLE | Interest::WRITABLE,
        )?);
        let shared = Arc::new(Shared::default());
        let (tell, ended) = watch::channel(None);
        let watcher = Watcher {
            child,
            exited: fds::watched(pidfd.try_clone()?, Interest::READABLE)?,
            control: control.clone(),
            shared: shared.clone(),
            said: None,
        };
        tokio::spawn(watcher.run(tell));
        Ok(Self {
            pid,
            pidfd,
            control,
            shared,
            next_id: 1.into(),
            ended,
        })
    }

    /// The process's number.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// The phases reached so far, with host CLOCK_MONOTONIC in ns.
    pub(super) fn phases(&self) -> Vec<(Phase, u64)> {
        locked(&self.shared.phases).clone()
    }

    /// Set once the process is gone.
    pub(super) fn ended(&self) -> watch::Receiver<Option<Ended>> {
        self.ended.clone()
    }

    /// Waits for the end.
    pub(super) async fn wait(&self) -> Ended {
        wait_end(&mut self.ended()).await
    }

    /// For who may have to kill it from elsewhere.
    pub(super) fn killer(&self) -> io::Result<Killer> {
        Ok(Killer {
            pidfd: self.pidfd.try_clone()?,
            shared: self.shared.clone(),
        })
    }

    /// Kills the process; harmless when it is gone.
    pub(super) fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
    }

    /// Asks for something, with descriptors to go along.
    pub(super) async fn request(
        &self,
        command: Command,
        passed: &[BorrowedFd<'_>],
    ) -> Result<Answer, VmError> {
        let id = self
            .next_id
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (tell, answer) = oneshot::channel();
        locked(&self.shared.pending).insert(id, tell);
        let result = tokio::time::timeout(REQUEST_TIMEOUT, async {
            self.send(&Request { id, command }, passed).await?;
            let mut ended = self.ended();
            tokio::select! {
                answer = answer => match answer {
                    Ok(result) => result.map_err(VmError::Refused),
                    Err(_) => Err(VmError::Gone(self.wait().await)),
                },
                end = wait_end(&mut ended) => Err(VmError::Gone(end)),
            }
        })
        .await
        .unwrap_or(Err(VmError::Timeout(REQUEST_TIMEOUT)));
        locked(&self.shared.pending).remove(&id);
        result
    }

    async fn send(&self, request: &Request, passed: &[BorrowedFd<'_>]) -> Result<(), VmError> {
        let socket_error = |e: io::Error| VmError::Socket(e.to_string());
        let bytes = serde_json::to_vec(request).map_err(|e| socket_error(e.into()))?;
        self.control
            .async_io(Interest::WRITABLE, |fd| {
                let mut space = vec![
                    std::mem::MaybeUninit::uninit();
                    rustix::net::SendAncillaryMessage::ScmRights(passed).size()
                ];
                let mut ancillary = rustix::net::SendAncillaryBuffer::new(&mut space);
                if !passed.is_empty() {
                    ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(passed));
                }
                rustix::net::sendmsg(
                    fd,
                    &[io::IoSlice::new(&bytes)],
                    &mut ancillary,
                    SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
                )
                .map_err(io::Error::from)
            })
            .await
            .map(|_| ())
            .map_err(socket_error)
    }
}

/// Waits until the watched process is gone.
pub(super) async fn wait_end(ended: &mut watch::Receiver<Option<Ended>>) -> Ended {
    match ended.wait_for(Option::is_some).await.as_deref() {
        Ok(Some(end)) => end.clone(),
        _ => Ended {
            code: None,
            reason: "the VMM's watcher ended".into(),
            guest_log: String::new(),
        },
    }
}

/// Reads the control socket and reaps the process.
struct Watcher {
    child: Child,
    exited: AsyncFd<OwnedFd>,
    control: Arc<AsyncFd<OwnedFd>>,
    shared: Arc<Shared>,
    /// The first `Ended` that the VMM sent.
    said: Option<(String, String)>,
}

impl Watcher {
    async fn run(mut self, tell: watch::Sender<Option<Ended>>) {
        let mut buffer = vec![0; MAX_MESSAGE];
        let mut open = true;
        loop {
            tokio::select! {
                _ = self.exited.readable() => break,
                got = receive(&self.control, &mut buffer), if open => match got {
                    Ok(0) | Err(_) => open = false,
                    Ok(length) => self.take(&buffer[..length]),
                },
            }
        }
        // What it sent before it died is still in the socket.
        while open {
            match next_packet(self.control.get_ref(), &mut buffer) {
                Ok(length) if length > 0 => self.take(&buffer[..length]),
                _ => open = false,
            }
        }
        let end = self.end();
        locked(&self.shared.pending).clear();
        tell.send_replace(Some(end));
    }

    fn take(&mut self, bytes: &[u8]) {
        // A message that isn't one is ignored: the VMM may have been taken over.
        match serde_json::from_slice::<Message>(bytes) {
            Ok(Message::Reply { id, result }) => {
                if let Some(waiting) = locked(&self.shared.pending).remove(&id) {
                    let _ = waiting.send(result);
                }
            }
            Ok(Message::Phase { phase, at_ns }) => {
                let mut phases = locked(&self.shared.phases);
                if phases.len() < MAX_PHASES {
                    phases.push((phase, at_ns));
                }
            }
            Ok(Message::Ended {
                reason, guest_log, ..
            }) => {
                self.said.get_or_insert_with(|| {
                    (printable(&reason, 1024), printable(&guest_log, MAX_LOG))
                });
            }
            Err(_) => {}
        }
    }

    fn end(&mut self) -> Ended {
        use std::os::unix::process::ExitStatusExt;
        let status = self.child.wait().ok();
        let code = status.and_then(|s| s.code());
        let blame = locked(&self.shared.blame).take();
        let said = blame.map(|reason| (reason, String::new()));
        let (reason, guest_log) = said.or(self.said.take()).unwrap_or_else(|| {
            let reason = match (code, status.and_then(|s| s.signal())) {
                (Some(code), _) => format!("the VMM ended with code {code}"),
                (None, Some(signal)) => format!("the VMM was killed by signal {signal}"),
                (None, None) => "the VMM is gone".to_owned(),
            };
            (reason, String::new())
        });
        Ended {
            code,
            reason,
            guest_log,
        }
    }
}

async fn receive(control: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    control
        .async_io(Interest::READABLE, |fd| next_packet(fd, buffer))
        .await
}

/// The next packet's length, 0 at the end, without waiting.
///
/// A VMM that ends with a request of ours unread resets the connection, which is told before what it still had
/// sent: its last words are behind that error.
fn next_packet(control: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    let mut receive = || rustix::net::recv(control, &mut *buffer, RecvFlags::DONTWAIT);
    let received = match receive() {
        Err(rustix::io::Errno::CONNRESET) => receive(),
        result => result,
    };
    // The length of a packet may exceed the buffer's; only what is in it counts.
    Ok(received.map(|(_, length)| length)?.min(buffer.len()))
}

/// The last `limit` bytes of a text from outside as they are shown, lines kept: escapes are longer than what they stand for.
pub(super) fn printable(text: &str, limit: usize) -> String {
    tail(&printable_lines(tail(text, limit)), limit).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_packet_after_a_reset_is_what_was_sent_before_it() {
        let (ours, theirs) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        rustix::net::send(&theirs, b"last words", SendFlags::empty()).unwrap();
        rustix::net::send(&ours, b"never read", SendFlags::empty()).unwrap();
        drop(theirs);

        let mut buffer = [0; 64];
        let length = next_packet(&ours, &mut buffer).unwrap();

        assert_eq!(&buffer[..length], b"last words");
        assert_eq!(next_packet(&ours, &mut buffer).unwrap(), 0);
    }

    #[test]
    fn printable_takes_the_end_and_defuses_escapes() {
        assert_eq!(printable("ab\x1b[2Jc\nd", 100), "ab\\u001b[2Jc\nd");
        assert_eq!(printable("äöü", 3), "ü");
        assert_eq!(printable(&"\x1b".repeat(50), 60).len(), 60);
    }
}
