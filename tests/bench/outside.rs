//! What is measured on the machine itself: getting an image ready.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use casemate_tests::fixture::{Compression, Image, Layer, Layout};
use casemate_tests::registry::Registry;

use crate::figures::Figure;
use crate::host::done;

const LAYERS: usize = 6;
const LAYER_BYTES: u64 = 50 << 20;

/// `casemate pull` of a 300 MB image from loopback, against `skopeo copy` and `umoci unpack`.
pub(crate) fn erofs_vs_unpack(casemate: &Path, samples: usize) -> Result<Figure> {
    let dir = tempfile::tempdir()?;
    let layout = dir.path().join("layout");
    Layout::create(&layout)?.add(&Image::new("bench:latest", layers()?))?;
    let registry = Registry::serve(&dir.path().join("registry"))?;
    let name = registry.name("bench:latest");
    let mut push = Command::new("skopeo");
    push.args([
        "copy",
        "--quiet",
        "--preserve-digests",
        "--dest-tls-verify=false",
    ]);
    push.arg(format!("oci:{}", layout.display()))
        .arg(format!("docker://{name}"));
    done(&mut push)?;

    let mut pairs = Vec::new();
    // The first pair does not count: the registry's files come into the page cache.
    for sample in 0..=samples {
        let data = fresh(dir.path(), "data")?;
        let begun = Instant::now();
        let mut pull = Command::new(casemate);
        pull.args(["pull", &name])
            .env("CASEMATE_DATA", &data)
            .env("CASEMATE_STATE", dir.path().join("state"));
        done(&mut pull)?;
        let ours = begun.elapsed().as_secs_f64();

        let copy = fresh(dir.path(), "copy")?;
        let begun = Instant::now();
        let mut skopeo = Command::new("skopeo");
        skopeo.args([
            "copy",
            "--quiet",
            "--src-tls-verify=false",
            &format!("docker://{name}"),
        ]);
        skopeo.arg(format!("oci:{}:latest", copy.join("oci").display()));
        done(&mut skopeo)?;
        let mut umoci = Command::new("umoci");
        umoci.args([
            "unpack",
            "--image",
            &format!("{}:latest", copy.join("oci").display()),
        ]);
        umoci.arg(copy.join("bundle"));
        done(&mut umoci)?;
        let theirs = begun.elapsed().as_secs_f64();
        if sample > 0 {
            pairs.push((ours, theirs));
        }
    }
    Ok(Figure::ratio("erofs_vs_unpack", "s", pairs))
}

/// Real files of this machine, 50 MB to a layer, in the order of their paths.
fn layers() -> Result<Vec<casemate_tests::fixture::BuiltLayer>> {
    let mut files = Vec::new();
    for root in ["/usr/lib", "/usr/share", "/usr/bin"] {
        collect(Path::new(root), &mut files)?;
    }
    let mut files = files.into_iter();
    let mut built = Vec::new();
    for number in 0..LAYERS {
        let (mut layer, mut bytes) = (Layer::new(), 0);
        while bytes < LAYER_BYTES {
            let file = files
                .next()
                .context("/usr has less than 300 MB: no image to measure with")?;
            let content = fs::read(&file)?;
            bytes += content.len() as u64;
            let path = file.strip_prefix("/")?.to_string_lossy().into_owned();
            layer = layer.file(path, 0o644, content);
        }
        let layer = layer.file(format!("layer-{number}"), 0o644, "");
        built.push(layer.build(Compression::Gzip));
    }
    Ok(built)
}

/// Regular files of a tree; none so large that it would fill a layer alone.
fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let mut entries: Vec<_> = fs::read_dir(dir)?.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let meta = entry.metadata()?;
        if meta.is_dir() {
            collect(&entry.path(), files)?;
        } else if meta.is_file() && meta.len() < LAYER_BYTES / 4 {
            files.push(entry.path());
        }
    }
    Ok(())
}

fn fresh(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    if path.exists() {
        fs::remove_dir_all(&path)?;
    }
    fs::create_dir(&path)?;
    Ok(path)
}
