//! `volume create|ls|inspect|rm|prune`

use super::args::{
    VolumeCommand, VolumeCreateArgs, VolumeInspectArgs, VolumeLsArgs, VolumePruneArgs, VolumeRmArgs,
};
use super::{containers, create, mounts, output};
use crate::scratch;
use crate::settings::Settings;
use crate::size::{self, Human};
use crate::state::StateRoot;
use crate::times;
use crate::volume::{New, Volume, VolumeError, Volumes, disk_in};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::IsTerminal;

/// Docker's mark of a volume that nobody named.
const ANONYMOUS: &str = "com.docker.volume.anonymous";

/// `casemate volume`
pub(super) fn volume(settings: &Settings, command: &VolumeCommand) -> anyhow::Result<()> {
    let volumes = Volumes::of(&settings.data_dir);
    match command {
        VolumeCommand::Create(args) => create(settings, &volumes, args),
        VolumeCommand::Ls(args) => list(settings, &volumes, args),
        VolumeCommand::Inspect(args) => inspect(settings, &volumes, args),
        VolumeCommand::Rm(args) => remove(settings, &volumes, args),
        VolumeCommand::Prune(args) => prune(settings, &volumes, args),
    }
}

fn create(settings: &Settings, volumes: &Volumes, args: &VolumeCreateArgs) -> anyhow::Result<()> {
    let size = wanted_size(args)?;
    let new = New {
        name: match &args.name {
            Some(name) => name.clone(),
            None => create::new_id()?,
        },
        size: size.unwrap_or(settings.storage_size),
        labels: create::labels(&args.labels)?.into_iter().collect(),
        anonymous: args.name.is_none(),
    };
    let made = match &args.from {
        Some(from) => volumes.create(&new, Some(&volumes.require(from)?))?,
        // As with Docker, one that is there will do.
        None => volumes.ensure(&new)?,
    };
    if let Some(want) = size.filter(|want| *want != made.record.size) {
        let name = made.record.name;
        let have = made.record.size;
        return Err(VolumeError::OtherSize { name, have, want }.into());
    }
    output::write(&format!("{}\n", made.record.name))
}

fn wanted_size(args: &VolumeCreateArgs) -> anyhow::Result<Option<u64>> {
    let mut size = match &args.size {
        Some(text) => Some(size::parse(text).context("--size")?),
        None => None,
    };
    for option in &args.opt {
        size = Some(mounts::volume_option(option).context("--opt")?);
    }
    Ok(size.map(scratch::checked_size).transpose()?)
}

/// What `--filter` asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Filters {
    names: Vec<String>,
    labels: Vec<(String, Option<String>)>,
    dangling: Option<bool>,
}

impl Filters {
    fn parse(given: &[String], allowed: &[&str]) -> anyhow::Result<Self> {
        let mut all = Self::default();
        for text in given {
            let (key, value) = text
                .split_once('=')
                .with_context(|| format!("--filter: {text:?} is not NAME=VALUE"))?;
            if !allowed.contains(&key) {
                bail!("--filter: {key:?} is none of {}", allowed.join(", "));
            }
            match (key, value) {
                ("name", _) => all.names.push(value.to_owned()),
                ("label", _) => all.labels.push(match value.split_once('=') {
                    Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                    None => (value.to_owned(), None),
                }),
                ("dangling", "true" | "1") => all.dangling = Some(true),
                ("dangling", "false" | "0") => all.dangling = Some(false),
                ("driver", "local") => {}
                _ => bail!("--filter: {value:?} is no value of {key}"),
            }
        }
        Ok(all)
    }

    /// `used`: whether a container was made with it.
    fn pass(&self, volume: &Volume, used: impl FnOnce() -> bool) -> bool {
        let record = &volume.record;
        let labelled = |(name, value): &(String, Option<String>)| {
            let have = record.labels.get(name);
            have.is_some_and(|have| value.as_ref().is_none_or(|value| value == have))
        };
        (self.names.is_empty() || self.names.iter().any(|name| record.name.contains(name)))
            && self.labels.iter().all(labelled)
            && self.dangling.is_none_or(|dangling| dangling != used())
    }
}

/// All volumes; those that can't be read are told.
/// All of them; of a broken one a warning is left.
pub(super) fn all(volumes: &Volumes) -> anyhow::Result<Vec<Volume>> {
    let (all, errors) = volumes.list()?;
    for error in errors {
        eprintln!("casemate: warning: {}", crate::rpc::chain(&error));
    }
    Ok(all)
}

fn labels_of(volume: &Volume) -> BTreeMap<String, String> {
    let mut labels = volume.record.labels.clone();
    if volume.record.anonymous {
        labels.insert(ANONYMOUS.to_owned(), String::new());
    }
    labels
}

fn row(volume: &Volume) -> Value {
    let labels = labels_of(volume);
    let labels: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    json!({
        "Driver": "local",
        "Name": volume.record.name,
        "Scope": "local",
        "Mountpoint": disk_in(&volume.dir),
        "Labels": labels.join(","),
        "Size": Human(volume.used()).to_string(),
        "VolumeName": volume.record.name,
    })
}

fn list(settings: &Settings, volumes: &Volumes, args: &VolumeLsArgs) -> anyhow::Result<()> {
    let filters = Filters::parse(&args.filters, &["name", "label", "dangling", "driver"])?;
    let root = containers::state(settings)?;
    let used = |volume: &Volume| root.user_of_volume(&volume.record.name, None).is_some();
    let rows: Vec<Value> = all(volumes)?
        .iter()
        .filter(|volume| filters.pass(volume, || used(volume)))
        .map(row)
        .collect();
    if args.quiet {
        return output::print(Some("{{.Name}}"), "", &[], &rows);
    }
    let format = args.format.format.as_deref();
    output::print(format, "", &["Driver", "VolumeName"], &rows)
}

/// What `inspect` shows, in Docker's shape; the disk stands where Docker has a directory.
fn inspected(root: &StateRoot, volume: &Volume) -> anyhow::Result<Value> {
    let record = &volume.record;
    let users = root.containers()?;
    let users = users.iter().filter(|c| c.meta.uses_volume(&record.name));
    Ok(json!({
        "CreatedAt": times::rfc3339(record.created),
        "Driver": "local",
        "Labels": labels_of(volume),
        "Mountpoint": disk_in(&volume.dir),
        "Name": record.name,
        "Options": {"size": record.size.to_string()},
        "Scope": "local",
        "UsageData": {"Size": volume.used(), "RefCount": users.count()},
    }))
}

fn inspect(settings: &Settings, volumes: &Volumes, args: &VolumeInspectArgs) -> anyhow::Result<()> {
    let root = containers::state(settings)?;
    let mut found = Vec::new();
    for name in &args.volumes {
        found.push(inspected(&root, &volumes.require(name)?)?);
    }
    match args.format.format.as_deref() {
        None => output::write(&format!("{}\n", serde_json::to_string_pretty(&found)?)),
        Some(format) => output::print(Some(format), "", &[], &found),
    }
}

fn remove(settings: &Settings, volumes: &Volumes, args: &VolumeRmArgs) -> anyhow::Result<()> {
    let root = containers::state(settings)?;
    let mut failed = None;
    for name in &args.volumes {
        match volumes.remove(name, |name| root.user_of_volume(name, None)) {
            Ok(_) => output::write(&format!("{name}\n"))?,
            Err(VolumeError::NotFound(_)) if args.force => {}
            Err(error) => {
                if let Some(before) = failed.replace(error) {
                    eprintln!("casemate: {}", crate::rpc::chain(&before));
                }
            }
        }
    }
    failed.map_or(Ok(()), |error| Err(error.into()))
}

fn prune(settings: &Settings, volumes: &Volumes, args: &VolumePruneArgs) -> anyhow::Result<()> {
    let filters = Filters::parse(&args.filters, &["label"])?;
    if !args.force && !agrees(args.all)? {
        return Ok(());
    }
    let root = containers::state(settings)?;
    let meant =
        |volume: &Volume| (args.all || volume.record.anonymous) && filters.pass(volume, || false);
    let (names, freed) = remove_unused(&root, volumes, meant)?;
    let mut text: String = names.iter().map(|name| format!("{name}\n")).collect();
    if !text.is_empty() {
        text.insert_str(0, "Deleted Volumes:\n");
        text.push('\n');
    }
    output::write(&format!("{text}Total reclaimed space: {}\n", Human(freed)))
}

/// Removes those that are meant and that no container needs. Returns their names, and the bytes that they took.
pub(super) fn remove_unused(
    root: &StateRoot,
    volumes: &Volumes,
    meant: impl Fn(&Volume) -> bool,
) -> anyhow::Result<(Vec<String>, u64)> {
    let (mut names, mut freed) = (Vec::new(), 0);
    for volume in all(volumes)?.into_iter().filter(meant) {
        let used = volume.used();
        match volumes.remove(&volume.record.name, |name| root.user_of_volume(name, None)) {
            Ok(_) => {
                freed += used;
                names.push(volume.record.name);
            }
            Err(VolumeError::InUse(_) | VolumeError::Needed { .. } | VolumeError::NotFound(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok((names, freed))
}

fn agrees(all: bool) -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() {
        bail!("there is no terminal to ask on; use --force");
    }
    let what = match all {
        true => "every volume that no container uses, with its data",
        false => "all volumes without a name that no container uses, with their data",
    };
    eprint!("This removes {what}. Go on? [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::Record;

    fn volume_with(labels: &[(&str, &str)]) -> Volume {
        let labels = labels.iter().map(|(k, v)| (k.to_string(), v.to_string()));
        Volume {
            record: Record {
                name: "cache".into(),
                size: 1,
                created: 0,
                labels: labels.collect(),
                anonymous: false,
            },
            dir: "/v/cache".into(),
        }
    }

    #[test]
    fn filters_pass_what_they_name() {
        let volume = volume_with(&[("job", "7")]);
        let passes = |filters: &[&str], used| {
            let given: Vec<String> = filters.iter().map(|f| f.to_string()).collect();
            let allowed = ["name", "label", "dangling", "driver"];
            Filters::parse(&given, &allowed)
                .unwrap()
                .pass(&volume, || used)
        };
        assert!(passes(&["name=ach", "label=job", "driver=local"], false));
        assert!(passes(&["label=job=7", "dangling=true"], false));
        assert!(passes(&["name=no", "name=cac"], false));
        assert!(!passes(&["label=job=8"], false));
        assert!(!passes(&["dangling=true"], true));
        assert!(!passes(&["name=other"], false));
    }

    #[test]
    fn filters_of_nonsense_are_refused() {
        for text in ["name", "colour=red", "dangling=maybe", "driver=nfs"] {
            let allowed = ["name", "label", "dangling", "driver"];
            assert!(Filters::parse(&[text.into()], &allowed).is_err(), "{text}");
        }
    }
}
