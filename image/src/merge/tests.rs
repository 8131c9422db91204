use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::limits::Limits;
use crate::testing::{Found, Tar, convert, read_back};

/// Layers' archives, merged and read back with contents.
fn merged(archives: &[Vec<u8>]) -> Result<BTreeMap<String, Found>> {
    let blobs: Vec<File> = archives
        .iter()
        .map(|a| convert(a, &Limits::default()).unwrap())
        .collect();
    let layers = archives
        .iter()
        .zip(&blobs)
        .map(|(a, blob)| (Digest::of(a), blob.try_clone().unwrap()))
        .collect();
    let out = tempfile::tempfile().unwrap();
    merge_files(layers, &Digest::of(b"chain"), &out)?;
    let reader = Reader::open(&out).unwrap();
    let by_tag: BTreeMap<String, &File> = archives
        .iter()
        .map(|a| Digest::of(a).hex())
        .zip(&blobs)
        .collect();
    let mut devices = vec![&out];
    let mut next = reader_blocks(&out);
    for slot in reader.devices() {
        // Flat mode: each device begins where the one before it ends.
        assert_eq!(slot.mapped, next);
        next += slot.blocks;
        devices.push(by_tag[&slot.tag]);
    }
    Ok(read_back(&devices))
}

fn reader_blocks(file: &File) -> u32 {
    let bytes = file.metadata().unwrap().len();
    assert_eq!(bytes % BLOCK, 0);
    (bytes / BLOCK) as u32
}

fn contents(found: &BTreeMap<String, Found>) -> BTreeMap<&str, &[u8]> {
    found
        .iter()
        .filter(|(path, _)| !path.is_empty())
        .map(|(path, f)| (path.as_str(), &*f.content))
        .collect()
}

#[test]
fn whiteouts_hide_lower_entries_only() {
    let lower = Tar::new()
        .file("a/x", b"1")
        .file("a/y", b"2")
        .file("b", b"3")
        .directory("c/")
        .file("c/d/e", b"4")
        .end();
    let upper = Tar::new()
        .file("a/.wh.x", b"")
        .file(".wh.b", b"")
        .file("c/.wh..wh..opq", b"")
        .file("c/n", b"5")
        .end();
    let found = merged(&[lower, upper]).unwrap();
    let expected: [(&str, &[u8]); 4] = [("a", b""), ("a/y", b"2"), ("c", b""), ("c/n", b"5")];
    assert_eq!(contents(&found), BTreeMap::from(expected));
    assert!(
        found.values().all(|f| f.xattrs.is_empty()),
        "no mark is left"
    );
}

#[test]
fn whiteout_of_nothing_has_no_effect() {
    let found = merged(&[
        Tar::new().file("a", b"1").end(),
        Tar::new().file(".wh.b", b"").file("x/.wh.c", b"").end(),
    ]);
    assert_eq!(
        contents(&found.unwrap()),
        BTreeMap::from([("a", &b"1"[..]), ("x", b"")])
    );
}

#[test]
fn implied_directory_keeps_the_lower_attributes() {
    let mut lower = Tar::new();
    lower.mtime = 77;
    let found = merged(&[
        lower.directory("d/").end(),
        Tar::new().file("d/x", b"1").end(),
    ])
    .unwrap();
    assert_eq!((found["d"].mtime, found["d"].uid), ((77, 0), 0o1750));
}

#[test]
fn explicit_directory_replaces_the_lower_attributes() {
    let mut upper = Tar::new();
    upper.mtime = 88;
    let found = merged(&[
        Tar::new().file("d/x", b"1").end(),
        upper.directory("d/").end(),
    ])
    .unwrap();
    assert_eq!(found["d"].mtime, (88, 0));
    assert_eq!(found["d/x"].content, b"1");
}

#[test]
fn types_are_replaced_both_ways() {
    let lower = Tar::new().file("a/x", b"1").file("b", b"2").end();
    let found = merged(&[lower, Tar::new().file("a", b"3").file("b/y", b"4").end()]).unwrap();
    assert_eq!(
        contents(&found),
        BTreeMap::from([("a", &b"3"[..]), ("b", b""), ("b/y", b"4")])
    );
}

#[test]
fn hard_link_to_a_lower_file_shares_its_inode() {
    let lower = Tar::new().file("d/a", b"lower").end();
    let upper = Tar::new()
        .link("b", "d/a")
        .file("d/a", b"upper")
        .link("d/c", "b")
        .end();
    let found = merged(&[lower.clone(), upper]).unwrap();
    assert_eq!(
        (&*found["b"].content, &*found["d/a"].content),
        (&b"lower"[..], &b"upper"[..])
    );
    assert_eq!(
        (found["b"].number, found["b"].nlink),
        (found["d/c"].number, 2)
    );
    let error = merged(&[lower, Tar::new().link("b", "d/none").end()])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("d/none") && error.contains("sha256:"),
        "{error}"
    );
}

#[test]
fn file_below_a_lower_symlink_goes_where_it_leads() {
    let lower = Tar::new()
        .directory("usr/bin/")
        .symlink("bin", "usr/bin")
        .symlink("run", "/var/run")
        .end();
    let upper = Tar::new()
        .file("bin/new", b"1")
        .file("run/lock/x", b"2")
        .end();
    let found = merged(&[lower, upper]).unwrap();
    assert_eq!(
        (
            &*found["usr/bin/new"].content,
            &*found["var/run/lock/x"].content
        ),
        (&b"1"[..], &b"2"[..])
    );
    assert_eq!(found["bin"].content, b"usr/bin");
}

#[test]
fn layers_without_visible_data_are_not_on_the_disk() {
    let layers = [
        Tar::new().file("a", b"1").end(),
        Tar::new().file("a", b"2").end(),
        Tar::new().directory("d").end(),
    ];
    let blobs: Vec<_> = layers
        .iter()
        .map(|a| (Digest::of(a), convert(a, &Limits::default()).unwrap()))
        .collect();
    let out = tempfile::tempfile().unwrap();
    merge_files(blobs, &Digest::of(b""), &out).unwrap();
    let reader = Reader::open(&out).unwrap();
    assert_eq!(reader.devices().len(), 1);
    assert_eq!(reader.devices()[0].tag, Digest::of(&layers[1]).hex());
}

#[test]
fn no_layers_and_a_layer_twice_are_fine() {
    assert_eq!(contents(&merged(&[]).unwrap()), BTreeMap::new());
    let layer = Tar::new().file("a", b"1").end();
    assert_eq!(
        contents(&merged(&[layer.clone(), layer]).unwrap()),
        BTreeMap::from([("a", &b"1"[..])])
    );
}

#[test]
fn hundred_layers_make_one_small_image() {
    let layers: Vec<_> = (0..100)
        .map(|n| Tar::new().file(&format!("d/f{n}"), &[n as u8; 5000]).end())
        .collect();
    let found = merged(&layers).unwrap();
    assert!((0..100).all(|n| found[&format!("d/f{n}")].content == [n as u8; 5000]));
}

/// One step of a random layer.
#[derive(Clone, Debug)]
enum Step {
    File(String, Vec<u8>),
    Directory(String),
    Symlink(String, String),
    Link(String, String),
    Whiteout(String, String),
    Opaque(String),
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
        .prop_map(|parts| parts.join("/"))
}

fn step() -> impl Strategy<Value = Step> {
    let data = prop_oneof![
        Just(Vec::new()),
        prop::collection::vec(any::<u8>(), 1..40),
        (any::<u8>(), 4000usize..9000).prop_map(|(byte, count)| vec![byte; count]),
    ];
    prop_oneof![
        4 => (path(), data).prop_map(|(path, data)| Step::File(path, data)),
        2 => path().prop_map(Step::Directory),
        1 => (path(), "[a-z/]{1,20}").prop_map(|(path, target)| Step::Symlink(path, format!("none/{target}"))),
        1 => (path(), path()).prop_map(|(path, to)| Step::Link(path, to)),
        2 => (path(), prop::sample::select(vec!["a", "b", "c"])).prop_map(|(dir, name)| Step::Whiteout(dir, name.into())),
        1 => path().prop_map(Step::Opaque),
    ]
}

/// The simplest thing that does what layers mean: a map from paths to contents, `None` for directories.
#[derive(Clone, Debug, Default)]
struct Model {
    nodes: BTreeMap<String, Option<Vec<u8>>>,
}

impl Model {
    fn is_directory(&self, path: &str) -> bool {
        path.is_empty() || matches!(self.nodes.get(path), Some(None))
    }

    fn remove(&mut self, path: &str) {
        let below = format!("{path}/");
        self.nodes
            .retain(|other, _| other != path && !other.starts_with(&below));
    }

    /// Applies a step as an unpacker would; `touched` are paths this layer made. False if it can't be part of an archive.
    fn apply(&mut self, step: &Step, touched: &mut Vec<String>) -> bool {
        let (Step::File(path, _)
        | Step::Directory(path)
        | Step::Symlink(path, _)
        | Step::Link(path, _)) = step
        else {
            return self.whiteout(step, touched);
        };
        if !self.make_parents(path, touched) {
            return false;
        }
        let value = match step {
            Step::File(_, data) => Some(data.clone()),
            Step::Symlink(_, target) => Some(target.clone().into_bytes()),
            Step::Link(_, to) => match self.nodes.get(to) {
                Some(Some(data))
                    if touched.contains(to) && !self.is_directory(to) && path != to =>
                {
                    Some(data.clone())
                }
                _ => return false,
            },
            _ => None,
        };
        if value.is_some() || !self.is_directory(path) {
            self.remove(path);
            let below = format!("{path}/");
            touched.retain(|other| !other.starts_with(&below));
        }
        self.nodes.insert(path.clone(), value);
        touched.push(path.clone());
        true
    }

    fn make_parents(&mut self, path: &str, touched: &mut Vec<String>) -> bool {
        let ends: Vec<usize> = path.match_indices('/').map(|(at, _)| at).collect();
        // A file of this very layer in the way is an error; a lower layer's file is replaced, symbolic links are left to other tests.
        let blocked = ends.iter().any(|&at| {
            let parent = &path[..at];
            self.nodes.get(parent).is_some_and(|node| {
                node.as_ref().is_some_and(|data| {
                    touched.contains(&parent.to_owned()) || data.starts_with(b"none/")
                })
            })
        });
        if blocked {
            return false;
        }
        for at in ends {
            let parent = path[..at].to_owned();
            if !self.is_directory(&parent) {
                self.remove(&parent);
                self.nodes.insert(parent.clone(), None);
            }
            touched.push(parent);
        }
        true
    }

    fn whiteout(&mut self, step: &Step, touched: &mut Vec<String>) -> bool {
        let (directory, victim) = match step {
            Step::Whiteout(directory, name) => (directory, Some(format!("{directory}/{name}"))),
            Step::Opaque(directory) => (directory, None),
            _ => return false,
        };
        if !self.make_parents(&format!("{directory}/x"), touched) {
            return false;
        }
        let below = format!("{}/", victim.as_ref().unwrap_or(directory));
        self.nodes.retain(|path, _| {
            let hit = Some(path) == victim.as_ref() || path.starts_with(&below);
            !hit || touched.contains(path)
        });
        true
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_layers_merge_as_an_unpacker_would(layers in prop::collection::vec(prop::collection::vec(step(), 0..14), 1..5)) {
        let mut model = Model::default();
        let mut archives = Vec::new();
        for steps in &layers {
            let mut tar = Tar::new();
            let mut touched = Vec::new();
            for step in steps {
                let mut next = model.clone();
                let mut next_touched = touched.clone();
                if !next.apply(step, &mut next_touched) {
                    continue;
                }
                (model, touched) = (next, next_touched);
                tar = match step {
                    Step::File(path, data) => tar.file(path, data),
                    Step::Directory(path) => tar.directory(path),
                    Step::Symlink(path, target) => tar.symlink(path, target),
                    Step::Link(path, to) => tar.link(path, to),
                    Step::Whiteout(directory, name) => tar.file(&format!("{directory}/.wh.{name}"), b""),
                    Step::Opaque(directory) => tar.file(&format!("{directory}/.wh..wh..opq"), b""),
                };
            }
            let archive = tar.end();
            crate::fuzz::tar_to_erofs(&archive);
            archives.push(archive);
        }
        let found = merged(&archives).unwrap();
        let expected: BTreeMap<&str, &[u8]> =
            model.nodes.iter().map(|(path, data)| (path.as_str(), data.as_deref().unwrap_or_default())).collect();
        prop_assert_eq!(contents(&found), expected);
        for (path, node) in &found {
            let directories = found.iter().filter(|(other, child)| {
                child.kind == NodeKind::Directory && !other.is_empty() && other.rsplit_once('/').map_or("", |(parent, _)| parent) == path
            });
            if node.kind == NodeKind::Directory {
                prop_assert_eq!(node.nlink as usize, 2 + directories.count());
            } else {
                prop_assert_eq!(node.nlink as usize, found.values().filter(|other| other.number == node.number).count());
            }
        }
    }

    #[test]
    fn broken_archives_and_images_never_panic(
        layer in prop::collection::vec(step(), 1..6),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
    ) {
        let mut tar = Tar::new();
        for step in layer {
            tar = match step {
                Step::File(path, data) => tar.pax(&[("path", path.as_bytes()), ("SCHILY.xattr.user.a", b"b")]).file("x", &data),
                Step::Symlink(path, target) => tar.symlink(&path, &target),
                Step::Link(path, to) => tar.link(&path, &to),
                Step::Directory(path) | Step::Opaque(path) | Step::Whiteout(path, _) => tar.directory(&path),
            };
        }
        let mut archive = tar.end();
        let blob = convert(&archive, &Limits::default());
        for (at, byte) in &changes {
            let at = at.index(archive.len());
            archive[at] = *byte;
        }
        crate::fuzz::tar_reader(&archive);
        crate::fuzz::tar_to_erofs(&archive);
        if let Ok(blob) = blob {
            use std::os::unix::fs::FileExt as _;
            let mut image = vec![0; blob.metadata().unwrap().len() as usize];
            blob.read_exact_at(&mut image, 0).unwrap();
            for (at, byte) in &changes {
                let at = at.index(image.len());
                image[at] = *byte;
            }
            crate::fuzz::erofs_reader(&image);
            crate::fuzz::erofs_reader(&crate::fuzz::sealed_erofs(&image));
        }
    }
}
