//! What is measured on the KVM host itself. Each group prints its figures as JSON, one a line.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

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

impl Installed {
    fn files(&self) -> Files {
        let share = self.prefix.join("share/casemate");
        Files {
            vmm: self.prefix.join("libexec/casemate/casemate-vmm"),
            kernel: share.join("vmlinux"),
            agent_initrd: share.join("initrd.cpio"),
            sign_initrd: self.sign_initrd.clone(),
        }
    }

    fn casemate(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.prefix.join("bin/casemate"));
        command
            .args(args)
            .env("CASEMATE_DATA", &self.data)
            .env("CASEMATE_STATE", "/run/casemate-bench");
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

    let private = repeat(samples.min(3), || {
        let (vmm, _agent, _) = vmm::boot_agent(&files)?;
        // Idle: everything that still runs after the first answer has had its time.
        std::thread::sleep(Duration::from_millis(500));
        private_kib(vmm.pid())
    })?;
    emit(&Figure::plain("vmm_private_kib", "KiB", private))
}

/// One boot to an agent that answers, for whoever counts exits around it.
pub(crate) fn one_boot(at: &Installed) -> Result<()> {
    vmm::boot_agent(&at.files())?;
    Ok(())
}

/// `casemate run` against `runc run`, the phases of a start, and the memory that a guest uses.
pub(crate) fn runs(at: &Installed, samples: usize) -> Result<()> {
    let casemate = || milliseconds(at.casemate(&["run", "--rm", "busybox", "/bin/true"]));
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
    emit(&run)?;
    let used = repeat(samples.min(3), || guest_used_kib(at))?;
    emit(&Figure::plain("guest_used_kib", "KiB", used))
}

/// Our side of all starts, for a quick comparison with what is committed.
pub(crate) fn starts(at: &Installed, samples: usize) -> Result<()> {
    let files = at.files();
    emit(&Figure::plain(
        "boot",
        "ms",
        repeat(samples, || vmm::boot_ours(&files))?,
    ))?;
    emit(&Figure::plain(
        "guest_boot_ms",
        "ms",
        repeat(samples, || Ok(vmm::boot_agent(&files)?.2))?,
    ))?;
    Ok(())
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

/// Kernel, agent and an idle shell: what is not free of a 128 MiB guest, page tables and page cache included.
fn guest_used_kib(at: &Installed) -> Result<f64> {
    let out = at
        .casemate(&[
            "run",
            "--rm",
            "--memory",
            "128m",
            "busybox",
            "cat",
            "/proc/meminfo",
        ])
        .output()?;
    ensure!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let text = String::from_utf8_lossy(&out.stdout);
    let free = text
        .lines()
        .find_map(|line| line.strip_prefix("MemFree:"))
        .context("no MemFree in meminfo")?;
    let free: f64 = free.trim().trim_end_matches(" kB").parse()?;
    Ok(f64::from(vmm::MEMORY_MIB * 1024) - free)
}

/// Nothing lost on the way out: a gigabyte past a slow reader, and many short lives.
pub(crate) fn console(at: &Installed, gigabytes: usize, lives: usize) -> Result<()> {
    let mut lost = Vec::new();
    for _ in 0..gigabytes {
        lost.push(lost_of_a_gigabyte(at)?);
    }
    let mut wrong = 0.0;
    for _ in 0..lives {
        let out = at
            .casemate(&["run", "--rm", "busybox", "sh", "-c", "printf x; exit 3"])
            .output()?;
        if out.stdout != b"x" || out.status.code() != Some(3) {
            eprintln!(
                "wrong: {:?} {:?} {}",
                out.status,
                out.stdout,
                String::from_utf8_lossy(&out.stderr)
            );
            wrong += 1.0;
        }
    }
    let mut figure = Figure::plain("console_lost_bytes", "bytes", lost);
    figure.details = [
        ("short_runs".to_owned(), lives as f64),
        ("short_runs_wrong".to_owned(), wrong),
    ]
    .into();
    emit(&figure)
}

/// Bytes that differ from the first one that does, 0 where all arrived in order.
fn lost_of_a_gigabyte(at: &Installed) -> Result<f64> {
    const SIZE: u64 = 1 << 30;
    let mut command = at.casemate(&[
        "run",
        "--rm",
        "busybox",
        "guest-tool",
        "stream",
        &SIZE.to_string(),
    ]);
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let mut stdout = child.stdout.take().context("stdout is piped")?;
    let (mut received, mut hash, mut buffer) = (0_u64, Sha256::new(), vec![0; 256 << 10]);
    let mut pause_at = 0;
    loop {
        let read = stdout.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        received += read as u64;
        hash.update(&buffer[..read]);
        // A slow reader: every buffer on the way fills up again and again.
        if received >= pause_at {
            std::thread::sleep(Duration::from_millis(20));
            pause_at = received + (16 << 20);
        }
    }
    ensure!(child.wait()?.success(), "the stream's sandbox failed");
    let mut expected = Sha256::new();
    casemate_tests::stream::write(SIZE, &mut HashWriter(&mut expected))?;
    if received == SIZE && hash.finalize() != expected.finalize() {
        return Ok(1.0);
    }
    Ok(SIZE.abs_diff(received) as f64)
}

struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// fio on a file of the image's disk in the guest, against the same bytes in the host's page cache.
pub(crate) fn block(at: &Installed, samples: usize) -> Result<()> {
    let host_file = PathBuf::from("/run/casemate-bench-fio");
    let host_file = if Path::new("/run").is_dir() {
        host_file
    } else {
        std::env::temp_dir().join("fio")
    };
    let file = fs::File::create(&host_file)?;
    casemate_tests::stream::write(FIO_BYTES, &mut std::io::BufWriter::new(&file))?;
    for (key, args) in [
        ("blk_vs_host", ["--rw=randread", "--bs=4k"]),
        ("blk_vs_host_sequential", ["--rw=read", "--bs=1m"]),
    ] {
        let guest = || {
            fio(at.casemate(&[
                "run",
                "--rm",
                "fio",
                "fio",
                "--direct=1",
                "--filename=/fio",
                args[0],
                args[1],
            ]))
        };
        let host = || {
            let mut command = Command::new("fio");
            command
                .arg(format!("--filename={}", host_file.display()))
                .args(args)
                .stdin(Stdio::null());
            fio(command)
        };
        guest()?;
        let pairs = pairs(samples, guest, host)?;
        emit(&Figure::ratio(key, "MiB/s", pairs))?;
    }
    fs::remove_file(host_file)?;
    Ok(())
}

/// Size of the file that fio reads.
pub(crate) const FIO_BYTES: u64 = 64 << 20;

/// Runs fio for two seconds; MiB/s read.
fn fio(mut command: Command) -> Result<f64> {
    command.args([
        "--name=bench",
        "--readonly",
        "--ioengine=psync",
        "--time_based",
        "--runtime=2",
    ]);
    command.args(["--output-format=json", "--thread", "--invalidate=0"]);
    let out = command
        .output()
        .with_context(|| format!("start {command:?}"))?;
    ensure!(
        out.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    let text = String::from_utf8_lossy(&out.stdout);
    // Notes may come before the document.
    let document: serde_json::Value =
        serde_json::from_str(&text[text.find('{').context("no JSON from fio")?..])?;
    let bytes = document["jobs"][0]["read"]["bw_bytes"]
        .as_f64()
        .context("no read.bw_bytes from fio")?;
    Ok(bytes / f64::from(1 << 20))
}

/// Prints a figure as soon as it is there: what fails later does not take it along.
fn emit(figure: &Figure) -> Result<()> {
    println!("{}", serde_json::to_string(figure)?);
    Ok(())
}

fn in_turn(
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
fn milliseconds(mut command: Command) -> Result<f64> {
    command.stdout(Stdio::null());
    let begun = Instant::now();
    let status = command
        .status()
        .with_context(|| format!("start {command:?}"))?;
    let elapsed = begun.elapsed();
    ensure!(status.success(), "{command:?}: {status}");
    Ok(elapsed.as_secs_f64() * 1000.0)
}

/// Private memory of a process, mappings the size of guest memory left out.
fn private_kib(pid: u32) -> Result<f64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut total, mut guest) = (0.0, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        let kib = || {
            value
                .parse::<f64>()
                .with_context(|| format!("smaps: {line}"))
        };
        match key {
            "Size:" => guest = kib()? >= f64::from(vmm::MEMORY_MIB * 1024 / 2),
            "Private_Clean:" | "Private_Dirty:" | "Private_Hugetlb:" if !guest => total += kib()?,
            _ => {}
        }
    }
    Ok(total)
}
