//! Hogs: how long a container's work takes beside one that takes all it can get, against the same work alone.

use std::net::UdpSocket;
use std::time::Duration;

use anyhow::Result;

use crate::container::Container;
use crate::disk::Disk;
use crate::figures::{Figure, median};
use crate::inside::{Installed, emit, milliseconds};
use crate::network::{GATEWAY, NETWORK, create_network};
use crate::volumes::on_disk;

/// Where the host sends packets back.
const ECHO: u16 = 9100;
/// A hog has come to what it does.
const SETTLED: Duration = Duration::from_secs(1);

/// A container that takes what it can get, and the limits that it was given.
struct Hog {
    key: &'static str,
    limits: &'static [&'static str],
    /// The rate of its disk's writes, in bytes each second.
    write_rate: Option<&'static str>,
    script: &'static str,
}

/// Each may have half of a processor, as every hog needs one for what it does: what a neighbour then loses
/// beyond that half is the other limit's.
const HOGS: [Hog; 5] = [
    Hog {
        key: "neighbour_beside_cpu_hog",
        limits: &[],
        write_rate: None,
        script: "while :; do :; done",
    },
    Hog {
        key: "neighbour_beside_memory_hog",
        limits: &["--memory", "128m"],
        write_rate: None,
        script: "while :; do guest-tool hog; done",
    },
    Hog {
        key: "neighbour_beside_fork_bomb",
        limits: &["--pids-limit", "64"],
        write_rate: None,
        script: "bomb() { bomb | bomb & }; while :; do bomb; done",
    },
    Hog {
        key: "neighbour_beside_disk_filler",
        limits: &["--storage-size", "64m"],
        write_rate: Some("16m"),
        script: "while :; do dd if=/dev/zero of=/full bs=1M; sync; rm /full; done",
    },
    Hog {
        key: "neighbour_beside_packet_flood",
        limits: &["--network", NETWORK, "--network-rate", "1m"],
        write_rate: None,
        script: "guest-tool udp-flood 10.99.0.1 9",
    },
];

/// One figure for each hog.
pub(crate) fn figures(at: &Installed, samples: usize) -> Result<()> {
    let (at, disk) = on_disk(at)?;
    create_network(&at)?;
    let options = ["--network", NETWORK, "-v", "neighbour:/data"];
    let command = ["busybox", "sleep", "1000000"];
    let args = [&options[..], &command].concat();
    let neighbour = Container::start(&at, "neighbour", &args)?;
    echo()?;
    // One that does not count: its programs come into the guest's page cache.
    work(&neighbour)?;
    for hog in &HOGS {
        let mut pairs = Vec::new();
        for _ in 0..samples.min(3) {
            let running = start(&at, &disk, hog)?;
            std::thread::sleep(SETTLED);
            let beside = work(&neighbour)?;
            running.end()?;
            pairs.push((beside, work(&neighbour)?));
        }
        let sums = pairs
            .iter()
            .map(|(beside, alone)| (sum(beside), sum(alone)));
        let mut figure = Figure::ratio(hog.key, "ms", sums.collect());
        for (part, name) in PARTS.iter().enumerate() {
            let ratios: Vec<f64> = pairs
                .iter()
                .map(|(beside, alone)| beside[part] / alone[part])
                .collect();
            figure.details.insert((*name).to_owned(), median(&ratios));
        }
        emit(&figure)?;
    }
    neighbour.end()
}

fn start<'a>(at: &'a Installed, disk: &Disk, hog: &Hog) -> Result<Container<'a>> {
    let rate = match hog.write_rate {
        Some(rate) => format!("{}:{rate}", disk.device()),
        None => String::new(),
    };
    let mut args = vec!["--cpus", "0.5"];
    args.extend(hog.limits);
    if !rate.is_empty() {
        args.extend(["--device-write-bps", &rate]);
    }
    args.extend(["busybox", "sh", "-c", hog.script]);
    Container::start(at, "hog", &args)
}

/// What the neighbour's work is made of.
const PARTS: [&str; 3] = ["processor", "disk", "network"];

/// Milliseconds of each part.
fn work(neighbour: &Container<'_>) -> Result<[f64; 3]> {
    let echo = ECHO.to_string();
    let compute = "head -c 16777216 /dev/zero | sha256sum";
    let write = "for file in 1 2 3 4; do dd if=/dev/zero of=/data/$file bs=64k count=128 conv=fsync; done 2> /dev/null";
    Ok([
        milliseconds(neighbour.exec(&["sh", "-c", compute]))?,
        milliseconds(neighbour.exec(&["sh", "-c", write]))?,
        milliseconds(neighbour.exec(&["guest-tool", "udp-ping", GATEWAY, &echo, "1000"]))?,
    ])
}

/// Sends packets back, for the rest of this process's life.
fn echo() -> Result<()> {
    let socket = UdpSocket::bind((GATEWAY, ECHO))?;
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            // A packet that is lost is asked for again.
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
    Ok(())
}

fn sum(parts: &[f64; 3]) -> f64 {
    parts.iter().sum()
}
