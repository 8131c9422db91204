//! `ps`, `rm`, `inspect`.

use super::args::{InspectArgs, Kind, PsArgs, RenameArgs, RmArgs};
use super::filter::Filters;
use super::{create, data, images, lifecycle, network_view, output};
use crate::health::{self, Health};
use crate::settings::Settings;
use crate::state::{Container, DEFAULT_NAMESPACE, Meta, State, StateRoot, now_ns};
use crate::times;
use anyhow::bail;
use serde_json::{Value, json};

/// Opens the state and tidies up after the dead.
pub(super) fn state(settings: &Settings) -> anyhow::Result<StateRoot> {
    let root = StateRoot::open(&settings.state_dir, DEFAULT_NAMESPACE)?;
    if root.fresh {
        let dir = crate::scratch::dir_of(&settings.data_dir, &settings.state_dir);
        crate::scratch::remove_orphans(&dir, |id| root.path_of(id).exists());
    } else {
        for error in root.reclaim_dead()? {
            eprintln!(
                "casemate: warning: what a dead container left can't be tidied up: {}",
                crate::rpc::chain(&error)
            );
        }
    }
    Ok(root)
}

fn status_text(container: &Container) -> String {
    let status = &container.status;
    let now = now_ns();
    let since = |then| output::ago(then, now);
    match status.state {
        State::Created => "Created".to_owned(),
        State::Running => {
            let up = since(status.started);
            let more = match (&status.health, status.paused) {
                (_, true) => " (Paused)",
                (None, false) => "",
                (Some(health), false) => match health.status {
                    health::Status::Starting => " (health: starting)",
                    health::Status::Healthy => " (healthy)",
                    health::Status::Unhealthy => " (unhealthy)",
                },
            };
            format!("Up {}{more}", up.trim_end_matches(" ago"))
        }
        State::Restarting => {
            format!(
                "Restarting ({}) {}",
                status.exit_code,
                since(status.finished)
            )
        }
        State::Exited => format!("Exited ({}) {}", status.exit_code, since(status.finished)),
    }
}

/// Docker's word for how the container is.
fn state_name(container: &Container) -> Value {
    match (container.status.state, container.status.paused) {
        (State::Running, true) => json!("paused"),
        (state, _) => json!(state),
    }
}

fn log_config(meta: &Meta) -> Value {
    match meta.log {
        None => json!({"Type": "none", "Config": {}}),
        Some(limits) => json!({
            "Type": "local",
            "Config": {"max-size": limits.size.to_string(), "max-file": limits.files.to_string()},
        }),
    }
}

/// `casemate rename`
pub(super) fn rename(settings: &Settings, args: &RenameArgs) -> anyhow::Result<()> {
    create::check_name(&args.name)?;
    let root = state(settings)?;
    let container = root.find(&args.container)?;
    root.rename(&container, &args.name)?;
    let old = [("oldName", container.meta.name.clone())];
    let meta = Meta {
        name: args.name.clone(),
        ..container.meta
    };
    root.tell(&meta, "rename", old);
    Ok(())
}

fn row(container: &Container, no_trunc: bool) -> Value {
    let meta = &container.meta;
    let mut command = format!("{:?}", meta.command.join(" "));
    let mut id = meta.id.clone();
    if !no_trunc {
        id.truncate(12);
        if command.chars().count() > 20 {
            command = command.chars().take(19).collect::<String>() + "…";
        }
    }
    let labels: Vec<String> = meta
        .labels
        .iter()
        .map(|(k, v)| format!("{k}={v}"))
        .collect();
    json!({
        "ID": id,
        "Image": meta.image,
        "Command": command,
        "CreatedSince": output::ago(meta.created, now_ns()),
        "CreatedAt": times::rfc3339(meta.created),
        "Status": status_text(container),
        "State": state_name(container),
        "Ports": network_view::ports(container),
        "Names": meta.name,
        "Labels": labels.join(","),
        "Mounts": data::names(&meta.mounts),
    })
}

const FILTERS: [&str; 9] = [
    "id", "name", "label", "status", "ancestor", "exited", "health", "before", "since",
];

fn fits(container: &Container, filters: &Filters) -> bool {
    let (meta, status) = (&container.meta, &container.status);
    let health = status.health.as_ref();
    let health = health.map_or("none", |health| health.status.name());
    filters.fits("id", |value| meta.id.starts_with(value))
        && filters.fits("name", |value| {
            meta.name.contains(value.trim_start_matches('/'))
        })
        && filters.fits("status", |value| state_name(container) == value)
        && filters.fits("ancestor", |value| {
            let id = meta.image_id.trim_start_matches("sha256:");
            meta.image == value
                || meta.image_id == value
                || (value.len() >= 12 && id.starts_with(value))
                || meta.image.strip_suffix(":latest") == Some(value)
        })
        && filters.fits("exited", |value| {
            status.state == State::Exited && status.exit_code.to_string() == value
        })
        && filters.fits("health", |value| health == value)
        && filters.fits_labels(|name| meta.labels.get(name).map(String::as_str))
}

/// `casemate ps`
pub(super) fn ps(settings: &Settings, args: &PsArgs) -> anyhow::Result<()> {
    let filters = Filters::parse(&args.filter, &FILTERS)?;
    let root = state(settings)?;
    let mut all = root.containers()?;
    let when = |key: &str| -> anyhow::Result<Option<u64>> {
        let name = filters.of(key).last();
        Ok(name
            .map(|name| root.find(name))
            .transpose()?
            .map(|c| c.meta.created))
    };
    let (before, since) = (when("before")?, when("since")?);
    all.retain(|c| {
        before.is_none_or(|then| c.meta.created < then)
            && since.is_none_or(|then| c.meta.created > then)
            && fits(c, &filters)
    });
    let last = if args.latest { Some(1) } else { args.last };
    // Who asks for an ended one by its state sees it.
    let ended_too = args.all
        || last.is_some()
        || ["status", "exited"]
            .iter()
            .any(|k| !filters.of(k).is_empty());
    all.retain(|c| ended_too || c.status.state.is_alive());
    all.truncate(last.unwrap_or(usize::MAX));
    let rows: Vec<Value> = all.iter().map(|c| row(c, args.no_trunc)).collect();
    if args.quiet {
        return output::print(Some("{{.ID}}"), "CONTAINER", &[], &rows);
    }
    let columns = [
        "ID",
        "Image",
        "Command",
        "CreatedSince",
        "Status",
        "Ports",
        "Names",
    ];
    output::print(args.format.format.as_deref(), "CONTAINER", &columns, &rows)
}

/// `casemate rm`
pub(super) async fn rm(settings: &Settings, args: &RmArgs) -> anyhow::Result<()> {
    lifecycle::for_each(settings, &args.containers, async |root, name| {
        let container = root.find(name)?;
        root.remove(&container, args.force, args.volumes)?;
        Ok(name.to_owned())
    })
    .await
}

fn inspected_health(health: &Health) -> Value {
    let log = health.log.iter().map(|outcome| {
        json!({
            "Start": times::rfc3339(outcome.start),
            "End": times::rfc3339(outcome.end),
            "ExitCode": outcome.exit_code,
            "Output": outcome.output,
        })
    });
    json!({
        "Status": health.status,
        "FailingStreak": health.failing_streak,
        "Log": log.collect::<Vec<_>>(),
    })
}

/// What `inspect` shows of a container, in Docker's shape.
fn inspected(container: &Container) -> Value {
    let (meta, status) = (&container.meta, &container.status);
    let time = |ns| match ns {
        0 => "0001-01-01T00:00:00Z".to_owned(),
        ns => times::rfc3339(ns),
    };
    let (path, args) = match meta.command.split_first() {
        Some((path, args)) => (path.clone(), args.to_vec()),
        None => (String::new(), Vec::new()),
    };
    let (network, host_network) = network_view::settings(container);
    json!({
        "Id": meta.id,
        "Name": meta.name,
        "Created": times::rfc3339(meta.created),
        "Path": path,
        "Args": args,
        "Image": meta.image_id,
        "State": {
            "Status": state_name(container),
            "Running": status.state == State::Running,
            "Paused": status.paused,
            "Restarting": status.state == State::Restarting,
            "OOMKilled": status.oom_killed,
            "Pid": status.pid,
            "ExitCode": status.exit_code,
            "Error": status.error,
            "StartedAt": time(status.started),
            "FinishedAt": time(status.finished),
            "Health": status.health.as_ref().map(inspected_health),
        },
        "Config": {
            "Image": meta.image,
            "Labels": meta.labels,
            "Cmd": meta.command,
            "Tty": meta.tty,
            "OpenStdin": meta.interactive,
            "StopSignal": meta.stop_signal,
            "StopTimeout": meta.stop_timeout,
            "Healthcheck": meta.health,
        },
        "Mounts": data::inspected(&meta.mounts),
        "RestartCount": status.restarts,
        "HostConfig": {
            "AutoRemove": meta.auto_remove,
            "ReadonlyRootfs": meta.read_only,
            "RestartPolicy": {"Name": meta.restart.name(), "MaximumRetryCount": meta.restart.times()},
            "LogConfig": log_config(meta),
            "NetworkMode": host_network["NetworkMode"],
            "PortBindings": host_network["PortBindings"],
        },
        "NetworkSettings": network,
    })
}

/// `casemate inspect`
pub(super) fn inspect(settings: &Settings, args: &InspectArgs) -> anyhow::Result<()> {
    let mut found = Vec::new();
    let mut missing = None;
    for name in &args.names {
        match inspect_one(settings, name, args.kind)? {
            Some(value) => found.push(value),
            None => missing = missing.or(Some(name)),
        }
    }
    match args.format.format.as_deref() {
        None => output::write(&format!("{}\n", serde_json::to_string_pretty(&found)?))?,
        Some(format) => output::print(Some(format), "CONTAINER", &[], &found)?,
    }
    match missing {
        Some(name) => bail!("no such container or image: {name}"),
        None => Ok(()),
    }
}

fn inspect_one(
    settings: &Settings,
    name: &str,
    kind: Option<Kind>,
) -> anyhow::Result<Option<Value>> {
    if kind != Some(Kind::Image)
        && let Ok(container) = state(settings)?.find(name)
    {
        return Ok(Some(inspected(&container)));
    }
    if kind != Some(Kind::Container)
        && let Some(image) = images::store(settings)?.find(name)?
    {
        return Ok(Some(images::inspected(&image)?));
    }
    Ok(None)
}
