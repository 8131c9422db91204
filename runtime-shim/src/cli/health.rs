//! `--health-…`: the health check of a container, from its image and from the command line.

use crate::health::Check;
use crate::times;
use anyhow::{Context, bail};
use casemate_image::Image;
use clap::Args;

/// The options of a health check.
#[derive(Debug, Default, Args)]
pub(super) struct HealthArgs {
    /// Run this in the container's shell now and then: its exit code tells whether the container is healthy
    #[arg(long, value_name = "COMMAND")]
    health_cmd: Option<String>,
    /// From one check to the next, like 30s
    #[arg(long, value_name = "TIME")]
    health_interval: Option<String>,
    /// A check that takes longer failed
    #[arg(long, value_name = "TIME")]
    health_timeout: Option<String>,
    /// Failures this soon after the start don't count
    #[arg(long, value_name = "TIME")]
    health_start_period: Option<String>,
    /// The interval within the start period, until the first success
    #[arg(long, value_name = "TIME")]
    health_start_interval: Option<String>,
    /// So many failures in a row make it unhealthy
    #[arg(long, value_name = "NUMBER")]
    health_retries: Option<u32>,
    /// Don't check, whatever the image says
    #[arg(long)]
    no_healthcheck: bool,
}

/// The check that a container gets; `None`: none.
pub(super) fn check(args: &HealthArgs, image: &Image) -> anyhow::Result<Option<Check>> {
    let time = |option: &str, text: &Option<String>| -> anyhow::Result<u64> {
        let Some(text) = text else { return Ok(0) };
        let time = times::parse_duration(text);
        time.with_context(|| format!("{option}: {text:?} is no time like 30s"))
    };
    let own = Check {
        test: match &args.health_cmd {
            Some(line) if line.is_empty() => bail!("--health-cmd: there is nothing to run"),
            Some(line) => vec!["CMD-SHELL".into(), line.clone()],
            None => Vec::new(),
        },
        interval: time("--health-interval", &args.health_interval)?,
        timeout: time("--health-timeout", &args.health_timeout)?,
        start_period: time("--health-start-period", &args.health_start_period)?,
        start_interval: time("--health-start-interval", &args.health_start_interval)?,
        retries: args.health_retries.unwrap_or(0),
    };
    if args.no_healthcheck {
        if own != Check::default() {
            bail!("--no-healthcheck leaves nothing for the other --health options");
        }
        return Ok(None);
    }
    let of_image = image.healthcheck.clone().map(serde_json::from_value);
    let of_image = of_image.transpose().context("the image's health check")?;
    let check = own.or(of_image.unwrap_or_default());
    Ok(check.command().is_some().then_some(check))
}
