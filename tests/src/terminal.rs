//! A command on a real pseudo terminal.
#![allow(unsafe_code)] // pre_exec: the child takes the terminal as its controlling one before it becomes casemate

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

const PATIENCE: Duration = Duration::from_secs(120);

/// The far end of a terminal: what a person at it types and sees.
pub struct Terminal {
    child: Child,
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    seen: Vec<u8>,
}

impl Terminal {
    /// Starts `command` on a terminal of that size.
    pub fn start(mut command: Command, rows: u16, cols: u16) -> Self {
        let (near, far) = open(rows, cols).expect("a pseudo terminal");
        let stream = |fd: &OwnedFd| fd.try_clone().expect("a descriptor is free");
        command
            .stdin(stream(&far))
            .stdout(stream(&far))
            .stderr(stream(&far));
        // SAFETY: the closure only makes two system calls, both async-signal-safe, on the child's own stdin.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            });
        }
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        // Only the child holds the far end now, so that reading ends when it is gone.
        drop((command, far));
        let mut screen = File::from(stream(&near));
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = screen.read(&mut buffer) {
                if sender.send(buffer[..read].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            keyboard: File::from(near),
            screen: receiver,
            seen: Vec::new(),
        }
    }

    /// Types `text`; `\x03` is Ctrl-C, `\x04` Ctrl-D.
    pub fn types(&mut self, text: &str) -> &mut Self {
        self.keyboard
            .write_all(text.as_bytes())
            .expect("the terminal is open");
        self
    }

    /// Waits until the screen shows `text`, and forgets all up to its end.
    #[track_caller]
    pub fn shows(&mut self, text: &str) -> &mut Self {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self
                .seen
                .windows(text.len())
                .position(|window| window == text.as_bytes());
            if let Some(start) = found {
                self.seen.drain(..start + text.len());
                return self;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(_) => panic!(
                    "the terminal never showed {text:?}, only {:?}",
                    self.screen_text()
                ),
            }
        }
    }

    /// What it showed since the last match.
    pub fn screen_text(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    /// Changes the window's size; the kernel tells the command by SIGWINCH.
    pub fn resizes(&mut self, rows: u16, cols: u16) -> &mut Self {
        tcsetwinsize(self.keyboard.as_fd(), size(rows, cols)).expect("the terminal is open");
        self
    }

    /// Sends a signal to the command.
    pub fn gets(&mut self, signal: Signal) -> &mut Self {
        kill_process(Pid::from_child(&self.child), signal).expect("the command still runs");
        self
    }

    /// Waits for the end and gives the exit code, 128+n for a death by signal.
    #[track_caller]
    pub fn ends(mut self) -> i32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                return status
                    .code()
                    .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            }
            while let Ok(bytes) = self.screen.try_recv() {
                self.seen.extend(bytes);
            }
            assert!(
                Instant::now() < deadline,
                "still running; the screen: {:?}",
                self.screen_text()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn size(rows: u16, cols: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn open(rows: u16, cols: u16) -> std::io::Result<(OwnedFd, OwnedFd)> {
    let near = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&near)?;
    unlockpt(&near)?;
    let path = ptsname(&near, Vec::new())?;
    let far = rustix::fs::open(
        path,
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    tcsetwinsize(&near, size(rows, cols))?;
    Ok((near, far))
}
