//! A pull that is killed, a disk that is full: nothing is corrupted and the next pull goes on.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::images::{Blobs, Packing, heavy, layer, noise};
use crate::common::server::{Fault, Server};
use crate::common::{run, runtime, stored};
use casemate_image::{Error, PullOptions, PullPolicy, Store, parse_reference};

const DATA: &str = "CASEMATE_TEST_DATA";
const NAME: &str = "CASEMATE_TEST_NAME";

fn pull(data: &Path, name: &str) -> casemate_image::Result<casemate_image::Image> {
    let options = PullOptions {
        policy: PullPolicy::Always,
        ..PullOptions::default()
    };
    runtime().block_on(Store::open(data)?.pull(&parse_reference(name)?, &options))
}

/// Not a test of its own: what the next test kills.
#[test]
fn child_pull() {
    if let (Some(data), Ok(name)) = (std::env::var_os(DATA), std::env::var(NAME)) {
        pull(Path::new(&data), &name).unwrap();
    }
}

#[test]
fn pull_killed_at_any_moment_the_next_one_goes_on() {
    let server = Server::start();
    let image = Blobs::image(&heavy(), Packing::Gzip);
    let name = server.add("x", &image);
    image
        .layers
        .iter()
        .for_each(|layer| server.fault(layer, Fault::Slow(5)));
    let data = tempfile::tempdir().unwrap();
    for round in 0..12u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "survival::child_pull", "--quiet"])
            .env(DATA, data.path())
            .env(NAME, &name)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(20 + 40 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let store = Store::open(data.path()).unwrap();
        for image in store.list().unwrap() {
            let disk = store.rootfs(&image).unwrap();
            assert!(
                disk.layers.iter().all(|layer| layer.exists()),
                "what has a name is whole"
            );
        }
        for blob in stored(data.path(), "layers")
            .iter()
            .filter(|name| name.ends_with(".erofs"))
        {
            run(
                "fsck.erofs",
                &[data.path().join("layers").join(blob).to_str().unwrap()],
            );
        }
    }
    server.mend();
    let image = pull(data.path(), &name).unwrap();
    assert_eq!(stored(data.path(), "tmp"), [""; 0]);
    let (fresh, store) = (
        tempfile::tempdir().unwrap(),
        Store::open(data.path()).unwrap(),
    );
    pull(fresh.path(), &name).unwrap();
    let disk = store.rootfs(&image).unwrap();
    for file in disk.layers.iter().chain([&disk.metadata]) {
        let other = fresh.path().join(file.strip_prefix(data.path()).unwrap());
        assert!(
            std::fs::read(file).unwrap() == std::fs::read(other).unwrap(),
            "{} differs",
            file.display()
        );
    }
}

/// A small file system that ends with the test.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(size: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        run(
            "mount",
            &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", path],
        );
        Self(directory)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        run("umount", &[self.path().to_str().unwrap()]);
    }
}

#[test]
fn pull_disk_full_is_told_and_harms_nothing() {
    crate::common::need_root();
    let server = Server::start();
    let disk = Tmpfs::new("6m");
    let small = server.add(
        "small",
        &Blobs::image(&[layer(&[("a", b"1")])], Packing::Gzip),
    );
    let large = server.add("large", &Blobs::image(&heavy(), Packing::Gzip));
    let first = pull(disk.path(), &small).unwrap();
    let error = pull(disk.path(), &large).unwrap_err();
    assert!(matches!(error, Error::DiskFull { .. }), "{error:?}");
    assert_eq!(stored(disk.path(), "tmp"), [""; 0]);
    let store = Store::open(disk.path()).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    assert!(store.rootfs(&first).is_ok());
    store.prune(false).unwrap();
    let other = layer(&[("b", &noise(9, 1 << 20))]);
    pull(
        disk.path(),
        &server.add("other", &Blobs::image(&[other], Packing::Gzip)),
    )
    .unwrap();
    run(
        "mount",
        &["-o", "remount,size=40m", disk.path().to_str().unwrap()],
    );
    pull(disk.path(), &large).unwrap();
}
