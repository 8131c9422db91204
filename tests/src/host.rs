//! A host: its own store, state, home and configuration; commands run on it.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

use crate::command::{Finished, Running};
use crate::{leftovers, paths};

/// Archives that [`Host::with_images`] has loaded.
const IMAGES: [&str; 3] = ["busybox.tar", "configured.tar", "museum.tar"];

/// The longest that a guest may take to start, unless a test says otherwise.
const PATIENT: &str = "start_timeout = 120\n";

/// Where one test's casemate lives, apart from every other test's.
pub struct Host {
    dir: TempDir,
    user: Option<u32>,
    /// Nothing says where state and data are: they are where a user's are.
    plain: bool,
    /// It was looked at, and nothing was left; what came later is the test's last word.
    clean: AtomicBool,
}

impl Host {
    /// A host whose store is empty.
    pub fn new() -> Self {
        let dir = scratch_dir();
        for name in ["state", "data", "home/.config/casemate", "run"] {
            fs::create_dir_all(dir.path().join(name)).expect("the scratch directory is writable");
        }
        let host = Self {
            dir,
            user: None,
            plain: false,
            clean: AtomicBool::new(false),
        };
        host.configured("")
    }

    /// A host with the fixture images in its store.
    pub fn with_images() -> Self {
        let host = Self::new();
        copy(&loaded_store(), &host.data());
        host
    }

    /// The same host with state and data where an ordinary user has them, in an empty store.
    pub fn in_the_users_places(mut self) -> Self {
        self.plain = true;
        self
    }

    /// The same host for the user `uid`, who owns all of its directories and nothing else.
    pub fn of_user(mut self, uid: u32) -> Self {
        self.user = Some(uid);
        let mut chown = Command::new("chown");
        chown
            .args(["-R", &format!("{uid}:{uid}")])
            .arg(self.dir.path());
        assert!(
            chown.status().is_ok_and(|status| status.success()),
            "chown to {uid}"
        );
        self
    }

    /// Writes the user's configuration file.
    pub fn configured(self, toml: &str) -> Self {
        self.configure(toml);
        self
    }

    /// Replaces the user's configuration file.
    pub fn configure(&self, toml: &str) {
        // An emulated host on a busy machine may take its time, which is no failure.
        let patient = if toml.contains("start_timeout") {
            ""
        } else {
            PATIENT
        };
        // A network takes its time, and is the whole machine's: those who want one say so.
        let quiet = match toml.contains("network =") {
            true => "",
            false => "network = \"none\"\n",
        };
        let toml = format!("{patient}{quiet}{toml}");
        let file = self.dir.path().join("home/.config/casemate/config.toml");
        fs::write(file, toml).expect("the scratch directory is writable");
    }

    /// A directory of the test's own.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where sandboxes keep their state.
    pub fn state(&self) -> PathBuf {
        let place = if self.plain { "run/casemate" } else { "state" };
        self.dir.path().join(place)
    }

    /// Where the image store and the scratch disks are.
    pub fn data(&self) -> PathBuf {
        let place = if self.plain {
            "home/.local/share/casemate"
        } else {
            "data"
        };
        self.dir.path().join(place)
    }

    /// `casemate ARGS`, not yet started.
    pub fn command<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(paths::casemate());
        command.args(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self.prepare(&mut command);
        command
    }

    /// Gives `command` this host's environment and user.
    pub fn prepare(&self, command: &mut Command) {
        self.clean.store(false, Ordering::Relaxed);
        command
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("HOME", self.dir.path().join("home"))
            .env("XDG_RUNTIME_DIR", self.dir.path().join("run"))
            .current_dir(self.dir.path());
        if !self.plain {
            command
                .env("CASEMATE_STATE", self.state())
                .env("CASEMATE_DATA", self.data());
        }
        if let Some(uid) = self.user {
            command.uid(uid).gid(uid);
        }
    }

    /// Starts `casemate ARGS`.
    pub fn start<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Running {
        Running::start(self.command(args))
    }

    /// Runs `casemate ARGS` to its end with an empty stdin.
    pub fn casemate<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Finished {
        self.start(args).ends()
    }

    /// Runs `casemate run --rm ARGS` to its end.
    pub fn run<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Finished {
        self.start_run(args).ends()
    }

    /// Starts `casemate run --rm ARGS`.
    pub fn start_run<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Running {
        let args = args.into_iter().map(|arg| arg.as_ref().to_owned());
        self.start(
            ["run".to_owned(), "--rm".to_owned()]
                .into_iter()
                .chain(args),
        )
    }

    /// Runs a shell script in a fresh busybox sandbox.
    pub fn script(&self, script: &str) -> Finished {
        self.run(["busybox", "sh", "-c", script])
    }

    /// Processes of this host whose executable has that name, e.g. `casemate-vmm`.
    pub fn processes(&self, executable: &str) -> Vec<rustix::process::Pid> {
        leftovers::processes(self.dir.path(), Some(executable))
    }

    /// All processes of this host, each with its number and executable.
    pub fn all_processes(&self) -> Vec<String> {
        leftovers::named_processes(self.dir.path())
    }

    /// No sandbox, scratch disk or process is left, at once or very soon.
    #[track_caller]
    pub fn is_clean(&self) {
        let found = leftovers::after(
            Duration::from_secs(60),
            self.dir.path(),
            &self.state(),
            &self.data(),
        );
        assert!(found.is_empty(), "left behind: {found:#?}");
        self.clean.store(true, Ordering::Relaxed);
    }
}

impl Drop for Host {
    /// What a test left running ends, and gives back what it has of the machine: the next test looks there, too. No
    /// assertion here: a test may be failing already.
    fn drop(&mut self) {
        if *self.clean.get_mut() {
            return;
        }
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let left = leftovers::processes(self.dir.path(), None);
            if left.is_empty() || Instant::now() > deadline {
                break;
            }
            for pid in left {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        if self.state().exists() {
            // Any command tidies up after what died.
            let mut sweep = Command::new("timeout");
            sweep.arg("60").arg(paths::casemate()).args(["ps", "-aq"]);
            self.prepare(&mut sweep);
            let _ = sweep.output();
        }
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

/// A new directory below the scratch space that any user may enter.
fn scratch_dir() -> TempDir {
    use std::os::unix::fs::PermissionsExt;
    tempfile::Builder::new()
        .prefix("casemate-e2e-")
        .permissions(fs::Permissions::from_mode(0o755))
        .tempdir_in(paths::scratch())
        .expect("the scratch space is writable")
}

/// A store with the fixture images: made by the first test that wants one, for all processes that run tests.
fn loaded_store() -> PathBuf {
    let store = paths::scratch().join("images");
    let _lock = only_one("images.lock");
    let made_of = made_of();
    let label = store.join("made-of");
    if fs::read_to_string(&label).is_ok_and(|old| old == made_of) {
        return store.join("data");
    }
    let host = Host::new();
    for archive in IMAGES {
        let archive = paths::fixtures().join(archive);
        host.casemate(["load", "-i", &archive.to_string_lossy()])
            .succeeds();
    }
    let _ = fs::remove_dir_all(&store);
    fs::create_dir(&store).expect("the scratch space is writable");
    fs::rename(host.data(), store.join("data")).expect("one file system");
    fs::write(&label, made_of).expect("the scratch space is writable");
    store.join("data")
}

/// Waits until no other process of the tests has this lock, and keeps it until the file is closed.
pub fn only_one(name: &str) -> File {
    let file = File::create(paths::scratch().join(name)).expect("the scratch space is writable");
    flock(&file, FlockOperation::LockExclusive).expect("a lock on the scratch space");
    file
}

/// What a store comes of: the program and the archives, as they are now.
fn made_of() -> String {
    let archives = IMAGES.map(|name| paths::fixtures().join(name));
    let files = [paths::casemate()].into_iter().chain(archives);
    let state = |path: PathBuf| {
        let meta = fs::metadata(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        format!("{} {:?} {}\n", path.display(), meta.modified(), meta.len())
    };
    files.map(state).collect()
}

fn copy(from: &Path, to: &Path) {
    let mut cp = Command::new("cp");
    cp.arg("-a").arg(from.join(".")).arg(to);
    assert!(
        cp.status().is_ok_and(|status| status.success()),
        "cp of {}",
        from.display()
    );
}
