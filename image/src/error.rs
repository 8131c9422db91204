//! What can go wrong, with the values at fault and what the user can do about it.

use std::io;
use std::path::{Path, PathBuf};

/// Result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every failure of the image store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file operation failed.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried, as a verb phrase.
        action: &'static str,
        /// The path it was tried on.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },

    /// The disk that holds the store is full.
    #[error(
        "no space left on the disk that holds {}; free some space or run `casemate prune`, then try again (finished layers are kept)",
        path.display()
    )]
    DiskFull {
        /// The file that couldn't grow.
        path: PathBuf,
    },

    /// The name doesn't parse as an image reference.
    #[error("{name:?} is not an image name: {reason}")]
    BadName {
        /// The name as given.
        name: String,
        /// What is wrong with it.
        reason: String,
    },

    /// No image of this name is in the store.
    #[error("no such image: {name}; `casemate pull {name}` fetches it")]
    NotFound {
        /// The name or id that was looked for.
        name: String,
    },

    /// A short id stands for several images.
    #[error("{prefix} is ambiguous: it begins the ids of {}", ids.join(", "))]
    Ambiguous {
        /// The prefix as given.
        prefix: String,
        /// The ids that begin with it.
        ids: Vec<String>,
    },

    /// The image has other names, or is in use.
    #[error("image {name} is in use: {reason}; use --force to remove it anyway")]
    InUse {
        /// The image.
        name: String,
        /// Who uses it.
        reason: String,
    },

    /// The registry couldn't be talked to.
    #[error("registry {registry}: {message}")]
    Registry {
        /// Host and port.
        registry: String,
        /// What failed and what can be done.
        message: String,
        /// The client's error, where there is one.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },

    /// The registry has no such repository or tag, or hides it.
    #[error(
        "{reference}: not found in the registry (or you may not see it: check the name and the tag, or log in with `docker login {registry}`)"
    )]
    UnknownImage {
        /// The whole reference.
        reference: String,
        /// Host and port.
        registry: String,
    },

    /// The registry wants other credentials.
    #[error(
        "{reference}: the registry refuses access ({message}); log in with `docker login {registry}` or `podman login {registry}`"
    )]
    Unauthorized {
        /// The whole reference.
        reference: String,
        /// Host and port.
        registry: String,
        /// The registry's words.
        message: String,
    },

    /// The registry was silent for too long.
    #[error(
        "registry {registry}: no data for {seconds} s while fetching {what}; check the network, or raise `image.limits.stall_seconds`"
    )]
    Stalled {
        /// Host and port.
        registry: String,
        /// What was being fetched.
        what: String,
        /// How long we waited.
        seconds: u64,
    },

    /// The registry keeps us waiting with a byte now and then.
    #[error(
        "registry {registry}: too slow: {bytes} bytes in {seconds} s while fetching {what}; check the network, or raise `image.limits.stall_seconds`"
    )]
    Slow {
        /// Host and port.
        registry: String,
        /// What was being fetched.
        what: String,
        /// How much came.
        bytes: u64,
        /// In how long.
        seconds: u64,
    },

    /// The bytes aren't what their digest promises.
    #[error("{what}: digest mismatch: expected {expected}, got {actual}; nothing was stored")]
    DigestMismatch {
        /// Manifest, config, layer blob or uncompressed layer.
        what: String,
        /// The digest promised.
        expected: String,
        /// The digest of what came.
        actual: String,
    },

    /// A stream ended before its time.
    #[error("{what}: truncated: {detail}; nothing was stored")]
    Truncated {
        /// The stream.
        what: String,
        /// How much came, how much was due.
        detail: String,
    },

    /// A compressed stream can't be decoded.
    #[error("{what}: broken {format} stream")]
    Decompress {
        /// The stream.
        what: String,
        /// gzip or zstd.
        format: &'static str,
        /// The decoder's error.
        #[source]
        source: io::Error,
    },

    /// A document of the image is malformed or not of a kind we can run.
    #[error("{what}: {reason}")]
    BadDocument {
        /// Manifest, config, archive index.
        what: String,
        /// What is wrong with it.
        reason: String,
    },

    /// The image has no variant for this platform.
    #[error("{reference}: no image for platform {wanted}; it has {}", if available.is_empty() { "none".to_owned() } else { available.join(", ") })]
    NoPlatform {
        /// The image.
        reference: String,
        /// The platform asked for.
        wanted: String,
        /// The platforms it has.
        available: Vec<String>,
    },

    /// A layer's archive is malformed or hostile.
    #[error("{layer}: entry \"{entry}\": {reason}")]
    BadLayer {
        /// The layer, by digest once it is known.
        layer: String,
        /// The entry's name, shortened and escaped.
        entry: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A configurable limit was reached.
    #[error("{what}: more than {limit} {unit}; if you trust the image raise `image.limits.{key}`")]
    Limit {
        /// What grew too large.
        what: String,
        /// The limit in force.
        limit: u64,
        /// What the limit counts.
        unit: &'static str,
        /// The key of the configuration file.
        key: &'static str,
    },

    /// An EROFS image doesn't follow its format.
    #[error("EROFS image: {reason} at byte {offset}")]
    BadErofs {
        /// What is wrong.
        reason: String,
        /// Where.
        offset: u64,
    },

    /// A file of the store is damaged.
    #[error("{} is damaged ({reason}); remove the image and pull it again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// The input isn't an image archive.
    #[error(
        "{what} is not an image archive: {reason}; docker-archive, oci-archive and OCI layout directories can be loaded"
    )]
    NotAnArchive {
        /// The input.
        what: String,
        /// What was missing.
        reason: String,
    },

    /// A credential helper or an auth file failed.
    #[error("credentials for {registry}: {message}")]
    Credentials {
        /// Host and port.
        registry: String,
        /// What failed.
        message: String,
    },

    /// A worker thread died.
    #[error("internal error: {0} ended unexpectedly")]
    Worker(&'static str),
}

impl Error {
    /// An I/O error on `path`; a full disk becomes [`Error::DiskFull`].
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        let path = path.as_ref().to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path },
            _ => Self::Io {
                action,
                path,
                source,
            },
        }
    }

    /// The same error, telling which file it was where that wasn't known.
    pub(crate) fn at(mut self, name: &Path) -> Self {
        if let Self::Io { path, .. } | Self::DiskFull { path } = &mut self
            && path.as_os_str().is_empty()
        {
            name.clone_into(path);
        }
        self
    }

    /// The same error, telling which layer it was.
    pub(crate) fn in_layer(mut self, name: &str) -> Self {
        if let Self::BadLayer { layer: what, .. }
        | Self::Truncated { what, .. }
        | Self::Limit { what, .. } = &mut self
            && let Some(rest) = what.strip_prefix(LAYER)
            && !rest.contains("sha256:")
        {
            *what = format!("{name}{rest}");
        }
        self
    }

    /// A malformed or hostile layer; the name is bounded and made printable.
    pub(crate) fn layer(entry: &[u8], reason: impl Into<String>) -> Self {
        Self::BadLayer {
            layer: LAYER.to_owned(),
            entry: printable(entry),
            reason: reason.into(),
        }
    }
}

/// How a layer is called where its digest isn't known.
pub(crate) const LAYER: &str = "layer";

/// A text from outside, cut to a line and made printable.
pub(crate) fn printable(text: &[u8]) -> String {
    const SHOWN: usize = 200;
    let shown = String::from_utf8_lossy(&text[..text.len().min(SHOWN)]);
    let mut shown = casemate_protocol::text::printable(&shown).into_owned();
    if text.len() > SHOWN {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printable_of_a_hostile_text_is_short_and_inert() {
        assert_eq!(
            printable(b"\x1b]0;x\x07\n\xff"),
            "\\u001b]0;x\\u0007\\u000a\u{fffd}"
        );
        let long = printable(&[0x9b; 1000]);
        assert!(long.ends_with('…') && long.chars().count() == 201);
    }
}
