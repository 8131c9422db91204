//! Images as the kernel sees them: mounted flat, as in the guest, and compared with what umoci unpacks.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::images::{Blobs, Packing, layer, noise};
use crate::common::trees::{Mounted, assert_equal, can_mount};
use crate::common::{run, runtime};
use casemate_image::{LoadOptions, LoadSource, RootfsDisk, Store};
use serde_json::json;

/// Makes the tree of a layer with a shell script, and an archive of it with GNU tar in the given dialect.
fn archive(script: &str, format: &[&str]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    run(
        "sh",
        &[
            "-e",
            "-c",
            &format!("cd '{}'; umask 022; {script}", root.display()),
        ],
    );
    for (path, name, value) in [
        ("etc/hello", "user.comment", &b"x\0y"[..]),
        ("etc/hello", "trusted.secret", b"t"),
        ("etc/hello", "system.posix_acl_access", b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\xd2\x04\0\0\x04\0\x04\0\xff\xff\xff\xff\x10\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff"),
        ("usr/bin/tool", "security.capability", b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        ("usr/bin/tool", "user.long", &[b'v'; 3000]),
    ] {
        let path = root.join(path);
        if path.exists() {
            // A file system without user xattrs has fewer to compare.
            let _ = rustix::fs::setxattr(&path, name, value, rustix::fs::XattrFlags::empty());
        }
    }
    let mut tar = Command::new("tar");
    tar.args(["--create", "--file=-", "--numeric-owner", "--sort=name"])
        .args(format);
    let output = tar.arg("--directory").arg(root).arg(".").output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// An OCI layout of an image, tagged `t`.
fn layout(directory: &Path, image: &Blobs) {
    std::fs::create_dir_all(directory.join("blobs/sha256")).unwrap();
    for (digest, bytes) in &image.blobs {
        std::fs::write(directory.join("blobs/sha256").join(&digest[7..]), bytes).unwrap();
    }
    let manifest = json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": image.manifest,
        "size": image.blobs[&image.manifest].len(),
        "annotations": {"org.opencontainers.image.ref.name": "t"},
    });
    std::fs::write(
        directory.join("index.json"),
        json!({"schemaVersion": 2, "manifests": [manifest]}).to_string(),
    )
    .unwrap();
    std::fs::write(
        directory.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
}

/// Loads an image into a store of its own.
fn disk(data: &Path, image: &Blobs) -> RootfsDisk {
    let source = tempfile::tempdir().unwrap();
    layout(source.path(), image);
    let store = Store::open(data).unwrap();
    let images = runtime()
        .block_on(store.load(LoadSource::Path(source.path()), &LoadOptions::default()))
        .unwrap();
    store.rootfs(&images[0]).unwrap()
}

fn check_with_fsck(disk: &RootfsDisk) {
    let metadata = disk.metadata.to_str().unwrap().to_owned();
    for layer in &disk.layers {
        run("fsck.erofs", &[layer.to_str().unwrap()]);
    }
    let mut arguments: Vec<String> = disk
        .layers
        .iter()
        .map(|layer| format!("--device={}", layer.display()))
        .collect();
    arguments.extend(["--extract".into(), metadata]);
    run(
        "fsck.erofs",
        &arguments.iter().map(String::as_str).collect::<Vec<_>>(),
    );
}

/// Our tree and umoci's.
fn compare(archives: &[Vec<u8>]) {
    // umoci reads no zstd.
    let image = Blobs::image(archives, Packing::Gzip);
    let work = tempfile::tempdir().unwrap();
    let disk = disk(&work.path().join("data"), &image);
    check_with_fsck(&disk);
    let mounted = Mounted::new(&disk);
    layout(&work.path().join("oci"), &image);
    let source = format!("{}:t", work.path().join("oci").display());
    run(
        "umoci",
        &[
            "unpack",
            "--image",
            &source,
            work.path().join("bundle").to_str().unwrap(),
        ],
    );
    assert_equal(&mounted.path, &work.path().join("bundle/rootfs"));
}

const BASE: &str = r#"
    mkdir -p etc usr/bin usr/lib/deep/er var/empty tmp big; chmod 1777 tmp; chmod 2750 var/empty
    echo hello > etc/hello; ln etc/hello etc/hard; ln -s hello etc/soft; ln -s /usr/bin bin
    head -c 300000 /dev/urandom > usr/bin/tool; chmod 6755 usr/bin/tool; : > etc/empty
    mkfifo etc/fifo; mknod etc/null c 1 3; mknod etc/disk b 259 300000
    chown 100000:200000 etc/hello; chown 12:34 var/empty; touch -d '1969-12-31 23:59:58.25 UTC' etc/soft -h
    touch -d '2040-05-06 07:08:09.123456789 UTC' usr/lib
    name=$(printf 'n%.0s' $(seq 250)); mkdir -p $name/$name; echo deep > $name/$name/$name; ln -s $name$name$name long
    for i in $(seq 700); do echo $i > "big/a file with a name of some length $i"; done
    truncate -s 100M sparse; head -c 10000 /dev/urandom | dd of=sparse bs=4096 seek=5000 conv=notrunc status=none
    truncate -s 5000000 holes; touch -d '2020-01-01 UTC' .
"#;

#[test]
fn mounted_tree_equals_umocis_in_every_dialect() {
    if !can_mount() {
        return;
    }
    let xattrs = ["--xattrs", "--xattrs-include=*"];
    for format in [
        &["--format=posix", "--sparse", xattrs[0], xattrs[1]][..],
        &["--format=posix", "--sparse", "--sparse-version=0.1"],
        &["--format=posix", "--sparse", "--sparse-version=0.0"],
        &["--format=gnu"],
    ] {
        eprintln!("{format:?}");
        compare(&[archive(BASE, format)]);
    }
}

#[test]
fn mounted_tree_of_old_sparse_files_equals_gnu_tars() {
    if !can_mount() {
        return;
    }
    // umoci refuses GNU's old sparse files, so GNU tar itself is the judge.
    let archive = archive(BASE, &["--format=gnu", "--sparse"]);
    let work = tempfile::tempdir().unwrap();
    let (file, theirs) = (work.path().join("layer.tar"), work.path().join("theirs"));
    std::fs::write(&file, &archive).unwrap();
    std::fs::create_dir(&theirs).unwrap();
    run(
        "tar",
        &[
            "-xpf",
            file.to_str().unwrap(),
            "--same-owner",
            "-C",
            theirs.to_str().unwrap(),
        ],
    );
    let disk = disk(
        &work.path().join("data"),
        &Blobs::image(&[archive], Packing::Zstd),
    );
    check_with_fsck(&disk);
    assert_equal(&Mounted::new(&disk).path, &theirs);
}

#[test]
fn mounted_layers_equal_umocis() {
    if !can_mount() {
        return;
    }
    let format = [
        "--format=posix",
        "--sparse",
        "--xattrs",
        "--xattrs-include=*",
    ];
    let second = archive(
        r#"mkdir -p etc usr/bin big var; echo new > etc/hello; : > etc/.wh.soft; : > big/.wh..wh..opq; echo 1 > big/one
           : > .wh.sparse; : > usr/bin/.wh.nothing; mkdir etc/null; echo x > etc/null/x; echo y > var/.wh.empty; chmod 700 usr
           touch -d '2021-01-01 UTC' etc usr . usr/bin big var"#,
        &format,
    );
    // Entries whose parents aren't listed, and one below a lower layer's symbolic link.
    let third = layer(&[
        ("usr/lib/deep/file", b"1"),
        ("bin/through-a-link", b"2"),
        ("etc/.wh.fifo", b""),
    ]);
    compare(&[archive(BASE, &format), second, third]);
}

#[test]
fn mount_costs_the_same_with_1_20_and_100_layers() {
    if !can_mount() {
        return;
    }
    let mut medians = Vec::new();
    for count in [1u64, 20, 100] {
        let layers: Vec<_> = (0..count)
            .map(|n| {
                // The same 2000 files in all, whatever the number of layers.
                let names: Vec<String> = (0..2000 / count)
                    .map(|file| format!("d{file}/f{n}"))
                    .collect();
                let data = noise(n, 100);
                layer(
                    &names
                        .iter()
                        .map(|name| (name.as_str(), data.as_slice()))
                        .collect::<Vec<_>>(),
                )
            })
            .collect();
        let work = tempfile::tempdir().unwrap();
        let disk = disk(work.path(), &Blobs::image(&layers, Packing::Gzip));
        assert_eq!(disk.layers.len() as u64, count);
        let mut times: Vec<Duration> = (0..7)
            .map(|_| {
                let start = Instant::now();
                let mounted = Mounted::new(&disk);
                assert!(mounted.path.join("d0/f0").exists());
                start.elapsed()
            })
            .collect();
        times.sort();
        let metadata = std::fs::metadata(&disk.metadata).unwrap().len();
        eprintln!(
            "{count} layers: {} bytes of metadata, mounted in {:?}",
            metadata, times[3]
        );
        medians.push(times[3]);
    }
    assert!(
        medians[2] < medians[0] * 3 + Duration::from_millis(100),
        "{medians:?}"
    );
}
