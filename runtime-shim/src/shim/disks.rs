//! The disks of a sandbox: opened, and those of volumes locked.

use crate::fds;
use crate::plan::{Disk, Plan};
use crate::settings::Settings;
use crate::state::{DEFAULT_NAMESPACE, StateRoot};
use crate::volume::{self, Access};
use casemate_vmm::config::{DiskConfig, DiskLimits};
use rustix::fs::{Mode, OFlags, major, minor};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Why a disk can't be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum DiskError {
    /// The file can't be opened.
    #[error("can't open disk {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A limit is for a device that holds none of them.
    #[error(
        "no disk of the container lies on the device {major}:{minor}, for which a limit was given"
    )]
    NoneThere {
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// Others use the volume.
    #[error(
        "the volume {name} is in use{holder}: one container at a time may write to a volume, or several may read it (:ro)"
    )]
    InUse {
        /// The volume.
        name: String,
        /// By whom, if that is known.
        holder: String,
    },
}

/// A disk that the VMM will get. The lock of a volume's lasts as long as anyone has it open.
pub(super) struct OpenDisk {
    /// The files that it consists of.
    pub(super) fds: Vec<OwnedFd>,
    read_only: bool,
    limits: Option<DiskLimits>,
}

/// Opens the plan's disks.
pub(super) fn open(plan: &Plan, settings: &Settings) -> Result<Vec<OpenDisk>, DiskError> {
    let one = |disk: &Disk| match disk.volume {
        true => open_volume(disk, settings),
        false => open_private(disk),
    };
    let mut disks = plan.disks.iter().map(one).collect::<Result<Vec<_>, _>>()?;
    for (device, limits) in &plan.limits.disks {
        let mut found = false;
        for disk in disks.iter_mut().filter(|disk| lies_on(disk, *device)) {
            add(disk.limits.get_or_insert_default(), limits);
            found = true;
        }
        if !found {
            let (major, minor) = *device;
            return Err(DiskError::NoneThere { major, minor });
        }
    }
    Ok(disks)
}

/// Adds what is given for one device to what was for another that the disk lies on too: the lower counts.
fn add(limits: &mut DiskLimits, more: &DiskLimits) {
    let lower = |limit: &mut u64, more: u64| {
        if more > 0 && (*limit == 0 || more < *limit) {
            *limit = more;
        }
    };
    for (limit, more) in [
        (&mut limits.read, more.read),
        (&mut limits.write, more.write),
    ] {
        lower(&mut limit.bytes_per_second, more.bytes_per_second);
        lower(&mut limit.ops_per_second, more.ops_per_second);
    }
}

/// Whether files of the disk are on a device, or on a part of it.
fn lies_on(disk: &OpenDisk, device: (u32, u32)) -> bool {
    disk.fds.iter().any(|fd| {
        let Ok(stat) = rustix::fs::fstat(fd) else {
            return false;
        };
        let own = (major(stat.st_dev), minor(stat.st_dev));
        own == device || whole(own) == Some(device)
    })
}

/// The device that a partition belongs to.
fn whole((major, minor): (u32, u32)) -> Option<(u32, u32)> {
    let partition = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    std::fs::metadata(partition.join("partition")).ok()?;
    // The link's target is below the whole device's directory; "..", followed from there, is that one.
    let text = std::fs::read_to_string(partition.join("../dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn open_error(path: &Path) -> impl FnOnce(io::Error) -> DiskError + '_ {
    move |source| DiskError::Open {
        path: path.to_owned(),
        source,
    }
}

fn open_private(disk: &Disk) -> Result<OpenDisk, DiskError> {
    let flags = match disk.read_only {
        true => OFlags::RDONLY,
        false => OFlags::RDWR,
    };
    let open = |path: &PathBuf| {
        rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| open_error(path)(e.into()))
    };
    Ok(OpenDisk {
        fds: disk.files.iter().map(open).collect::<Result<_, _>>()?,
        read_only: disk.read_only,
        limits: None,
    })
}

fn open_volume(disk: &Disk, settings: &Settings) -> Result<OpenDisk, DiskError> {
    let path = disk.files.first().map(PathBuf::as_path);
    let path = path.unwrap_or(Path::new(""));
    let lock = |access| {
        volume::open_locked(path, access).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => in_use(path, settings),
            _ => open_error(path)(e),
        })
    };
    if disk.read_only {
        let fd = lock(Access::Shared)?;
        if !needs_recovery(&fd) {
            return Ok(OpenDisk {
                fds: vec![fd],
                read_only: true,
                limits: None,
            });
        }
        // Its last writer was killed: the guest's kernel plays the journal back, for which it must write.
    }
    Ok(OpenDisk {
        fds: vec![lock(Access::Exclusive)?],
        read_only: false,
        limits: None,
    })
}

/// Whether an ext4 file system says that its journal has to be played back.
fn needs_recovery(disk: &OwnedFd) -> bool {
    /// `s_feature_incompat` in the superblock at 1024.
    const INCOMPATIBLE: u64 = 1024 + 0x60;
    const RECOVER: u32 = 0x4;
    let mut bytes = [0; 4];
    let read = rustix::io::pread(disk.as_fd(), &mut bytes, INCOMPATIBLE);
    read == Ok(4) && u32::from_le_bytes(bytes) & RECOVER != 0
}

/// Names the container that has the volume, as far as our state knows.
fn in_use(path: &Path, settings: &Settings) -> DiskError {
    let name = volume::name_of_disk(path).map(str::to_owned);
    let name = name.unwrap_or_else(|| path.display().to_string());
    let containers = StateRoot::open(&settings.state_dir, DEFAULT_NAMESPACE)
        .and_then(|root| root.containers())
        .unwrap_or_default();
    let holder = containers
        .iter()
        .find(|c| c.status.state.is_alive() && c.meta.uses_volume(&name))
        .map(|c| format!(" by container {}", c.meta.name));
    DiskError::InUse {
        name,
        holder: holder.unwrap_or_default(),
    }
}

/// The disks as the VMM is told of them.
pub(super) fn configs(plan: &Plan, open: &[OpenDisk], discard: bool) -> Vec<DiskConfig> {
    plan.disks
        .iter()
        .zip(open)
        .map(|(disk, open)| DiskConfig {
            id: disk.id.clone(),
            segments: fds::numbers(&open.fds),
            read_only: open.read_only,
            // A container that goes away with its end leaves nothing to read: its fsync needn't wait for the host's disk.
            volatile: discard && !disk.read_only && !disk.volume,
            limits: open.limits,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::{self, Kind};
    use std::os::unix::fs::FileExt;

    #[test]
    fn needs_recovery_is_what_the_superblock_says() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk.img");
        scratch::create(Kind::Volume, dir.path(), scratch::MIN_SIZE, &disk).unwrap();
        let open = || volume::open_locked(&disk, Access::Exclusive).unwrap();
        assert!(!needs_recovery(&open()));
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&disk)
            .unwrap();
        let mut flags = [0; 4];
        file.read_exact_at(&mut flags, 1024 + 0x60).unwrap();
        flags[0] |= 4;
        file.write_all_at(&flags, 1024 + 0x60).unwrap();
        assert!(needs_recovery(&open()));
        file.set_len(0).unwrap();
        assert!(!needs_recovery(&open()));
    }
}
