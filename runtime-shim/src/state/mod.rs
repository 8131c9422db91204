//! The directory of each sandbox, and the tidying up after those that died.
//!
//! `STATE/NAMESPACE/ID/` holds everything of one sandbox. Its `lock` file is
//! locked for as long as someone looks after it: the command line takes the lock
//! with the directory and hands the same open file to the shim, so that the lock
//! falls exactly when both are gone. Whoever then gets the lock tidies up by the
//! journal. While a directory is made or unmade its name says by which process, so
//! that nobody finds half a sandbox. Lock order: one sandbox, then the names, never two of either.

mod lock;
mod record;
#[cfg(test)]
mod tests;

pub use lock::is_locked;
pub use record::{Container, Meta, MountPoint, State, Status};

use crate::cgroup;
use crate::events::{Event, Events, Kind};
use crate::files::{self, gone_is_fine};
use crate::journal::{self, Journal, Taken};
use crate::network;
use crate::restart::Policy;
use crate::rpc::KILLED;
use crate::volume::{self, VolumeError};
use lock::{Lock, lock, new_lock, open_lock};
use rustix::fs::{FlockOperation, OFlags};
use serde::Serialize;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The namespace that the command line uses.
pub const DEFAULT_NAMESPACE: &str = "default";
/// Holds a file for each name, with the id of its owner.
const NAMES: &str = "names";
/// No metadata of ours is larger.
const MAX_META: u64 = 4 << 20;
/// Is there once the container shall end.
const ENDING: &str = "ending";
/// Serves the Task API.
pub const SOCKET: &str = "task.sock";
/// Making or unmaking a directory takes no longer: its process's number is another's by now.
const IN_PASSING: Duration = Duration::from_secs(60);
/// What an ended container's shim takes to give back what it ran on, with the slowest of CNI plugins.
const GIVEN_BACK: Duration = network::cni::PATIENCE.saturating_mul(2);
/// What a killed process takes to go.
const GOES: Duration = Duration::from_secs(30);

/// What went wrong with the state directory.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file operation failed.
    #[error("can't {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Another container has the name.
    #[error(
        "the name {name:?} is in use by container {id}; remove it with `casemate rm`, or use another name"
    )]
    NameInUse {
        /// The name.
        name: String,
        /// Its owner.
        id: String,
    },
    /// No container by that name or id.
    #[error("no such container: {0}")]
    NotFound(String),
    /// The prefix of an id fits several.
    #[error("{0:?} is the beginning of more than one container's id; give more of it")]
    Ambiguous(String),
    /// Someone else's directory where ours should be.
    #[error(
        "{0} belongs to another user or may be written by others; remove it, or set CASEMATE_STATE"
    )]
    Untrusted(PathBuf),
    /// The container is running.
    #[error("container {0} is running; stop it first, or use --force")]
    Running(String),
    /// Somebody else is at it.
    #[error(
        "container {0} is still being started or ended by another process after {1:?}; try again"
    )]
    Busy(String, Duration),
    /// What a sandbox has of the network stays.
    #[error("can't give back what container {id} has of the network")]
    Network {
        /// Whose it is.
        id: String,
        /// The cause.
        source: network::ReleaseError,
    },
    /// A volume that goes with a container can't be removed.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// A kill didn't help.
    #[error("container {0} still runs {1:?} after its processes were killed")]
    Stuck(String, Duration),
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StateError + 'a {
    move |source| StateError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

impl Container {
    /// Writes down that the container shall end, so that it doesn't start again by itself.
    pub fn mark_ending(&self) -> Result<(), StateError> {
        let path = self.dir.join(ENDING);
        std::fs::write(&path, "").map_err(io_error("write", &path))
    }
}

/// All sandboxes of a namespace.
#[derive(Debug)]
pub struct StateRoot {
    dir: PathBuf,
    /// The directory was just made: nothing of before this boot is known.
    pub fresh: bool,
}

/// One sandbox's directory, held by its lock.
#[derive(Debug)]
pub struct SandboxDir {
    path: PathBuf,
    lock: OwnedFd,
}

fn make_private_dir(path: &Path) -> Result<bool, StateError> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(io_error("create directory", path)(e)),
    }
}

/// A directory below a shared one such as /tmp may have been planted there.
fn check_private(path: &Path) -> Result<(), StateError> {
    let stat = rustix::fs::lstat(path).map_err(|e| io_error("look at", path)(e.into()))?;
    let is_dir = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir();
    let ours = stat.st_uid == rustix::process::geteuid().as_raw();
    if is_dir && ours && stat.st_mode & 0o022 == 0 {
        Ok(())
    } else {
        Err(StateError::Untrusted(path.to_owned()))
    }
}

impl StateRoot {
    /// Opens the state of a namespace, making its directories.
    pub fn open(state_dir: &Path, namespace: &str) -> Result<Self, StateError> {
        let dir = state_dir.join(namespace);
        if let Some(parent) = state_dir.parent() {
            std::fs::create_dir_all(parent).map_err(io_error("create directory", parent))?;
        }
        make_private_dir(state_dir)?;
        check_private(state_dir)?;
        let fresh = make_private_dir(&dir)?;
        if fresh {
            make_private_dir(&dir.join(NAMES))?;
        }
        Ok(Self { dir, fresh })
    }

    /// The namespace's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Changes what happens when a container ends.
    pub fn set_restart(&self, container: &Container, restart: Policy) -> Result<(), StateError> {
        let meta = Meta {
            restart,
            ..container.meta.clone()
        };
        write_json(&container.dir, "meta.json", &meta)
    }

    /// Tells what happened to a container.
    pub fn tell<const N: usize>(&self, meta: &Meta, action: &str, more: [(&str, String); N]) {
        tell(&self.dir, meta, action, more);
    }

    /// Where a sandbox's directory is or would be.
    pub fn path_of(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    /// Makes a sandbox's directory, locked, and gives it a name.
    pub fn create(&self, meta: &Meta) -> Result<SandboxDir, StateError> {
        let path = self.path_of(&meta.id);
        if path.exists() {
            return Err(io_error("create directory", &path)(
                io::ErrorKind::AlreadyExists.into(),
            ));
        }
        let passing = passing_name(&path);
        make_private_dir(&passing)?;
        let lock = new_lock(&passing)
            .and_then(|lock| {
                std::fs::rename(&passing, &path).map_err(io_error("rename", &passing))?;
                Ok(lock)
            })
            .inspect_err(|_| {
                let _ = std::fs::remove_dir_all(&passing);
            })?;
        let dir = SandboxDir { path, lock };
        if let Err(error) = self.fill(&dir, meta) {
            // The first error is the one to tell.
            let _ = dir.remove();
            return Err(error);
        }
        Ok(dir)
    }

    fn fill(&self, dir: &SandboxDir, meta: &Meta) -> Result<(), StateError> {
        write_json(&dir.path, "meta.json", meta)?;
        let name_file = self.dir.join(NAMES).join(&meta.name);
        dir.journal()
            .record(&Taken::Name {
                path: name_file.clone(),
                id: meta.id.clone(),
            })
            .map_err(io_error("write the journal in", &dir.path))?;
        self.claim_name(&name_file, meta)
    }

    fn claim_name(&self, file: &Path, meta: &Meta) -> Result<(), StateError> {
        let names = self.dir.join(NAMES);
        // Held for a few file operations, by whoever claims a name.
        let claims = open_lock(&names.join(".lock"), OFlags::CREATE)?;
        rustix::fs::flock(&claims, FlockOperation::LockExclusive)
            .map_err(|e| io_error("lock", &names)(e.into()))?;
        match std::fs::read_to_string(file) {
            Ok(owner) if !owner.is_empty() && self.path_of(&owner).exists() => {
                return Err(StateError::NameInUse {
                    name: meta.name.clone(),
                    id: owner,
                });
            }
            // Its owner is gone: the name is free.
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io_error("read", file)(e)),
        }
        let whole = names.join(".new");
        std::fs::write(&whole, &meta.id).map_err(io_error("write", &whole))?;
        std::fs::rename(&whole, file).map_err(io_error("write", file))
    }

    /// Gives a container another name.
    pub fn rename(&self, container: &Container, name: &str) -> Result<(), StateError> {
        let names = self.dir.join(NAMES);
        let meta = Meta {
            name: name.to_owned(),
            ..container.meta.clone()
        };
        let file = names.join(name);
        let taken = Taken::Name {
            path: file.clone(),
            id: meta.id.clone(),
        };
        Journal::in_dir(&container.dir)
            .record(&taken)
            .map_err(io_error("write the journal in", &container.dir))?;
        self.claim_name(&file, &meta)?;
        write_json(&container.dir, "meta.json", &meta)?;
        // A name that leads nowhere is free anyway.
        let _ = std::fs::remove_file(names.join(&container.meta.name));
        Ok(())
    }

    /// What is in the namespace's directory: sandboxes by their ids, and those made or unmade right now.
    fn entries(&self) -> Result<Vec<String>, StateError> {
        let entries = std::fs::read_dir(&self.dir).map_err(io_error("list", &self.dir))?;
        Ok(entries
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .filter(|name| name != NAMES)
            .collect())
    }

    /// Tidies up after every sandbox that nobody looks after any more.
    ///
    /// Costs one directory read when there is none. What can't be tidied up stays, and is told.
    pub fn reclaim_dead(&self) -> Result<Vec<StateError>, StateError> {
        let reclaim = |name: String| -> Result<(), StateError> {
            let path = self.path_of(&name);
            if is_passing(&name) {
                return match is_abandoned(&path, &name) {
                    true => remove_all(&path),
                    false => Ok(()),
                };
            }
            match lock(&path)? {
                Lock::Ours(lock) => SandboxDir { path, lock }.reclaim(),
                Lock::Theirs => Ok(()),
                Lock::Missing => remove_all(&path),
            }
        };
        let entries = self.entries()?;
        Ok(entries
            .into_iter()
            .filter_map(|name| reclaim(name).err())
            .collect())
    }

    /// All containers, newest first.
    pub fn containers(&self) -> Result<Vec<Container>, StateError> {
        let mut all: Vec<Container> = self
            .entries()?
            .iter()
            .filter(|name| !is_passing(name))
            .filter_map(|id| self.container(id))
            .collect();
        all.sort_by_key(|c| std::cmp::Reverse(c.meta.created));
        Ok(all)
    }

    fn container(&self, id: &str) -> Option<Container> {
        let dir = self.path_of(id);
        Some(Container {
            meta: read_json(&dir, "meta.json")?,
            status: read_json(&dir, "status.json").unwrap_or_default(),
            dir,
        })
    }

    /// The name of a container that was made with a volume, other than that of the directory `but`.
    pub fn user_of_volume(&self, volume: &str, but: Option<&Path>) -> Option<String> {
        let all = self.containers().unwrap_or_default();
        let user = all
            .into_iter()
            .find(|c| c.meta.uses_volume(volume) && Some(c.dir.as_path()) != but);
        user.map(|container| container.meta.name)
    }

    /// The container of a name, an id or the unambiguous beginning of an id.
    pub fn find(&self, name_or_id: &str) -> Result<Container, StateError> {
        let all = self.containers()?;
        if let Some(exact) = all
            .iter()
            .find(|c| c.meta.name == name_or_id || c.meta.id == name_or_id)
        {
            return Ok(exact.clone());
        }
        let mut prefixed = all
            .into_iter()
            .filter(|c| !name_or_id.is_empty() && c.meta.id.starts_with(name_or_id));
        match (prefixed.next(), prefixed.next()) {
            (Some(one), None) => Ok(one),
            (Some(_), Some(_)) => Err(StateError::Ambiguous(name_or_id.to_owned())),
            (None, _) => Err(StateError::NotFound(name_or_id.to_owned())),
        }
    }

    /// What a container that ended left; `None` if it is gone or goes on.
    pub fn exit_code(&self, id: &str) -> Option<u32> {
        let status = self.container(id)?.status;
        (!status.state.is_alive()).then_some(status.exit_code)
    }

    /// Takes over a container that nobody looks after; one that just ended is waited for.
    pub fn take(&self, container: &Container) -> Result<SandboxDir, StateError> {
        let deadline = Instant::now() + GIVEN_BACK;
        loop {
            match lock(&container.dir)? {
                Lock::Ours(lock) => {
                    let path = container.dir.clone();
                    return Ok(SandboxDir { path, lock });
                }
                Lock::Missing => return Err(StateError::NotFound(container.meta.name.clone())),
                Lock::Theirs if Instant::now() > deadline => {
                    return Err(StateError::Busy(container.meta.id.clone(), GIVEN_BACK));
                }
                Lock::Theirs => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Removes a container and everything it holds. With `force`, a running one too; with `volumes`, also those that
    /// were made for it and have no name.
    pub fn remove(
        &self,
        container: &Container,
        force: bool,
        volumes: bool,
    ) -> Result<(), StateError> {
        let id = &container.meta.id;
        let begun = Instant::now();
        loop {
            match lock(&container.dir)? {
                Lock::Ours(lock) => {
                    let path = container.dir.clone();
                    let dir = SandboxDir { path, lock };
                    if volumes {
                        dir.remove_volumes(&dir.journal().read().unwrap_or_default())?;
                    }
                    return dir.remove();
                }
                Lock::Missing => return remove_all(&container.dir),
                Lock::Theirs => {}
            }
            // One that ended is still being given back what it ran on.
            let ended = read_json::<Status>(&container.dir, "status.json")
                .is_some_and(|status| status.state == State::Exited);
            if !force && !ended {
                return Err(StateError::Running(id.clone()));
            }
            if force && begun.elapsed() > GOES {
                return Err(StateError::Stuck(id.clone(), GOES));
            }
            if begun.elapsed() > GIVEN_BACK {
                return Err(StateError::Busy(id.clone(), GIVEN_BACK));
            }
            if force {
                let journal = Journal::in_dir(&container.dir);
                journal::kill_processes(&journal.read().unwrap_or_default());
            }
            // The lock falls with the killed processes: only their exit is waited for.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl SandboxDir {
    /// A directory whose lock the parent process handed over.
    pub fn inherited(path: PathBuf, lock: OwnedFd) -> Self {
        Self { path, lock }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open, locked file to hand to the shim.
    pub fn lock_fd(&self) -> &OwnedFd {
        &self.lock
    }

    /// What it has taken.
    pub fn journal(&self) -> Journal {
        Journal::in_dir(&self.path)
    }

    /// Whether the container shall end ([`Container::mark_ending`]).
    pub fn is_ending(&self) -> bool {
        self.path.join(ENDING).exists()
    }

    /// Makes it as if it had never run: for another start.
    pub fn forget_run(&self) -> Result<(), StateError> {
        for name in [ENDING, SOCKET] {
            let path = self.path.join(name);
            gone_is_fine(std::fs::remove_file(&path)).map_err(io_error("remove", &path))?;
        }
        self.release()?;
        self.journal()
            .forget_processes(|_| true)
            .map_err(io_error("write the journal in", &self.path))
    }

    /// Gives back what a container that has ended needs no more: its control group and its network.
    fn release(&self) -> Result<(), StateError> {
        cgroup::release(&self.journal())
            .map_err(io_error("give back what is taken by", &self.path))?;
        network::release(&self.journal()).map_err(|source| {
            let name = self.path.file_name().unwrap_or_default();
            let id = name.to_string_lossy().into_owned();
            StateError::Network { id, source }
        })
    }

    /// Replaces the status.
    pub fn write_status(&self, status: &Status) -> Result<(), StateError> {
        write_json(&self.path, "status.json", status)
    }

    /// What it is; `None` for a sandbox that is not the command line's.
    pub fn meta(&self) -> Option<Meta> {
        read_json(&self.path, "meta.json")
    }

    /// Tells what happened to it.
    pub fn tell<const N: usize>(&self, action: &str, more: [(&str, String); N]) {
        if let (Some(meta), Some(namespace)) = (self.meta(), self.path.parent()) {
            tell(namespace, &meta, action, more);
        }
    }

    /// The last status written.
    pub fn status(&self) -> Status {
        read_json(&self.path, "status.json").unwrap_or_default()
    }

    /// Ends what is left of a sandbox whose keeper died; keeps a container that is to be kept.
    fn reclaim(self) -> Result<(), StateError> {
        let taken = self.journal().read().unwrap_or_default();
        journal::kill_processes(&taken);
        let meta: Option<Meta> = read_json(&self.path, "meta.json");
        // The first status comes once it is whole.
        let status: Option<Status> = read_json(&self.path, "status.json");
        match (meta, status) {
            (Some(meta), Some(status)) if !meta.auto_remove || status.state == State::Created => {
                if status.state.is_alive() {
                    self.write_status(&Status {
                        state: State::Exited,
                        pid: 0,
                        exit_code: KILLED,
                        error: "the processes that ran it were killed".into(),
                        ..status
                    })?;
                }
                self.release()
            }
            _ => self.remove(),
        }
    }

    /// Gives everything back and removes the directory. Volumes without a name go with a container that is not
    /// whole yet, or was to go away with its end; others' stay.
    pub fn remove(&self) -> Result<(), StateError> {
        let taken = self.journal().read().unwrap_or_default();
        journal::kill_processes(&taken);
        self.release()?;
        if taken.iter().any(|t| matches!(t, Taken::Volume { .. })) {
            let meta: Option<Meta> = read_json(&self.path, "meta.json");
            let is_whole = self.path.join("status.json").exists();
            if !is_whole || meta.is_some_and(|meta| meta.auto_remove) {
                self.remove_volumes(&taken)?;
            }
        }
        journal::delete_files(&taken).map_err(io_error(
            "delete the files that the journal names in",
            &self.path,
        ))?;
        self.tell("destroy", []);
        remove_all(&self.path)
    }
}

impl SandboxDir {
    /// Removes the volumes that were made for this container, unless others use them.
    fn remove_volumes(&self, taken: &[Taken]) -> Result<(), StateError> {
        let dirs: Vec<PathBuf> = taken
            .iter()
            .filter_map(|taken| match taken {
                Taken::Volume { path } => Some(path.clone()),
                _ => None,
            })
            .collect();
        let Some(all) = self.path.parent().filter(|_| !dirs.is_empty()) else {
            return Ok(());
        };
        let root = StateRoot {
            dir: all.to_owned(),
            fresh: false,
        };
        let needed_by = |volume: &str| root.user_of_volume(volume, Some(&self.path));
        Ok(volume::remove_unused(&dirs, needed_by)?)
    }
}

fn tell<const N: usize>(namespace: &Path, meta: &Meta, action: &str, more: [(&str, String); N]) {
    let mut event = Event::now(Kind::Container, action, &meta.id, more);
    let attributes = &mut event.actor.attributes;
    attributes.extend(meta.labels.clone());
    attributes.insert("image".into(), meta.image.clone());
    attributes.insert("name".into(), meta.name.clone());
    Events::of(namespace).tell(&event);
}

/// Beside `dir`, and nobody's but this process's.
fn passing_name(dir: &Path) -> PathBuf {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let name = name.trim_start_matches('.');
    dir.with_file_name(format!(".{}-{name}", std::process::id()))
}

/// Whether a directory is one that [`passing_name`] names.
fn is_passing(name: &str) -> bool {
    name.starts_with('.')
}

/// Whether the process that was making or unmaking the directory is gone.
fn is_abandoned(dir: &Path, name: &str) -> bool {
    let pid = name.trim_start_matches('.').split('-').next();
    let Some(pid) = pid.and_then(|pid| pid.parse().ok()) else {
        return false;
    };
    let changed = std::fs::symlink_metadata(dir).and_then(|m| m.modified());
    changed.is_ok_and(|at| {
        let old = at.elapsed().is_ok_and(|age| age > IN_PASSING);
        old || journal::start_time(pid).is_none()
    })
}

fn remove_all(dir: &Path) -> Result<(), StateError> {
    let passing = passing_name(dir);
    gone_is_fine(std::fs::rename(dir, &passing)).map_err(io_error("rename", dir))?;
    gone_is_fine(std::fs::remove_dir_all(&passing)).map_err(io_error("remove", dir))
}

/// Whether somebody looks after the container of this directory and it has not ended for good.
pub fn is_looked_after(dir: &Path) -> bool {
    let status: Option<Status> = read_json(dir, "status.json");
    // One that is being started has no status yet.
    status.is_none_or(|status| status.state != State::Exited) && is_locked(dir)
}

fn write_json(dir: &Path, name: &str, value: &impl Serialize) -> Result<(), StateError> {
    let path = dir.join(name);
    let bytes = serde_json::to_vec(value).map_err(|e| io_error("write", &path)(e.into()))?;
    files::replace(&path, &bytes).map_err(io_error("write", &path))
}

fn read_json<T: serde::de::DeserializeOwned>(dir: &Path, name: &str) -> Option<T> {
    let bytes = files::read(&dir.join(name), MAX_META).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// Nanoseconds since the epoch.
pub fn now_ns() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map(|d| d.as_nanos() as u64)
        .unwrap_or_default()
}
