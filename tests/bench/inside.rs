//! What is measured on the KVM host itself. Each group prints its figures as JSON, one a line.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::figures::Figure;
use crate::vmm::{self, Files};

/// Where `casemate` runs: its tree and a store with the bench's images.
pub(crate) struct Installed {
    /// The staged tree.
    pub prefix: PathBuf,
    /// Its image store.
    pub data: PathBuf,
    /// The initrd of guests that are only booted.
    pub sign_initrd: PathBuf,
    /// A bundle of the same busybox for runc.
    pub bundle: PathBuf,
}

/// Where its sandboxes keep their state.
pub(crate) const STATE: &str = "/run/casemate-bench";

impl Installed {
    /// The same tree with another store.
    pub(crate) fn with_data(&self, data: PathBuf) -> Self {
        Self {
            prefix: self.prefix.clone(),
            data,
            sign_initrd: self.sign_initrd.clone(),
            bundle: self.bundle.clone(),
        }
    }

    pub(crate) fn files(&self) -> Files {
        let share = self.prefix.join("share/casemate");
        Files {
            vmm: self.prefix.join("libexec/casemate/casemate-vmm"),
            kernel: share.join("vmlinux"),
            agent_initrd: share.join("initrd.cpio"),
            sign_initrd: self.sign_initrd.clone(),
        }
    }

    pub(crate) fn casemate(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.prefix.join("bin/casemate"));
        command
            .args(args)
            .env("CASEMATE_DATA", &self.data)
            .env("CASEMATE_STATE", STATE)
            // An emulated host on a busy machine may take its time, which is no failure.
            .env("CASEMATE_START_TIMEOUT", "300");
        command.stdin(Stdio::null());
        command
    }
}

/// Boots only: against Firecracker and QEMU, and to an agent that answers.
pub(crate) fn boots(at: &Installed, samples: usize) -> Result<()> {
    let files = at.files();
    if let Some(firecracker) = std::env::var_os("FIRECRACKER").filter(|path| !path.is_empty()) {
        let firecracker = PathBuf::from(firecracker);
        emit(&in_turn(
            "boot_vs_firecracker",
            samples,
            || vmm::boot_ours(&files),
            || vmm::boot_firecracker(&files, &firecracker),
        )?)?;
    }
    emit(&in_turn(
        "boot_vs_qemu_microvm",
        samples,
        || vmm::boot_ours(&files),
        || vmm::boot_qemu(&files),
    )?)?;
    emit(&Figure::plain(
        "guest_boot_ms",
        "ms",
        repeat(samples, || Ok(vmm::boot_agent(&files)?.2))?,
    ))?;
    Ok(())
}

/// One boot to an agent that answers, for whoever counts exits around it.
pub(crate) fn one_boot(at: &Installed) -> Result<()> {
    vmm::boot_agent(&at.files())?;
    Ok(())
}

/// `casemate run` against `runc run`, the phases of a start, and the memory that a guest uses.
pub(crate) fn runs(at: &Installed, samples: usize) -> Result<()> {
    let casemate = || run_true(at);
    let runc = || {
        let mut command = Command::new("runc");
        command
            .args(["run", "--bundle"])
            .arg(&at.bundle)
            .arg("bench")
            .stdin(Stdio::null());
        milliseconds(command)
    };
    // The first run of each makes what all later ones find: templates, cgroups, page cache.
    casemate()?;
    runc()?;
    let mut run = in_turn("run_vs_runc", samples, casemate, runc)?;
    run.details = phases(at)?;
    emit(&run)
}

/// Our side of all starts, for a quick comparison with what is committed.
pub(crate) fn starts(at: &Installed, samples: usize) -> Result<()> {
    let files = at.files();
    let starts: [(&str, &dyn Fn() -> Result<f64>); 3] = [
        ("boot", &|| vmm::boot_ours(&files)),
        ("guest_boot_ms", &|| Ok(vmm::boot_agent(&files)?.2)),
        ("run", &|| run_true(at)),
    ];
    for (key, start) in starts {
        start()?;
        let mut took = Vec::new();
        for sample in 0..samples {
            await_phase(sample, samples);
            took.push(start()?);
        }
        emit(&Figure::plain(key, "ms", took))?;
    }
    Ok(())
}

/// Waits for this sample's share of the host's timer tick to pass: some waits end with a tick, so that how much a
/// start takes depends on when it begins. Spread evenly over a tick, the mean no longer does.
fn await_phase(sample: usize, samples: usize) {
    /// The emulated host's tick (CONFIG_HZ=100) in ns.
    const TICK: u64 = 10_000_000;
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_nsec as u64;
    let wanted = TICK * sample as u64 / samples as u64;
    std::thread::sleep(Duration::from_nanos((wanted + TICK - now % TICK) % TICK));
}

/// Milliseconds of a whole `casemate run`.
fn run_true(at: &Installed) -> Result<f64> {
    milliseconds(at.casemate(&["run", "--rm", "busybox", "/bin/true"]))
}

/// Milliseconds of each phase, from `casemate run --timing=json`.
fn phases(at: &Installed) -> Result<BTreeMap<String, f64>> {
    let out = at
        .casemate(&["run", "--rm", "--timing=json", "busybox", "/bin/true"])
        .output()?;
    let text = String::from_utf8_lossy(&out.stderr);
    let line = text.lines().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("--timing=json printed {text:?}"))?;
    let mut document: serde_json::Value = serde_json::from_str(line)?;
    Ok(serde_json::from_value(
        document["casemate_timing_ms"].take(),
    )?)
}

/// Prints a figure as soon as it is there: what fails later does not take it along.
pub(crate) fn emit(figure: &Figure) -> Result<()> {
    println!("{}", serde_json::to_string(figure)?);
    Ok(())
}

pub(crate) fn in_turn(
    key: &str,
    samples: usize,
    ours: impl Fn() -> Result<f64>,
    theirs: impl Fn() -> Result<f64>,
) -> Result<Figure> {
    // One of each that does not count: files come into the page cache.
    ours()?;
    theirs()?;
    Ok(Figure::ratio(key, "ms", pairs(samples, ours, theirs)?))
}

fn pairs(
    samples: usize,
    ours: impl Fn() -> Result<f64>,
    theirs: impl Fn() -> Result<f64>,
) -> Result<Vec<(f64, f64)>> {
    (0..samples).map(|_| Ok((ours()?, theirs()?))).collect()
}

fn repeat(samples: usize, measure: impl Fn() -> Result<f64>) -> Result<Vec<f64>> {
    measure()?;
    (0..samples).map(|_| measure()).collect()
}

/// Milliseconds until the command ended well.
pub(crate) fn milliseconds(mut command: Command) -> Result<f64> {
    command.stdout(Stdio::null());
    let begun = Instant::now();
    let status = command
        .status()
        .with_context(|| format!("start {command:?}"))?;
    let elapsed = begun.elapsed();
    ensure!(status.success(), "{command:?}: {status}");
    Ok(elapsed.as_secs_f64() * 1000.0)
}
