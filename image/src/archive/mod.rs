//! Images as files: docker-archive, oci-archive and OCI layout directories, written and read.

mod input;
mod load;
mod output;
mod save;

pub(crate) use load::leaves_room;
pub(crate) use save::SavedLayer;

use serde::{Deserialize, Serialize};

/// The file that tells docker-archives.
const DOCKER_INDEX: &str = "manifest.json";
/// The file that lists an OCI layout's images.
const OCI_INDEX: &str = "index.json";
/// The file that tells an OCI layout, and what is in it.
const OCI_LAYOUT: &str = "oci-layout";
const OCI_LAYOUT_TEXT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";
/// The tag, in an OCI layout's index.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The full name, as containerd and Docker write it beside the tag.
const FULL_NAME: &str = "io.containerd.image.name";

/// An image in a docker-archive's index.
#[derive(Debug, Serialize, Deserialize)]
struct DockerImage {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "RepoTags")]
    names: Option<Vec<String>>,
    #[serde(rename = "Layers")]
    layers: Vec<String>,
}

/// Where a blob is in an OCI layout.
fn blob_path(digest: &crate::digest::Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// The manifest of an image whose layers are uncompressed archives of these sizes.
fn plain_manifest(
    config: (&crate::digest::Digest, u64),
    layers: &[(crate::digest::Digest, u64)],
) -> Vec<u8> {
    let layers: Vec<_> = layers
        .iter()
        .map(|(digest, size)| serde_json::json!({"mediaType": LAYER_TYPE, "digest": digest, "size": size}))
        .collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": config.0, "size": config.1},
        "layers": layers,
    });
    manifest.to_string().into_bytes()
}
