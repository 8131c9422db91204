//! A disk that can be filled up.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file system of its own below a host's directory; unmounted when dropped, which comes before the host's end.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Covers `dir` with one of this size, e.g. `64m`.
    pub fn on(dir: &Path, size: &str) -> Self {
        let options = format!("size={size},mode=700");
        mount(&["-t", "tmpfs", "-o", &options, "small"], dir);
        Self(dir.to_path_buf())
    }

    /// Gives it another size.
    pub fn grows_to(&self, size: &str) {
        mount(&["-o", &format!("remount,size={size}")], &self.0);
    }

    /// Leaves no room at all until the returned file is removed.
    pub fn fills_up(&self) -> PathBuf {
        let path = self.0.join("filler");
        let mut file = fs::File::create(&path).expect("the small disk is writable");
        for size in [1 << 20, 4096] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn mount(arguments: &[&str], dir: &Path) {
    let status = Command::new("mount").args(arguments).arg(dir).status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "mount {arguments:?}"
    );
}
