//! `make bench`: measures what the project promises, both sides in turn, and writes it down.
//!
//!     casemate-bench [--samples N] [--group boots|runs|images|block|console]… [--baseline]
//!     casemate-bench gate         compare a quick measurement of starts with the committed figures
//!     casemate-bench inside …     what runs on the KVM host; started by the two above

mod figures;
mod host;
mod inside;
mod outside;
mod report;
mod vmm;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use inside::Installed;
use report::Baseline;

const GROUPS: [&str; 5] = ["boots", "runs", "images", "block", "console"];

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("inside") => inside(&args[1..]),
        Some("gate") => gate(),
        _ => bench(&args),
    }
}

/// Measures the groups and writes everything.
fn bench(args: &[String]) -> Result<ExitCode> {
    let (mut samples, mut groups, mut new_baseline) = (5, Vec::new(), false);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--samples" => samples = args.next().context("--samples wants a number")?.parse()?,
            "--baseline" => new_baseline = true,
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
            "boots" | "runs" | "block" | "console" => bench.measure(group, samples, &mut figures),
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
    report::refresh_page(&root.join("docs/performance.md"), &figures, host::CLOCK)?;
    if new_baseline {
        let text = serde_json::to_string_pretty(&Baseline::of(&figures))? + "\n";
        std::fs::write(baseline_file(&root), text)?;
    }
    print!("{}", report::table(&figures, host::CLOCK));
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// A quick look at the starts: an error if one got worse than what is committed.
fn gate() -> Result<ExitCode> {
    let root = casemate_tests::paths::repository();
    let bench = host::Bench::prepare(&root)?;
    let mut figures = Vec::new();
    bench.measure("gate", 3, &mut figures)?;
    let (lines, worse) = Baseline::read(&baseline_file(&root))?.judge(&Baseline::of(&figures));
    for line in lines {
        println!("bench: {line}");
    }
    if worse {
        println!(
            "bench: a start got slower. Mend it, or accept it with its reason: casemate-bench --baseline"
        );
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn baseline_file(root: &Path) -> PathBuf {
    root.join("tests/bench/baseline.json")
}

/// Runs on the KVM host: figures as JSON on stdout, one a line.
fn inside(args: &[String]) -> Result<ExitCode> {
    let [group, samples, prefix, bench] = args else {
        bail!("usage: casemate-bench inside GROUP SAMPLES PREFIX BENCH-DIRECTORY");
    };
    let samples: usize = samples.parse()?;
    let bench = Path::new(bench);
    let at = Installed {
        prefix: PathBuf::from(prefix),
        data: bench.join("data"),
        sign_initrd: bench.join("sign.cpio"),
        bundle: bench.join("bundle"),
    };
    match group.as_str() {
        "boots" => inside::boots(&at, samples)?,
        "one-boot" => inside::one_boot(&at)?,
        "runs" => inside::runs(&at, samples)?,
        "gate" => inside::starts(&at, samples)?,
        "block" => inside::block(&at, samples)?,
        "console" => inside::console(&at, 3, 500)?,
        other => bail!("no group {other:?}"),
    };
    Ok(ExitCode::SUCCESS)
}
