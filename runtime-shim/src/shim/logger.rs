//! A program that takes a process's output: `binary://PATH?NAME=VALUE…`, as containerd's clients know it (containerd's
//! docs/runtime-v2.md, "Logging").
//!
//! It has standard output at descriptor 3, standard error at 4, and closes 5 once it is ready.

#![allow(unsafe_code)] // what runs between fork and exec

use super::stdio::StdioError;
use crate::fds;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::io::Interest;
use tokio::sync::oneshot;

const SCHEME: &str = "binary://";
/// How long one may take to get ready.
const READY: Duration = Duration::from_secs(30);
/// How long one may take to write down the last lines.
const FINISHES: Duration = Duration::from_secs(12);
/// Its descriptors.
const PLACES: [RawFd; 3] = [3, 4, 5];

/// Whose output it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Whose<'a> {
    /// containerd's namespace.
    pub(super) namespace: &'a str,
    /// The container's or the process's id.
    pub(super) id: &'a str,
}

/// A program that runs, and what it reads.
#[derive(Debug)]
pub(super) struct Logger {
    /// For standard output.
    pub(super) stdout: OwnedFd,
    /// For standard error.
    pub(super) stderr: OwnedFd,
    /// While it is there, more is to come.
    pub(super) more: oneshot::Sender<()>,
}

/// Whether a stream is to go to a program.
pub(super) fn is_meant(text: &str) -> bool {
    text.starts_with(SCHEME)
}

/// The program and its arguments: names and values of the query, in order.
fn words(uri: &str) -> Option<(String, Vec<String>)> {
    let rest = uri.strip_prefix(SCHEME)?;
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = decoded(path, false)?;
    let mut args = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        args.push(decoded(name, true)?);
        args.push(decoded(value, true)?);
    }
    (path.starts_with('/') && !path.contains('\0')).then_some((path, args))
}

/// Without what percent signs stand for (RFC 3986, 2.1), and in a query plus signs.
fn decoded(text: &str, query: bool) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                (digit()? * 16 + digit()?) as u8
            }
            b'+' if query => b' ',
            other => other,
        });
    }
    String::from_utf8(bytes)
        .ok()
        .filter(|text| !text.contains('\0'))
}

/// Starts the program that `uri` names, and waits until it is ready.
pub(super) async fn start(uri: &str, whose: Whose<'_>) -> Result<Logger, StdioError> {
    let (path, args) = words(uri).ok_or_else(|| StdioError::Unsupported(uri.to_owned()))?;
    let error = |source| StdioError::Open {
        path: uri.to_owned(),
        source,
    };
    let mut command = Command::new(path);
    command
        .args(args)
        .env_clear()
        .env("CONTAINER_ID", whose.id)
        .env("CONTAINER_NAMESPACE", whose.namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let (child, [stdout, stderr], ready) = spawn(command).map_err(error)?;
    let (more, no_more) = oneshot::channel();
    tokio::spawn(see_to_its_end(child, no_more));
    let closed = async {
        let ready = fds::watched(ready, Interest::READABLE)?;
        ready.readable().await.map(drop)
    };
    match tokio::time::timeout(READY, closed).await {
        Ok(closed) => closed.map_err(error)?,
        Err(_) => {
            let text = format!("the program was not ready within {READY:?}");
            return Err(error(io::Error::other(text)));
        }
    }
    Ok(Logger {
        stdout,
        stderr,
        more,
    })
}

/// The process; our ends of what it reads; what it closes.
fn spawn(mut command: Command) -> io::Result<(Child, [OwnedFd; 2], OwnedFd)> {
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
    let ((out, ours_out), (err, ours_err), (ready, tell)) = (pipe()?, pipe()?, pipe()?);
    // Not where they are to be, so that none takes another one's place.
    let apart = |fd: OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, PLACES[2] + 1);
    let theirs = [apart(out)?, apart(err)?, apart(tell)?];
    let numbers = [0, 1, 2].map(|n: usize| theirs[n].as_raw_fd());
    let place = move || {
        for (from, to) in numbers.into_iter().zip(PLACES) {
            // SAFETY: numbers only; what was there before is closed by the program's start anyway.
            if unsafe { libc::dup2(from, to) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: system calls only; the descriptors are open in the child as they are here.
    unsafe { command.pre_exec(place) };
    let child = fds::spawn_with(&mut command, &[])?;
    for fd in [&ours_out, &ours_err, &ready] {
        rustix::io::ioctl_fionbio(fd, true)?;
    }
    Ok((child, [ours_out, ours_err], ready))
}

/// Waits for its end, for a while only once there is nothing more for it.
async fn see_to_its_end(mut child: Child, no_more: oneshot::Receiver<()>) {
    let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::NONBLOCK).map_err(io::Error::from);
    let Ok(pidfd) = pidfd.and_then(|pidfd| fds::watched(pidfd, Interest::READABLE)) else {
        return;
    };
    tokio::select! {
        _ = pidfd.readable() => {}
        () = async {
            let _ = no_more.await;
            tokio::time::sleep(FINISHES).await;
        } => {
            let _ = pidfd_send_signal(pidfd.get_ref(), Signal::KILL);
            let _ = pidfd.readable().await;
        }
    }
    let _ = child.wait();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn words_are_the_path_and_what_the_query_says() {
        let said = |uri| words(uri).map(|(path, args)| (path, args.join("|")));
        let is = |path: &str, args: &str| Some((path.to_owned(), args.to_owned()));
        assert_eq!(said("binary:///bin/log"), is("/bin/log", ""));
        assert_eq!(
            said("binary:///a%20b?-f=/x%3Dy&-v=&s=a+b"),
            is("/a b", "-f|/x=y|-v||s|a b")
        );
        for odd in [
            "binary://",
            "binary://log",
            "/bin/log",
            "binary:///%f",
            "binary:///%00",
            "binary:///%ff",
        ] {
            assert_eq!(said(odd), None, "{odd}");
        }
    }

    #[tokio::test]
    async fn program_gets_both_outputs_and_who_they_are_of() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("log");
        let script = "#!/bin/sh\nexec 5>&-\necho \"$CONTAINER_NAMESPACE $CONTAINER_ID\" > \"$2\"\n/bin/cat <&3 >> \"$2\"\n/bin/cat <&4 >> \"$2\"\necho end >> \"$2\"\n";
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let log = dir.path().join("it");
        let uri = format!("binary://{}?to={}", program.display(), log.display());
        let whose = Whose {
            namespace: "k8s.io",
            id: "web",
        };
        let Logger {
            stdout,
            stderr,
            more,
        } = start(&uri, whose).await.unwrap();
        std::fs::File::from(stdout).write_all(b"out\n").unwrap();
        std::fs::File::from(stderr).write_all(b"err\n").unwrap();
        drop(more);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        loop {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            if text.ends_with("end\n") {
                assert_eq!(text, "k8s.io web\nout\nerr\nend\n");
                break;
            }
            assert!(tokio::time::Instant::now() < deadline, "{text:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn program_that_is_not_there_is_named() {
        let whose = Whose {
            namespace: "n",
            id: "i",
        };
        let error = start("binary:///no/such", whose).await.unwrap_err();
        assert!(error.to_string().contains("/no/such"), "{error}");
    }
}
