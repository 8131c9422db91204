//! Images in memory: layers, configuration, manifest.

use std::collections::BTreeMap;
use std::io::Write as _;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// An image's blobs by digest, and its manifest's.
#[derive(Clone, Default)]
pub(crate) struct Blobs {
    pub(crate) blobs: BTreeMap<String, Vec<u8>>,
    pub(crate) manifest: String,
    pub(crate) config: String,
    pub(crate) layers: Vec<String>,
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

/// A layer of these files; a name that ends in a slash is a directory.
pub(crate) fn layer(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = tar::Header::new_gnu();
        let directory = name.ends_with('/');
        header.set_entry_type(if directory {
            tar::EntryType::Directory
        } else {
            tar::EntryType::Regular
        });
        header.set_mode(if directory { 0o755 } else { 0o644 });
        header.set_size(data.len() as u64);
        header.set_mtime(1_600_000_000);
        builder.append_data(&mut header, name, *data).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Bytes that don't compress, the same each time.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

pub(crate) fn pack(archive: &[u8], packing: Packing) -> Vec<u8> {
    match packing {
        Packing::Plain => archive.to_vec(),
        Packing::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(archive).unwrap();
            encoder.finish().unwrap()
        }
        Packing::Zstd => zstd::encode_all(archive, 1).unwrap(),
    }
}

impl Blobs {
    pub(crate) fn put(&mut self, bytes: Vec<u8>) -> String {
        let digest = digest(&bytes);
        self.blobs.insert(digest.clone(), bytes);
        digest
    }

    fn descriptor(&self, media_type: &str, digest: &str) -> Value {
        json!({"mediaType": media_type, "digest": digest, "size": self.blobs[digest].len()})
    }

    /// An image of these archives.
    pub(crate) fn image(archives: &[Vec<u8>], packing: Packing) -> Self {
        Self::image_with(
            archives,
            packing,
            &json!({"architecture": "amd64", "os": "linux"}),
        )
    }

    /// The same with a configuration to start from.
    pub(crate) fn image_with(archives: &[Vec<u8>], packing: Packing, config: &Value) -> Self {
        let mut image = Self::default();
        let mut config = config.clone();
        let diff_ids: Vec<String> = archives.iter().map(|archive| digest(archive)).collect();
        config["rootfs"] = json!({"type": "layers", "diff_ids": diff_ids});
        config["config"] = json!({"Cmd": ["/bin/true"]});
        image.config = image.put(config.to_string().into_bytes());
        let media_type = match packing {
            Packing::Plain => "application/vnd.oci.image.layer.v1.tar",
            Packing::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Packing::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        };
        image.layers = archives
            .iter()
            .map(|archive| image.put(pack(archive, packing)))
            .collect();
        let layers: Vec<Value> = image
            .layers
            .iter()
            .map(|layer| image.descriptor(media_type, layer))
            .collect();
        let config = image.descriptor("application/vnd.oci.image.config.v1+json", &image.config);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers,
        });
        image.manifest = image.put(manifest.to_string().into_bytes());
        image
    }

    /// An index of images by platform.
    pub(crate) fn index(images: &[(Self, Value)]) -> Self {
        let mut all = Self::default();
        let mut entries = Vec::new();
        for (image, platform) in images {
            all.blobs.extend(image.blobs.clone());
            let mut entry = image.descriptor(
                "application/vnd.oci.image.manifest.v1+json",
                &image.manifest,
            );
            entry["platform"] = platform.clone();
            entries.push(entry);
        }
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": entries,
        });
        all.manifest = all.put(index.to_string().into_bytes());
        all
    }
}

/// Three layers with some weight: noise, so that downloads take a while.
pub(crate) fn heavy() -> Vec<Vec<u8>> {
    (0..3u64)
        .map(|n| {
            let name = format!("layer{n}/data");
            layer(&[
                (&format!("layer{n}/"), b""),
                (&name, &noise(n + 1, 3 << 20)),
                ("etc/common", name.as_bytes()),
            ])
        })
        .collect()
}
