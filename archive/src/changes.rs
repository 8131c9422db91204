//! What a container changed of its image: the upper directory of its overlay.

use crate::at;
use crate::pack::{Packed, Packer, is_opaque, sorted};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// Of the OCI image specification, layer.md, “Whiteouts”.
const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";

/// An overlay's directories.
#[derive(Debug, Clone, Copy)]
pub struct Layers<'a> {
    /// What the container wrote.
    pub upper: &'a Path,
    /// Its image.
    pub lower: &'a Path,
    /// Relative to the root: what is mounted over these is not the container's, and they are there for that alone.
    pub mount_points: &'a [PathBuf],
}

/// What became of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// The image doesn't have it.
    Added,
    /// The image has another.
    Changed,
    /// Only the image has it.
    Deleted,
}

/// One difference between a container and its image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// What happened to it.
    pub kind: ChangeKind,
    /// Relative to the root.
    pub path: PathBuf,
}

impl Change {
    fn new(kind: ChangeKind, path: PathBuf) -> Self {
        Self { kind, path }
    }
}

/// Tells every change, parents first.
pub fn changes(
    layers: Layers<'_>,
    mut tell: impl FnMut(Change) -> io::Result<()>,
) -> io::Result<()> {
    walk(layers, Path::new(""), &mut |found| match found {
        Found::Deleted(path) => tell(Change::new(ChangeKind::Deleted, path)),
        Found::There { path, metadata } => {
            let known = exists(&layers.lower.join(&path))?;
            let kind = match known {
                true => ChangeKind::Changed,
                false => ChangeKind::Added,
            };
            tell(Change::new(kind, path.clone()))?;
            match known && metadata.is_dir() && is_opaque(&layers.upper.join(&path)) {
                true => hidden(layers, &path, &mut tell),
                false => Ok(()),
            }
        }
    })
}

/// Tells what a directory hides: all that is in the image's but for what it has itself.
fn hidden(
    layers: Layers<'_>,
    directory: &Path,
    tell: &mut impl FnMut(Change) -> io::Result<()>,
) -> io::Result<()> {
    let below = layers.lower.join(directory);
    if !fs::symlink_metadata(&below).map_err(at(&below))?.is_dir() {
        return Ok(());
    }
    for name in sorted(&below)? {
        let path = directory.join(name);
        if !exists(&layers.upper.join(&path))? {
            tell(Change::new(ChangeKind::Deleted, path))?;
        }
    }
    Ok(())
}

/// Writes the changes as an image layer.
pub fn pack_changes(layers: Layers<'_>, to: impl Write) -> io::Result<Packed> {
    let mut packer = Packer::new(to);
    walk(layers, Path::new(""), &mut |found| match found {
        Found::Deleted(path) => {
            let mut name = OsString::from(WHITEOUT);
            name.push(path.file_name().unwrap_or_default());
            packer.mark(&path.with_file_name(name))
        }
        Found::There { path, metadata } => {
            let source = layers.upper.join(&path);
            packer.one(&source, &path, &metadata)?;
            match metadata.is_dir() && is_opaque(&source) {
                true => packer.mark(&path.join(OPAQUE)),
                false => Ok(()),
            }
        }
    })?;
    packer.finish()
}

/// An entry of the upper directory.
enum Found {
    There { path: PathBuf, metadata: Metadata },
    Deleted(PathBuf),
}

fn walk(
    layers: Layers<'_>,
    directory: &Path,
    tell: &mut impl FnMut(Found) -> io::Result<()>,
) -> io::Result<()> {
    let source = layers.upper.join(directory);
    for name in sorted(&source)? {
        let path = directory.join(name);
        if layers.mount_points.contains(&path) {
            continue;
        }
        let metadata = fs::symlink_metadata(layers.upper.join(&path)).map_err(at(&path))?;
        if metadata.file_type().is_char_device() && metadata.rdev() == 0 {
            tell(Found::Deleted(path))?;
            continue;
        }
        let is_dir = metadata.is_dir();
        tell(Found::There {
            path: path.clone(),
            metadata,
        })?;
        if is_dir {
            walk(layers, &path, tell)?;
        }
    }
    Ok(())
}

fn exists(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(false)
        }
        Err(e) => Err(at(path)(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Ids, unpack};

    struct Overlay {
        _dir: tempfile::TempDir,
        upper: PathBuf,
        lower: PathBuf,
    }

    /// The image has `kept`, `changed` and `etc/{a,b}`; the container changed one, deleted one and added one.
    fn overlay() -> Overlay {
        let dir = tempfile::tempdir().unwrap();
        let (upper, lower) = (dir.path().join("upper"), dir.path().join("lower"));
        fs::create_dir_all(lower.join("etc")).unwrap();
        fs::create_dir_all(upper.join("etc")).unwrap();
        for name in ["kept", "changed", "etc/a", "etc/b"] {
            fs::write(lower.join(name), "old").unwrap();
        }
        fs::write(upper.join("changed"), "new").unwrap();
        fs::write(upper.join("etc/added"), "new").unwrap();
        fs::write(upper.join("etc/hosts"), "").unwrap();
        Overlay {
            _dir: dir,
            upper,
            lower,
        }
    }

    fn told(overlay: &Overlay) -> Vec<(ChangeKind, String)> {
        let mut all = Vec::new();
        let mount_points = [PathBuf::from("etc/hosts")];
        let layers = Layers {
            upper: &overlay.upper,
            lower: &overlay.lower,
            mount_points: &mount_points,
        };
        changes(layers, |change| {
            all.push((change.kind, change.path.display().to_string()));
            Ok(())
        })
        .unwrap();
        all
    }

    #[test]
    fn changes_are_told_with_their_parents() {
        use ChangeKind::{Added, Changed};
        let expected = [(Changed, "changed"), (Changed, "etc"), (Added, "etc/added")];
        assert_eq!(told(&overlay()), expected.map(|(k, p)| (k, p.to_owned())));
    }

    #[test]
    fn pack_changes_says_deletions_as_whiteouts() {
        if !rustix::process::geteuid().is_root() {
            return; // only root makes overlayfs's marks
        }
        let overlay = overlay();
        let white = overlay.upper.join("kept");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &white,
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::empty(),
            0,
        )
        .unwrap();
        rustix::fs::setxattr(
            overlay.upper.join("etc"),
            "trusted.overlay.opaque",
            b"y",
            rustix::fs::XattrFlags::empty(),
        )
        .unwrap();
        let told = told(&overlay);
        for path in ["kept", "etc/a", "etc/b"] {
            assert!(
                told.contains(&(ChangeKind::Deleted, path.to_owned())),
                "{told:?}"
            );
        }
        let mut layer = Vec::new();
        let layers = Layers {
            upper: &overlay.upper,
            lower: &overlay.lower,
            mount_points: &[],
        };
        pack_changes(layers, &mut layer).unwrap();
        let out = tempfile::tempdir().unwrap();
        unpack(layer.as_slice(), out.path(), None, Ids::Mine).unwrap();
        for name in [".wh.kept", "etc/.wh..wh..opq", "etc/added", "changed"] {
            assert!(out.path().join(name).exists(), "{name}");
        }
        assert!(!out.path().join("kept").exists());
    }
}
