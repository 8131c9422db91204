//! `casemate system` and `casemate info`: the whole of it, and what can go.

use super::args::FormatArgs;
use super::images::{self, confirm};
use super::{containers, output, volumes};
use crate::settings::Settings;
use crate::size::Human;
use crate::state::{Container, State, StateRoot};
use crate::volume::{Volume, Volumes};
use crate::{log, scratch};
use casemate_image::Image;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// `casemate system`
#[derive(Debug, Subcommand)]
pub(super) enum SystemCommand {
    /// Show what images, containers and volumes take on the disk
    Df(FormatArgs),
    /// Show the host, the installation and what is there
    Info(FormatArgs),
    /// Remove containers that ended, and images that nothing needs
    Prune(SystemPruneArgs),
}

/// `casemate system prune`
#[derive(Debug, Args)]
pub(super) struct SystemPruneArgs {
    /// Remove every image that no container uses
    #[arg(short, long)]
    all: bool,
    /// Also remove volumes without a name that no container uses
    #[arg(long)]
    volumes: bool,
    /// Don't ask
    #[arg(short, long)]
    force: bool,
}

/// `casemate system …`
pub(super) fn system(settings: &Settings, command: &SystemCommand) -> anyhow::Result<()> {
    match command {
        SystemCommand::Df(args) => df(settings, args),
        SystemCommand::Info(args) => info(settings, args),
        SystemCommand::Prune(args) => prune(settings, args),
    }
}

/// Bytes that a file or tree takes on the disk; what can't be looked at takes none.
fn taken(path: &Path) -> u64 {
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return 0;
    };
    let below = match metadata.is_dir() {
        true => std::fs::read_dir(path).ok(),
        false => None,
    };
    let below = below.into_iter().flatten().flatten();
    metadata.blocks() * 512 + below.map(|entry| taken(&entry.path())).sum::<u64>()
}

/// What a container takes: its writable layer and its log.
fn container_bytes(settings: &Settings, container: &Container) -> u64 {
    let id = &container.meta.id;
    let disk = scratch::file_of(&settings.data_dir, &settings.state_dir, id);
    taken(&disk) + taken(&log::dir_of(&settings.data_dir, &settings.state_dir, id))
}

/// What images take that share layers.
fn layers_bytes<'a>(
    settings: &Settings,
    images: impl Iterator<Item = &'a Image>,
) -> anyhow::Result<u64> {
    let store = images::store(settings)?;
    let layers: HashSet<_> = images.flat_map(|image| &image.layers).collect();
    Ok(layers
        .into_iter()
        .filter_map(|layer| store.layer_bytes(layer))
        .sum())
}

fn df(settings: &Settings, args: &FormatArgs) -> anyhow::Result<()> {
    let all = containers::state(settings)?.containers()?;
    let images = images::store(settings)?.list()?;
    let in_use = |image: &Image| all.iter().any(|c| c.meta.image_id == image.id.to_string());
    let (total, needed) = (
        layers_bytes(settings, images.iter())?,
        layers_bytes(settings, images.iter().filter(|i| in_use(i)))?,
    );
    let active = images.iter().filter(|i| in_use(i)).count();
    let image_row = row(
        "Images",
        images.len(),
        active,
        total,
        total - needed.min(total),
    );

    let bytes = |c: &Container| container_bytes(settings, c);
    let alive = all.iter().filter(|c| c.status.state.is_alive());
    let ended = all.iter().filter(|c| !c.status.state.is_alive());
    let container_row = row(
        "Containers",
        all.len(),
        alive.count(),
        all.iter().map(bytes).sum(),
        ended.map(bytes).sum(),
    );
    let volumes = volumes::all(&Volumes::of(&settings.data_dir))?;
    let used = |v: &&Volume| all.iter().any(|c| c.meta.uses_volume(&v.record.name));
    let size: u64 = volumes.iter().map(Volume::used).sum();
    let needed: u64 = volumes.iter().filter(used).map(Volume::used).sum();
    let volume_row = row(
        "Local Volumes",
        volumes.len(),
        volumes.iter().filter(used).count(),
        size,
        size.saturating_sub(needed),
    );
    let columns = ["Type", "Total", "Active", "Size", "Reclaimable"];
    output::print(
        args.format.as_deref(),
        "",
        &columns,
        &[image_row, container_row, volume_row],
    )
}

fn row(kind: &str, total: usize, active: usize, size: u64, reclaimable: u64) -> Value {
    let share = (reclaimable * 100).checked_div(size).unwrap_or(0);
    json!({
        "Type": kind,
        "Total": total.to_string(),
        "TotalCount": total.to_string(),
        "Active": active.to_string(),
        "Size": Human(size).to_string(),
        "Reclaimable": format!("{} ({share}%)", Human(reclaimable)),
    })
}

fn prune(settings: &Settings, args: &SystemPruneArgs) -> anyhow::Result<()> {
    let images = match args.all {
        true => "every image that no container uses",
        false => "all images without a name",
    };
    let volumes = match args.volumes {
        true => ", with the data of volumes without a name that no container uses",
        false => "",
    };
    let what = format!("all containers that don't run, and {images}{volumes}");
    if !args.force && !confirm(&what)? {
        return Ok(());
    }
    let root = containers::state(settings)?;
    let (mut text, mut freed) = (String::new(), 0);
    for container in stopped(&root)? {
        let bytes = container_bytes(settings, &container);
        // One that was just started again stays.
        if root.remove(&container, false, false).is_ok() {
            text.push_str(&format!("Deleted: {}\n", container.meta.id));
            freed += bytes;
        }
    }
    if args.volumes {
        let volumes = Volumes::of(&settings.data_dir);
        let (names, bytes) = volumes::remove_unused(&root, &volumes, |v| v.record.anonymous)?;
        for name in names {
            text.push_str(&format!("Deleted: {name}\n"));
        }
        freed += bytes;
    }
    let pruned = images::store_in_use(settings)?.prune(args.all)?;
    for id in pruned.deleted {
        text.push_str(&format!("Deleted: {id}\n"));
    }
    freed += pruned.freed;
    text.push_str(&format!("Total reclaimed space: {}\n", Human(freed)));
    output::write(&text)
}

fn stopped(root: &StateRoot) -> anyhow::Result<Vec<Container>> {
    let mut all = root.containers()?;
    all.retain(|container| !container.status.state.is_alive());
    Ok(all)
}

/// `casemate info`
pub(super) fn info(settings: &Settings, args: &FormatArgs) -> anyhow::Result<()> {
    let all = containers::state(settings)?.containers()?;
    let images = images::store(settings)?.list()?.len();
    let count = |fits: &dyn Fn(&Container) -> bool| all.iter().filter(|c| fits(c)).count();
    let paused = count(&|c| c.status.state == State::Running && c.status.paused);
    let alive = count(&|c| c.status.state.is_alive());
    let uname = rustix::system::uname();
    let memory = rustix::system::sysinfo();
    let facts = json!({
        "Containers": all.len(),
        "ContainersRunning": alive - paused,
        "ContainersPaused": paused,
        "ContainersStopped": all.len() - alive,
        "Images": images,
        "ServerVersion": env!("CARGO_PKG_VERSION"),
        "Name": uname.nodename().to_string_lossy(),
        "OperatingSystem": os_name(),
        "OSType": "linux",
        "Architecture": uname.machine().to_string_lossy(),
        "KernelVersion": uname.release().to_string_lossy(),
        "NCPU": std::thread::available_parallelism().map_or(1, usize::from),
        "MemTotal": memory.totalram as u64 * u64::from(memory.mem_unit.max(1)),
        "Driver": "erofs",
        "DataDir": settings.data_dir,
        "StateDir": settings.state_dir,
        "KvmDevice": settings.kvm,
        "GuestKernel": settings.kernel,
        "Vmm": settings.vmm,
        "Shim": settings.shim,
        "DefaultMemory": settings.memory,
        "DefaultCpus": settings.cpus,
        "DefaultStorageSize": settings.storage_size,
    });
    match args.format.as_deref() {
        None => output::write(&listed(&facts)),
        format => output::print(format, "", &[], &[facts]),
    }
}

/// A line for each fact, in words.
fn listed(facts: &Value) -> String {
    let number = |name: &str| facts[name].as_u64().unwrap_or(0);
    let text = |name: &str| facts[name].as_str().unwrap_or_default().to_owned();
    let size = |name: &str| Human(number(name)).to_string();
    [
        ("Containers", number("Containers").to_string()),
        (" Running", number("ContainersRunning").to_string()),
        (" Paused", number("ContainersPaused").to_string()),
        (" Stopped", number("ContainersStopped").to_string()),
        ("Images", number("Images").to_string()),
        ("Version", text("ServerVersion")),
        ("Host", text("Name")),
        (" Operating System", text("OperatingSystem")),
        (" Kernel Version", text("KernelVersion")),
        (" Architecture", text("Architecture")),
        (" CPUs", number("NCPU").to_string()),
        (" Total Memory", size("MemTotal")),
        (" KVM", text("KvmDevice")),
        ("Guest Kernel", text("GuestKernel")),
        ("VMM", text("Vmm")),
        ("Shim", text("Shim")),
        ("Data", text("DataDir")),
        ("State", text("StateDir")),
        ("Default Memory", size("DefaultMemory")),
        ("Default CPUs", number("DefaultCpus").to_string()),
        ("Default Storage Size", size("DefaultStorageSize")),
    ]
    .iter()
    .map(|(name, value)| format!("{name}: {value}\n"))
    .collect()
}

/// Of os-release(5).
fn os_name() -> String {
    let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = text.lines().find_map(|l| l.strip_prefix("PRETTY_NAME="));
    name.unwrap_or("Linux").trim_matches('"').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taken_counts_blocks_of_a_tree_and_no_holes() {
        let dir = tempfile::tempdir().unwrap();
        let empty = taken(dir.path());
        std::fs::create_dir(dir.path().join("d")).unwrap();
        std::fs::write(dir.path().join("d/file"), vec![1; 100_000]).unwrap();
        let sparse = std::fs::File::create(dir.path().join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        let grown = taken(dir.path()) - empty;
        assert!((100_000..200_000).contains(&grown), "{grown}");
        assert_eq!(taken(&dir.path().join("missing")), 0);
    }

    #[test]
    fn row_says_the_reclaimable_share() {
        let row = row("Images", 4, 1, 4_000_000, 1_000_000);
        assert!(
            row["Reclaimable"].as_str().unwrap().ends_with("(25%)"),
            "{row}"
        );
        let empty = super::row("Images", 0, 0, 0, 0);
        assert!(
            empty["Reclaimable"].as_str().unwrap().ends_with("(0%)"),
            "{empty}"
        );
    }
}
