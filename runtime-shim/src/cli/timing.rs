//! `--timing`: where the time of a start went.

use super::args::TimingFormat;
use crate::shim::timing::Timing;
use casemate_vmm::control::Phase;
use serde_json::json;

/// One phase: its name and milliseconds.
type Row = (&'static str, f64);

/// Name of the phase that ends where the VMM tells `phase`.
fn ends(phase: Phase) -> Option<&'static str> {
    Some(match phase {
        Phase::Main => "VMM exec",
        Phase::Confined => "confinement",
        Phase::KvmReady => "KVM setup",
        Phase::KernelLoaded => "kernel load",
        Phase::FirstRun => "filters",
        // The agent's own clock is finer.
        Phase::AgentConnected => return None,
    })
}

/// The phases of a start in order; `cli_main` is when the command line began.
fn rows(cli_main: u64, timing: &Timing) -> Vec<Row> {
    // The guest's clock started at an unknown moment; the agent's connection is seen on both sides.
    let connected = timing
        .vmm
        .iter()
        .find(|(phase, _)| *phase == Phase::AgentConnected)
        .map_or(timing.hello, |(_, at)| *at);
    let in_host_time = |guest: u64| {
        let before = timing.guest_agent_serving.saturating_sub(guest);
        let after = guest.saturating_sub(timing.guest_agent_serving);
        connected.saturating_sub(before).saturating_add(after)
    };
    let exec = match timing.guest_exec {
        0 => timing.started,
        guest => in_host_time(guest).min(timing.started),
    };
    let mut points = vec![
        ("command line", timing.shim_main),
        ("shim", timing.create),
        ("kernel boot", in_host_time(timing.guest_agent_main)),
        ("agent", timing.hello),
        ("container", timing.created),
        ("first instruction", exec),
    ];
    let told = timing.vmm.iter();
    points.extend(told.filter_map(|(phase, at)| Some((ends(*phase)?, *at))));
    points.sort_by_key(|(_, at)| *at);
    let mut before = cli_main;
    let mut rows: Vec<Row> = points
        .into_iter()
        .map(|(name, at)| {
            let took = at.saturating_sub(before);
            before = at.max(before);
            (name, took as f64 / 1e6)
        })
        .collect();
    rows.push(("total", before.saturating_sub(cli_main) as f64 / 1e6));
    rows
}

/// The text for standard error.
pub(super) fn render(format: TimingFormat, cli_main: u64, timing: &Timing) -> String {
    let rows = rows(cli_main, timing);
    match format {
        TimingFormat::Json => {
            let phases: serde_json::Map<String, serde_json::Value> = rows
                .iter()
                .map(|(name, ms)| (name.replace(' ', "_").to_lowercase(), json!(ms)))
                .collect();
            format!("{}\n", json!({ "casemate_timing_ms": phases }))
        }
        TimingFormat::Table | TimingFormat::Initcalls => {
            let mut out = format!("{:<20}{:>10}\n", "PHASE", "MS");
            for (name, ms) in rows {
                out.push_str(&format!("{name:<20}{ms:>10.2}\n"));
            }
            out
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Timing {
        Timing {
            shim_main: 3_000_000,
            create: 4_000_000,
            vmm: vec![
                (Phase::Main, 6_000_000),
                (Phase::Confined, 7_000_000),
                (Phase::KvmReady, 9_000_000),
                (Phase::KernelLoaded, 12_000_000),
                (Phase::FirstRun, 12_500_000),
                (Phase::AgentConnected, 60_000_000),
            ],
            hello: 61_000_000,
            guest_agent_main: 40_000_000,
            guest_agent_serving: 45_000_000,
            created: 65_000_000,
            start: 65_500_000,
            started: 68_000_000,
            guest_exec: 52_000_000,
        }
    }

    #[test]
    fn rows_add_up_to_the_total() {
        let rows = rows(1_000_000, &sample());
        let (last, parts) = rows.split_last().unwrap();
        let sum: f64 = parts.iter().map(|(_, ms)| ms).sum();
        assert_eq!(last.0, "total");
        assert!((sum - last.1).abs() < 1e-9);
        assert_eq!(last.1, 66.0);
        let kernel = parts.iter().find(|(name, _)| *name == "kernel boot");
        assert_eq!(kernel.unwrap().1, 42.5);
    }

    #[test]
    fn render_with_lying_guest_clock_does_not_panic() {
        let timing = Timing {
            guest_agent_main: u64::MAX,
            guest_exec: u64::MAX,
            ..sample()
        };
        let text = render(TimingFormat::Json, 0, &timing);
        serde_json::from_str::<serde_json::Value>(&text).unwrap();
    }
}
