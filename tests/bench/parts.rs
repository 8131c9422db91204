//! What the images and bundles of the groups are made of.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use casemate_tests::fixture::{BuiltLayer, Compression, Layer};

use crate::block::FIO_BYTES;
use crate::host::done;
use crate::volumes::{SMALL_BYTES, SMALL_FILES, SMALL_TAR};

const FIO: &str = "/usr/bin/fio";
pub(crate) const IPERF: &str = "/usr/bin/iperf3";

/// The layers that an image has above busybox.
pub(crate) fn layers(image: &str) -> Vec<Result<BuiltLayer>> {
    match image {
        "fio" => vec![fio_and_its_file()],
        "volumes" => {
            vec![with_program(Layer::new(), FIO).map(|layer| layer.build(Compression::None))]
        }
        "binds" => vec![small_files()],
        "network" => {
            vec![with_program(Layer::new(), IPERF).map(|layer| layer.build(Compression::None))]
        }
        _ => Vec::new(),
    }
}

fn fio_and_its_file() -> Result<BuiltLayer> {
    let mut bytes = Vec::new();
    casemate_tests::stream::write(FIO_BYTES, &mut bytes)?;
    let layer = with_program(Layer::new(), FIO)?.file("fio", 0o644, bytes);
    Ok(layer.build(Compression::None))
}

fn small_files() -> Result<BuiltLayer> {
    let mut content = Vec::new();
    casemate_tests::stream::write(SMALL_BYTES, &mut content)?;
    let mut tree = Layer::new().dir("tree", 0o755);
    for number in 0..SMALL_FILES {
        // As in a source tree, no directory is large.
        if number % 100 == 0 {
            tree = tree.dir(&format!("tree/{:03}", number / 100), 0o755);
        }
        let path = format!("tree/{:03}/file-{number:05}", number / 100);
        tree = tree.file(path, 0o644, content.clone());
    }
    let tar = tree.build(Compression::None).blob;
    let path = SMALL_TAR.trim_start_matches('/');
    let layer = Layer::new().file(path, 0o644, tar);
    Ok(layer.build(Compression::None))
}

/// A program of this machine and its libraries, each at its own path.
fn with_program(layer: Layer, program: &str) -> Result<Layer> {
    let mut layer = layer
        .dir("lib64", 0o755)
        .dir("lib", 0o755)
        .dir("usr", 0o755)
        .dir("usr/bin", 0o755);
    for path in libraries(program)? {
        let name = path.to_string_lossy();
        layer = layer.file(name.trim_start_matches('/'), 0o755, fs::read(&path)?);
    }
    let name = Path::new(program).file_name().unwrap_or_default();
    let place = format!("bin/{}", name.to_string_lossy());
    Ok(layer.file(place, 0o755, fs::read(program)?))
}

/// The libraries and the loader of a program.
fn libraries(program: &str) -> Result<Vec<PathBuf>> {
    let ldd = Command::new("ldd").arg(program).output()?;
    ensure!(
        ldd.status.success(),
        "ldd {program}: is it installed? scripts/setup test"
    );
    let text = String::from_utf8(ldd.stdout)?;
    let words = text.split_whitespace();
    let paths = words.filter(|word| word.starts_with('/'));
    Ok(paths.map(PathBuf::from).collect())
}

/// The same busybox unpacked, with the configuration that `runc spec` writes, for `/bin/true` without a terminal;
/// with the guests' tool and these programs.
pub(crate) fn write_bundle(bundle: &Path, tool: &Path, programs: &[&str]) -> Result<()> {
    let root = bundle.join("rootfs");
    let bin = root.join("bin");
    fs::create_dir_all(&bin)?;
    for dir in ["proc", "sys", "dev", "etc", "tmp"] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::copy("/bin/busybox", bin.join("busybox"))?;
    fs::copy(tool, bin.join("guest-tool"))?;
    std::os::unix::fs::symlink("busybox", bin.join("true"))?;
    for program in programs {
        let mut files = libraries(program)?;
        files.push(PathBuf::from(program));
        for file in files {
            let place = root.join(file.strip_prefix("/")?);
            fs::create_dir_all(place.parent().context("a file has a directory")?)?;
            fs::copy(&file, &place)?;
        }
    }
    let mut spec = Command::new("runc");
    spec.args(["spec", "--bundle"]).arg(bundle);
    done(&mut spec).context("runc (Debian package) is needed for run_vs_runc")?;
    let file = bundle.join("config.json");
    let mut document: serde_json::Value = serde_json::from_slice(&fs::read(&file)?)?;
    document["process"]["args"] = serde_json::json!(["/bin/true"]);
    document["process"]["terminal"] = serde_json::json!(false);
    Ok(fs::write(file, serde_json::to_vec_pretty(&document)?)?)
}
