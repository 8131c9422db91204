//! `casemate top`: the processes of a container.

use super::args::{ExecArgs, ProcessArgs};
use super::lifecycle::Running;
use super::run::Failure;
use super::tools::Workshop;
use super::{containers, exec, output};
use crate::settings::Settings;
use crate::state::now_ns;
use crate::times;
use anyhow::Context;
use casemate_protocol::tool::{self, Tool};
use clap::Args;
use serde_json::{Value, json};

/// A process for each of 30,000 pids.
const MAX_ANSWER: u64 = 64 << 20;
/// Docker's, which are those of `ps -ef`.
const COLUMNS: [&str; 8] = ["Uid", "Pid", "Ppid", "C", "Stime", "Tty", "Time", "Cmd"];
/// Major number of the terminals below /dev/pts (Documentation/admin-guide/devices.txt).
const PTS_MAJOR: u32 = 136;

/// `casemate top`
#[derive(Debug, Args)]
pub(super) struct TopArgs {
    /// Name or id
    container: String,
    /// Options for the `ps` of the container's image; without any, casemate looks itself
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

/// `casemate top`
pub(super) async fn top(settings: &Settings, args: &TopArgs) -> Result<u8, Failure> {
    if !args.options.is_empty() {
        let command = ["ps".to_owned()].into_iter().chain(args.options.clone());
        let args = ExecArgs {
            process: ProcessArgs::default(),
            privileged: false,
            detach: false,
            container: args.container.clone(),
            command: command.collect(),
        };
        return exec::exec(settings, &args).await;
    }
    let root = containers::state(settings)?;
    let id = Running::find(&root, &args.container)?.container.meta.id;
    let workshop = Workshop::open(settings, &root, &id).await?;
    let answer = workshop.ask(&Tool::Processes, MAX_ANSWER).await?;
    let mut running: Vec<tool::Running> =
        serde_json::from_slice(&answer).context("the guest's answer is no list of processes")?;
    running.sort_by_key(|process| process.pid);
    let now = now_ns();
    let rows: Vec<Value> = running.iter().map(|process| row(process, now)).collect();
    output::print(None, "CONTAINER", &COLUMNS, &rows)?;
    Ok(0)
}

fn row(process: &tool::Running, now: u64) -> Value {
    let seconds = process.cpu_ticks / 100;
    let share = (process.cpu_ticks * 100).checked_div(process.age_ticks);
    let started = now.saturating_sub(process.age_ticks.saturating_mul(10_000_000));
    let started = times::rfc3339(started);
    // Field by field as makedev(3) puts them together.
    let (major, minor) = (
        process.tty >> 8 & 0xfff,
        process.tty & 0xff | process.tty >> 12 & 0xfff00,
    );
    json!({
        "Uid": process.uid.to_string(),
        "Pid": process.pid.to_string(),
        "Ppid": process.ppid.to_string(),
        "C": share.unwrap_or(0).min(99).to_string(),
        "Stime": started.get(11..16).unwrap_or_default(),
        "Tty": match (process.tty, major) {
            (0, _) => "?".to_owned(),
            (_, PTS_MAJOR) => format!("pts/{minor}"),
            _ => format!("{major}:{minor}"),
        },
        "Time": format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60),
        "Cmd": process.command.replace(['\t', '\n'], " "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_says_what_ps_would() {
        let process = tool::Running {
            uid: 1000,
            pid: 7,
            ppid: 1,
            cpu_ticks: 6_150,
            age_ticks: 12_300,
            tty: PTS_MAJOR << 8 | 3,
            command: "sleep\t9".into(),
        };
        let now = times::parse("2026-01-31T12:02:03Z").unwrap();
        let row = row(&process, now);
        for (column, value) in COLUMNS.iter().zip([
            "1000", "7", "1", "50", "12:00", "pts/3", "00:01:01", "sleep 9",
        ]) {
            assert_eq!(row[column], value, "{column}");
        }
    }
}
