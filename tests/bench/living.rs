//! Containers that live for a while: what it takes to add a process to one, and what twenty of them take of the host.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::container::Container;
use crate::figures::Figure;
use crate::host::done;
use crate::inside::{Installed, emit, in_turn, milliseconds};
use crate::memory::{family, pss_kib};

const CONTAINERS: usize = 20;
/// How long the idle ones are watched.
const IDLE: Duration = Duration::from_secs(60);
/// Of /proc/PID/stat: USER_HZ.
const TICKS_PER_SECOND: f64 = 100.0;

/// All figures of this group.
pub(crate) fn figures(at: &Installed, samples: usize) -> Result<()> {
    exec(at, samples)?;
    twenty_at_once(at, samples.min(3))?;
    twenty_idle(at)
}

/// `casemate exec` of /bin/true against `runc exec`.
fn exec(at: &Installed, samples: usize) -> Result<()> {
    let ours = Detached::start(at, "living")?;
    let bundle = sleeping_bundle(at)?;
    let mut run = Command::new("runc");
    run.args(["run", "--detach", "--bundle"]).arg(&bundle);
    // What it starts keeps the streams open: nobody may wait for their end.
    let status = run
        .arg("living")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()?;
    ensure!(status.success(), "{run:?}: {status}");
    let figure = in_turn(
        "exec_vs_runc_exec",
        samples,
        || milliseconds(ours.container.exec(&["/bin/true"])),
        || {
            let mut exec = Command::new("runc");
            exec.args(["exec", "living", "/bin/true"])
                .stdin(Stdio::null());
            milliseconds(exec)
        },
    );
    done(Command::new("runc").args(["delete", "--force", "living"]))?;
    ours.end()?;
    emit(&figure?)
}

/// Twenty starts at the same time, from the first to the last one's end.
fn twenty_at_once(at: &Installed, samples: usize) -> Result<()> {
    let figure = in_turn(
        "start_20_parallel",
        samples,
        || all_at_once(|_| at.casemate(&["run", "--rm", "busybox", "/bin/true"])),
        || {
            all_at_once(|number| {
                let mut run = Command::new("runc");
                run.args(["run", "--bundle"]).arg(&at.bundle);
                run.arg(format!("at-once-{number}")).stdin(Stdio::null());
                run
            })
        },
    )?;
    emit(&figure)
}

/// Milliseconds until the last of twenty commands has ended well.
fn all_at_once(command: impl Fn(usize) -> Command) -> Result<f64> {
    let begun = std::time::Instant::now();
    let children: Vec<_> = (0..CONTAINERS)
        .map(|number| command(number).stdout(Stdio::null()).spawn())
        .collect::<Result<_, _>>()?;
    for mut child in children {
        let status = child.wait()?;
        ensure!(status.success(), "one of {CONTAINERS} at once: {status}");
    }
    Ok(begun.elapsed().as_secs_f64() * 1000.0)
}

/// Memory and processor time of twenty containers that do nothing.
fn twenty_idle(at: &Installed) -> Result<()> {
    let mut running = vec![Detached::start(at, "idle-0")?];
    let one = pss_mib(&running)?;
    for number in 1..CONTAINERS {
        running.push(Detached::start(at, &format!("idle-{number}"))?);
    }
    // What follows a start has had its time.
    std::thread::sleep(Duration::from_secs(5));
    match (one, pss_mib(&running)?) {
        (Some(one), Some(all)) => {
            let each = (all - one) / (CONTAINERS - 1) as f64;
            emit(&Figure::plain("per_container_mib", "MiB", vec![each]))?;
        }
        _ => eprintln!(
            "bench: per_container_mib is left out: the host's kernel has no /proc/PID/smaps"
        ),
    }
    let before = cpu_seconds(&running)?;
    std::thread::sleep(IDLE);
    let used = cpu_seconds(&running)? - before;
    let percent = used / IDLE.as_secs_f64() * 100.0;
    emit(&Figure::plain("idle_cpu", "% of a core", vec![percent]))?;
    running.into_iter().try_for_each(Detached::end)
}

/// A container that sleeps.
struct Detached<'a> {
    container: Container<'a>,
    /// The VMM; the shim is its parent.
    vmm: u32,
}

impl<'a> Detached<'a> {
    fn start(at: &'a Installed, name: &str) -> Result<Self> {
        let container = Container::start(at, name, &["busybox", "sleep", "1000000"])?;
        let text = container.inspect("{{.State.Pid}}")?;
        let vmm = text.parse().with_context(|| format!("pid {text:?}"))?;
        Ok(Self { container, vmm })
    }

    /// The shim and all below it.
    fn processes(&self) -> Result<Vec<u32>> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.vmm))?;
        let shim = crate::memory::parent(&stat).with_context(|| stat.clone())?;
        family(shim)
    }

    fn end(self) -> Result<()> {
        self.container.end()
    }
}

/// The share of the host's memory that all processes of these have, guest memory included.
fn pss_mib(containers: &[Detached<'_>]) -> Result<Option<f64>> {
    if !fs::exists("/proc/self/smaps")? {
        return Ok(None);
    }
    let mut kib = 0_u64;
    for container in containers {
        for pid in container.processes()? {
            kib += pss_kib(pid)?;
        }
    }
    Ok(Some(kib as f64 / 1024.0))
}

/// Processor time of all processes of these, that of their guests included.
fn cpu_seconds(containers: &[Detached<'_>]) -> Result<f64> {
    let mut ticks = 0_u64;
    for container in containers {
        for pid in container.processes()? {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
            let (_, rest) = stat.rsplit_once(')').with_context(|| stat.clone())?;
            // Fields 14 and 15; guest time is within the former.
            let times = rest.split_whitespace().skip(11).take(2);
            ticks += times
                .filter_map(|field| field.parse::<u64>().ok())
                .sum::<u64>();
        }
    }
    Ok(ticks as f64 / TICKS_PER_SECOND)
}

/// The bundle's container, asleep.
fn sleeping_bundle(at: &Installed) -> Result<PathBuf> {
    let dir = std::env::temp_dir().join("casemate-bench-sleeper");
    fs::create_dir_all(&dir)?;
    let mut spec: serde_json::Value =
        serde_json::from_slice(&fs::read(at.bundle.join("config.json"))?)?;
    spec["process"]["args"] = json!(["/bin/busybox", "sleep", "1000000"]);
    spec["root"]["path"] = json!(at.bundle.join("rootfs"));
    fs::write(dir.join("config.json"), serde_json::to_vec(&spec)?)?;
    Ok(dir)
}
