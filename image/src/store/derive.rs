//! An image made of another one and a further layer.

use std::io::{BufReader, Read, Seek as _, Write as _};

use futures_util::FutureExt as _;
use oci_spec::distribution::Reference;
use serde_json::Value;

use crate::archive::leaves_room;
use crate::convert::Expected;
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};

use super::{Config, Image, LoadOptions, Partial, Store, files};

/// How often the disk is looked at while the layer is spooled.
const ROOM_EVERY: u64 = 4 << 20;

impl Store {
    /// Adds an image: `base`, with the uncompressed archive `layer` on top of it.
    ///
    /// `edit` gets the base's configuration document (OCI image specification, config.md), whose layers are right
    /// already. Without a name the image is known by its id alone.
    pub fn derive(
        &self,
        base: &Image,
        layer: impl Read,
        edit: impl FnOnce(&mut Value),
        name: Option<&Reference>,
        options: &LoadOptions,
    ) -> Result<Image> {
        let lock = self.use_lock()?;
        let (mut spool, diff_id) = self.spool_layer(layer, options)?;
        spool
            .file
            .rewind()
            .map_err(|e| Error::io("cannot rewind", &spool.path, e))?;
        let progress = options.progress.as_ref();
        let claim = self.claim_layer(base.layers.len(), &diff_id, progress, async |time| {
            std::thread::sleep(time)
        });
        let claim = claim
            .now_or_never()
            .expect("this thread slept instead of waiting");
        if let Some(writer) = claim? {
            let expected = Expected {
                what: format!("layer {diff_id}"),
                blob: None,
                diff_id,
            };
            let input = BufReader::with_capacity(256 << 10, &spool.file);
            self.write_layer(writer, input, &expected, &options.limits)?;
        }
        let config = self.derived_config(base, diff_id, edit, options)?;
        let manifest = self.plain_manifest_of(&config)?;
        let names = name.map(Reference::whole).into_iter().collect();
        self.add_image(
            &lock,
            &config,
            &manifest,
            names,
            Vec::new(),
            &options.progress,
        )
    }

    fn spool_layer(
        &self,
        mut layer: impl Read,
        options: &LoadOptions,
    ) -> Result<(Partial, Digest)> {
        let mut spool = self.spool_file()?;
        let mut hasher = Hasher::default();
        let mut buffer = vec![0; 256 << 10];
        let (mut total, mut checked) = (0, 0);
        loop {
            let count = match layer.read(&mut buffer) {
                Ok(0) => return Ok((spool, hasher.finish())),
                Ok(count) => count,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Error::io("cannot read", "the new layer", e)),
            };
            total += count as u64;
            options.limits.inflated("the new layer", total, None)?;
            if total - checked >= ROOM_EVERY {
                checked = total;
                leaves_room(&spool)?;
            }
            hasher.update(&buffer[..count]);
            spool
                .file
                .write_all(&buffer[..count])
                .map_err(|e| Error::io("cannot write", &spool.path, e))?;
        }
    }

    fn derived_config(
        &self,
        base: &Image,
        layer: Digest,
        edit: impl FnOnce(&mut Value),
        options: &LoadOptions,
    ) -> Result<Config> {
        let bad = |reason: &str| Error::BadDocument {
            what: format!("configuration of {}", base.id),
            reason: reason.to_owned(),
        };
        let bytes = files::read(&self.paths.document(&base.id))?;
        let mut document: Value =
            serde_json::from_slice(&bytes).map_err(|e| bad(&e.to_string()))?;
        document["rootfs"]["diff_ids"]
            .as_array_mut()
            .ok_or_else(|| bad("it lists no layers"))?
            .push(layer.to_string().into());
        edit(&mut document);
        let bytes = document.to_string().into_bytes();
        let layers = base.layers.len() + 1;
        Config::parse(
            "the new image",
            Digest::of(&bytes),
            bytes,
            layers,
            &options.limits,
        )
    }
}
