//! What a container gets of outside its image: from the user's wishes to mount points, and from those to a spec.

use super::args::CreateArgs;
use super::create::new_id;
use super::mounts::{self, Source, Wish};
use crate::journal::{Journal, Taken};
use crate::plan::{self, COPY_UP, Found};
use crate::scratch;
use crate::settings::Settings;
use crate::state::{MountPoint, StateRoot};
use crate::volume::{self, New, Volumes};
use anyhow::{Context, bail};
use oci_spec::image::ImageConfiguration;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Everything mounted into a new container besides what each has.
#[derive(Debug, Default)]
pub(super) struct Data {
    /// Volumes, and what of the host.
    pub(super) points: Vec<MountPoint>,
    /// Mounts of the spec that are nothing of outside: tmpfs.
    memory: Vec<Value>,
    /// Volumes that are made if there are none.
    new: Vec<New>,
    /// Directories of the host that are made if there are none.
    missing: Vec<PathBuf>,
}

/// The wishes of `--volume` and `--mount`, read before anything is fetched.
pub(super) fn wishes(args: &CreateArgs) -> anyhow::Result<Vec<Wish>> {
    let volumes = args.volumes.iter().map(|text| mounts::volume(text));
    let mounts = args.mounts.iter().map(|text| mounts::mount(text));
    let all: Vec<Wish> = volumes.chain(mounts).collect::<anyhow::Result<_>>()?;
    let tmpfs = args.tmpfs.iter().map(|wish| wish.split(':').next());
    let mut targets: Vec<&str> = all.iter().map(|wish| wish.target.as_str()).collect();
    targets.extend(tmpfs.flatten());
    targets.sort_unstable();
    if let Some(twice) = targets.windows(2).find(|two| two[0] == two[1]) {
        bail!("two mounts have the same place: {}", twice[0]);
    }
    for wish in &all {
        if let Some(size) = wish.size {
            scratch::checked_size(size).with_context(|| format!("--mount {}", wish.target))?;
        }
    }
    Ok(all)
}

/// What a container is to get, in this order: what the user wants, what others have, what the image asks for.
pub(super) fn gather(
    settings: &Settings,
    root: &StateRoot,
    args: &CreateArgs,
    wishes: Vec<Wish>,
    image: &ImageConfiguration,
) -> anyhow::Result<Data> {
    let mut data = Data::default();
    let volumes = Volumes::of(&settings.data_dir);
    for wish in wishes {
        data.add(&volumes, settings.storage_size, wish)?;
    }
    for text in &args.volumes_from {
        let (name, read_only) = mounts::volumes_from(text)?;
        let from = root.find(name).context("--volumes-from")?;
        for point in from.meta.mounts {
            if !data.has(&point.target) {
                data.points.push(MountPoint {
                    read_only: point.read_only || read_only,
                    // It is the other container's to take with it.
                    anonymous: false,
                    ..point
                });
            }
        }
    }
    let config = image.config().as_ref();
    let mut asked = config.and_then(|c| c.volumes().clone()).unwrap_or_default();
    asked.sort();
    for target in asked {
        let wish = Wish::anonymous(&target)
            .with_context(|| format!("the image's volume {target:?} makes no sense"))?;
        let covered = args
            .tmpfs
            .iter()
            .any(|t| t.split(':').next() == Some(&wish.target));
        if !covered && !data.has(&wish.target) {
            data.add(&volumes, settings.storage_size, wish)?;
        }
    }
    Ok(data)
}

impl Data {
    fn has(&self, target: &str) -> bool {
        let in_memory = |mount: &Value| mount["destination"] == target;
        self.points.iter().any(|point| point.target == target) || self.memory.iter().any(in_memory)
    }

    fn add(&mut self, volumes: &Volumes, size: u64, wish: Wish) -> anyhow::Result<()> {
        let name = match wish.source {
            Source::Volume(name) => name,
            Source::Tmpfs(own) => {
                let options = tmpfs_options(wish.read_only, wish.options, own);
                self.memory.push(json!({
                    "destination": wish.target, "type": "tmpfs", "source": "tmpfs", "options": options,
                }));
                return Ok(());
            }
            Source::Host { path, make } => {
                if plan::look(&path) == Found::Nothing {
                    if !make {
                        bail!("the bind source path does not exist: {}", path.display());
                    }
                    self.missing.push(path.clone());
                }
                self.points.push(MountPoint {
                    source: path,
                    target: wish.target,
                    read_only: wish.read_only,
                    options: wish.options,
                    ..MountPoint::default()
                });
                return Ok(());
            }
        };
        let anonymous = name.is_none();
        let name = match name {
            Some(name) => name,
            None => new_id()?,
        };
        self.points.push(MountPoint {
            source: volumes.dir_of(&name),
            volume: name.clone(),
            target: wish.target,
            read_only: wish.read_only,
            anonymous,
            copy_up: wish.copy_up,
            options: wish.options,
        });
        self.new.push(New {
            name,
            size: wish.size.unwrap_or(size),
            labels: wish.labels,
            anonymous,
        });
        Ok(())
    }

    /// Puts the mounts among a spec's: in place of one at the same path, and parents before what is below them.
    pub(super) fn mount(&self, mounts: &mut Vec<Value>) {
        let own: Vec<Value> = self.points.iter().map(spec_mount).collect();
        let own: Vec<Value> = own.into_iter().chain(self.memory.iter().cloned()).collect();
        if own.is_empty() {
            return;
        }
        mounts.retain(|mount| own.iter().all(|o| o["destination"] != mount["destination"]));
        mounts.extend(own);
        let depth = |mount: &Value| {
            let path = mount["destination"].as_str().unwrap_or_default();
            path.trim_end_matches('/').matches('/').count()
        };
        mounts.sort_by_key(depth);
    }

    /// Makes the volumes that aren't there yet; those without a name go with the container if it fails to become whole.
    pub(super) fn make(&self, settings: &Settings, journal: &Journal) -> anyhow::Result<()> {
        for path in &self.missing {
            std::fs::create_dir_all(path)
                .with_context(|| format!("can't make the directory {}", path.display()))?;
        }
        let volumes = Volumes::of(&settings.data_dir);
        for new in &self.new {
            if new.anonymous {
                let path = volumes.dir_of(&new.name);
                journal
                    .record(&Taken::Volume { path })
                    .context("can't write the sandbox's journal")?;
            }
            volumes.ensure(new)?;
        }
        Ok(())
    }
}

fn tmpfs_options(read_only: bool, given: Vec<String>, own: Vec<String>) -> Vec<String> {
    let mut all: Vec<String> = ["nosuid", "nodev"].map(str::to_owned).to_vec();
    all.extend(given);
    all.extend(own);
    if read_only {
        all.push("ro".to_owned());
    }
    all
}

/// A mount point as a spec has it.
fn spec_mount(point: &MountPoint) -> Value {
    let mut options: Vec<&str> = vec![if point.read_only { "ro" } else { "rw" }];
    options.extend(point.options.iter().map(String::as_str));
    if point.volume.is_empty() {
        options.extend(["rbind", "rprivate"]);
        return json!({
            "destination": point.target,
            "type": "bind",
            "source": point.source,
            "options": options,
        });
    }
    options.push("loop");
    if point.copy_up {
        options.push(COPY_UP);
    }
    json!({
        "destination": point.target,
        "type": "ext4",
        "source": volume::disk_in(&point.source),
        "options": options,
    })
}

/// `inspect`'s list of mounts, in Docker's shape.
pub(super) fn inspected(points: &[MountPoint]) -> Vec<Value> {
    points.iter().map(inspected_one).collect()
}

fn inspected_one(point: &MountPoint) -> Value {
    let mut shown = json!({
        "Type": "bind",
        "Source": point.source,
        "Destination": point.target,
        "Mode": point.options.join(","),
        "RW": !point.read_only,
        "Propagation": "rprivate",
    });
    if !point.volume.is_empty() {
        shown["Type"] = json!("volume");
        shown["Name"] = json!(point.volume);
        shown["Driver"] = json!("local");
        shown["Propagation"] = json!("");
    }
    shown
}

/// `ps`' column of mounts: names of volumes, paths of the host.
pub(super) fn names(points: &[MountPoint]) -> String {
    let name = |point: &MountPoint| match point.volume.as_str() {
        "" => point.source.display().to_string(),
        volume => volume.to_owned(),
    };
    points.iter().map(name).collect::<Vec<_>>().join(",")
}
