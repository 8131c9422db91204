//! From a stream to a tree.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use tar::{Archive, Entry, EntryType};

/// More of them are nobody's tree.
const MAX_CLOSED: usize = 1 << 16;

/// Whose files they become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// Those of whoever unpacks; no set-user-ID bits.
    Mine,
    /// As the stream has it.
    Keep,
}

/// What was unpacked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Of all files.
    pub bytes: u64,
    /// Devices, FIFOs and whatever else is no file, directory or link. At most [`Unpacked::MAX_TOLD`] of them.
    pub left_out: Vec<PathBuf>,
}

impl Unpacked {
    /// More names don't help anybody.
    pub const MAX_TOLD: usize = 16;
}

/// Unpacks a stream into the directory `into`. Files that are in the way are replaced.
///
/// With `only`, an entry that is neither of that name nor below it is refused: the stream comes from somebody who was
/// asked for just that. No entry gets out of `into`, by `..`, an absolute path, or a link.
pub fn unpack(
    from: impl Read,
    into: &Path,
    only: Option<&OsStr>,
    ids: Ids,
) -> io::Result<Unpacked> {
    let mut archive = Archive::new(from);
    archive.set_preserve_ownerships(ids == Ids::Keep);
    archive.set_preserve_permissions(ids == Ids::Keep);
    archive.set_unpack_xattrs(false);
    let mut unpacked = Unpacked::default();
    // A directory that may not be written to comes once everything is in it.
    let mut closed = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        check(&path, only)?;
        match entry.header().entry_type() {
            EntryType::Directory if entry.header().mode()? & 0o300 != 0o300 => {
                if closed.len() == MAX_CLOSED {
                    let why =
                        format!("more than {MAX_CLOSED} directories that nobody may write to");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, why));
                }
                closed.push((path, entry));
            }
            EntryType::Directory => place(&mut entry, into, &path)?,
            EntryType::Link => match entry.unpack_in(into) {
                // Where it goes was checked by then.
                Err(error) if is_taken(&error) => {
                    fs::remove_file(into.join(&path))?;
                    place(&mut entry, into, &path)?;
                }
                result => refuse_outside(result?, &path)?,
            },
            EntryType::Regular
            | EntryType::Continuous
            | EntryType::GNUSparse
            | EntryType::Symlink => {
                place(&mut entry, into, &path)?;
                unpacked.bytes += entry.size();
            }
            _ if unpacked.left_out.len() < Unpacked::MAX_TOLD => unpacked.left_out.push(path),
            _ => {}
        }
    }
    // The innermost first.
    for (path, mut entry) in closed.into_iter().rev() {
        place(&mut entry, into, &path)?;
    }
    Ok(unpacked)
}

fn place<R: Read>(entry: &mut Entry<'_, R>, into: &Path, path: &Path) -> io::Result<()> {
    let inside = entry.unpack_in(into).map_err(whole)?;
    refuse_outside(inside, path)
}

/// The library's errors keep their cause to themselves.
fn whole(error: io::Error) -> io::Error {
    let cause = error.get_ref().and_then(|e| e.source());
    match cause {
        Some(cause) => io::Error::new(error.kind(), format!("{error}: {cause}")),
        None => error,
    }
}

fn is_taken(error: &io::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let io = error.downcast_ref::<io::Error>();
        if io.is_some_and(|e| e.kind() == io::ErrorKind::AlreadyExists) {
            return true;
        }
        cause = error.source();
    }
    false
}

fn refuse_outside(inside: bool, path: &Path) -> io::Result<()> {
    match inside {
        true => Ok(()),
        false => Err(outside(path)),
    }
}

fn outside(path: &Path) -> io::Error {
    let why = format!("the archive has {path:?}, which is not where it was asked for");
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn check(path: &Path, only: Option<&OsStr>) -> io::Result<()> {
    let mut parts = path.components().filter(|part| *part != Component::CurDir);
    let first = parts.next();
    let fits = match only {
        Some(only) => first == Some(Component::Normal(only)),
        None => !matches!(first, Some(Component::RootDir)),
    };
    match fits && path.components().all(|part| part != Component::ParentDir) {
        true => Ok(()),
        false => Err(outside(path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
    use tar::{Builder, Header};

    /// An archive of one entry after another: name, type, link's target, content.
    fn archive(entries: &[(&str, EntryType, &str, &str)]) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        for (name, kind, target, content) in entries {
            let mut header = Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            header.set_size(content.len() as u64);
            // As a liar would: past the library's own checks.
            let gnu = header.as_gnu_mut().unwrap();
            gnu.name[..name.len()].copy_from_slice(name.as_bytes());
            gnu.linkname[..target.len()].copy_from_slice(target.as_bytes());
            header.set_cksum();
            builder.append(&header, content.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn files(directory: &Path) -> Vec<String> {
        crate::pack::sorted(directory)
            .unwrap()
            .into_iter()
            .map(|name| name.into_string().unwrap())
            .collect()
    }

    #[test]
    fn unpack_of_what_was_packed_is_the_same_tree() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let tree = from.path().join("tree");
        fs::create_dir_all(tree.join("d/closed")).unwrap();
        fs::write(tree.join("d/file"), "content").unwrap();
        fs::hard_link(tree.join("d/file"), tree.join("d/same")).unwrap();
        symlink("d/file", tree.join("link")).unwrap();
        fs::write(tree.join("d/closed/inside"), "x").unwrap();
        fs::set_permissions(tree.join("d/closed"), fs::Permissions::from_mode(0o500)).unwrap();
        let sparse = fs::File::create(tree.join("sparse")).unwrap();
        sparse.set_len(64 << 20).unwrap();
        let long = "n".repeat(200);
        fs::write(tree.join(&long), "long").unwrap();

        let mut stream = Vec::new();
        pack(&tree, Path::new("as"), &mut stream).unwrap();
        let only = Some(OsStr::new("as"));
        for _ in 0..2 {
            unpack(stream.as_slice(), to.path(), only, Ids::Mine).unwrap();
            fs::set_permissions(
                to.path().join("as/d/closed"),
                fs::Permissions::from_mode(0o700),
            )
            .unwrap();
        }

        let made = to.path().join("as");
        assert!(stream.len() < 1 << 20, "holes travel as holes");
        assert_eq!(fs::read(made.join("d/file")).unwrap(), b"content");
        let inode = |name: &str| fs::metadata(made.join(name)).unwrap().ino();
        assert_eq!(inode("d/file"), inode("d/same"));
        assert_eq!(
            fs::read_link(made.join("link")).unwrap(),
            Path::new("d/file")
        );
        assert_eq!(fs::read(made.join("d/closed/inside")).unwrap(), b"x");
        assert_eq!(fs::read(made.join(long)).unwrap(), b"long");
        let sparse = fs::metadata(made.join("sparse")).unwrap();
        assert_eq!((sparse.len(), sparse.blocks()), (64 << 20, 0));
    }

    #[test]
    fn pack_without_a_name_packs_what_is_in_it() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(from.path().join("a"), "x").unwrap();
        let mut stream = Vec::new();
        let packed = pack(from.path(), Path::new(""), &mut stream).unwrap();
        assert_eq!(packed.bytes, 1);
        unpack(stream.as_slice(), to.path(), None, Ids::Mine).unwrap();
        assert_eq!(files(to.path()), ["a"]);
    }

    #[test]
    fn unpack_of_paths_that_lead_out_is_refused() {
        use EntryType::{Link, Regular, Symlink};
        for entries in [
            &[("../out", Regular, "", "x")][..],
            &[("as/../../out", Regular, "", "x")],
            &[("/out", Regular, "", "x")],
            &[("as", Symlink, "..", ""), ("as/out", Regular, "", "x")],
            &[("as", Symlink, "/tmp", ""), ("as/out", Regular, "", "x")],
            &[("as", Link, "../secret", "")],
            &[
                ("as", Symlink, "../secret", ""),
                ("as", Link, "as", ""),
                ("as/../../out", Regular, "", "x"),
            ],
        ] {
            let dir = tempfile::tempdir().unwrap();
            let into = dir.path().join("into");
            fs::create_dir(&into).unwrap();
            fs::write(dir.path().join("secret"), "secret").unwrap();
            for only in [None, Some(OsStr::new("as"))] {
                let refused = unpack(archive(entries).as_slice(), &into, only, Ids::Mine);
                assert!(refused.is_err(), "{entries:?}");
            }
            assert_eq!(files(dir.path()), ["into", "secret"], "{entries:?}");
            assert_eq!(fs::read(dir.path().join("secret")).unwrap(), b"secret");
        }
    }

    #[test]
    fn unpack_through_a_link_replaces_the_link_alone() {
        let dir = tempfile::tempdir().unwrap();
        let into = dir.path().join("into");
        fs::create_dir(&into).unwrap();
        fs::write(dir.path().join("secret"), "secret").unwrap();
        let entries = [
            ("as", EntryType::Symlink, "../secret", ""),
            ("as", EntryType::Regular, "", "mine"),
        ];
        unpack(
            archive(&entries).as_slice(),
            &into,
            Some(OsStr::new("as")),
            Ids::Mine,
        )
        .unwrap();
        assert_eq!(fs::read(dir.path().join("secret")).unwrap(), b"secret");
        assert_eq!(fs::read(into.join("as")).unwrap(), b"mine");
    }

    #[test]
    fn unpack_of_another_name_than_asked_for_is_refused() {
        let into = tempfile::tempdir().unwrap();
        let stream = archive(&[(".bashrc", EntryType::Regular, "", "x")]);
        let refused = unpack(
            stream.as_slice(),
            into.path(),
            Some(OsStr::new("as")),
            Ids::Mine,
        );
        assert!(refused.unwrap_err().to_string().contains(".bashrc"));
        assert_eq!(files(into.path()), [""; 0]);
    }

    #[test]
    fn unpack_leaves_devices_out_and_says_so() {
        let into = tempfile::tempdir().unwrap();
        let stream = archive(&[
            ("as", EntryType::Char, "", ""),
            ("fifo", EntryType::Fifo, "", ""),
        ]);
        let unpacked = unpack(stream.as_slice(), into.path(), None, Ids::Mine).unwrap();
        assert_eq!(unpacked.left_out, [Path::new("as"), Path::new("fifo")]);
        assert_eq!(files(into.path()), [""; 0]);
    }

    #[test]
    fn unpack_of_a_torn_stream_fails() {
        let into = tempfile::tempdir().unwrap();
        let stream = archive(&[("as", EntryType::Regular, "", &"x".repeat(4000))]);
        let torn = &stream[..1024];
        assert!(unpack(torn, into.path(), None, Ids::Mine).is_err());
    }

    proptest::proptest! {
        #[test]
        fn unpack_of_anything_stays_inside(
            names in proptest::collection::vec("(\\.\\./|/|as/|b/|as|b|\\.){1,4}", 1..6),
            kinds in proptest::collection::vec(0..4_usize, 6),
            target in "(\\.\\./|/|as|b|\\.){1,3}",
        ) {
            let kinds = kinds.iter().map(|k| [EntryType::Regular, EntryType::Symlink, EntryType::Link, EntryType::Directory][*k]);
            let entries: Vec<_> = names.iter().zip(kinds).map(|(n, k)| (n.as_str(), k, target.as_str(), "")).collect();
            let dir = tempfile::tempdir().unwrap();
            let into = dir.path().join("into");
            fs::create_dir(&into).unwrap();
            let _ = unpack(archive(&entries).as_slice(), &into, None, Ids::Mine);
            proptest::prop_assert_eq!(files(dir.path()), ["into"]);
        }
    }
}
