//! Save and load: every format there and back, and read by programs not written here.

use std::path::Path;
use std::process::Command;

use casemate_tests::{Host, Running};

fn id(host: &Host, name: &str) -> String {
    host.casemate(["images", "--no-trunc", "-q", name])
        .succeeds()
        .word()
}

#[test]
fn image_saved_and_loaded_is_the_same_in_every_format() {
    let host = Host::with_images();
    for format in ["docker-archive", "oci-archive", "oci-dir"] {
        let file = host.dir().join(format);
        let file = file.to_string_lossy();
        host.casemate(["save", "--format", format, "-o", &file, "museum"])
            .succeeds();
        let other = Host::new();
        other.casemate(["load", "-i", &file]).succeeds();
        // The configuration names every layer by the digest of its content.
        assert_eq!(id(&other, "museum"), id(&host, "museum"), "{format}");
    }
}

#[test]
fn saved_images_are_read_by_skopeo_and_unpacked_by_umoci_to_the_same_tree() {
    let host = Host::with_images();
    for (format, transport) in [
        ("docker-archive", "docker-archive"),
        ("oci-archive", "oci-archive"),
        ("oci-dir", "oci"),
    ] {
        let file = host.dir().join(format);
        host.casemate([
            "save",
            "--format",
            format,
            "-o",
            &file.to_string_lossy(),
            "museum",
        ])
        .succeeds();
        let layout = host.dir().join(format!("{format}-layout"));
        let mut skopeo = Command::new("skopeo");
        skopeo.args([
            "copy",
            "--quiet",
            &format!("{transport}:{}", file.display()),
        ]);
        skopeo.arg(format!("oci:{}:latest", layout.display()));
        Running::start(skopeo).ends().succeeds();
        assert_eq!(unpacked(&layout, host.dir()), golden(), "{format}");
    }
}

#[test]
fn image_saved_to_stdout_is_loaded_from_stdin() {
    let host = Host::with_images();
    let saved = host.casemate(["save", "busybox"]);
    saved.succeeds();
    let other = Host::new();
    let mut load = other.start(["load"]);
    load.says(&saved.stdout);
    load.ends().succeeds().mentions("busybox");
    assert_eq!(id(&other, "busybox"), id(&host, "busybox"));
}

#[test]
fn several_images_are_saved_in_one_archive() {
    let host = Host::with_images();
    let file = host.dir().join("both.tar");
    let file = file.to_string_lossy();
    host.casemate(["save", "-o", &file, "busybox", "configured"])
        .succeeds();
    let other = Host::new();
    other.casemate(["load", "-i", &file]).succeeds();
    assert_eq!(id(&other, "configured"), id(&host, "configured"));
    assert_eq!(id(&other, "busybox"), id(&host, "busybox"));
}

#[test]
fn archive_of_skopeo_is_loaded() {
    let host = Host::new();
    let layout = casemate_tests::paths::fixtures().join("layouts/museum");
    for transport in ["docker-archive", "oci-archive"] {
        let file = host.dir().join(transport);
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["copy", "--quiet", &format!("oci:{}", layout.display())]);
        skopeo.arg(format!(
            "{transport}:{}:example.org/from-{transport}:v1",
            file.display()
        ));
        Running::start(skopeo).ends().succeeds();
        host.casemate(["load", "-i", &file.to_string_lossy()])
            .succeeds();
    }
    host.casemate(["inspect", "example.org/from-docker-archive:v1"])
        .succeeds();
}

#[test]
fn what_is_no_archive_is_refused_by_name() {
    let host = Host::new();
    let file = host.dir().join("noise");
    for content in [&b""[..], b"not an archive", &[0; 10_240]] {
        std::fs::write(&file, content).unwrap();
        host.casemate(["load", "-i", &file.to_string_lossy()])
            .fails()
            .complains_of("noise");
    }
    host.casemate(["load", "-i", "/no/such/file"])
        .fails()
        .complains_of("/no/such/file");
    host.casemate(["save", "-o", "/no/such/dir/x", "nosuch"])
        .fails();
    host.is_clean();
}

fn unpacked(layout: &Path, dir: &Path) -> String {
    let bundle = dir.join("bundle");
    let mut umoci = Command::new("umoci");
    umoci
        .args(["unpack", "--image", &format!("{}:latest", layout.display())])
        .arg(&bundle);
    Running::start(umoci).ends().succeeds();
    let listing = casemate_tests::list_tree(&bundle.join("rootfs"), &[]).unwrap();
    std::fs::remove_dir_all(bundle).unwrap();
    listing
}

fn golden() -> String {
    std::fs::read_to_string(casemate_tests::paths::fixtures().join("museum.listing")).unwrap()
}
