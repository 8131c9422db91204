//! Pulls: formats, verification, faults, several at once.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::images::{Blobs, Packing, heavy, layer, noise};
use crate::common::server::{Fault, Server};
use crate::common::{runtime, stored};
use casemate_image::{
    Error, Image, Limits, Platform, PullOptions, PullPolicy, RegistryConfig, RegistryHost, Result,
    Store, parse_reference,
};
use serde_json::json;

fn options() -> PullOptions {
    let limits = Limits {
        stall_seconds: 1,
        connect_seconds: 1,
        attempts: 2,
        ..Limits::default()
    };
    PullOptions {
        limits,
        policy: PullPolicy::Always,
        ..PullOptions::default()
    }
}

fn pull_with(data: &Path, name: &str, options: &PullOptions) -> Result<Image> {
    runtime().block_on(Store::open(data)?.pull(&parse_reference(name)?, options))
}

fn pull(data: &Path, name: &str) -> Result<Image> {
    pull_with(data, name, &options())
}

/// A failed pull leaves no name, no partial file, and no layer but whole ones.
#[track_caller]
fn nothing_visible(data: &Path, layers: usize) {
    assert!(Store::open(data).unwrap().list().unwrap().is_empty());
    assert_eq!(stored(data, "tmp"), [""; 0]);
    assert!(stored(data, "layers").len() <= 2 * layers);
    assert_eq!(stored(data, "rootfs"), [""; 0]);
}

#[test]
fn pull_every_packing_gives_the_same_files() {
    let server = Server::start();
    let mut seen = Vec::new();
    for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
        let data = tempfile::tempdir().unwrap();
        let name = server.add("x", &Blobs::image(&heavy(), packing));
        let image = pull(data.path(), &name).unwrap();
        assert_eq!(image.names, [name]);
        assert_eq!(image.layers.len(), 3);
        assert!(image.size > 9 << 20);
        let store = Store::open(data.path()).unwrap();
        let disk = store.rootfs(&image).unwrap();
        assert_eq!(disk.layers.len(), 3);
        let metadata = std::fs::read(&disk.metadata).unwrap();
        assert!(metadata.len() < 16 << 10);
        seen.push((
            [stored(data.path(), "layers"), stored(data.path(), "rootfs")],
            metadata,
        ));
        assert_eq!(stored(data.path(), "tmp"), [""; 0]);
    }
    assert!(seen.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn pull_policy_decides_whether_the_registry_is_asked() {
    let server = Server::start();
    let data = tempfile::tempdir().unwrap();
    let name = server.add("x", &Blobs::image(&[layer(&[("a", b"1")])], Packing::Gzip));
    let never = PullOptions {
        policy: PullPolicy::Never,
        ..options()
    };
    assert!(matches!(
        pull_with(data.path(), &name, &never),
        Err(Error::NotFound { .. })
    ));
    let missing = PullOptions {
        policy: PullPolicy::Missing,
        ..options()
    };
    let first = pull_with(data.path(), &name, &missing).unwrap();
    server.add("x", &Blobs::image(&[layer(&[("a", b"2")])], Packing::Gzip));
    assert_eq!(
        pull_with(data.path(), &name, &missing).unwrap().id,
        first.id
    );
    assert_eq!(pull_with(data.path(), &name, &never).unwrap().id, first.id);
    assert_eq!(server.requests("manifests/x"), 1);
    let second = pull(data.path(), &name).unwrap();
    assert_ne!(second.id, first.id);
    let old = Store::open(data.path())
        .unwrap()
        .find(&first.id.to_string())
        .unwrap()
        .unwrap();
    assert!(old.names.is_empty(), "the name moved");
}

#[test]
fn pull_index_chooses_the_platform() {
    let server = Server::start();
    let image = |arch: &str| {
        let config = json!({"architecture": arch, "os": "linux"});
        Blobs::image_with(
            &[layer(&[("arch", arch.as_bytes())])],
            Packing::Gzip,
            &config,
        )
    };
    let entries = [
        (
            image("arm64"),
            json!({"os": "linux", "architecture": "arm64", "variant": "v8"}),
        ),
        (
            image("amd64"),
            json!({"os": "linux", "architecture": "amd64"}),
        ),
    ];
    let index = Blobs::index(&entries);
    let name = server.add("multi", &index);
    for (platform, expected) in [
        ("linux/amd64", &entries[1].0),
        ("linux/arm64", &entries[0].0),
    ] {
        let data = tempfile::tempdir().unwrap();
        let options = PullOptions {
            platform: platform.parse().unwrap(),
            ..options()
        };
        let image = pull_with(data.path(), &name, &options).unwrap();
        assert_eq!(image.digest.to_string(), expected.manifest);
        assert!(
            image
                .repo_digests
                .iter()
                .any(|digest| digest.ends_with(&index.manifest))
        );
    }
    let data = tempfile::tempdir().unwrap();
    let options = PullOptions {
        platform: "linux/s390x".parse::<Platform>().unwrap(),
        ..options()
    };
    let error = pull_with(data.path(), &name, &options)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("s390x") && error.contains("linux/amd64"),
        "{error}"
    );
    nothing_visible(data.path(), 0);
}

#[test]
fn pull_by_digest_is_verified_and_found_again() {
    let server = Server::start();
    let data = tempfile::tempdir().unwrap();
    let image = Blobs::image(&[layer(&[("a", b"1")])], Packing::Gzip);
    server.add("x", &image);
    let name = format!("{}/app@{}", server.address, image.manifest);
    let pulled = pull(data.path(), &name).unwrap();
    assert_eq!(
        Store::open(data.path())
            .unwrap()
            .find(&name)
            .unwrap()
            .unwrap()
            .id,
        pulled.id
    );
    server.fault(&image.manifest, Fault::Corrupt);
    let other = tempfile::tempdir().unwrap();
    assert!(matches!(
        pull(other.path(), &name),
        Err(Error::DigestMismatch { .. })
    ));
    nothing_visible(other.path(), 0);
}

#[test]
fn pull_corrupt_layer_or_config_names_both_digests() {
    for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
        let server = Server::start();
        let data = tempfile::tempdir().unwrap();
        let image = Blobs::image(&heavy(), packing);
        let name = server.add("x", &image);
        server.fault(&image.layers[1], Fault::Corrupt);
        match pull(data.path(), &name) {
            Err(Error::DigestMismatch {
                expected, actual, ..
            }) => {
                assert_eq!(expected, image.layers[1]);
                assert!(actual.starts_with("sha256:") && actual != expected);
            }
            other => panic!("{packing:?}: {other:?}"),
        }
        nothing_visible(data.path(), 2);
        server.mend();
        server.fault(&image.config, Fault::Corrupt);
        assert!(matches!(
            pull(data.path(), &name),
            Err(Error::DigestMismatch { .. })
        ));
        server.mend();
        assert!(pull(data.path(), &name).is_ok());
    }
}

#[test]
fn pull_wrong_diff_id_is_refused() {
    let server = Server::start();
    let data = tempfile::tempdir().unwrap();
    let mut image = Blobs::image(&[layer(&[("a", b"1")])], Packing::Gzip);
    let config = json!({"architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [crate::common::images::digest(b"other")]}});
    let old = image.config.clone();
    let new = image.put(config.to_string().into_bytes());
    let manifest = String::from_utf8(image.blobs[&image.manifest].clone()).unwrap();
    let size = |digest: &str| format!("\"size\":{}", image.blobs[digest].len());
    let manifest = manifest
        .replace(&old, &new)
        .replacen(&size(&old), &size(&new), 1);
    image.manifest = image.put(manifest.into_bytes());
    let error = pull(data.path(), &server.add("x", &image))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("uncompressed") && error.contains("mismatch"),
        "{error}"
    );
    nothing_visible(data.path(), 0);
}

#[test]
fn pull_broken_download_goes_on_where_it_broke() {
    for ranges in [true, false] {
        let server = Server::start();
        if !ranges {
            server.without_ranges();
        }
        let data = tempfile::tempdir().unwrap();
        let image = Blobs::image(&heavy(), Packing::Gzip);
        let name = server.add("x", &image);
        server.fault_once(&image.layers[0], Fault::Cut(1_000_000));
        pull(data.path(), &name).unwrap();
        assert_eq!(server.requests(&image.layers[0]), 2);
    }
}

#[test]
fn pull_layer_always_cut_is_truncated_and_the_others_are_kept() {
    let server = Server::start();
    let data = tempfile::tempdir().unwrap();
    let image = Blobs::image(&heavy(), Packing::Zstd);
    let name = server.add("x", &image);
    server.fault(&image.layers[2], Fault::Cut(0));
    let error = pull(data.path(), &name).unwrap_err();
    assert!(
        matches!(error, Error::Truncated { .. } | Error::Registry { .. }),
        "{error:?}"
    );
    nothing_visible(data.path(), 2);
    let kept = stored(data.path(), "layers").len() / 2;
    server.mend();
    pull(data.path(), &name).unwrap();
    let asked: usize = image.layers[..2]
        .iter()
        .map(|layer| server.requests(layer))
        .sum();
    assert!(
        asked <= 2 + (2 - kept),
        "finished layers are not fetched again"
    );
}

#[test]
fn pull_longer_layer_than_promised_is_refused() {
    let server = Server::start();
    let data = tempfile::tempdir().unwrap();
    let image = Blobs::image(&[layer(&[("a", &noise(1, 300_000))])], Packing::Gzip);
    let name = server.add("x", &image);
    server.fault(&image.layers[0], Fault::Longer);
    assert!(pull(data.path(), &name).is_err());
    nothing_visible(data.path(), 0);
}

#[test]
fn pull_stalled_registry_is_given_up_in_bounded_time() {
    let server = Server::start();
    let data = tempfile::tempdir().unwrap();
    let image = Blobs::image(&heavy(), Packing::Gzip);
    let name = server.add("x", &image);
    server.fault(&image.layers[0], Fault::Stall(0));
    let start = Instant::now();
    let error = pull(data.path(), &name).unwrap_err();
    assert!(
        matches!(error, Error::Stalled { seconds: 1, .. }),
        "{error:?}"
    );
    assert!(start.elapsed() < Duration::from_secs(30));
    nothing_visible(data.path(), 2);
}

#[test]
fn pull_unknown_down_or_failing_registry_is_told_apart() {
    let server = Server::start();
    let data = tempfile::tempdir().unwrap();
    let error = pull(data.path(), &format!("{}/app:none", server.address)).unwrap_err();
    assert!(matches!(error, Error::UnknownImage { .. }), "{error:?}");
    let image = Blobs::image(&[layer(&[("a", b"1")])], Packing::Gzip);
    let name = server.add("x", &image);
    for (status, tries) in [(500, 2), (403, 1)] {
        server.fault("x", Fault::Status(status));
        let before = server.requests("manifests/x");
        assert!(pull(data.path(), &name).is_err());
        assert_eq!(server.requests("manifests/x") - before, tries, "{status}");
    }
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let error = pull(data.path(), &format!("{free}/app")).unwrap_err();
    assert!(error.to_string().contains(&free.to_string()), "{error}");
    nothing_visible(data.path(), 0);
}

#[test]
fn pull_something_else_than_an_image_is_refused() {
    let server = Server::start();
    let data = tempfile::tempdir().unwrap();
    for document in [
        "<html>login</html>",
        r#"{"schemaVersion":1}"#,
        "",
        r#"{"schemaVersion":2,"manifests":[]}"#,
    ] {
        let mut blobs = Blobs::default();
        blobs.manifest = blobs.put(document.as_bytes().to_vec());
        assert!(
            pull(data.path(), &server.add("odd", &blobs)).is_err(),
            "{document}"
        );
    }
    let mut huge = Blobs::default();
    huge.manifest = huge.put(vec![b' '; 5 << 20]);
    let error = pull(data.path(), &server.add("huge", &huge)).unwrap_err();
    assert!(matches!(error, Error::Limit { .. }), "{error:?}");
    nothing_visible(data.path(), 0);
}

#[test]
fn pull_credentials_basic_and_token() {
    for tokens in [false, true] {
        let server = Server::start();
        let data = tempfile::tempdir().unwrap();
        let name = server.add("x", &Blobs::image(&[layer(&[("a", b"1")])], Packing::Gzip));
        server.protect("dXNlcjpwYXNz", tokens);
        let error = pull_with(
            data.path(),
            &name,
            &PullOptions {
                auth_file: Some("/dev/null".into()),
                ..options()
            },
        );
        assert!(error.is_err());
        let file = data.path().join("auth.json");
        std::fs::write(
            &file,
            json!({"auths": {&server.address: {"auth": "d3Jvbmc6cGFzcw=="}}}).to_string(),
        )
        .unwrap();
        let with = PullOptions {
            auth_file: Some(file.clone()),
            ..options()
        };
        assert!(matches!(
            pull_with(data.path(), &name, &with),
            Err(Error::Unauthorized { .. })
        ));
        std::fs::write(
            &file,
            json!({"auths": {&server.address: {"auth": "dXNlcjpwYXNz"}}}).to_string(),
        )
        .unwrap();
        pull_with(data.path(), &name, &with).unwrap();
    }
}

#[test]
fn pull_mirror_is_tried_first_and_may_fail() {
    let (mirror, server) = (Server::start(), Server::start());
    let image = Blobs::image(&heavy(), Packing::Gzip);
    let name = server.add("x", &image);
    mirror.add("x", &image);
    let mut registries = RegistryConfig::default();
    let host = RegistryHost {
        mirrors: vec![format!("http://{}", mirror.address)],
        ..RegistryHost::default()
    };
    registries.hosts.insert(server.address.clone(), host);
    let with = PullOptions {
        registries,
        ..options()
    };
    let data = tempfile::tempdir().unwrap();
    let pulled = pull_with(data.path(), &name, &with).unwrap();
    assert_eq!(
        (server.requests("manifests/x"), pulled.names),
        (0, vec![name.clone()])
    );
    let data = tempfile::tempdir().unwrap();
    mirror.fault(&image.layers[0], Fault::Corrupt);
    pull_with(data.path(), &name, &with).unwrap();
    assert_eq!(server.requests("manifests/x"), 1);
}

#[test]
fn pulls_at_once_fetch_each_layer_once() {
    let server = Server::start();
    let data = tempfile::tempdir().unwrap();
    let image = Blobs::image(&heavy(), Packing::Gzip);
    let name = server.add("x", &image);
    image
        .layers
        .iter()
        .for_each(|layer| server.fault(layer, Fault::Slow(10)));
    std::thread::scope(|scope| {
        let pulls: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| pull(data.path(), &name).unwrap().id))
            .collect();
        let ids: Vec<_> = pulls.into_iter().map(|pull| pull.join().unwrap()).collect();
        assert!(ids.windows(2).all(|pair| pair[0] == pair[1]));
    });
    assert!(image.layers.iter().all(|layer| server.requests(layer) == 1));
    assert_eq!(stored(data.path(), "tmp"), [""; 0]);
}

#[test]
fn pull_bomb_stops_at_the_limit() {
    let server = Server::start();
    let data = tempfile::tempdir().unwrap();
    for packing in [Packing::Gzip, Packing::Zstd] {
        let name = server.add(
            "bomb",
            &Blobs::image(&[layer(&[("zeros", &vec![0; 20 << 20])])], packing),
        );
        let limits = Limits {
            layer_bytes: 1 << 20,
            ..Limits::default()
        };
        let error = pull_with(
            data.path(),
            &name,
            &PullOptions {
                limits,
                ..options()
            },
        )
        .unwrap_err();
        assert!(error.to_string().contains("layer_bytes"), "{error}");
        nothing_visible(data.path(), 0);
    }
}

#[test]
fn pull_layer_that_leaves_its_tree_is_refused_by_name() {
    let server = Server::start();
    let data = tempfile::tempdir().unwrap();
    let mut archive = layer(&[("aa/escaped", b"x")]);
    archive[..2].copy_from_slice(b"..");
    let sum: u32 = archive[..512]
        .iter()
        .enumerate()
        .map(|(at, &b)| {
            if (148..156).contains(&at) {
                32
            } else {
                u32::from(b)
            }
        })
        .sum();
    archive[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let error = pull(
        data.path(),
        &server.add("x", &Blobs::image(&[archive], Packing::Gzip)),
    )
    .unwrap_err()
    .to_string();
    assert!(
        error.contains("../escaped") && error.contains("sha256:"),
        "{error}"
    );
    nothing_visible(data.path(), 0);
}
