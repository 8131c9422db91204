//! Data: a volume against the file system that it lies on, and a bind against a volume.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::block::{report, speed};
use crate::container::Container;
use crate::disk::{Disk, forget_cache};
use crate::figures::{Figure, median};
use crate::host::done;
use crate::inside::{Installed, emit, milliseconds};

/// Bytes that fio writes and reads.
const FIO_SIZE: &str = "--size=64m";
/// Files of the tree that is unpacked.
pub(crate) const SMALL_FILES: usize = 20_000;
/// Bytes in each.
pub(crate) const SMALL_BYTES: u64 = 1000;
/// Where the image has it.
pub(crate) const SMALL_TAR: &str = "/small.tar";

/// A volume against the host.
pub(crate) fn figures(at: &Installed, samples: usize) -> Result<()> {
    let (at, disk) = on_disk(at)?;
    against_host(&at, &disk, samples)
}

/// A bind against a volume: apart, as it takes long.
pub(crate) fn binds(at: &Installed, samples: usize) -> Result<()> {
    let (at, disk) = on_disk(at)?;
    small_files(&at, &disk, samples.min(3))
}

/// The same store on a disk of its own.
pub(crate) fn on_disk(at: &Installed) -> Result<(Installed, Disk)> {
    let disk = Disk::new(8)?;
    let data = disk.dir().join("data");
    done(Command::new("cp").arg("-a").arg(&at.data).arg(&data))?;
    Ok((at.with_data(data), disk))
}

/// fio on a named volume against the ext4 of the host that holds it: to the disk and from it, 1 MiB at a time.
fn against_host(at: &Installed, disk: &Disk, samples: usize) -> Result<()> {
    // Privileged only to forget what its kernel has in its cache.
    let options = ["--privileged", "--memory", "512m", "-v", "fio:/volume"];
    let args = [&options[..], &["volumes", "sleep", "1000000"]].concat();
    let container = Container::start(at, "fio", &args)?;
    let (mut writes, mut reads) = (Vec::new(), Vec::new());
    let forget = || {
        let script = "sync; echo 3 > /proc/sys/vm/drop_caches";
        done(&mut container.exec(&["sh", "-c", script]))?;
        forget_cache()
    };
    // The first of each does not count: templates, fio itself in the page cache.
    for sample in 0..=samples {
        let ours = write_and_read(&|| container.exec(&[]), Path::new("/volume"), &forget)?;
        let theirs = write_and_read(&|| Command::new("env"), disk.dir(), &forget)?;
        if sample > 0 {
            writes.push((ours[0], theirs[0]));
            reads.push((ours[1], theirs[1]));
        }
    }
    container.end()?;
    emit(&Figure::ratio("vols_write_vs_host", "MiB/s", writes))?;
    emit(&Figure::ratio("vols_read_vs_host", "MiB/s", reads))
}

/// MiB/s of a new file's writes until the disk has it, and of its reads. Before each, outside of the time that counts,
/// both kernels write back what they have cached and forget it.
fn write_and_read(
    starter: &dyn Fn() -> Command,
    dir: &Path,
    forget: &dyn Fn() -> Result<()>,
) -> Result<[f64; 2]> {
    let file = dir.join("fio-file");
    done(starter().args(["rm", "-f"]).arg(&file))?;
    forget()?;
    let name = format!("--filename={}", file.display());
    let run = |jobs: &[&str]| report(starter().args(["fio", &name, FIO_SIZE, "--bs=1m"]), jobs);
    let written = run(&["--end_fsync=1", "--name=write", "--rw=write"])?;
    forget()?;
    let read = run(&["--readonly", "--name=read", "--rw=read"])?;
    Ok([speed(&written, 0, "write")?, speed(&read, 0, "read")?])
}

/// Unpacks many small files and looks at each: on a bind, on a volume, both on the same file system of the host.
fn small_files(at: &Installed, disk: &Disk, samples: usize) -> Result<()> {
    let shared = disk.dir().join("shared");
    std::fs::create_dir(&shared)?;
    let bind = format!("{}:/bind", shared.display());
    let options = ["--memory", "512m", "-v", "small:/volume", "-v", &bind];
    let args = [&options[..], &["binds", "sleep", "1000000"]].concat();
    let container = Container::start(at, "small", &args)?;
    let measure = |dir: &str| -> Result<[f64; 2]> {
        let unpack = milliseconds(container.exec(&["tar", "-xf", SMALL_TAR, "-C", dir]))?;
        // Prints nothing, but has to ask for each file's size.
        let look = ["find", dir, "-type", "f", "-size", "+100k"];
        let look = milliseconds(container.exec(&look))?;
        let tree = format!("{dir}/tree");
        done(&mut container.exec(&["rm", "-rf", &tree]))?;
        done(&mut container.exec(&["sync"]))?;
        forget_cache()?;
        Ok([unpack, look])
    };
    // One that does not count: the archive comes into the guest's page cache.
    measure("/volume")?;
    let mut pairs = Vec::new();
    for _ in 0..samples {
        pairs.push((measure("/bind")?, measure("/volume")?));
    }
    container.end()?;
    let sums = pairs.iter().map(|(bind, volume)| (sum(bind), sum(volume)));
    let mut figure = Figure::ratio("bind_small_files", "ms", sums.collect());
    let sides = [("bind", 0), ("volume", 1)];
    for ((place, side), (what, part)) in sides
        .into_iter()
        .flat_map(|side| [(side, ("unpack", 0)), (side, ("stat", 1))])
    {
        let times: Vec<f64> = pairs
            .iter()
            .map(|(bind, volume)| [bind, volume][side][part])
            .collect();
        let name = format!("{what} on the {place}");
        figure.details.insert(name, median(&times));
    }
    emit(&figure)
}

fn sum(parts: &[f64; 2]) -> f64 {
    parts.iter().sum()
}
