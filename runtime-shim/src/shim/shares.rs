//! The host's directories in a sandbox: one process of virtiofsd for each, started, watched and ended.

use super::bounds::Bounds;
use super::places::{PlaceError, Places};
use super::vm::{Ended, Killer, printable, wait_end};
use crate::fds;
use crate::journal::Journal;
use crate::plan::Share;
use crate::settings::Settings;
use casemate_vmm::config::ShareConfig;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The role of such a process in the journal.
pub(super) const ROLE: &str = "virtiofsd";
/// Where in the sandbox's directory shares' own roots are; beside them they are mounted.
const ROOTS: &str = "shared";
/// Bytes kept of what one prints: it says why it ends.
const MAX_WORDS: usize = 4096;
/// How long one may take to notice that its VM is gone, and a VM to be found gone when its share is.
const FOLLOWS: Duration = Duration::from_secs(5);

/// Why a share can't be served.
#[derive(Debug, thiserror::Error)]
#[error("can't share {path}: {action}")]
pub(super) struct ShareError {
    path: PathBuf,
    action: &'static str,
    source: io::Error,
}

/// A process that serves a share, not yet watched.
pub(super) struct Server {
    child: Child,
    source: PathBuf,
    is_pods: bool,
    said: File,
    /// Connected to it; for the VMM.
    socket: OwnedFd,
    tag: String,
}

impl Server {
    /// Starts the process. `dir` is the sandbox's.
    pub(super) fn start(
        share: &Share,
        settings: &Settings,
        dir: &Path,
        bounds: &Bounds,
        journal: &Journal,
    ) -> Result<Self, ShareError> {
        let error = |action| {
            move |source| ShareError {
                path: share.source.clone(),
                action,
                source,
            }
        };
        let place = dir.join(&share.tag);
        // It is there from the last time if the container starts again.
        match std::fs::create_dir(&place) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error("make a directory to mount it on")(e));
            }
            _ => {}
        }
        // A pod's begins with nothing in it.
        let own = dir.join(ROOTS).join(&share.tag);
        let source = match share.is_pods {
            true => {
                std::fs::create_dir_all(&own).map_err(error("make its directory"))?;
                &own
            }
            false => &share.source,
        };
        let (listener, socket) = socket_pair(&dir.join(format!("{}.sock", share.tag)))
            .map_err(error("make a socket"))?;
        let said = fds::bounded_file("virtiofsd-stderr", MAX_WORDS as u64)
            .map_err(error("make a file for its errors"))?;
        let stderr = said
            .try_clone()
            .map_err(error("make a file for its errors"))?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("--share")
            .arg(source)
            .arg("--place")
            .arg(&place)
            .arg("--virtiofsd")
            .arg(&settings.virtiofsd)
            .arg("--listen-fd")
            .arg(listener.as_raw_fd().to_string());
        if share.read_only {
            command.arg("--read-only");
        }
        if share.is_pods {
            command.arg("--read-only-base");
        }
        command
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        bounds.hold(&mut command);
        let child = fds::spawn_with(&mut command, &[listener.as_fd()])
            .map_err(error("start the process that serves it"))?;
        // One that is gone already is noticed by who watches it.
        let _ = journal.record_process(ROLE, child.id() as i32);
        Ok(Self {
            child,
            source: source.clone(),
            is_pods: share.is_pods,
            said,
            socket,
            tag: share.tag.clone(),
        })
    }

    /// The socket that [`Server::config`] names.
    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// The share as the VMM is told of it.
    pub(super) fn config(&self) -> ShareConfig {
        ShareConfig {
            tag: self.tag.clone(),
            socket: self.socket.as_raw_fd(),
        }
    }

    /// Ends the VM when the process ends before it, and the process after the VM. Our end of the socket is closed.
    pub(super) fn watch(
        self,
        killer: Killer,
        ended: watch::Receiver<Option<Ended>>,
    ) -> io::Result<Watched> {
        let pid = rustix::process::Pid::from_child(&self.child);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::NONBLOCK)?;
        let exited = fds::watched(pidfd, Interest::READABLE)?;
        let Self {
            child,
            source,
            is_pods,
            said,
            socket,
            tag: _,
        } = self;
        let pods = is_pods.then(|| (source.clone(), child.id()));
        drop(socket);
        let said = Said { source, file: said };
        let watcher = Watcher {
            child,
            said: said.try_clone()?,
            exited,
        };
        Ok(Watched {
            task: tokio::spawn(watcher.run(killer, ended)),
            said,
            pods,
        })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // A zombie is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process that serves a share, looked after.
pub(super) struct Watched {
    task: JoinHandle<()>,
    said: Said,
    /// A pod's: its root on the host, and the process.
    pods: Option<(PathBuf, u32)>,
}

impl Watched {
    /// Waits until the process is gone; its VM must be, too.
    pub(super) async fn gone(&mut self) {
        let _ = (&mut self.task).await;
    }

    /// The places in it, if it is a pod's.
    pub(super) fn places(&self) -> Option<Result<Places, PlaceError>> {
        let (root, process) = self.pods.as_ref()?;
        Some(Places::new(root.clone(), *process))
    }

    /// What it complained of, on a line of its own, unless that was `told` already.
    pub(super) fn complaint(&self, told: &str) -> Option<String> {
        let words = self.said.words();
        let source = self.said.source.display();
        let new = !words.is_empty() && !told.contains(&words);
        new.then(|| format!("\n{source} can't be shared: {words}"))
    }
}

/// What such a process prints.
struct Said {
    source: PathBuf,
    file: File,
}

impl Said {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            source: self.source.clone(),
            file: self.file.try_clone()?,
        })
    }

    fn words(&self) -> String {
        let mut bytes = vec![0; MAX_WORDS];
        let got = self.file.read_at(&mut bytes, 0).unwrap_or(0);
        let end = bytes[..got].iter().position(|b| *b == 0).unwrap_or(got);
        let words = printable(&String::from_utf8_lossy(&bytes[..end]), MAX_WORDS);
        words.trim().to_owned()
    }
}

struct Watcher {
    child: Child,
    said: Said,
    exited: AsyncFd<OwnedFd>,
}

impl Watcher {
    async fn run(mut self, killer: Killer, mut ended: watch::Receiver<Option<Ended>>) {
        tokio::select! {
            _ = self.exited.readable() => {
                // It ends by itself when the VM does: then that is what there is to tell.
                let vm_ended = tokio::time::timeout(FOLLOWS / 10, wait_end(&mut ended)).await;
                if vm_ended.is_err() {
                    killer.kill_because(self.why());
                }
            }
            _ = wait_end(&mut ended) => {
                let _ = tokio::time::timeout(FOLLOWS, self.exited.readable()).await;
            }
        }
    }

    /// What there is to say about an end that nobody wanted.
    fn why(&mut self) -> String {
        let status = match self.child.wait() {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        let words = match self.said.words() {
            words if words.is_empty() => words,
            words => format!("; it said: {words}"),
        };
        let source = self.said.source.display();
        format!("the process that serves {source} to the guest is gone ({status}){words}")
    }
}

/// A listening socket that nobody else can find, and a connection to it.
fn socket_pair(path: &Path) -> io::Result<(UnixListener, OwnedFd)> {
    // A socket's path has room for 107 bytes only: by way of the directory's descriptor.
    let dir = path.parent().unwrap_or(Path::new("/"));
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    let opened = rustix::fs::open(dir, flags, rustix::fs::Mode::empty())?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let short = format!("/proc/self/fd/{}/{name}", opened.as_raw_fd());
    crate::files::gone_is_fine(std::fs::remove_file(path))?;
    let listener = UnixListener::bind(&short)?;
    let connected = UnixStream::connect(&short);
    std::fs::remove_file(path)?;
    Ok((listener, connected?.into()))
}
