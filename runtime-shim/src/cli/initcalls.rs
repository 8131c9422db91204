//! `--timing=initcalls`: which of the guest kernel's initcalls took how long.
//!
//! The kernel prints each call's address and microseconds on its console (`initcall_debug`); the
//! names are in the `System.map` beside it. Printing takes time itself, but not within a call.

use anyhow::{Context, bail};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

/// The console's text lags behind the agent by the time of a copy.
const LAG: Duration = Duration::from_secs(10);
/// What the kernel prints after its last initcall.
const LAST_LINE: &str = "Run /init as init process";
/// How many are listed: the rest takes microseconds.
const LISTED: usize = 20;

/// One initcall: its address and microseconds.
type Call = (u64, u64);

/// The table for standard error, from the console's text in `log`.
pub(super) async fn report(log: &Path, kernel: &Path) -> anyhow::Result<String> {
    let deadline = Instant::now() + LAG;
    let text = loop {
        let bytes = std::fs::read(log).with_context(|| format!("can't read {}", log.display()))?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if text.contains(LAST_LINE) {
            break text;
        }
        if Instant::now() > deadline {
            bail!("--timing=initcalls: the guest's kernel did not print {LAST_LINE:?}");
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    // Without it the addresses have to do.
    let map = std::fs::read_to_string(kernel.with_file_name("System.map")).unwrap_or_default();
    Ok(table(calls(&text), &names(&map)))
}

fn calls(text: &str) -> Vec<Call> {
    let call = |line: &str| {
        let (_, rest) = line.split_once("initcall ")?;
        let mut words = rest.split_ascii_whitespace();
        let address = words.next()?.trim_start_matches("0x");
        let address = u64::from_str_radix(address, 16).ok()?;
        let (_, took) = rest.split_once(" after ")?;
        let took = took.split_ascii_whitespace().next()?.parse().ok()?;
        Some((address, took))
    };
    text.lines().filter_map(call).collect()
}

fn names(map: &str) -> HashMap<u64, &str> {
    let name = |line: &'_ str| -> Option<(u64, usize)> {
        let address = u64::from_str_radix(line.split(' ').next()?, 16).ok()?;
        Some((address, line.rfind(' ')? + 1))
    };
    map.lines()
        .filter_map(|line| name(line).map(|(address, at)| (address, &line[at..])))
        .collect()
}

fn table(mut calls: Vec<Call>, names: &HashMap<u64, &str>) -> String {
    calls.sort_by_key(|(_, took)| std::cmp::Reverse(*took));
    let ms = |us: u64| us as f64 / 1e3;
    let all: u64 = calls
        .iter()
        .fold(0, |sum, (_, took)| sum.saturating_add(*took));
    let mut out = format!("{:<40}{:>10}\n", "INITCALL", "MS");
    for (address, took) in calls.iter().take(LISTED) {
        let name = match names.get(address) {
            Some(name) => (*name).to_owned(),
            None => format!("{address:#x}"),
        };
        let _ = writeln!(out, "{name:<40}{:>10.3}", ms(*took));
    }
    let _ = writeln!(
        out,
        "{:<40}{:>10.3}",
        format!("all {}", calls.len()),
        ms(all)
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "[    0.010000] calling  0xffffffff812b1d30 @ 1\r\n\
        [    0.010900] initcall 0xffffffff812b1d30 returned 0 after 812 usecs\r\n\
        [    0.011000] initcall 0xffffffff812b2000 returned 0 after 3004 usecs\r\n\
        [    0.012000] initcall torn\r\n\
        [    0.013000] Run /init as init process\r\n";
    const MAP: &str = "ffffffff812b1d30 t inet_init\nnonsense\nffffffff812b3000 T other\n";

    #[test]
    fn table_names_the_longest_first() {
        let table = table(calls(LOG), &names(MAP));
        let lines: Vec<_> = table
            .lines()
            .map(|l| l.split_whitespace().collect::<Vec<_>>())
            .collect();
        assert_eq!(lines[1], ["0xffffffff812b2000", "3.004"]);
        assert_eq!(lines[2], ["inet_init", "0.812"]);
        assert_eq!(lines[3], ["all", "2", "3.816"]);
    }

    proptest::proptest! {
        #[test]
        fn calls_of_anything_never_panics(text in "(initcall |0x| after |[0-9a-f]{1,20}| |\n){0,40}", map in "([0-9a-f]{0,20}| |\n|x){0,40}") {
            table(calls(&text), &names(&map));
        }
    }
}
