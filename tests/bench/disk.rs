//! A disk of the host's own for what is measured on one: ext4 on a loop device.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::host::done;

/// Mounted until dropped.
#[derive(Debug)]
pub(crate) struct Disk {
    dir: PathBuf,
    file: PathBuf,
    /// The loop device.
    device: String,
}

impl Disk {
    /// A sparse one of so many GiB. On a clocked host its blocks are in memory: it costs a copy, and no wait.
    pub(crate) fn new(gib: u64) -> Result<Self> {
        let base = std::env::temp_dir();
        let (dir, file) = (
            base.join("casemate-bench-disk"),
            base.join("casemate-bench-disk.ext4"),
        );
        fs::create_dir_all(&dir)?;
        fs::File::create(&file)?.set_len(gib << 30)?;
        let mut make = Command::new("/usr/sbin/mke2fs");
        done(
            make.args(["-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1"])
                .arg(&file),
        )?;
        // Not by `mount -o loop`: a kernel may refuse to mount what another has open to write to it.
        let free = done(Command::new("losetup").arg("-f"))
            .context("a disk to measure on wants root and loop devices")?;
        let device = String::from_utf8(free.stdout)?.trim().to_owned();
        done(Command::new("losetup").arg(&device).arg(&file))?;
        let disk = Self { dir, file, device };
        let mut mount = Command::new("mount");
        // Nothing but what is measured writes to it.
        mount.args(["-t", "ext4", "-o", "noatime,noinit_itable", &disk.device]);
        done(mount.arg(&disk.dir))?;
        Ok(disk)
    }

    /// Where it is mounted.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its block device.
    pub(crate) fn device(&self) -> &str {
        &self.device
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // What is left when measuring failed goes with its last user.
        let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
        let _ = Command::new("losetup").args(["-d", &self.device]).status();
        let _ = fs::remove_file(&self.file);
        let _ = fs::remove_dir(&self.dir);
    }
}

/// Writes everything back and forgets it: the next read comes from the disk.
pub(crate) fn forget_cache() -> Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("forget the page cache")
}
