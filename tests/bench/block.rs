//! The image's disk, by fio.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::figures::Figure;
use crate::host::done;
use crate::inside::{Installed, emit};

/// Size of the file that fio reads.
pub(crate) const FIO_BYTES: u64 = 64 << 20;

/// fio on a file of the image's disk in the guest, against the same bytes in the host's page cache.
pub(crate) fn figures(at: &Installed, samples: usize) -> Result<()> {
    let host_file = PathBuf::from("/run/casemate-bench-fio");
    let host_file = if Path::new("/run").is_dir() {
        host_file
    } else {
        std::env::temp_dir().join("fio")
    };
    let file = fs::File::create(&host_file)?;
    casemate_tests::stream::write(FIO_BYTES, &mut std::io::BufWriter::new(&file))?;
    let guest = || {
        let mut command = at.casemate(&["run", "--rm", "fio", "fio", "--filename=/fio"]);
        // What the guest reads is in the host's page cache, not in its own.
        both(command.arg("--direct=1"), ["4m", "64m"])
    };
    let host = || {
        let mut command = Command::new("fio");
        command.arg(format!("--filename={}", host_file.display()));
        both(&mut command, ["64m", "256m"])
    };
    let samples: Vec<_> = (0..samples.min(3))
        .map(|_| Ok((guest()?, host()?)))
        .collect::<Result<_>>()?;
    for (index, key) in ["blk_vs_host", "blk_vs_host_sequential"].iter().enumerate() {
        let pairs = samples
            .iter()
            .map(|(guest, host)| (guest[index], host[index]));
        emit(&Figure::ratio(key, "MiB/s", pairs.collect()))?;
    }
    fs::remove_file(host_file)?;
    Ok(())
}

/// Reads fixed amounts, as the slower clock may take minutes for seconds: MiB/s of 4 KiB reads in random order, then
/// of 1 MiB reads one after the other. Both in one start, which takes longer than the reading.
fn both(command: &mut Command, amounts: [&str; 2]) -> Result<[f64; 2]> {
    let amounts = amounts.map(|amount| format!("--io_size={amount}"));
    let mut jobs = vec!["--readonly", "--invalidate=0"];
    jobs.extend(["--name=random", "--rw=randread", "--bs=4k", &amounts[0]]);
    jobs.extend(["--name=sequential", "--stonewall", "--rw=read", "--bs=1m"]);
    jobs.push(&amounts[1]);
    let report = report(command, &jobs)?;
    Ok([speed(&report, 0, "read")?, speed(&report, 1, "read")?])
}

/// What fio says of these jobs.
pub(crate) fn report(command: &mut Command, jobs: &[&str]) -> Result<Value> {
    // An option is for the jobs whose names come after it.
    command.args(["--ioengine=psync", "--thread", "--output-format=json"]);
    let out = done(command.args(jobs))?;
    let text = String::from_utf8_lossy(&out.stdout);
    // Notes may come before the document.
    let document = &text[text.find('{').context("no JSON from fio")?..];
    Ok(serde_json::from_str(document)?)
}

/// MiB/s of a job that reads ("read") or writes ("write").
pub(crate) fn speed(report: &Value, job: usize, direction: &str) -> Result<f64> {
    let bytes = report["jobs"][job][direction]["bw_bytes"].as_f64();
    let bytes = bytes.with_context(|| format!("no {direction}.bw_bytes of job {job} from fio"))?;
    Ok(bytes / f64::from(1 << 20))
}
