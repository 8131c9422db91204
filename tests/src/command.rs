//! A command that was started, and one that has ended.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// No command of these tests runs longer, even on an emulated KVM host under load.
const PATIENCE: Duration = Duration::from_secs(150);

/// Bytes of one stream so far, and whether it has ended.
#[derive(Default)]
struct Capture {
    state: Mutex<(Vec<u8>, bool)>,
    changed: Condvar,
}

impl Capture {
    fn follow(mut stream: impl Read + Send + 'static) -> (Arc<Self>, JoinHandle<()>) {
        let capture = Arc::new(Self::default());
        let shared = Arc::clone(&capture);
        let reader = std::thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                let read = stream.read(&mut buffer).unwrap_or(0);
                let mut state = shared.state.lock().expect("no reader panics");
                state.0.extend_from_slice(&buffer[..read]);
                state.1 = read == 0;
                shared.changed.notify_all();
                if read == 0 {
                    return;
                }
            }
        });
        (capture, reader)
    }

    /// Waits until the stream contains `text`; false once it ended or time ran out without it.
    fn wait_for(&self, text: &str, deadline: Instant) -> bool {
        let mut state = self.state.lock().expect("no reader panics");
        loop {
            if contains(&state.0, text.as_bytes()) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.1 || left.is_zero() {
                return false;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .expect("no reader panics")
                .0;
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.state.lock().expect("no reader panics").0.clone()
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    needle.is_empty()
        || haystack
            .windows(needle.len())
            .any(|window| window == needle)
}

/// A command under way; killed when dropped.
pub struct Running {
    child: Child,
    line: String,
    stdin: Option<ChildStdin>,
    stdout: (Arc<Capture>, JoinHandle<()>),
    stderr: (Arc<Capture>, JoinHandle<()>),
    deadline: Instant,
}

impl Running {
    /// Starts `command` with all three streams in the test's hands.
    pub fn start(mut command: Command) -> Self {
        let line = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {line}: {error}"));
        Self {
            stdin: child.stdin.take(),
            stdout: Capture::follow(child.stdout.take().expect("stdout is piped")),
            stderr: Capture::follow(child.stderr.take().expect("stderr is piped")),
            deadline: Instant::now() + PATIENCE,
            child,
            line,
        }
    }

    /// The process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Gives the command longer than usual, or less.
    pub fn within(mut self, patience: Duration) -> Self {
        self.deadline = Instant::now() + patience;
        self
    }

    /// Writes to the command's stdin and leaves it open.
    pub fn says(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        let stdin = self.stdin.as_mut().expect("stdin is still open");
        // A command that ended early closes its stdin: its exit code tells more than the broken pipe.
        let _ = stdin.write_all(bytes.as_ref()).and_then(|()| stdin.flush());
        self
    }

    /// Closes the command's stdin.
    pub fn hangs_up(&mut self) -> &mut Self {
        self.stdin = None;
        self
    }

    /// Waits until stdout holds `text`.
    pub fn prints(&mut self, text: &str) -> &mut Self {
        let found = self.stdout.0.wait_for(text, self.deadline);
        assert!(
            found,
            "{} never printed {text:?}{}",
            self.line,
            self.so_far()
        );
        self
    }

    /// Sends a signal to the command alone, not to its group.
    pub fn gets(&mut self, signal: Signal) -> &mut Self {
        kill_process(self.pid(), signal).expect("the command still runs");
        self
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Closes stdin and waits for the end.
    pub fn ends(mut self) -> Finished {
        self.stdin = None;
        let status = loop {
            match self.child.try_wait().expect("our own child") {
                Some(status) => break status,
                None if Instant::now() > self.deadline => {
                    let so_far = self.so_far();
                    panic!("{} did not end in time{so_far}", self.line)
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        // A process left behind may hold the pipes open for ever: the readers are not waited for without bound.
        let drained = Instant::now() + Duration::from_secs(5);
        while !(self.stdout.1.is_finished() && self.stderr.1.is_finished())
            && Instant::now() < drained
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        Finished {
            status,
            line: std::mem::take(&mut self.line),
            stdout: self.stdout.0.bytes(),
            stderr: self.stderr.0.bytes(),
        }
    }

    fn so_far(&self) -> String {
        shown(&self.stdout.0.bytes(), &self.stderr.0.bytes())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn shown(stdout: &[u8], stderr: &[u8]) -> String {
    let tail = |bytes: &[u8]| {
        String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(4000)..]).into_owned()
    };
    format!(
        "\n--- stdout\n{}\n--- stderr\n{}\n---",
        tail(stdout),
        tail(stderr)
    )
}

/// A command that has ended.
pub struct Finished {
    status: ExitStatus,
    line: String,
    /// All it wrote to stdout.
    pub stdout: Vec<u8>,
    /// All it wrote to stderr.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Exit code, 128+n for a death by signal n, as a shell tells it.
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// It ended with 0.
    #[track_caller]
    pub fn succeeds(&self) -> &Self {
        self.ends_with(0)
    }

    /// It ended with `code`.
    #[track_caller]
    pub fn ends_with(&self, code: i32) -> &Self {
        assert_eq!(
            self.code(),
            code,
            "exit code of {}{}",
            self.line,
            self.shown()
        );
        self
    }

    /// It ended with anything but 0, and said why.
    #[track_caller]
    pub fn fails(&self) -> &Self {
        assert_ne!(
            self.code(),
            0,
            "{} should have failed{}",
            self.line,
            self.shown()
        );
        assert!(
            !self.stderr.is_empty(),
            "{} failed without a word",
            self.line
        );
        assert!(
            !self.stderr_text().contains("panicked at"),
            "{} panicked{}",
            self.line,
            self.shown()
        );
        self
    }

    /// Stdout is exactly `text`.
    #[track_caller]
    pub fn prints(&self, text: &str) -> &Self {
        assert_eq!(self.text(), text, "stdout of {}{}", self.line, self.shown());
        self
    }

    /// Stdout has `text` somewhere.
    #[track_caller]
    pub fn mentions(&self, text: &str) -> &Self {
        assert!(
            self.text().contains(text),
            "{} did not print {text:?}{}",
            self.line,
            self.shown()
        );
        self
    }

    /// Stderr has `text` somewhere, whatever its case.
    #[track_caller]
    pub fn complains_of(&self, text: &str) -> &Self {
        let found = self
            .stderr_text()
            .to_lowercase()
            .contains(&text.to_lowercase());
        assert!(
            found,
            "{} did not complain of {text:?}{}",
            self.line,
            self.shown()
        );
        self
    }

    /// Stderr has none of it.
    #[track_caller]
    pub fn is_silent(&self) -> &Self {
        assert!(
            self.stderr.is_empty(),
            "{} complained{}",
            self.line,
            self.shown()
        );
        self
    }

    /// Stdout as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Stdout as text without the white space around it.
    pub fn word(&self) -> String {
        self.text().trim().to_owned()
    }

    /// Stderr as text.
    pub fn stderr_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    fn shown(&self) -> String {
        shown(&self.stdout, &self.stderr)
    }
}
