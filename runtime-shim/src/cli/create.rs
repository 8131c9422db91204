//! `casemate create`: a container on disk, ready to start.

use super::args::{CreateArgs, LogDriver, TimingFormat};
use super::run::Failure;
use super::{
    containers, data, env, health, images, network_options, output, signals, spec, terminal,
};
use crate::journal::Taken;
use crate::log;
use crate::plan::{self, Host};
use crate::scratch::{self, Kind};
use crate::settings::Settings;
use crate::size;
use crate::state::{Meta, SandboxDir, Status, now_ns};
use anyhow::{Context, bail};
use casemate_image::{Image, RootfsDisk};
use serde_json::Value;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// A log smaller than this would be rotated at every other line.
const MIN_LOG: u64 = 4 << 10;

/// A container that was made.
pub(super) struct Made {
    /// What it is.
    pub(super) meta: Meta,
    /// Its directory.
    pub(super) dir: SandboxDir,
    /// Its image's files, which stay as long as this lives.
    pub(super) rootfs: RootfsDisk,
}

/// What making a container needs beside the arguments.
pub(super) struct Wishes {
    /// The times of the start.
    pub(super) timing: Option<TimingFormat>,
    /// What the container writes is logged unless that is refused.
    pub(super) log: bool,
}

/// `casemate create`
pub(super) async fn create(settings: &Settings, args: &CreateArgs) -> Result<u8, Failure> {
    let wishes = Wishes {
        timing: None,
        log: true,
    };
    let made = make(settings, args, &wishes).await?;
    // From now on it is whole, and stays though nobody looks after it.
    made.dir.write_status(&Status::default())?;
    output::write(&format!("{}\n", made.meta.id))?;
    Ok(0)
}

/// Makes the container's directory with everything that a start needs. What fails leaves nothing behind.
pub(super) async fn make(
    settings: &Settings,
    args: &CreateArgs,
    wishes: &Wishes,
) -> anyhow::Result<Made> {
    check_names(args)?;
    let resources = checked_resources(settings, args)?;
    let storage = storage_size(settings, args)?;
    let log = log_limits(args, wishes.log)?;
    let security = args.security.resolve()?;
    if let Some(signal) = &args.stop_signal {
        signals::parse(signal).context("--stop-signal")?;
    }
    let given_env = env::of(&args.process)?;
    let labels = labels(&args.labels)?;
    let mounts = data::wishes(args)?;
    let cidfile = args.cidfile.as_deref().map(IdFile::new).transpose()?;
    let mut network = network_options::wish(settings, &args.network)?;
    let root = containers::state(settings)?;

    let wanted = args.platform.as_deref();
    let (store, image) = images::for_run(settings, args.image(), args.pull, wanted).await?;
    let rootfs = store.rootfs(&image)?;

    network_options::publish_exposed(&args.network, network.as_mut(), &image.config)?;
    let data = data::gather(settings, &root, args, mounts, &image.config)?;
    let id = new_id()?;
    let bundle = root.path_of(&id);
    let given = spec::Given {
        id: &id,
        bundle: &bundle,
        env: given_env,
        console: terminal::size(),
        timing: wishes.timing,
        network: network.is_some(),
        data: &data,
        security: &security,
    };
    let spec = spec::build(args, &image.config, &resources, &given)?;
    let hostname = spec::hostname(args, &given).to_owned();
    let files = network_options::files(settings, &args.network, network.as_ref(), &hostname)?;
    let meta = Meta {
        health: health::check(&args.health, &image)?,
        mounts: data.points.clone(),
        ..meta(args, &image, &id, &spec, labels, log)
    };
    let dir = root.create(&meta)?;
    let filled = write_bundle(dir.path(), &spec, &hostname, files)
        .and_then(|()| make_scratch(settings, &meta, &dir, storage))
        .and_then(|()| make_log(settings, &meta, &dir))
        .and_then(|()| data.make(settings, &dir.journal()))
        .and_then(|()| cidfile.map_or(Ok(()), |file| file.write(&id)));
    if let Err(error) = filled {
        // The first error is the one to tell.
        let _ = dir.remove();
        return Err(error);
    }
    root.tell(&meta, "create", []);
    Ok(Made { meta, dir, rootfs })
}

/// `--cidfile`: must not be there yet, and is not if nothing is made.
struct IdFile<'a> {
    path: &'a Path,
    file: std::fs::File,
    written: bool,
}

impl<'a> IdFile<'a> {
    fn new(path: &'a Path) -> anyhow::Result<Self> {
        let file = std::fs::File::create_new(path)
            .with_context(|| format!("--cidfile: can't make {}", path.display()))?;
        let written = false;
        Ok(Self {
            path,
            file,
            written,
        })
    }

    fn write(mut self, id: &str) -> anyhow::Result<()> {
        self.file
            .write_all(id.as_bytes())
            .with_context(|| format!("--cidfile: can't write {}", self.path.display()))?;
        self.written = true;
        Ok(())
    }
}

impl Drop for IdFile<'_> {
    fn drop(&mut self) {
        if !self.written {
            let _ = std::fs::remove_file(self.path);
        }
    }
}

/// Whether a text has nothing in it but letters, digits and `more`, and begins with one of the former.
fn is_plain(text: &str, more: &[u8]) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || more.contains(&b))
}

/// A container's name becomes part of paths.
pub(super) fn check_name(name: &str) -> anyhow::Result<()> {
    if is_plain(name, b"_.-") && (2..=128).contains(&name.len()) {
        return Ok(());
    }
    bail!(
        "{name:?} is not a container name; it takes 2 to 128 of [a-zA-Z0-9_.-], a letter or digit first"
    )
}

fn check_names(args: &CreateArgs) -> anyhow::Result<()> {
    if let Some(name) = &args.name {
        check_name(name).context("--name")?;
    }
    if let Some(name) = &args.hostname
        && !(is_plain(name, b".-") && name.len() <= 63)
    {
        bail!("--hostname: {name:?} is not a host name of at most 63 characters");
    }
    Ok(())
}

/// The limits, checked against this host before anything is fetched.
fn checked_resources(settings: &Settings, args: &CreateArgs) -> anyhow::Result<Value> {
    let resources = args.resources.resources()?;
    let defaults = plan::Defaults {
        memory: settings.memory,
        cpus: settings.cpus,
    };
    plan::sizes(&spec::only_resources(&resources)?, Host::here(), defaults)?;
    Ok(resources)
}

fn storage_size(settings: &Settings, args: &CreateArgs) -> anyhow::Result<u64> {
    let size = match &args.resources.storage_size {
        Some(text) => size::parse(text).context("--storage-size")?,
        None => settings.storage_size,
    };
    scratch::checked_size(size).context("--storage-size")
}

/// The log's bounds; `None`: no log.
fn log_limits(args: &CreateArgs, wanted: bool) -> anyhow::Result<Option<log::Limits>> {
    let mut limits = log::Limits::default();
    for option in &args.log_opt {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        match name {
            "max-size" => limits.size = size::parse(value).context("--log-opt max-size")?,
            "max-file" => {
                let files = value.parse().ok().filter(|n| (1..=1000).contains(n));
                limits.files = files.with_context(|| {
                    format!("--log-opt max-file: {value:?} is no number from 1 to 1000")
                })?;
            }
            _ => bail!("--log-opt: {name:?} is neither max-size nor max-file"),
        }
    }
    if limits.size < MIN_LOG {
        bail!(
            "--log-opt max-size: a file of {} bytes is too small; at least {MIN_LOG} are needed",
            limits.size
        );
    }
    Ok(match args.log_driver {
        Some(LogDriver::None) => None,
        None if !wanted => None,
        _ => Some(limits),
    })
}

/// What `--label` was given.
pub(super) fn labels(given: &[String]) -> anyhow::Result<Vec<(String, String)>> {
    given
        .iter()
        .map(|label| {
            let (name, value) = label.split_once('=').unwrap_or((label, ""));
            if name.is_empty() {
                bail!("--label: {label:?} has no name");
            }
            Ok((name.to_owned(), value.to_owned()))
        })
        .collect()
}

/// A container's or process's id.
pub(super) fn new_id() -> anyhow::Result<String> {
    let bytes: [u8; 32] = crate::random::bytes().context("no random numbers")?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

fn meta(
    args: &CreateArgs,
    image: &Image,
    id: &str,
    spec: &Value,
    labels: Vec<(String, String)>,
    log: Option<log::Limits>,
) -> Meta {
    let of_image = image.config.config().as_ref();
    let image_labels = of_image.and_then(|c| c.labels().clone());
    let command = spec["process"]["args"].as_array().cloned();
    Meta {
        id: id.to_owned(),
        name: args.name.clone().unwrap_or_else(|| id[..12].to_owned()),
        image: args.image().to_owned(),
        image_id: image.id.to_string(),
        command: command
            .unwrap_or_default()
            .iter()
            .filter_map(|a| a.as_str().map(str::to_owned))
            .collect(),
        created: now_ns(),
        auto_remove: args.rm,
        stop_signal: args
            .stop_signal
            .clone()
            .or_else(|| of_image.and_then(|c| c.stop_signal().clone())),
        stop_timeout: args.stop_timeout,
        restart: args.restart,
        log,
        interactive: args.process.interactive,
        tty: args.process.tty,
        read_only: args.read_only,
        health: None,
        labels: image_labels
            .unwrap_or_default()
            .into_iter()
            .chain(labels)
            .collect(),
        mounts: Vec::new(),
    }
}

fn write_bundle(
    dir: &Path,
    spec: &Value,
    hostname: &str,
    of_network: Vec<(&'static str, Vec<u8>)>,
) -> anyhow::Result<()> {
    let mut files = vec![
        ("config.json", serde_json::to_vec(spec)?),
        ("hostname", format!("{hostname}\n").into_bytes()),
    ];
    files.extend(of_network);
    for (name, bytes) in files {
        let path = dir.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("can't write {}", path.display()))?;
    }
    Ok(())
}

/// Where a container's writable layer is.
pub(super) fn scratch_file(settings: &Settings, id: &str) -> PathBuf {
    scratch::file_of(&settings.data_dir, &settings.state_dir, id)
}

fn make_scratch(
    settings: &Settings,
    meta: &Meta,
    dir: &SandboxDir,
    size: u64,
) -> anyhow::Result<()> {
    if meta.read_only {
        return Ok(());
    }
    let path = scratch_file(settings, &meta.id);
    dir.journal()
        .record(&Taken::File { path: path.clone() })
        .context("can't write the sandbox's journal")?;
    scratch::create(Kind::Scratch, &settings.data_dir, size, &path)?;
    Ok(())
}

fn make_log(settings: &Settings, meta: &Meta, dir: &SandboxDir) -> anyhow::Result<()> {
    if meta.log.is_none() {
        return Ok(());
    }
    let path = log::dir_of(&settings.data_dir, &settings.state_dir, &meta.id);
    dir.journal()
        .record(&Taken::Directory { path: path.clone() })
        .context("can't write the sandbox's journal")?;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&path)
        .with_context(|| format!("can't make {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_names_of_bad_names_is_refused() {
        for name in ["a", "../x", ".hidden", "a/b", "-x"] {
            assert!(
                check_names(&CreateArgs::of(&format!("--name={name} i"))).is_err(),
                "{name}"
            );
        }
        check_names(&CreateArgs::of("--name web-1.a_b i")).unwrap();
        assert!(check_names(&CreateArgs::of("--hostname a/b i")).is_err());
    }

    #[test]
    fn log_limits_are_checked() {
        let limits = |line: &str, wanted| log_limits(&CreateArgs::of(line), wanted);
        let bounded = limits("--log-opt max-size=1m --log-opt max-file=5 i", true).unwrap();
        assert_eq!(bounded.unwrap().to_string(), "1048576:5");
        assert_eq!(limits("i", false).unwrap(), None);
        assert_eq!(limits("--log-driver none i", true).unwrap(), None);
        assert!(limits("--log-driver local i", false).unwrap().is_some());
        for line in ["max-size=1", "max-file=0", "max-file=x", "colour=red"] {
            assert!(
                limits(&format!("--log-opt {line} i"), true).is_err(),
                "{line}"
            );
        }
    }

    #[test]
    fn new_id_is_64_hex_digits() {
        let id = new_id().unwrap();
        assert_eq!(id.len(), 64);
        assert!(id.bytes().all(|b| b.is_ascii_hexdigit()));
    }
}
