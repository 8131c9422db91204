//! Manifests and indexes, parsed as strictly as running them needs.

use serde::Deserialize;

use crate::digest::Digest;
use crate::error::{Error, Result, printable};
use crate::platform::Platform;

/// What a manifest says of a blob.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Descriptor {
    #[serde(default, rename = "mediaType")]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    #[serde(default)]
    pub(crate) platform: Option<PlatformFields>,
    #[serde(default)]
    pub(crate) annotations: std::collections::BTreeMap<String, String>,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct PlatformFields {
    os: String,
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    schema_version: i64,
    #[serde(default)]
    media_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

/// An image's manifest.
#[derive(Clone, Debug)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

/// What a manifest turned out to be.
#[derive(Debug)]
pub(crate) enum Select {
    Image(Manifest),
    Index(Vec<Descriptor>),
}

const INDEX_TYPES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
const MANIFEST_TYPES: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
const CONFIG_TYPES: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];

/// Parses a manifest or an index.
pub(crate) fn parse(what: &str, bytes: &[u8]) -> Result<Select> {
    let bad = |reason: String| Error::BadDocument {
        what: format!("manifest of {what}"),
        reason,
    };
    let document: Document =
        serde_json::from_slice(bytes).map_err(|e| bad(printable(e.to_string().as_bytes())))?;
    if document.schema_version != 2 {
        return Err(bad(format!(
            "schema version {}; only version 2 is supported, so the image must be built anew",
            document.schema_version
        )));
    }
    let media_type = document.media_type.as_deref();
    if let Some(other) =
        media_type.filter(|t| !INDEX_TYPES.contains(t) && !MANIFEST_TYPES.contains(t))
    {
        return Err(bad(format!(
            "media type {other:?} is neither an image manifest nor an index"
        )));
    }
    match (document.config, document.layers, document.manifests) {
        (Some(config), Some(layers), None)
            if media_type.is_none_or(|t| MANIFEST_TYPES.contains(&t)) =>
        {
            let config_type = config.media_type.as_str();
            if !config_type.is_empty() && !CONFIG_TYPES.contains(&config_type) {
                return Err(bad(format!(
                    "its configuration is of type {config_type:?}: an artifact, not a container image"
                )));
            }
            if let Some(layer) = layers
                .iter()
                .find(|layer| !is_layer_type(&layer.media_type))
            {
                return Err(bad(format!(
                    "a layer is of type {:?}, which can't be unpacked",
                    layer.media_type
                )));
            }
            Ok(Select::Image(Manifest { config, layers }))
        }
        (None, None, Some(manifests)) if media_type.is_none_or(|t| INDEX_TYPES.contains(&t)) => {
            Ok(Select::Index(manifests))
        }
        _ => Err(bad("neither an image manifest nor an index, or both".into())),
    }
}

/// Archives, compressed or not; encrypted ones and others can't be read.
fn is_layer_type(media_type: &str) -> bool {
    let known = [
        "",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.diff.tar",
    ];
    let plain = media_type.split('+').next().unwrap_or_default();
    let oci = plain.starts_with("application/vnd.oci.image.layer.") && plain.ends_with(".tar");
    let docker =
        plain.starts_with("application/vnd.docker.image.rootfs.") && plain.contains(".tar");
    known.contains(&media_type) || ((oci || docker) && !media_type.ends_with("+encrypted"))
}

/// The entry of an index for a platform: the first that fits exactly, else the first that fits.
pub(crate) fn select<'a>(
    what: &str,
    wanted: &Platform,
    entries: &'a [Descriptor],
) -> Result<&'a Descriptor> {
    let platform = |entry: &Descriptor| {
        let fields = entry.platform.clone()?;
        let variant = fields.variant.filter(|variant| !variant.is_empty());
        Some(Platform {
            os: fields.os,
            architecture: fields.architecture,
            variant,
        })
    };
    let exact = entries
        .iter()
        .find(|entry| platform(entry).as_ref() == Some(wanted));
    let fitting = || {
        entries
            .iter()
            .find(|entry| platform(entry).is_some_and(|offered| wanted.accepts(&offered)))
    };
    // An index that names no platforms and has one image means that one.
    let only = || match entries {
        [entry] if entry.platform.is_none() => Some(entry),
        _ => None,
    };
    exact
        .or_else(fitting)
        .or_else(only)
        .ok_or_else(|| Error::NoPlatform {
            reference: what.to_owned(),
            wanted: wanted.to_string(),
            available: entries
                .iter()
                .filter_map(platform)
                .filter(|platform| platform.os != "unknown")
                .map(|platform| printable(platform.to_string().as_bytes()))
                .collect(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn manifest(media: &str, config: &str, layer: &str) -> String {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{media}","config":{{"mediaType":"{config}","digest":"{DIGEST}","size":2}},
            "layers":[{{"mediaType":"{layer}","digest":"{DIGEST}","size":3}}]}}"#
        )
    }

    #[test]
    fn parse_docker_and_oci_manifests() {
        let layer = "application/vnd.docker.image.rootfs.diff.tar.gzip";
        assert!(matches!(
            parse(
                "x",
                manifest(MANIFEST_TYPES[1], CONFIG_TYPES[1], layer).as_bytes()
            ),
            Ok(Select::Image(_))
        ));
        let layer = "application/vnd.oci.image.layer.v1.tar+zstd";
        assert!(matches!(
            parse(
                "x",
                manifest(MANIFEST_TYPES[0], CONFIG_TYPES[0], layer).as_bytes()
            ),
            Ok(Select::Image(_))
        ));
    }

    #[test]
    fn parse_wrong_types_are_refused() {
        let layer = "application/vnd.oci.image.layer.v1.tar";
        for text in [
            manifest(
                "application/vnd.docker.distribution.manifest.v1+prettyjws",
                CONFIG_TYPES[0],
                layer,
            ),
            manifest(
                MANIFEST_TYPES[0],
                "application/vnd.cncf.helm.config.v1+json",
                layer,
            ),
            manifest(
                MANIFEST_TYPES[0],
                CONFIG_TYPES[0],
                "application/vnd.oci.image.layer.v1.tar+encrypted",
            ),
            manifest(MANIFEST_TYPES[0], CONFIG_TYPES[0], "text/plain"),
            manifest(INDEX_TYPES[0], CONFIG_TYPES[0], layer),
            r#"{"schemaVersion":1}"#.into(),
            r#"{"schemaVersion":2}"#.into(),
            "<html>".into(),
        ] {
            assert!(parse("x", text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn select_platform_prefers_the_exact_one() {
        let entry = |platform: &str| -> Descriptor {
            serde_json::from_str(&format!(
                r#"{{"digest":"{DIGEST}","size":1,"platform":{platform}}}"#
            ))
            .unwrap()
        };
        let entries = [
            entry(r#"{"os":"linux","architecture":"arm","variant":"v6"}"#),
            entry(r#"{"os":"linux","architecture":"arm","variant":"v7"}"#),
            entry(r#"{"os":"unknown","architecture":"unknown"}"#),
        ];
        let found = select("x", &"linux/arm/v7".parse().unwrap(), &entries).unwrap();
        assert_eq!(
            found.platform.as_ref().unwrap().variant.as_deref(),
            Some("v7")
        );
        let error = select("x", &"linux/s390x".parse().unwrap(), &entries)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("linux/s390x")
                && error.contains("linux/arm/v6")
                && !error.contains("unknown")
        );
    }
}
