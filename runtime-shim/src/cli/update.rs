//! `casemate update`: other limits for containers that are there.

use super::lifecycle::{self, Running};
use super::limits::LimitArgs;
use super::spec;
use crate::plan::{self, Defaults, Host};
use crate::restart::Policy;
use crate::rpc;
use crate::settings::Settings;
use crate::state::StateRoot;
use crate::update;
use anyhow::{Context, bail};
use clap::Args;
use serde_json::Value;

/// `casemate update`
#[derive(Debug, Args)]
pub(super) struct UpdateArgs {
    /// Other limits.
    #[command(flatten)]
    limits: LimitArgs,
    /// Start it again when it ends: no, on-failure[:TIMES], always or unless-stopped
    #[arg(long, value_name = "POLICY")]
    restart: Option<Policy>,
    /// Names or ids
    #[arg(required = true)]
    containers: Vec<String>,
}

/// `casemate update`
pub(super) async fn update(settings: &Settings, args: &UpdateArgs) -> anyhow::Result<()> {
    let change = args.limits.resources()?;
    if change.as_object().is_none_or(|c| c.is_empty()) && args.restart.is_none() {
        bail!("nothing to change: give a limit, such as --memory, or --restart");
    }
    lifecycle::for_each(settings, &args.containers, async |root, name| {
        update_one(settings, root, name, &change, args.restart).await?;
        Ok(name.to_owned())
    })
    .await
}

async fn update_one(
    settings: &Settings,
    root: &StateRoot,
    name: &str,
    change: &Value,
    restart: Option<Policy>,
) -> anyhow::Result<()> {
    let container = root.find(name)?;
    if let Some(policy) = restart {
        if container.meta.auto_remove && policy != Policy::No {
            bail!("container {name} goes away when it ends (--rm), so it can't be started again");
        }
        root.set_restart(&container, policy)?;
    }
    let before = update::wanted(&container.dir).context("can't read the container's limits")?;
    let after = update::changed(&before, change);
    let sizes = |resources: &Value| {
        let defaults = Defaults {
            memory: settings.memory,
            cpus: settings.cpus,
        };
        let spec = spec::only_resources(resources)?;
        Ok::<_, anyhow::Error>(plan::sizes(&spec, Host::here(), defaults)?)
    };
    let (memory, cpus) = sizes(&after)?;
    if container.status.state.is_alive() {
        let (has_memory, has_cpus) = sizes(&update::booted(&container.dir)?)?;
        if memory > has_memory || cpus > has_cpus {
            bail!(
                "the VM of container {name} was booted with {has_memory} MiB and {has_cpus} CPUs, and {memory} MiB and {cpus} CPUs are needed; stop it, update it and start it again"
            );
        }
        let running = Running::find(root, name)?;
        let applied = running.client.update(&container.meta.id, change).await;
        applied.map_err(|error| anyhow::anyhow!(rpc::parts(&error).1))?;
    }
    update::want(&container.dir, &after).context("can't write the container's limits")?;
    root.tell(&container.meta, "update", []);
    Ok(())
}
