//! `stats`: what running containers use, by the counters of their cgroups in the guests.

use super::args::StatsArgs;
use super::client::Client;
use super::{containers, output};
use crate::rpc;
use crate::settings::Settings;
use crate::size::Human;
use crate::state::{Container, State, StateRoot};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Between two looks; a share of the CPU needs two.
const INTERVAL: Duration = Duration::from_secs(1);
/// A guest that doesn't answer in this time is shown without figures.
const PATIENCE: Duration = Duration::from_secs(5);
/// Clears the screen and goes to its top.
const CLEAR: &str = "\x1b[H\x1b[J";
const COLUMNS: [&str; 7] = [
    "ID", "Name", "CPUPerc", "MemUsage", "MemPerc", "BlockIO", "PIDs",
];

/// A container's counters at some time.
struct Look {
    at: Instant,
    metrics: Metrics,
}

/// `casemate stats`
pub(super) async fn stats(settings: &Settings, args: &StatsArgs) -> anyhow::Result<()> {
    let root = containers::state(settings)?;
    let on_screen = std::io::stdout().is_terminal() && !args.no_stream;
    let mut before = HashMap::new();
    for round in 0.. {
        let shown = chosen(&root, args)?;
        let now = look_at(&shown).await;
        // The first look has nothing to compare with.
        if round > 0 {
            let rows: Vec<Value> = shown
                .iter()
                .map(|container| {
                    let id = &container.meta.id;
                    row(settings, args, container, before.get(id), now.get(id))
                })
                .collect();
            if on_screen {
                output::write_raw(CLEAR)?;
            }
            output::print(args.format.format.as_deref(), "CONTAINER", &COLUMNS, &rows)?;
            if args.no_stream {
                return Ok(());
            }
        }
        before = now;
        tokio::time::sleep(INTERVAL).await;
    }
    Ok(())
}

/// The containers that are asked for; those that run unless they are named or `--all` is given.
fn chosen(root: &StateRoot, args: &StatsArgs) -> anyhow::Result<Vec<Container>> {
    if args.containers.is_empty() {
        let mut all = root.containers()?;
        all.retain(|c| args.all || c.status.state == State::Running);
        return Ok(all);
    }
    let named = args.containers.iter().map(|name| Ok(root.find(name)?));
    named.collect()
}

/// Looks at all that run, at once.
async fn look_at(containers: &[Container]) -> HashMap<String, Look> {
    let mut looks = JoinSet::new();
    for container in containers {
        if container.status.state == State::Running {
            let container = container.clone();
            looks.spawn(async move {
                let look = tokio::time::timeout(PATIENCE, look(&container)).await;
                Some((container.meta.id, look.ok()?.ok()?))
            });
        }
    }
    looks.join_all().await.into_iter().flatten().collect()
}

async fn look(container: &Container) -> anyhow::Result<Look> {
    let client = Client::connect(&container.dir)?;
    let metrics = client.stats(&container.meta.id).await;
    let metrics = metrics.map_err(|error| anyhow::anyhow!(rpc::parts(&error).1))?;
    Ok(Look {
        at: Instant::now(),
        metrics,
    })
}

fn row(
    settings: &Settings,
    args: &StatsArgs,
    container: &Container,
    before: Option<&Look>,
    now: Option<&Look>,
) -> Value {
    let mut id = container.meta.id.clone();
    if !args.no_trunc {
        id.truncate(12);
    }
    let name = &container.meta.name;
    let Some(now) = now else {
        return json!({
            "ID": id, "Container": id, "Name": name, "CPUPerc": "--", "MemUsage": "-- / --", "MemPerc": "--",
            "NetIO": "--", "BlockIO": "--", "PIDs": "--",
        });
    };
    let Metrics {
        cpu,
        memory,
        io,
        pids,
        ..
    } = &now.metrics;
    let cpu_share = before.map_or(0.0, |before| {
        let used = cpu.usage_usec.saturating_sub(before.metrics.cpu.usage_usec);
        let passed = now.at.duration_since(before.at).as_micros().max(1);
        100.0 * used as f64 / passed as f64
    });
    // As Docker has it: what the kernel would drop at once isn't in use.
    let used = memory.usage.saturating_sub(memory.inactive_file);
    // Without a limit of its own it can have what its guest has.
    let limit = match memory.usage_limit {
        0 | u64::MAX => settings.memory,
        limit => limit,
    };
    let (read, written) = io.usage.iter().fold((0, 0), |(read, written), device| {
        (read + device.rbytes, written + device.wbytes)
    });
    json!({
        "ID": id,
        "Container": id,
        "Name": name,
        "CPUPerc": format!("{cpu_share:.2}%"),
        "MemUsage": format!("{} / {}", Human(used), Human(limit)),
        "MemPerc": format!("{:.2}%", 100.0 * used as f64 / limit.max(1) as f64),
        "NetIO": "--",
        "BlockIO": format!("{} / {}", Human(read), Human(written)),
        "PIDs": pids.current,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_without_figures_says_so() {
        let settings = Settings::load().unwrap();
        let args = StatsArgs::default();
        let container = Container {
            meta: crate::state::Meta {
                id: "0123456789abcdef".into(),
                name: "box".into(),
                ..Default::default()
            },
            status: Default::default(),
            dir: "/nowhere".into(),
        };
        let shown = row(&settings, &args, &container, None, None);
        assert_eq!(shown["ID"], "0123456789ab");
        assert_eq!(shown["CPUPerc"], "--");
    }
}
