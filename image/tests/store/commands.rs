//! The store's own commands: names, leases, removal, archives.

use std::path::Path;

use crate::common::images::{Blobs, Packing, heavy, layer};
use crate::common::server::Server;
use crate::common::{run, runtime, stored};
use casemate_image::{
    Error, Image, LoadOptions, LoadSource, PullOptions, PullPolicy, Result, SaveTarget, Store,
    parse_reference,
};

fn pull(store: &Store, name: &str) -> Image {
    let options = PullOptions {
        policy: PullPolicy::Always,
        ..PullOptions::default()
    };
    runtime()
        .block_on(store.pull(&parse_reference(name).unwrap(), &options))
        .unwrap()
}

fn load(store: &Store, path: &Path) -> Result<Vec<Image>> {
    runtime().block_on(store.load(LoadSource::Path(path), &LoadOptions::default()))
}

/// A store with one image of three layers.
fn filled() -> (tempfile::TempDir, Store, Image) {
    let server = Server::start();
    let data = tempfile::tempdir().unwrap();
    let store = Store::open(data.path()).unwrap();
    let image = pull(
        &store,
        &server.add("x", &Blobs::image(&heavy(), Packing::Gzip)),
    );
    (data, store, image)
}

#[test]
fn find_by_name_id_and_prefix() {
    let (_data, store, image) = filled();
    let name = &image.names[0];
    for text in [
        name.clone(),
        image.id.to_string(),
        image.id.hex(),
        image.id.short(),
        image.digest.to_string(),
    ] {
        assert_eq!(
            store.find(&text).unwrap().map(|found| found.id),
            Some(image.id),
            "{text}"
        );
    }
    assert_eq!(
        store.find(&image.repo_digests[0]).unwrap().unwrap().id,
        image.id
    );
    for text in ["debian", "", "sha256:", "zz", "../../etc/passwd"] {
        assert!(store.find(text).unwrap().is_none(), "{text:?}");
    }
}

#[test]
fn tag_moves_a_name_and_remove_takes_names_before_images() {
    let (data, store, image) = filled();
    let first = image.names[0].clone();
    let tagged = store
        .tag(&first, &parse_reference("other").unwrap())
        .unwrap();
    assert_eq!(tagged.names.len(), 2);
    assert_eq!(
        store
            .find("docker.io/library/other:latest")
            .unwrap()
            .unwrap()
            .id,
        image.id
    );
    assert!(matches!(
        store.remove(&image.id.to_string(), false),
        Err(Error::InUse { .. })
    ));
    let removed = store.remove("other", false).unwrap();
    assert_eq!(
        (removed.untagged.len(), removed.deleted.len(), removed.freed),
        (1, 0, 0)
    );
    let removed = store.remove(&first, false).unwrap();
    assert_eq!(removed.deleted, [image.id]);
    assert!(removed.freed > 9 << 20);
    for directory in ["layers", "rootfs", "blobs/sha256", "tmp"] {
        assert_eq!(stored(data.path(), directory), [""; 0], "{directory}");
    }
    assert!(matches!(
        store.remove(&first, false),
        Err(Error::NotFound { .. })
    ));
}

#[test]
fn image_that_something_needs_is_kept_unless_forced() {
    let (_data, store, image) = filled();
    let reason = "container web was made from it".to_owned();
    let store = store.keeping([(image.id, reason.clone())].into());
    match store.remove(&image.names[0], false) {
        Err(Error::InUse { reason: told, .. }) => assert_eq!(told, reason),
        other => panic!("{other:?}"),
    }
    assert!(store.prune(true).unwrap().deleted.is_empty());
    let removed = store.remove(&image.names[0], true).unwrap();
    assert_eq!(removed.deleted, [image.id]);
}

#[test]
fn lease_keeps_files_until_it_is_dropped() {
    let (data, store, image) = filled();
    let disk = store.rootfs(&image).unwrap();
    assert!(matches!(
        store.remove(&image.names[0], false),
        Err(Error::InUse { .. })
    ));
    assert!(store.prune(true).unwrap().deleted.is_empty());
    let removed = store.remove(&image.names[0], true).unwrap();
    assert_eq!(removed.deleted, [image.id]);
    assert!(
        disk.metadata.exists() && disk.layers.iter().all(|layer| layer.exists()),
        "it still runs"
    );
    drop(disk);
    assert!(store.prune(false).unwrap().freed > 9 << 20);
    assert_eq!(stored(data.path(), "layers"), [""; 0]);
}

#[test]
fn prune_keeps_shared_layers_and_clears_what_was_left_over() {
    let server = Server::start();
    let data = tempfile::tempdir().unwrap();
    let store = Store::open(data.path()).unwrap();
    let layers = heavy();
    let name = server.add("x", &Blobs::image(&layers, Packing::Gzip));
    pull(&store, &name);
    let more = [layers[0].clone(), layer(&[("new", b"1")])];
    server.add("x", &Blobs::image(&more, Packing::Gzip));
    pull(&store, &name);
    assert_eq!(store.list().unwrap().len(), 2);
    std::fs::write(data.path().join("tmp/layers-left.erofs"), b"partial").unwrap();
    std::fs::write(data.path().join("layers/stray.erofs"), b"stray").unwrap();
    let pruned = store.prune(false).unwrap();
    assert_eq!(pruned.deleted.len(), 1);
    assert_eq!(stored(data.path(), "layers").len(), 4);
    assert_eq!(stored(data.path(), "tmp"), [""; 0]);
    let image = store.find(&name).unwrap().unwrap();
    assert_eq!(store.rootfs(&image).unwrap().layers.len(), 2);
}

#[test]
fn rootfs_lost_is_built_again() {
    let (_data, store, image) = filled();
    let path = store.rootfs(&image).unwrap().metadata;
    let before = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let disk = store.rootfs(&image).unwrap();
    assert!(std::fs::read(&disk.metadata).unwrap() == before);
}

#[test]
fn index_damaged_is_told_with_its_path() {
    let (data, store, _) = filled();
    std::fs::write(data.path().join("index.json"), b"{").unwrap();
    let error = store.list().unwrap_err().to_string();
    assert!(error.contains("index.json"), "{error}");
}

#[test]
fn save_and_load_keep_ids_names_and_bytes() {
    let (data, store, image) = filled();
    let name = image.names[0].as_str();
    let out = tempfile::tempdir().unwrap();
    let [docker, oci, layout] =
        ["docker.tar", "oci.tar", "layout"].map(|file| out.path().join(file));
    let mut file = std::fs::File::create(&docker).unwrap();
    store
        .save(&[name], SaveTarget::DockerArchive(&mut file))
        .unwrap();
    let mut file = std::fs::File::create(&oci).unwrap();
    store
        .save(&[name], SaveTarget::OciArchive(&mut file))
        .unwrap();
    store.save(&[name], SaveTarget::OciLayout(&layout)).unwrap();
    assert!(
        store.save(&[name], SaveTarget::OciLayout(&layout)).is_err(),
        "a full directory is refused"
    );
    let compressed = out.path().join("oci.tar.zst");
    std::fs::write(
        &compressed,
        zstd::encode_all(std::fs::File::open(&oci).unwrap(), 1).unwrap(),
    )
    .unwrap();
    for path in [&docker, &oci, &layout, &compressed] {
        let other = tempfile::tempdir().unwrap();
        let loaded = load(&Store::open(other.path()).unwrap(), path).unwrap();
        assert_eq!(
            (loaded[0].id, &loaded[0].names),
            (image.id, &image.names),
            "{}",
            path.display()
        );
        for directory in ["layers", "rootfs"] {
            for file in stored(data.path(), directory) {
                let [ours, theirs] = [&data, &other]
                    .map(|root| std::fs::read(root.path().join(directory).join(&file)).unwrap());
                assert!(ours == theirs, "{directory}/{file}");
            }
        }
        assert_eq!(stored(other.path(), "tmp"), [""; 0]);
    }
    let piped = tempfile::tempdir().unwrap();
    let reader = Box::new(std::fs::File::open(&docker).unwrap());
    let store = Store::open(piped.path()).unwrap();
    let loaded = runtime()
        .block_on(store.load(LoadSource::Reader(reader), &LoadOptions::default()))
        .unwrap();
    assert_eq!(loaded[0].id, image.id);
}

#[test]
fn save_is_read_by_skopeo() {
    let (_data, store, image) = filled();
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("a.tar");
    let mut file = std::fs::File::create(&path).unwrap();
    store
        .save(&[&image.names[0]], SaveTarget::DockerArchive(&mut file))
        .unwrap();
    for transport in ["docker-archive", "oci-archive"] {
        let source = format!("{transport}:{}", path.display());
        let target = format!("oci:{}:t", out.path().join(transport).display());
        run("skopeo", &["copy", "--insecure-policy", &source, &target]);
        let loaded = load(&store, &out.path().join(transport)).unwrap();
        // Out of a docker-archive skopeo writes a configuration of its own, of the same layers.
        assert_eq!(loaded[0].layers, image.layers);
        assert_eq!(loaded[0].id == image.id, transport == "oci-archive");
    }
}

#[test]
fn save_damaged_layer_is_noticed() {
    let (_data, store, image) = filled();
    let disk = store.rootfs(&image).unwrap();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&disk.layers[0])
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", 8192).unwrap();
    let error = store
        .save(
            &[&image.names[0]],
            SaveTarget::OciArchive(&mut std::io::sink()),
        )
        .unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
}

#[test]
fn load_of_something_else_is_refused() {
    let (_data, store, image) = filled();
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("x");
    std::fs::write(&path, layer(&[("just", b"a tar")])).unwrap();
    assert!(matches!(
        load(&store, &path),
        Err(Error::NotAnArchive { .. })
    ));
    std::fs::write(&path, [7; 3000]).unwrap();
    assert!(matches!(
        load(&store, &path),
        Err(Error::NotAnArchive { .. })
    ));
    assert!(load(&store, out.path()).is_err());
    assert!(load(&store, Path::new("/nonexistent")).is_err());
    let mut archive = Vec::new();
    store
        .save(&[&image.names[0]], SaveTarget::DockerArchive(&mut archive))
        .unwrap();
    let empty = tempfile::tempdir().unwrap();
    for length in [archive.len() / 3, archive.len() - 3000] {
        std::fs::write(&path, &archive[..length]).unwrap();
        let other = Store::open(empty.path()).unwrap();
        assert!(load(&other, &path).is_err());
        assert!(other.list().unwrap().is_empty());
    }
    let middle = archive.len() / 2;
    archive[middle] ^= 1;
    std::fs::write(&path, &archive).unwrap();
    let error = load(&Store::open(empty.path()).unwrap(), &path).unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error:?}");
}
