//! `make bench`: measures what the project promises, both sides in turn, and writes it down.
//!
//!     casemate-bench [--samples N] [--group boots|runs|living|memory|images|block|volumes|binds|
//!                     network|neighbours|pods|console]…
//!     casemate-bench gate         compare a quick measurement of starts with the committed figures
//!     casemate-bench baseline     measure the same anew, to be committed with the reason
//!     casemate-bench inside …     what runs on the KVM host; started by the two above

mod baseline;
mod block;
mod console;
mod container;
mod disk;
mod figures;
mod hogs;
mod host;
mod inside;
mod living;
mod memory;
mod network;
mod outside;
mod parts;
mod pods;
mod report;
mod rows;
mod vmm;
mod volumes;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use baseline::Baseline;
use inside::Installed;

const GROUPS: [&str; 12] = [
    "boots",
    "runs",
    "living",
    "memory",
    "images",
    "block",
    "volumes",
    "binds",
    "network",
    "neighbours",
    "pods",
    "console",
];
/// How often the gate measures each start, spread over a tick of the host's timer.
const GATE_SAMPLES: usize = 6;

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("inside") => inside(&args[1..]),
        Some("gate") => gate(),
        Some("baseline") => new_baseline(),
        _ => bench(&args),
    }
}

/// Measures the groups and writes everything.
fn bench(args: &[String]) -> Result<ExitCode> {
    let (mut samples, mut groups) = (5, Vec::new());
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--samples" => samples = args.next().context("--samples wants a number")?.parse()?,
            "--group" => groups.push(args.next().context("--group wants a name")?.as_str()),
            other => bail!("unknown option {other:?}; see the top of tests/bench/main.rs"),
        }
    }
    if groups.is_empty() {
        groups = GROUPS.to_vec();
    }
    let root = casemate_tests::paths::repository();
    let dir = root.join("target/bench");
    let bench = host::Bench::prepare(&root)?;
    let mut failed = false;
    for group in groups {
        eprintln!("bench: {group}");
        let mut figures = Vec::new();
        let measured = match group {
            "images" => outside::erofs_vs_unpack(&bench.casemate(), samples)
                .map(|figure| figures.push(figure)),
            group if GROUPS.contains(&group) => bench.measure(group, samples, &mut figures),
            other => bail!("no group {other:?}; there are {GROUPS:?}"),
        };
        report::write(&dir, &figures)?;
        if let Err(error) = measured {
            // The other groups are still worth measuring.
            eprintln!("bench: {group}: {error:#}");
            failed = true;
        }
    }
    let figures = report::measured(&dir)?;
    let clock = bench.clock();
    report::refresh_page(&root.join("docs/performance.md"), &figures, clock)?;
    print!("{}", report::table(&figures, clock));
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// A quick look at the starts: an error if one got worse than what is committed.
fn gate() -> Result<ExitCode> {
    let root = casemate_tests::paths::repository();
    // First, as measuring in vain takes a minute.
    let committed = Baseline::read(&baseline_file(&root))?;
    let figures = host::Bench::prepare(&root)?.starts(GATE_SAMPLES)?;
    let verdict = committed.judge(&Baseline::of(&figures));
    for line in &verdict.lines {
        println!("gate: {line}");
    }
    if verdict.fails {
        println!(
            "gate: mend it, or accept it in the open: `tests/bench/run baseline` writes the new figures; commit them with the reason"
        );
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Measures what the gate measures and makes it the figures to hold.
fn new_baseline() -> Result<ExitCode> {
    let root = casemate_tests::paths::repository();
    let figures = host::Bench::prepare(&root)?.starts(GATE_SAMPLES)?;
    Baseline::of(&figures).write(&baseline_file(&root))?;
    Ok(ExitCode::SUCCESS)
}

fn baseline_file(root: &Path) -> PathBuf {
    root.join("tests/bench/baseline.json")
}

/// Runs on the KVM host: figures as JSON on stdout, one a line.
fn inside(args: &[String]) -> Result<ExitCode> {
    let [group, samples, prefix, bench, store, bundle] = args else {
        bail!("usage: casemate-bench inside GROUP SAMPLES PREFIX BENCH-DIRECTORY STORE BUNDLE");
    };
    let samples: usize = samples.parse()?;
    let bench = Path::new(bench);
    let at = Installed {
        prefix: PathBuf::from(prefix),
        data: PathBuf::from(store),
        sign_initrd: bench.join("sign.cpio"),
        bundle: PathBuf::from(bundle),
    };
    match group.as_str() {
        "boots" => inside::boots(&at, samples)?,
        "one-boot" => inside::one_boot(&at)?,
        "runs" => inside::runs(&at, samples)?,
        "living" => living::figures(&at, samples)?,
        "gate" => inside::starts(&at, samples)?,
        "memory" => memory::figures(&at, samples)?,
        "block" => block::figures(&at, samples)?,
        "volumes" => volumes::figures(&at, samples)?,
        "binds" => volumes::binds(&at, samples)?,
        "network" => network::figures(&at, samples)?,
        "neighbours" => hogs::figures(&at, samples)?,
        "pods" => pods::figures(&at, samples, &bench.join(pods::ARCHIVE))?,
        "console" => console::figure(
            &at,
            &bench.join(host::SCRATCH),
            samples.min(3),
            samples * 100,
        )?,
        other => bail!("no group {other:?}"),
    };
    Ok(ExitCode::SUCCESS)
}
