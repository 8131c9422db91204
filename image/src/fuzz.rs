//! Entry points for fuzzing, one for each parser of foreign bytes. They check more than that nothing panics.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::digest::Digest;
use crate::erofs::{NodeKind, Reader};
use crate::error::Result;
use crate::layer::Layer;
use crate::limits::Limits;
use crate::merge::merge_files;
use crate::platform::Platform;
use crate::recipe::{ArchiveReader, RecipeWriter};
use crate::registry::{Select, parse, select};
use crate::store::Config;
use crate::tar::Archive;

/// Small enough that every limit is reached.
fn limits() -> Limits {
    Limits {
        layer_bytes: 1 << 20,
        layer_entries: 1000,
        layer_metadata_bytes: 1 << 18,
        path_bytes: 512,
        allow_absolute_paths: true,
        ..Limits::default()
    }
}

fn memory() -> File {
    memfd_create("fuzz", MemfdFlags::CLOEXEC)
        .expect("a memory file can be made")
        .into()
}

/// An archive: whatever becomes a layer can be read back and merged, and gives the same archive again.
pub fn tar_to_erofs(archive: &[u8]) {
    let (blob, recipe) = (memory(), memory());
    let limits = limits();
    let converted = || -> Result<()> {
        let mut layer = Layer::new(&blob, Path::new("blob"), &limits);
        let recipe = RecipeWriter::new(&recipe).expect("memory can be written");
        let (_, recipe) = layer.read(archive, recipe)?;
        recipe.finish().expect("memory can be written");
        layer.seal(&Digest::of(archive))?;
        Ok(())
    };
    if converted().is_err() {
        return;
    }
    let reader = Reader::open(&blob).expect("a layer that was written can be opened");
    walk(&reader, 10_000).expect("a layer that was written can be read");
    rewind(&recipe);
    let mut again = Vec::new();
    let mut back =
        ArchiveReader::new(&recipe, &blob).expect("a recipe that was written can be opened");
    back.read_to_end(&mut again)
        .expect("a recipe that was written can be read");
    assert!(again == archive, "the archive comes back as it was");

    let merged = memory();
    let digest = Digest::of(archive);
    let other = blob.try_clone().expect("a file can be duplicated");
    // A layer twice is merged with itself; only its hard links to lower files may lead nowhere.
    if merge_files(vec![(digest, blob), (digest, other)], &digest, &merged).is_ok() {
        let reader = Reader::open(&merged).expect("a merged image can be opened");
        walk(&reader, 10_000).expect("a merged image can be read");
    }
}

fn rewind(mut file: &File) {
    std::io::Seek::rewind(&mut file).expect("memory can be rewound");
}

/// An EROFS image.
pub fn erofs_reader(image: &[u8]) {
    if let Ok(reader) = Reader::open(image) {
        let _ = walk(&reader, 1000);
    }
}

/// The bytes as an image whose superblock is right as far as magic, features and checksum go.
pub fn sealed_erofs(bytes: &[u8]) -> Vec<u8> {
    crate::erofs::sealed(bytes)
}

/// A tar archive, entry by entry.
pub fn tar_reader(bytes: &[u8]) {
    let mut archive = Archive::new(bytes, ());
    while let Ok(Some(_)) = archive.next_entry() {
        if archive.skip_data().is_err() {
            return;
        }
    }
}

/// A manifest or index, an image configuration, or a platform and a name.
pub fn oci_image_config(bytes: &[u8]) {
    if let Ok(Select::Index(entries)) = parse("fuzz", bytes) {
        let _ = select("fuzz", &Platform::host(), &entries);
    }
    let _ = Config::parse("fuzz", Digest::of(bytes), bytes.to_vec(), 1, &limits());
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = text.parse::<Platform>();
        let _ = text.parse::<Digest>();
        if let Ok(reference) = crate::parse_reference(text) {
            assert_eq!(
                crate::parse_reference(&reference.whole())
                    .map(|r| r.whole())
                    .ok(),
                Some(reference.whole())
            );
        }
    }
}

/// Reads every inode, at most `budget` of them.
fn walk<S: crate::erofs::Source>(reader: &Reader<S>, budget: usize) -> Result<()> {
    let mut pending = vec![reader.root()?];
    let mut left = budget;
    while let Some(node) = pending.pop() {
        reader.xattrs(&node)?;
        match node.kind() {
            NodeKind::Symlink => drop(reader.link_target(&node)?),
            NodeKind::Regular => drop(reader.data(&node)?),
            NodeKind::Directory => reader.entries(&node, |_, number| {
                if left > 0 {
                    left -= 1;
                    pending.push(reader.node(number)?);
                }
                Ok(())
            })?,
            _ => {}
        }
    }
    Ok(())
}

/// Converts one archive of any length into `blob`, for measuring what a layer costs.
pub fn convert_layer(archive: impl std::io::BufRead, blob: &File, limits: &Limits) -> Result<u64> {
    let mut layer = Layer::new(blob, Path::new("blob"), limits);
    layer.read(archive, ())?;
    Ok(layer.seal(&Digest::of(b"measured"))?.entries)
}
