//! What a container may take: the options, and what they are in an OCI spec.

use crate::plan::{self, NETWORK_RATE};
use crate::size;
use anyhow::{Context, bail};
use clap::Args;
use serde_json::{Value, json};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

/// The kernel's default period.
const CPU_PERIOD: u64 = 100_000;
/// Docker's.
const SHM_SIZE: u64 = 64 << 20;
/// Of getrlimit(2), by the names of ulimit.
const ULIMITS: [(&str, &str); 16] = [
    ("as", "RLIMIT_AS"),
    ("core", "RLIMIT_CORE"),
    ("cpu", "RLIMIT_CPU"),
    ("data", "RLIMIT_DATA"),
    ("fsize", "RLIMIT_FSIZE"),
    ("locks", "RLIMIT_LOCKS"),
    ("memlock", "RLIMIT_MEMLOCK"),
    ("msgqueue", "RLIMIT_MSGQUEUE"),
    ("nice", "RLIMIT_NICE"),
    ("nofile", "RLIMIT_NOFILE"),
    ("nproc", "RLIMIT_NPROC"),
    ("rss", "RLIMIT_RSS"),
    ("rtprio", "RLIMIT_RTPRIO"),
    ("rttime", "RLIMIT_RTTIME"),
    ("sigpending", "RLIMIT_SIGPENDING"),
    ("stack", "RLIMIT_STACK"),
];

/// Limits that `casemate update` changes too.
#[derive(Debug, Default, Args)]
pub(super) struct LimitArgs {
    /// CPUs to use, fractions allowed
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true)]
    cpus: Option<String>,
    /// Its weight where CPUs are short, 2 to 262144; 1024 is usual
    #[arg(short = 'c', long, value_name = "NUMBER")]
    cpu_shares: Option<u64>,
    /// Memory limit, like 512m or 2g
    #[arg(short, long, value_name = "SIZE", allow_hyphen_values = true)]
    memory: Option<String>,
    /// Memory that is not taken from it for others' sake
    #[arg(long, value_name = "SIZE")]
    memory_reservation: Option<String>,
    /// Processes and threads that it may have; -1: any number
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true)]
    pids_limit: Option<i64>,
}

/// All limits of a new container.
#[derive(Debug, Default, Args)]
pub(super) struct ResourceArgs {
    /// Those that can change.
    #[command(flatten)]
    limits: LimitArgs,
    /// Processors of the host that it may run on, like 0-2,7
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Size of the writable layer, a hard limit
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(super) storage_size: Option<String>,
    /// Size of /dev/shm
    #[arg(long, value_name = "SIZE")]
    shm_size: Option<String>,
    /// A limit of each process: NAME=SOFT[:HARD]
    #[arg(
        long = "ulimit",
        value_name = "NAME=SOFT[:HARD]",
        allow_hyphen_values = true
    )]
    ulimits: Vec<String>,
    /// Bytes per second read from each of its disks on a device of the host: DEVICE:RATE
    #[arg(long, value_name = "DEVICE:RATE")]
    device_read_bps: Vec<String>,
    /// Bytes per second written
    #[arg(long, value_name = "DEVICE:RATE")]
    device_write_bps: Vec<String>,
    /// Reads per second
    #[arg(long, value_name = "DEVICE:NUMBER")]
    device_read_iops: Vec<String>,
    /// Writes per second
    #[arg(long, value_name = "DEVICE:NUMBER")]
    device_write_iops: Vec<String>,
    /// Bytes per second that its network passes in each direction, like 10m
    #[arg(long, value_name = "RATE")]
    network_rate: Option<String>,
}

fn positive(option: &str, text: &str) -> anyhow::Result<u64> {
    match size::parse(text).with_context(|| option.to_owned())? {
        0 => bail!("{option}: nothing would pass at {text}"),
        bytes => Ok(bytes),
    }
}

impl LimitArgs {
    /// The spec's `linux.resources`.
    pub(super) fn resources(&self) -> anyhow::Result<Value> {
        let mut resources = json!({});
        if let Some(text) = &self.cpus {
            resources["cpu"] = json!({"quota": quota(text)?, "period": CPU_PERIOD});
        }
        if let Some(shares) = self.cpu_shares {
            if !(2..=262_144).contains(&shares) {
                bail!("--cpu-shares: {shares} is not within 2 to 262144");
            }
            resources["cpu"]["shares"] = shares.into();
        }
        let memory = self.memory.as_deref().map(size::parse).transpose();
        let memory = memory.context("--memory")?;
        if let Some(limit) = memory {
            resources["memory"]["limit"] = limit.into();
        }
        if let Some(text) = &self.memory_reservation {
            let reservation = size::parse(text).context("--memory-reservation")?;
            if let Some(limit) = memory.filter(|limit| reservation > *limit) {
                bail!("--memory-reservation: {text} is more than the limit of {limit} bytes");
            }
            resources["memory"]["reservation"] = reservation.into();
        }
        if let Some(limit) = self.pids_limit {
            if limit < -1 {
                bail!("--pids-limit: {limit} is not a number of processes; -1 means any number");
            }
            resources["pids"]["limit"] = limit.into();
        }
        Ok(resources)
    }
}

fn quota(text: &str) -> anyhow::Result<i64> {
    let number: f64 = text
        .parse()
        .ok()
        .filter(|n: &f64| n.is_finite())
        .with_context(|| format!("--cpus: {text:?} is not a number of CPUs"))?;
    if number < 0.01 {
        bail!("--cpus: {text} is too few; at least 0.01 are needed");
    }
    Ok((number * CPU_PERIOD as f64).round().min(1e15) as i64)
}

impl ResourceArgs {
    /// The spec's `linux.resources`.
    pub(super) fn resources(&self) -> anyhow::Result<Value> {
        let mut resources = self.limits.resources()?;
        if let Some(list) = &self.cpuset_cpus {
            resources["cpu"]["cpus"] = checked_cpus(list)?.into();
        }
        for (option, key, devices) in [
            (
                "--device-read-bps",
                "throttleReadBpsDevice",
                &self.device_read_bps,
            ),
            (
                "--device-write-bps",
                "throttleWriteBpsDevice",
                &self.device_write_bps,
            ),
            (
                "--device-read-iops",
                "throttleReadIOPSDevice",
                &self.device_read_iops,
            ),
            (
                "--device-write-iops",
                "throttleWriteIOPSDevice",
                &self.device_write_iops,
            ),
        ] {
            if !devices.is_empty() {
                let all: anyhow::Result<Vec<Value>> =
                    devices.iter().map(|text| throttle(option, text)).collect();
                resources["blockIO"][key] = all?.into();
            }
        }
        Ok(resources)
    }

    /// The spec's `process.rlimits`.
    pub(super) fn rlimits(&self) -> anyhow::Result<Vec<Value>> {
        let mut all: Vec<Value> = Vec::new();
        for text in &self.ulimits {
            let limit = ulimit(text).with_context(|| format!("--ulimit {text:?}"))?;
            // The last one counts, as with Docker.
            all.retain(|other| other["type"] != limit["type"]);
            all.push(limit);
        }
        Ok(all)
    }

    /// The option of the tmpfs at /dev/shm.
    pub(super) fn shm(&self) -> anyhow::Result<String> {
        let size = match &self.shm_size {
            Some(text) => positive("--shm-size", text)?,
            None => SHM_SIZE,
        };
        Ok(format!("size={}k", size.div_ceil(1024)))
    }

    /// What the network may pass, for the spec's annotations.
    pub(super) fn annotate(&self, annotations: &mut Value) -> anyhow::Result<()> {
        if let Some(text) = &self.network_rate {
            let rate = positive("--network-rate", text)?;
            annotations[NETWORK_RATE] = rate.to_string().into();
        }
        Ok(())
    }
}

/// A list of processors of which each is there for us.
fn checked_cpus(list: &str) -> anyhow::Result<&str> {
    let cpus = plan::processor_list(list).context("--cpuset-cpus")?;
    let ours =
        rustix::thread::sched_getaffinity(None).context("can't learn which CPUs there are")?;
    if cpus.is_empty() {
        bail!("--cpuset-cpus: {list:?} names no CPU");
    }
    let has = |cpu: &&u32| {
        (**cpu as usize) < rustix::thread::CpuSet::MAX_CPU && ours.is_set(**cpu as usize)
    };
    if let Some(cpu) = cpus.iter().find(|cpu| !has(cpu)) {
        let have: Vec<String> = (0..rustix::thread::CpuSet::MAX_CPU)
            .filter(|cpu| ours.is_set(*cpu))
            .map(|cpu| cpu.to_string())
            .collect();
        bail!(
            "--cpuset-cpus: CPU {cpu} of {list:?} is not available; there are {}",
            have.join(",")
        );
    }
    Ok(list)
}

fn throttle(option: &str, text: &str) -> anyhow::Result<Value> {
    let Some((path, rate)) = text.rsplit_once(':') else {
        bail!("{option}: {text:?} is not like /dev/sda:10m");
    };
    let rate = positive(option, rate)?;
    let meta = std::fs::metadata(path).with_context(|| format!("{option}: {path}"))?;
    if !meta.file_type().is_block_device() {
        bail!("{option}: {path} is not a block device");
    }
    let device = meta.rdev();
    Ok(json!({
        "major": rustix::fs::major(device),
        "minor": rustix::fs::minor(device),
        "rate": rate,
    }))
}

fn ulimit(text: &str) -> anyhow::Result<Value> {
    let (name, limits) = text
        .split_once('=')
        .context("it is not like nofile=1024:2048")?;
    let kind = ULIMITS.iter().find(|(known, _)| *known == name);
    let Some((_, kind)) = kind else {
        bail!(
            "there is no limit {name:?}; those of ulimit are {}",
            ULIMITS.map(|(n, _)| n).join(", ")
        );
    };
    let number = |text: &str| match text {
        "unlimited" | "-1" => Ok(u64::MAX),
        _ => text
            .parse()
            .with_context(|| format!("{text:?} is not a number")),
    };
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let (soft, hard) = (number(soft)?, number(hard)?);
    if soft > hard {
        bail!("the soft limit {soft} is above the hard one, {hard}");
    }
    Ok(json!({"type": kind, "soft": soft, "hard": hard}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::CreateArgs;

    fn args(line: &str) -> ResourceArgs {
        CreateArgs::of(&format!("{line} image")).resources
    }

    #[test]
    fn resources_are_the_specs() {
        let resources = args("--cpus 1.5 -m 64m --memory-reservation 32m --pids-limit 7 -c 512")
            .resources()
            .unwrap();
        let expected = json!({
            "cpu": {"quota": 150_000, "period": 100_000, "shares": 512},
            "memory": {"limit": 64 << 20, "reservation": 32 << 20},
            "pids": {"limit": 7},
        });
        assert_eq!(resources, expected);
        assert_eq!(args("").resources().unwrap(), json!({}));
    }

    #[test]
    fn resources_of_nonsense_are_refused_by_name() {
        for (line, part) in [
            ("--cpus 0", "--cpus"),
            ("--cpus NaN", "NaN"),
            ("--cpus inf", "inf"),
            ("--cpus -1", "-1"),
            ("--cpus many", "many"),
            ("--cpus 0.001", "0.001"),
            ("--memory lots", "lots"),
            ("--memory -5m", "-5m"),
            ("--memory 8m --memory-reservation 9m", "9m"),
            ("--pids-limit -2", "-2"),
            ("--cpu-shares 1", "1"),
            ("--cpuset-cpus 4000", "4000"),
            ("--cpuset-cpus x", "\"x\""),
            ("--device-read-bps /dev/null:1m", "/dev/null"),
            ("--device-read-bps /dev/null", "/dev/sda:10m"),
            ("--device-write-iops /nothing:5", "/nothing"),
            ("--device-write-bps /dev/null:0", "0"),
        ] {
            let error = format!("{:#}", args(line).resources().unwrap_err());
            assert!(error.contains(part), "{line}: {error}");
        }
    }

    #[test]
    fn ulimits_are_dockers() {
        let limits = args("--ulimit nofile=5 --ulimit core=-1 --ulimit nofile=10:20")
            .rlimits()
            .unwrap();
        let expected = [
            json!({"type": "RLIMIT_CORE", "soft": u64::MAX, "hard": u64::MAX}),
            json!({"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}),
        ];
        assert_eq!(limits, expected);
        for text in [
            "nofile",
            "nofile=",
            "nofile=9:8",
            "colour=1",
            "nofile=1:2:3",
        ] {
            let error = args(&format!("--ulimit {text}")).rlimits().unwrap_err();
            assert!(format!("{error:#}").contains(text), "{error:#}");
        }
    }

    #[test]
    fn shm_is_64_mib_or_what_was_asked_for() {
        assert_eq!(args("").shm().unwrap(), "size=65536k");
        assert_eq!(args("--shm-size 1m").shm().unwrap(), "size=1024k");
        assert!(args("--shm-size 0").shm().is_err());
    }
}
