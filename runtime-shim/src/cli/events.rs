//! `casemate events`: what happens to containers and images, as it happens.

use super::filter::Filters;
use super::{containers, logs, output};
use crate::events::{Event, Events};
use crate::settings::Settings;
use crate::state::now_ns;
use crate::times;
use clap::Args;
use serde_json::Value;
use std::time::Duration;

/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(100);
const FILTERS: [&str; 6] = ["type", "event", "container", "image", "label", "volume"];

/// `casemate events`
#[derive(Debug, Args)]
pub(super) struct EventsArgs {
    /// Those since then: a time like 2026-01-31T12:00:00Z, or an age like 10m
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Those until then, and no longer
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Only those with: type, event, container, image, label or volume
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
    /// json, or a Go template such as '{{.Action}}'
    #[arg(long)]
    format: Option<String>,
}

/// `casemate events`
pub(super) async fn events(settings: &Settings, args: &EventsArgs) -> anyhow::Result<()> {
    let now = now_ns();
    let time = |name, text: &Option<String>| {
        let text = text.as_deref();
        text.map(|text| logs::time(name, text, now)).transpose()
    };
    // Without a beginning: what happens from now on.
    let since = time("--since", &args.since)?.unwrap_or(now);
    let until = time("--until", &args.until)?.unwrap_or(u64::MAX);
    let filters = Filters::parse(&args.filter, &FILTERS)?;
    let mut reader = Events::of(containers::state(settings)?.dir()).read();
    loop {
        // Before the look: what comes in between is seen.
        let over = now_ns() > until;
        for event in reader.news()? {
            if (since..=until).contains(&event.time_ns) && fits(&event, &filters) {
                show(&event, args.format.as_deref())?;
            }
        }
        if over {
            return Ok(());
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

fn fits(event: &Event, filters: &Filters) -> bool {
    let attribute = |name: &str| event.actor.attributes.get(name).map(String::as_str);
    let is = |kind: &str, value: &str| {
        event.kind.name() == kind
            && (event.actor.id.starts_with(value) || attribute("name") == Some(value))
    };
    filters.fits("type", |value| event.kind.name() == value)
        && filters.fits("event", |value| event.action == value)
        && filters.fits("container", |value| is("container", value))
        && filters.fits("volume", |value| is("volume", value))
        && filters.fits("image", |value| {
            attribute("image") == Some(value) || is("image", value)
        })
        && filters.fits_labels(attribute)
}

fn show(event: &Event, format: Option<&str>) -> anyhow::Result<()> {
    if let Some(format) = format {
        let row: Value = serde_json::to_value(event)?;
        return output::print(Some(format), "EVENT", &[], &[row]);
    }
    let attributes = event.actor.attributes.iter();
    let attributes: Vec<String> = attributes.map(|(n, v)| format!("{n}={v}")).collect();
    output::write(&format!(
        "{} {} {} {} ({})\n",
        times::rfc3339(event.time_ns),
        event.kind.name(),
        event.action,
        event.actor.id,
        attributes.join(", ")
    ))
}
