//! `pull`, `images`, `rmi`, `load`, `save`, `tag`, `prune`.

use super::args::{
    ImagesArgs, LoadArgs, PruneArgs, PullArgs, PullWhen, RmiArgs, SaveArgs, SaveFormat, TagArgs,
};
use super::outfile::OutFile;
use super::{containers, output, progress};
use crate::events::{Event, Events, Kind};
use crate::settings::Settings;
use crate::size::Human;
use crate::state::{Container, DEFAULT_NAMESPACE, now_ns};
use crate::times;
use anyhow::{Context, bail};
use casemate_image::{
    Digest, Image, Limits, LoadOptions, LoadSource, Platform, PullOptions, PullPolicy,
    RegistryConfig, SaveTarget, Store, parse_reference,
};
use serde::Deserialize;
use serde_json::{Value, json};
use std::io::{IsTerminal, Write};

/// The `[image]` table of the configuration.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ImageTable {
    limits: Limits,
}

/// Tells what happened to an image, by its name as the user gave it.
fn tell(settings: &Settings, action: &str, id: &str, name: &str) {
    let namespace = settings.state_dir.join(DEFAULT_NAMESPACE);
    let attributes = [("name", name.to_owned())];
    Events::of(&namespace).tell(&Event::now(Kind::Image, action, id, attributes));
}

/// Opens the store.
pub(super) fn store(settings: &Settings) -> anyhow::Result<Store> {
    Store::open(&settings.data_dir).context("can't open the image store")
}

/// The store, to take images away from: those that containers were made from are kept.
pub(super) fn store_in_use(settings: &Settings) -> anyhow::Result<Store> {
    let containers = containers::state(settings)?.containers()?;
    let needed = containers.into_iter().filter_map(|Container { meta, .. }| {
        let id: Digest = meta.image_id.parse().ok()?;
        Some((id, format!("container {} was made from it", meta.name)))
    });
    Ok(store(settings)?.keeping(needed.collect()))
}

/// What images may cost, by the configuration.
pub(super) fn limits(settings: &Settings) -> anyhow::Result<Limits> {
    let Some(table) = settings.image.clone() else {
        return Ok(Limits::default());
    };
    let table: ImageTable = table
        .try_into()
        .context("configuration: the [image] table")?;
    Ok(table.limits)
}

fn registries(settings: &Settings) -> anyhow::Result<RegistryConfig> {
    let Some(table) = settings.registries.clone() else {
        return Ok(RegistryConfig::default());
    };
    table
        .try_into()
        .context("configuration: the [registries] table")
}

fn platform(wish: Option<&str>) -> anyhow::Result<Platform> {
    match wish {
        None => Ok(Platform::host()),
        Some(text) => text.parse().context("--platform"),
    }
}

/// The image to run: from the store if that will do, else from its registry.
pub(super) async fn for_run(
    settings: &Settings,
    name: &str,
    when: PullWhen,
    wanted: Option<&str>,
) -> anyhow::Result<(Store, Image)> {
    let store = store(settings)?;
    let platform = platform(wanted)?;
    if when != PullWhen::Always
        && let Some(image) = store.find(name)?
        && (wanted.is_none() || platform.accepts(&image.platform))
    {
        runs_here(name, &image)?;
        return Ok((store, image));
    }
    if when == PullWhen::Never {
        bail!("no such image here: {name}; `casemate pull {name}` fetches it");
    }
    let image = pull_into(
        &store,
        settings,
        name,
        when == PullWhen::Always,
        platform,
        false,
    )
    .await?;
    runs_here(name, &image)?;
    Ok((store, image))
}

/// An archive may hold an image of another platform, and a registry may be asked for one: storing it is fine, running it isn't.
fn runs_here(name: &str, image: &Image) -> anyhow::Result<()> {
    let host = Platform::host();
    if !host.accepts(&image.platform) {
        bail!(
            "image {name} is for {}, and this host runs {host}",
            image.platform
        );
    }
    Ok(())
}

async fn pull_into(
    store: &Store,
    settings: &Settings,
    name: &str,
    always: bool,
    platform: Platform,
    quiet: bool,
) -> anyhow::Result<Image> {
    let options = PullOptions {
        platform,
        policy: match always {
            true => PullPolicy::Always,
            false => PullPolicy::Missing,
        },
        registries: registries(settings)?,
        limits: limits(settings)?,
        progress: progress::choose(quiet),
        ..PullOptions::default()
    };
    let image = store.pull(&parse_reference(name)?, &options).await?;
    tell(settings, "pull", name, name);
    Ok(image)
}

/// `casemate pull`
pub(super) async fn pull(settings: &Settings, args: &PullArgs) -> anyhow::Result<()> {
    let store = store(settings)?;
    let platform = platform(args.platform.as_deref())?;
    let image = pull_into(&store, settings, &args.image, true, platform, args.quiet).await?;
    output::write(&format!("{}\n", image.id))
}

/// `casemate load`
pub(super) async fn load(settings: &Settings, args: &LoadArgs) -> anyhow::Result<()> {
    let source = match &args.input {
        Some(path) => LoadSource::Path(path),
        None if std::io::stdin().is_terminal() => {
            bail!("nothing to load: give --input FILE, or an archive on standard input")
        }
        None => LoadSource::Reader(Box::new(std::io::stdin())),
    };
    let options = LoadOptions {
        platform: platform(args.platform.as_deref())?,
        limits: limits(settings)?,
        progress: progress::choose(args.quiet),
    };
    let mut text = String::new();
    for image in store(settings)?.load(source, &options).await? {
        let lead = if args.quiet { "" } else { "Loaded image: " };
        let names = match image.names.as_slice() {
            [] => vec![image.id.to_string()],
            names => names.to_vec(),
        };
        for name in names {
            tell(settings, "load", &image.id.to_string(), &name);
            text.push_str(&format!("{lead}{name}\n"));
        }
    }
    output::write(&text)
}

/// `casemate save`
pub(super) fn save(settings: &Settings, args: &SaveArgs) -> anyhow::Result<()> {
    let store = store(settings)?;
    let names: Vec<&str> = args.images.iter().map(String::as_str).collect();
    // Before anything is opened: a FIFO would wait for its reader first.
    for name in &names {
        if store.find(name)?.is_none() {
            bail!("no such image: {name}");
        }
    }
    if args.format == SaveFormat::OciDir {
        let path = args
            .output
            .as_ref()
            .context("--format oci-dir needs --output DIR")?;
        return Ok(store.save(&names, SaveTarget::OciLayout(path))?);
    }
    match &args.output {
        Some(path) => {
            let out = OutFile::create(path)?;
            save_archive(&store, &names, args.format, out.file())?;
            out.commit()
        }
        None if std::io::stdout().is_terminal() => {
            bail!("an archive won't be written to a terminal; give --output FILE or redirect")
        }
        None => save_archive(&store, &names, args.format, std::io::stdout()),
    }
}

fn save_archive(
    store: &Store,
    names: &[&str],
    format: SaveFormat,
    out: impl Write + Send,
) -> anyhow::Result<()> {
    let mut out = std::io::BufWriter::with_capacity(256 << 10, out);
    let target = match format {
        SaveFormat::OciArchive => SaveTarget::OciArchive(&mut out),
        SaveFormat::DockerArchive | SaveFormat::OciDir => SaveTarget::DockerArchive(&mut out),
    };
    store.save(names, target)?;
    out.flush().context("can't write the archive")
}

/// `casemate tag`
pub(super) fn tag(settings: &Settings, args: &TagArgs) -> anyhow::Result<()> {
    let image = store(settings)?.tag(&args.source, &parse_reference(&args.target)?)?;
    tell(settings, "tag", &image.id.to_string(), &args.target);
    Ok(())
}

/// `casemate rmi`
pub(super) fn rmi(settings: &Settings, args: &RmiArgs) -> anyhow::Result<()> {
    let store = store_in_use(settings)?;
    for name in &args.images {
        let removed = store.remove(name, args.force)?;
        let mut text = String::new();
        for name in removed.untagged {
            tell(settings, "untag", &name, &name);
            text.push_str(&format!("Untagged: {name}\n"));
        }
        for id in removed.deleted {
            tell(settings, "delete", &id.to_string(), name);
            text.push_str(&format!("Deleted: {id}\n"));
        }
        output::write(&text)?;
    }
    Ok(())
}

/// Asks whether `what` may be removed.
pub(super) fn confirm(what: &str) -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() {
        bail!("there is no terminal to ask on; use --force");
    }
    eprint!("This removes {what}. Go on? [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// `casemate prune`
pub(super) fn prune(settings: &Settings, args: &PruneArgs) -> anyhow::Result<()> {
    let what = match args.all {
        true => "every image that no container uses",
        false => "all images without a name",
    };
    if !args.force && !confirm(what)? {
        return Ok(());
    }
    let pruned = store_in_use(settings)?.prune(args.all)?;
    let mut text = String::new();
    for id in pruned.deleted {
        text.push_str(&format!("Deleted: {id}\n"));
    }
    text.push_str(&format!("Total reclaimed space: {}\n", Human(pruned.freed)));
    output::write(&text)
}

/// Repository and tag of a name; the repository as short as Docker shows it.
fn split_name(name: &str) -> (String, String) {
    let (repository, tag) = match name.rfind(':') {
        Some(at) if !name[at..].contains('/') => (&name[..at], &name[at + 1..]),
        _ => (name, "<none>"),
    };
    let short = repository
        .strip_prefix("docker.io/library/")
        .or_else(|| repository.strip_prefix("docker.io/"))
        .unwrap_or(repository);
    (short.to_owned(), tag.to_owned())
}

fn rows(image: &Image, no_trunc: bool) -> Vec<Value> {
    let id = image.id.to_string();
    let shown = match no_trunc {
        true => id,
        false => id.trim_start_matches("sha256:").chars().take(12).collect(),
    };
    let created = image.created.as_deref().and_then(times::parse);
    let since = match created {
        Some(then) => output::ago(then, now_ns()),
        None => "N/A".to_owned(),
    };
    let mut names: Vec<(String, String)> = image.names.iter().map(|n| split_name(n)).collect();
    if names.is_empty() {
        names.push(("<none>".into(), "<none>".into()));
    }
    names
        .into_iter()
        .map(|(repository, tag)| {
            json!({
                "ID": shown,
                "Repository": repository,
                "Tag": tag,
                "Digest": image.digest.to_string(),
                "CreatedSince": since,
                "CreatedAt": image.created.clone().unwrap_or_default(),
                "Size": Human(image.size).to_string(),
            })
        })
        .collect()
}

/// `casemate images`
pub(super) fn images(settings: &Settings, args: &ImagesArgs) -> anyhow::Result<()> {
    let all = store(settings)?.list()?;
    let mut rows: Vec<Value> = all.iter().flat_map(|i| rows(i, args.no_trunc)).collect();
    if let Some(name) = &args.name {
        let full = format!("{}:", name.trim_end_matches(':'));
        rows.retain(|row| {
            let (repository, tag) = (row["Repository"].as_str(), row["Tag"].as_str());
            let (repository, tag) = (repository.unwrap_or_default(), tag.unwrap_or_default());
            repository == name || format!("{repository}:{tag}:") == full
        });
    }
    if args.quiet {
        return output::print(Some("{{.ID}}"), "IMAGE", &[], &rows);
    }
    let columns: &[&str] = match args.digests {
        true => &["Repository", "Tag", "Digest", "ID", "CreatedSince", "Size"],
        false => &["Repository", "Tag", "ID", "CreatedSince", "Size"],
    };
    output::print(args.format.format.as_deref(), "IMAGE", columns, &rows)
}

/// What `inspect` shows of an image, in Docker's shape.
pub(super) fn inspected(image: &Image) -> anyhow::Result<Value> {
    let mut config = serde_json::to_value(&image.config)?;
    if let Some(check) = &image.healthcheck {
        config["config"]["Healthcheck"] = check.clone();
    }
    Ok(json!({
        "Id": image.id,
        "RepoTags": image.names,
        "RepoDigests": image.repo_digests,
        "Created": image.created,
        "Architecture": image.platform.architecture,
        "Os": image.platform.os,
        "Variant": image.platform.variant,
        "Size": image.size,
        "Digest": image.digest,
        "Config": config["config"],
        "RootFS": {"Type": "layers", "Layers": image.layers},
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_name_knows_ports_from_tags() {
        for (name, repository, tag) in [
            ("docker.io/library/debian:bookworm", "debian", "bookworm"),
            ("docker.io/me/app:1", "me/app", "1"),
            ("localhost:5000/app", "localhost:5000/app", "<none>"),
            ("localhost:5000/app:v1", "localhost:5000/app", "v1"),
        ] {
            assert_eq!(split_name(name), (repository.into(), tag.into()));
        }
    }
}
