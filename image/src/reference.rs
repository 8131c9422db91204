//! Names of images, as users write them.
//!
//! `oci-spec` parses them as well, with a regular expression whose compilation takes 25 ms: more than everything else that a
//! start needs of the store. So this is done by hand, by the same grammar.

use oci_spec::distribution::Reference;

use crate::digest::Digest;
use crate::error::{Error, Result};

/// The registry and the repository's parent that are meant when a name has none.
const DEFAULT_REGISTRY: &str = "docker.io";
const DEFAULT_PARENT: &str = "library";
const DEFAULT_TAG: &str = "latest";
/// Bounds of the grammar.
const REPOSITORY_MAX: usize = 255;
const TAG_MAX: usize = 128;

/// Parses a name (`debian`, `registry:5000/a/b:tag`, `name@sha256:…`) into the full form.
pub fn parse_reference(name: &str) -> Result<Reference> {
    let bad = |reason: &str| Error::BadName {
        name: crate::error::printable(name.as_bytes()),
        reason: reason.to_owned(),
    };
    let (rest, digest) = match name.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (name, None),
    };
    if let Some(digest) = digest {
        digest
            .parse::<Digest>()
            .map_err(|_| bad("after @ comes sha256: and 64 lowercase hexadecimal digits"))?;
    }
    // A colon after the last slash begins the tag; before it, a port.
    let (path, tag) = match rest.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
        _ => (rest, None),
    };
    if let Some(tag) = tag
        && !is_tag(tag)
    {
        return Err(bad("a tag is 1 to 128 letters, digits, _, . and -"));
    }
    let (registry, repository) = match path.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => {
            check_registry(first).map_err(bad)?;
            (first, rest.to_owned())
        }
        _ => (DEFAULT_REGISTRY, path.to_owned()),
    };
    let registry = if registry == "index.docker.io" {
        DEFAULT_REGISTRY
    } else {
        registry
    };
    let repository = if registry == DEFAULT_REGISTRY && !repository.contains('/') {
        format!("{DEFAULT_PARENT}/{repository}")
    } else {
        repository
    };
    if repository.len() > REPOSITORY_MAX {
        return Err(bad("a repository's name has at most 255 characters"));
    }
    if !repository.split('/').all(is_component) {
        let reason = if path.bytes().any(|b| b.is_ascii_uppercase()) {
            "a repository's name is in lowercase"
        } else {
            "a repository is lowercase letters and digits, with single . _ - between them, in parts divided by /"
        };
        return Err(bad(reason));
    }
    let registry = registry.to_owned();
    Ok(match (tag, digest) {
        (Some(tag), Some(digest)) => {
            Reference::with_tag_and_digest(registry, repository, tag.to_owned(), digest.to_owned())
        }
        (None, Some(digest)) => Reference::with_digest(registry, repository, digest.to_owned()),
        (tag, None) => {
            Reference::with_tag(registry, repository, tag.unwrap_or(DEFAULT_TAG).to_owned())
        }
    })
}

/// What the store knows an image by: the name with its tag, or with its digest if it has one.
pub(crate) fn key(reference: &Reference) -> String {
    match reference.digest() {
        Some(digest) => format!(
            "{}/{}@{digest}",
            reference.registry(),
            reference.repository()
        ),
        None => reference.whole(),
    }
}

/// Checks `host`, `host:port`, `[IPv6 address]` and `[IPv6 address]:port`.
fn check_registry(registry: &str) -> Result<(), &'static str> {
    let is_label = |label: &str| {
        let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        !label.is_empty()
            && label.bytes().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let (is_host, port) = match registry.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').unwrap_or((rest, "]"));
            (address.parse::<std::net::Ipv6Addr>().is_ok(), port)
        }
        None => {
            let (host, port) = registry.split_at(registry.find(':').unwrap_or(registry.len()));
            (host.split('.').all(is_label), port)
        }
    };
    if !is_host {
        return Err("a registry is a host's name or address, with a port if need be");
    }
    match port.strip_prefix(':') {
        Some(port) if port.parse::<u16>().is_ok() => Ok(()),
        None if port.is_empty() => Ok(()),
        _ => Err("after the registry's colon comes a port"),
    }
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= TAG_MAX
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

/// Lowercase letters and digits, divided by one dot, one or two underscores, or any number of dashes.
fn is_component(part: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let divided = part
        .split(|c: char| c.is_ascii() && plain(c as u8))
        .filter(|divider| !divider.is_empty());
    let mut ends = [part.bytes().next(), part.bytes().last()].into_iter();
    ends.all(|end| end.is_some_and(plain))
        && divided
            .into_iter()
            .all(|d| d == "." || d == "_" || d == "__" || d.bytes().all(|b| b == b'-'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn parse_short_names_are_completed() {
        for (name, whole) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12", "docker.io/library/debian:12"),
            ("user/app", "docker.io/user/app:latest"),
            ("docker.io/debian", "docker.io/library/debian:latest"),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/a/b:t", "localhost:5000/a/b:t"),
            ("host:5000/x", "host:5000/x:latest"),
            ("ghcr.io/a/b-c__d.e:V1.0_x", "ghcr.io/a/b-c__d.e:V1.0_x"),
            ("[::1]:5000/x", "[::1]:5000/x:latest"),
            ("127.0.0.1:5000/t:1", "127.0.0.1:5000/t:1"),
        ] {
            assert_eq!(parse_reference(name).unwrap().whole(), whole);
        }
        let both = parse_reference(&format!("debian:12@{DIGEST}")).unwrap();
        assert_eq!((both.tag(), both.digest()), (Some("12"), Some(DIGEST)));
        assert_eq!(key(&both), format!("docker.io/library/debian@{DIGEST}"));
    }

    #[test]
    fn parse_bad_names_are_refused() {
        let long = "a".repeat(300);
        for name in [
            "",
            "Debian",
            "a/B",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a//b",
            "/a",
            "a/",
            "a:",
            "a:-x",
            "a@",
            "a@sha256:0",
            ":5000/a",
            "a b",
            "../a",
            "a/../b",
            "host:x/a",
            "host:]/a",
            "[::1]:x/a",
            "ho_st.io/a:t/b",
            "[::g]/a",
            "[::1/a",
            "[::1]5/a",
            "a_b.io/a",
            "é",
            "a\n",
            &long,
        ] {
            assert!(parse_reference(name).is_err(), "{name:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn parse_agrees_with_oci_spec(name in "([a-zA-Z0-9.:\\[\\]-]{1,8}/)?[a-z0-9._/-]{1,12}(:[a-zA-Z0-9._-]{1,4})?") {
            let ours = parse_reference(&name).ok().map(|r| r.whole());
            let theirs = name.parse::<Reference>().ok().map(|r| r.whole());
            // Stricter about hosts and ports; never another meaning.
            if let Some(ours) = &ours {
                prop_assert_eq!(Some(ours), theirs.as_ref());
            }
        }
    }
}
