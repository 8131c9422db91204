//! A file that is written whole or not at all.

use anyhow::Context;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

/// A regular file is replaced by `commit`; a device or a FIFO is written as it is.
pub(super) struct OutFile {
    file: File,
    /// The unfinished file and what it will be.
    partial: Option<(PathBuf, PathBuf)>,
}

impl OutFile {
    /// Opens what will become, or is, `path`. What is there stays until `commit`.
    pub(super) fn create(path: &Path) -> anyhow::Result<Self> {
        let cannot = || format!("can't write {}", path.display());
        let target = match std::fs::metadata(path) {
            Ok(there) if there.is_file() => {
                // A file that may not be written may not be replaced either.
                OpenOptions::new()
                    .write(true)
                    .open(path)
                    .with_context(cannot)?;
                // Through a link: what it leads to is replaced, not the link.
                std::fs::canonicalize(path).with_context(cannot)?
            }
            Ok(_) => {
                let file = OpenOptions::new().write(true).open(path);
                return Ok(Self {
                    file: file.with_context(cannot)?,
                    partial: None,
                });
            }
            Err(_) => path.to_owned(),
        };
        let name = target
            .file_name()
            .with_context(|| format!("{} names no file", path.display()))?;
        for number in 0..100 {
            let mut partial = std::ffi::OsString::from(".");
            partial.push(name);
            partial.push(format!(".{}-{number}.partial", std::process::id()));
            let partial = target.with_file_name(partial);
            match File::create_new(&partial) {
                Ok(file) => {
                    let created = Self {
                        file,
                        partial: Some((partial, target)),
                    };
                    if let Ok(there) = std::fs::metadata(path) {
                        let same = created.file.set_permissions(there.permissions());
                        same.with_context(cannot)?;
                    }
                    return Ok(created);
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e).with_context(cannot),
            }
        }
        anyhow::bail!("{}: too many unfinished files beside it", target.display())
    }

    /// What to write into.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Puts the finished file in its place.
    pub(super) fn commit(mut self) -> anyhow::Result<()> {
        if let Some((partial, target)) = &self.partial {
            let cannot = || format!("can't write {}", target.display());
            self.file.sync_data().with_context(cannot)?;
            std::fs::rename(partial, target).with_context(cannot)?;
            self.partial = None;
        }
        Ok(())
    }
}

impl Drop for OutFile {
    fn drop(&mut self) {
        if let Some((partial, _)) = &self.partial {
            let _ = std::fs::remove_file(partial);
        }
    }
}
