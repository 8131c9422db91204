//! Named volumes: private disks that outlive the containers that use them.
//!
//! ```text
//! DATA/volumes/NAME/volume.json   what it is
//! DATA/volumes/NAME/disk.img      an ext4 file system, sparse; locked for as long as a VMM has it open
//! DATA/volumes/.lock              held while a volume appears or goes
//! DATA/volumes/.new-…             one that is being made, locked by who makes it
//! DATA/volumes/.old               one that is being removed, by whoever holds `.lock`
//! ```
//!
//! Who is to write to a volume locks its disk exclusively, who reads shares the lock. The lock belongs to the open
//! file that the VMM inherits, so it falls when the last process that could write is gone, and not before.
//! Lock order: a sandbox, then `.lock`, then disks.

use crate::files::{self, gone_is_fine};
use crate::scratch::{self, Kind, ScratchError};
use crate::state::now_ns;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The disk in a volume's directory.
const DISK: &str = "disk.img";
/// Says what the volume is.
const RECORD: &str = "volume.json";
/// No record of ours is larger.
const MAX_RECORD: u64 = 1 << 20;
/// How the directory of a volume in the making begins.
const UNFINISHED: &str = ".new-";
/// As long as a container's name.
const MAX_NAME: usize = 128;
/// What a VMM that was killed needs to be gone.
const LAST_USER_GOES: Duration = Duration::from_secs(2);

/// Why something can't be done with a volume.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// It could lead out of the volumes' directory.
    #[error(
        "{0:?} is not a volume name; it takes 2 to {MAX_NAME} of [a-zA-Z0-9_.-], a letter or digit first. \
         A directory of the host is given by an absolute path"
    )]
    Name(String),
    /// There is none.
    #[error("no such volume: {0}")]
    NotFound(String),
    /// There is one, and it is another.
    #[error("the volume {name} exists with a size of {have} bytes, and {want} were asked for")]
    OtherSize {
        /// Its name.
        name: String,
        /// Its size.
        have: u64,
        /// The size asked for.
        want: u64,
    },
    /// There is one already.
    #[error("the volume {0} exists already")]
    Exists(String),
    /// Another process makes one of that name right now.
    #[error("the volume {0} is being made by another process; try again")]
    BeingMade(String),
    /// Somebody has its disk open.
    #[error("the volume {0} is in use")]
    InUse(String),
    /// A container, which need not run, was made with it.
    #[error("the volume {name} is in use by container {container}")]
    Needed {
        /// Its name.
        name: String,
        /// The container's.
        container: String,
    },
    /// The disk can't be made.
    #[error("can't make the volume {name}")]
    Disk {
        /// The volume.
        name: String,
        /// The cause.
        source: ScratchError,
    },
    /// Its record can't be understood.
    #[error("{path} is not the record of a volume: {message}")]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
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
}

type Result<T> = std::result::Result<T, VolumeError>;

fn io_error<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> VolumeError + 'a {
    move |source| VolumeError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// What is written down about a volume, once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// Bytes that its disk has, file system included.
    pub size: u64,
    /// Nanoseconds since the epoch.
    pub created: u64,
    /// The user's.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Made for one container and without a name of the user's.
    #[serde(default)]
    pub anonymous: bool,
}

/// A volume.
#[derive(Debug, Clone)]
pub struct Volume {
    /// What it is.
    pub record: Record,
    /// Its directory.
    pub dir: PathBuf,
}

/// What a new volume is to be.
#[derive(Debug, Clone, Default)]
pub struct New {
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// The user's.
    pub labels: BTreeMap<String, String>,
    /// Nobody named it.
    pub anonymous: bool,
}

/// Who may use a volume's disk at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Others that read.
    Shared,
    /// Nobody else.
    Exclusive,
}

/// All volumes.
#[derive(Debug, Clone)]
pub struct Volumes {
    data_dir: PathBuf,
    dir: PathBuf,
}

/// A volume in the making; what is not finished goes away.
struct Unfinished {
    dir: PathBuf,
    finished: bool,
    _lock: OwnedFd,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.finished {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// A volume's name becomes part of paths.
pub fn check_name(name: &str) -> Result<()> {
    let first = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
    if first && (2..=MAX_NAME).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    Err(VolumeError::Name(name.chars().take(MAX_NAME).collect()))
}

/// Where the disk of the volume in `dir` is.
pub fn disk_in(dir: &Path) -> PathBuf {
    dir.join(DISK)
}

/// The volume's name if `disk` is the disk of one.
pub fn name_of_disk(disk: &Path) -> Option<&str> {
    let dir = disk.parent().filter(|_| disk.ends_with(DISK))?;
    dir.file_name()?.to_str()
}

/// Opens a disk as a sandbox will have it, and locks it for as long as it is open anywhere.
pub fn open_locked(disk: &Path, access: Access) -> io::Result<OwnedFd> {
    let (write, lock) = match access {
        Access::Shared => (OFlags::RDONLY, FlockOperation::NonBlockingLockShared),
        Access::Exclusive => (OFlags::RDWR, FlockOperation::NonBlockingLockExclusive),
    };
    let flags = write | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = rustix::fs::open(disk, flags, Mode::empty())?;
    let deadline = Instant::now() + LAST_USER_GOES;
    loop {
        match rustix::fs::flock(fd.as_fd(), lock) {
            Ok(()) => return Ok(fd),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

impl Volumes {
    /// The volumes of a data directory; nothing is made yet.
    pub fn of(data_dir: &Path) -> Self {
        Self {
            data_dir: data_dir.to_owned(),
            dir: data_dir.join("volumes"),
        }
    }

    /// Where the volume of that name is or would be.
    pub fn dir_of(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The volume of that name, if there is one.
    pub fn find(&self, name: &str) -> Result<Option<Volume>> {
        check_name(name)?;
        let dir = self.dir_of(name);
        match std::fs::symlink_metadata(&dir) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => {
                let source = io::ErrorKind::NotADirectory.into();
                return Err(io_error("use the volume", &dir)(source));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io_error("look at", &dir)(e)),
        }
        let path = dir.join(RECORD);
        let bytes = files::read(&path, MAX_RECORD).map_err(io_error("read", &path))?;
        let record = serde_json::from_slice(&bytes).map_err(|e| VolumeError::Record {
            path,
            message: e.to_string(),
        })?;
        Ok(Some(Volume { record, dir }))
    }

    /// The same, which must be there.
    pub fn require(&self, name: &str) -> Result<Volume> {
        let found = self.find(name)?;
        found.ok_or_else(|| VolumeError::NotFound(name.to_owned()))
    }

    /// All volumes by their names, and what is wrong with those that can't be read.
    pub fn list(&self) -> Result<(Vec<Volume>, Vec<VolumeError>)> {
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Default::default()),
            Err(e) => return Err(io_error("list", &self.dir)(e)),
        };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| check_name(name).is_ok())
            .collect();
        names.sort();
        let (mut all, mut errors) = (Vec::new(), Vec::new());
        for name in names {
            match self.find(&name) {
                Ok(found) => all.extend(found),
                Err(error) => errors.push(error),
            }
        }
        Ok((all, errors))
    }

    /// Waits until nobody else adds or removes a volume, and sweeps away what killed ones left.
    fn lock(&self) -> Result<OwnedFd> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(io_error("create directory", &self.dir))?;
        let path = self.dir.join(".lock");
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let lock = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|e| io_error("open", &path)(e.into()))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)
            .map_err(|e| io_error("lock", &path)(e.into()))?;
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let made = name.as_encoded_bytes().starts_with(UNFINISHED.as_bytes());
            let left = name == ".old" || made && lock_directory(&entry.path()).is_ok();
            if left {
                let path = entry.path();
                gone_is_fine(std::fs::remove_dir_all(&path)).map_err(io_error("remove", &path))?;
            }
        }
        Ok(lock)
    }

    /// The volume of that name, made if there is none.
    pub fn ensure(&self, new: &New) -> Result<Volume> {
        loop {
            let found = {
                let _lock = self.lock()?;
                self.find(&new.name)?
            };
            match found {
                Some(volume) => return Ok(volume),
                None => match self.create(new, None) {
                    // Another one was quicker.
                    Err(VolumeError::Exists(_)) => {}
                    Err(VolumeError::BeingMade(_)) => {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    other => return other,
                },
            }
        }
    }

    /// Makes a volume; with `from`, with the content and the size of that one, which nobody may be writing to.
    pub fn create(&self, new: &New, from: Option<&Volume>) -> Result<Volume> {
        check_name(&new.name)?;
        let mut made = {
            let _lock = self.lock()?;
            let dir = self.dir.join(format!("{UNFINISHED}{}", new.name));
            match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(VolumeError::BeingMade(new.name.clone()));
                }
                Err(e) => return Err(io_error("create directory", &dir)(e)),
            }
            let lock = lock_directory(&dir).map_err(io_error("lock", &dir))?;
            Unfinished {
                dir,
                finished: false,
                _lock: lock,
            }
        };
        let record = self.fill(&made.dir, new, from)?;
        let dir = self.dir_of(&record.name);
        let _lock = self.lock()?;
        // A directory is not renamed over one that has something in it.
        std::fs::rename(&made.dir, &dir).map_err(|e| match e.kind() {
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => {
                VolumeError::Exists(record.name.clone())
            }
            _ => io_error("rename to", &dir)(e),
        })?;
        made.finished = true;
        sync(&self.dir)?;
        Ok(Volume { record, dir })
    }

    fn fill(&self, made: &Path, new: &New, from: Option<&Volume>) -> Result<Record> {
        let disk = made.join(DISK);
        let disk_error = |source| VolumeError::Disk {
            name: new.name.clone(),
            source,
        };
        match from {
            None => scratch::create(Kind::Volume, &self.data_dir, new.size, &disk)
                .map_err(disk_error)?,
            Some(from) => {
                let original = disk_in(&from.dir);
                let _reads =
                    open_locked(&original, Access::Shared).map_err(|e| match e.kind() {
                        io::ErrorKind::WouldBlock => VolumeError::InUse(from.record.name.clone()),
                        _ => io_error("open", &original)(e),
                    })?;
                scratch::copy(&original, &disk).map_err(disk_error)?;
            }
        }
        let size = std::fs::metadata(&disk).map_err(io_error("look at", &disk))?;
        let record = Record {
            name: new.name.clone(),
            size: size.len(),
            created: now_ns(),
            labels: new.labels.clone(),
            anonymous: new.anonymous,
        };
        let path = made.join(RECORD);
        let bytes = serde_json::to_vec(&record).map_err(|e| io_error("write", &path)(e.into()))?;
        std::fs::write(&path, bytes).map_err(io_error("write", &path))?;
        // What a guest syncs must be found again after a crash of the host: so must the way to it.
        for path in [disk.as_path(), &path, made] {
            sync(path)?;
        }
        Ok(record)
    }

    /// Removes a volume whose disk nobody has open, and that no container needs as `needed_by` tells.
    pub fn remove(&self, name: &str, needed_by: impl Fn(&str) -> Option<String>) -> Result<Volume> {
        let _lock = self.lock()?;
        let volume = self.require(name)?;
        if let Some(container) = needed_by(name) {
            let name = name.to_owned();
            return Err(VolumeError::Needed { name, container });
        }
        let disk = disk_in(&volume.dir);
        let _nobodys = match open_locked(&disk, Access::Exclusive) {
            Ok(lock) => Some(lock),
            // Half a volume can go.
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Err(VolumeError::InUse(name.to_owned()));
            }
            Err(e) => return Err(io_error("open", &disk)(e)),
        };
        let old = self.dir.join(".old");
        std::fs::rename(&volume.dir, &old).map_err(io_error("rename", &volume.dir))?;
        std::fs::remove_dir_all(&old).map_err(io_error("remove", &old))?;
        Ok(volume)
    }
}

/// Locks a directory for as long as the descriptor is open, if nobody else has.
fn lock_directory(dir: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(dir, flags, Mode::empty())?;
    rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive)?;
    Ok(fd)
}

impl Volume {
    /// Bytes of the host's disk that it takes.
    pub fn used(&self) -> u64 {
        std::fs::metadata(disk_in(&self.dir)).map_or(0, |meta| meta.blocks() * 512)
    }
}

fn sync(path: &Path) -> Result<()> {
    let file = std::fs::File::open(path).map_err(io_error("open", path))?;
    file.sync_all().map_err(io_error("sync", path))
}

/// Removes those volumes that went with a container, by their directories. One that others use by now stays.
pub fn remove_unused(dirs: &[PathBuf], needed_by: impl Fn(&str) -> Option<String>) -> Result<()> {
    for dir in dirs {
        let name = dir.file_name().and_then(|name| name.to_str());
        let data_dir = dir.parent().and_then(Path::parent);
        let (Some(name), Some(data_dir)) = (name, data_dir) else {
            continue;
        };
        match Volumes::of(data_dir).remove(name, &needed_by) {
            Ok(_) => {}
            Err(VolumeError::NotFound(_) | VolumeError::InUse(_) | VolumeError::Needed { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(name: &str) -> New {
        New {
            name: name.into(),
            size: scratch::MIN_SIZE,
            ..New::default()
        }
    }

    fn made(name: &str) -> (tempfile::TempDir, Volumes, Volume) {
        let dir = tempfile::tempdir().unwrap();
        let volumes = Volumes::of(dir.path());
        let volume = volumes.create(&new(name), None).unwrap();
        (dir, volumes, volume)
    }

    #[test]
    fn create_makes_a_sparse_file_system_with_a_journal() {
        let (_dir, volumes, volume) = made("cache");
        let disk = disk_in(&volume.dir);
        let out = std::process::Command::new("dumpe2fs")
            .arg("-h")
            .arg(&disk)
            .env("PATH", scratch::search_path())
            .output()
            .unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(text.contains("has_journal"), "{text}");
        let check = std::process::Command::new("e2fsck")
            .arg("-fn")
            .arg(&disk)
            .env("PATH", scratch::search_path())
            .output()
            .unwrap();
        assert!(check.status.success(), "{check:?}");
        assert!(volume.used() < 1 << 20, "{}", volume.used());
        assert_eq!(volumes.list().unwrap().0[0].record, volume.record);
    }

    #[test]
    fn create_twice_is_refused_and_ensure_takes_what_is_there() {
        let (_dir, volumes, volume) = made("cache");
        let error = volumes.create(&new("cache"), None).unwrap_err();
        assert!(matches!(error, VolumeError::Exists(_)));
        assert_eq!(volumes.ensure(&new("cache")).unwrap().record, volume.record);
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let (_dir, volumes, _) = made("cache");
        let long = "x".repeat(129);
        for name in [
            "../x", "/etc", "a/b", ".lock", "", "a", "-x", "a\nb", "ä1", &long,
        ] {
            assert!(
                matches!(volumes.find(name), Err(VolumeError::Name(_))),
                "{name:?}"
            );
        }
        check_name(&"x".repeat(128)).unwrap();
    }

    #[test]
    fn a_symlink_in_place_of_a_volume_is_refused() {
        let (dir, volumes, volume) = made("cache");
        std::os::unix::fs::symlink(&volume.dir, dir.path().join("volumes/link")).unwrap();
        assert!(volumes.find("link").is_err());
        let (found, errors) = volumes.list().unwrap();
        assert_eq!((found.len(), errors.len()), (1, 1));
        std::fs::remove_file(disk_in(&volume.dir)).unwrap();
        std::os::unix::fs::symlink("/dev/null", disk_in(&volume.dir)).unwrap();
        assert!(open_locked(&disk_in(&volume.dir), Access::Shared).is_err());
    }

    #[test]
    fn one_writes_or_many_read() {
        let (_dir, volumes, volume) = made("cache");
        let disk = disk_in(&volume.dir);
        let reader = open_locked(&disk, Access::Shared).unwrap();
        let other = open_locked(&disk, Access::Shared).unwrap();
        let refused = open_locked(&disk, Access::Exclusive).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        let error = volumes.remove("cache", |_| None).unwrap_err();
        assert!(matches!(error, VolumeError::InUse(_)));
        drop((reader, other));
        let _writer = open_locked(&disk, Access::Exclusive).unwrap();
        assert!(open_locked(&disk, Access::Shared).is_err());
        let clone = volumes.create(&new("copy"), Some(&volume));
        assert!(matches!(clone, Err(VolumeError::InUse(_))));
        assert!(volumes.find("copy").unwrap().is_none());
    }

    #[test]
    fn clone_has_the_content_and_the_holes() {
        use std::os::unix::fs::FileExt;
        let (_dir, volumes, volume) = made("cache");
        let file = std::fs::File::options()
            .write(true)
            .open(disk_in(&volume.dir))
            .unwrap();
        file.write_all_at(b"here", 12 << 20).unwrap();
        let clone = volumes.create(&new("copy"), Some(&volume)).unwrap();
        let bytes = std::fs::read(disk_in(&clone.dir)).unwrap();
        assert_eq!(bytes, std::fs::read(disk_in(&volume.dir)).unwrap());
        assert!(clone.used() < 2 << 20, "{}", clone.used());
        assert_eq!(clone.record.size, volume.record.size);
    }

    #[test]
    fn what_a_killed_one_left_is_swept_away() {
        let (dir, volumes, _) = made("cache");
        for left in [".new-dead", ".new-other", ".old"] {
            std::fs::create_dir_all(dir.path().join("volumes").join(left).join("x")).unwrap();
        }
        let alive = dir.path().join("volumes/.new-alive");
        std::fs::create_dir(&alive).unwrap();
        let _lock = lock_directory(&alive).unwrap();
        volumes.create(&new("other"), None).unwrap();
        let mut left: Vec<_> = std::fs::read_dir(dir.path().join("volumes"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, [".lock", ".new-alive", "cache", "other"]);
        let error = volumes.create(&new("alive"), None).unwrap_err();
        assert!(matches!(error, VolumeError::BeingMade(_)));
    }

    #[test]
    fn ensure_by_many_at_once_makes_one() {
        let (_dir, volumes, _) = made("cache");
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| volumes.ensure(&new("shared")).unwrap().record))
                .collect();
            let all: Vec<_> = all.into_iter().map(|one| one.join().unwrap()).collect();
            assert!(all.iter().all(|record| *record == all[0]));
        });
    }

    #[test]
    fn remove_unused_spares_what_others_need() {
        let (_dir, volumes, volume) = made("cache");
        let dirs = [volume.dir.clone(), volumes.dir_of("gone")];
        remove_unused(&dirs, |_| Some("box".into())).unwrap();
        assert!(volume.dir.exists());
        let reader = open_locked(&disk_in(&volume.dir), Access::Shared).unwrap();
        remove_unused(&dirs, |_| None).unwrap();
        assert!(volume.dir.exists());
        drop(reader);
        remove_unused(&dirs, |_| None).unwrap();
        assert!(!volume.dir.exists());
    }

    #[test]
    fn name_of_disk_is_that_of_its_directory() {
        assert_eq!(
            name_of_disk(Path::new("/d/volumes/ab/disk.img")),
            Some("ab")
        );
        assert_eq!(name_of_disk(Path::new("/d/scratch/1.img")), None);
    }

    proptest::proptest! {
        #[test]
        fn check_name_passes_only_what_stays_one_component(name in "[a-z./\\\\\0\n~ -]{0,12}") {
            if check_name(&name).is_ok() {
                let path = Path::new("/volumes").join(&name);
                proptest::prop_assert_eq!(path.parent(), Some(Path::new("/volumes")));
                proptest::prop_assert_ne!(&name[..1], ".");
            }
        }
    }
}
