//! A container that takes all it can get gets what it was given, while its neighbour goes on.

use casemate_tests::Host;
use casemate_tests::machine::output;
use std::fs;
use std::net::UdpSocket;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::network::{address, alone, networked};

/// No wait of these tests is longer, even on an emulated host under load.
const PATIENCE: Duration = Duration::from_secs(120);

/// A container that sleeps until the end, and answers.
struct Neighbour<'a>(&'a Host);

impl<'a> Neighbour<'a> {
    fn of(host: &'a Host, options: &[&str]) -> Self {
        let args = [&["run", "-d", "--name", "neighbour"], options].concat();
        let args = [&args[..], &["busybox", "sleep", "100000"]].concat();
        host.casemate(args).succeeds();
        Self(host)
    }

    /// It writes, syncs and reads.
    fn answers(&self) {
        let script = "echo kept > /kept && sync && cat /kept";
        self.0
            .casemate(["exec", "neighbour", "sh", "-c", script])
            .succeeds()
            .prints("kept\n");
    }

    fn reaches(&self, address: &str) {
        self.0
            .casemate(["exec", "neighbour", "ping", "-c", "1", "-w", "60", address])
            .succeeds();
    }
}

/// Waits until something is so.
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn ends(host: &Host) {
    host.casemate(["rm", "-f", "hog", "neighbour"]).succeeds();
    host.is_clean();
}

/// The first number in a file of the kernel's.
fn number(path: impl AsRef<Path>) -> u64 {
    let path = path.as_ref();
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let word = text.split_whitespace().find_map(|word| word.parse().ok());
    word.unwrap_or_else(|| panic!("{}: {text:?}", path.display()))
}

/// Bytes each second that a flood may send or get.
const RATE: u64 = 64 << 10;
const WINDOW: Duration = Duration::from_secs(5);

/// Waits until the rate's first second is used up, and sees that no more than the rate passes from then on.
fn keeps_to_the_rate(direction: &str, bytes: impl Fn() -> u64) {
    let first = bytes();
    until(&format!("{direction}: the flood flows"), || {
        bytes() > first + RATE
    });
    let (begun, before) = (Instant::now(), bytes());
    std::thread::sleep(WINDOW);
    let passed = bytes() - before;
    let seconds = begun.elapsed().as_secs_f64();
    // A quarter more, and what a window's edges may add.
    let most = RATE as f64 * (seconds * 1.25 + 1.0);
    assert!(
        (passed as f64) < most,
        "{direction}: {passed} bytes in {seconds} s, at most {most} are within the rate"
    );
    assert!(passed > 0, "{direction}: the flood flows no more");
}

#[test]
fn packet_flood_keeps_to_its_rate_both_ways() {
    let _alone = alone();
    let host = networked();
    let neighbour = Neighbour::of(&host, &[]);
    let rate = RATE.to_string();
    let limits = ["run", "-d", "--name", "hog", "--network-rate", &rate];
    let flood = ["busybox", "guest-tool", "udp-flood", "10.188.0.1", "9"];
    host.casemate([&limits[..], &flood].concat()).succeeds();
    // What the bridge of the host got; the neighbour is silent.
    let received = "/sys/class/net/casemate0/statistics/rx_bytes";
    keeps_to_the_rate("from the guest", || number(received));
    neighbour.reaches("10.188.0.1");
    neighbour.answers();
    host.casemate(["rm", "-f", "hog"]).succeeds();

    let sleep = ["busybox", "sleep", "100000"];
    host.casemate([&limits[..], &sleep].concat()).succeeds();
    let target = address(&host, "hog");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| flood_from_host(&target, &over));
        let stop = StopWhenDropped(&over);
        let counter = "/sys/class/net/eth0/statistics/rx_bytes";
        keeps_to_the_rate("to the guest", || {
            let count = host.casemate(["exec", "hog", "cat", counter]);
            count.succeeds().word().parse().expect("a number")
        });
        neighbour.reaches("10.188.0.1");
        drop(stop);
    });
    ends(&host);
}

/// Ends a thread even if the test fails before.
struct StopWhenDropped<'a>(&'a AtomicBool);

impl Drop for StopWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends some megabytes each second, far more than the rate, and leaves the processor to others in between.
fn flood_from_host(target: &str, over: &AtomicBool) {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a port");
    socket.connect((target, 9)).expect("a way there");
    while !over.load(Ordering::Relaxed) {
        for _ in 0..50 {
            // A port that nobody listens on answers with an error, which changes nothing.
            let _ = socket.send(&[b'x'; 1400]);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn memory_hog_takes_its_own_and_leaves_the_host_the_rest() {
    let host = Host::with_images();
    let neighbour = Neighbour::of(&host, &[]);
    let hog = "while :; do guest-tool hog; done";
    let args = ["run", "-d", "--name", "hog", "--memory", "96m"];
    let args = [&args[..], &["busybox", "sh", "-c", hog]].concat();
    let id = host.casemate(args).succeeds().word();
    let group = PathBuf::from("/sys/fs/cgroup/casemate").join(id);
    let max = number(group.join("memory.max"));
    assert!((96 << 20..256 << 20).contains(&max), "{max} bytes");
    // The guest's kernel kills it at its limit, and it begins again.
    until("the hog reaches its limit", || {
        number(group.join("memory.peak")) > 96 << 20
    });
    neighbour.answers();
    assert!(number(group.join("memory.peak")) <= max);
    // The host has killed nothing, and has memory left: without a bound the hog would have taken it.
    let events = fs::read_to_string(group.join("memory.events")).expect("the group is there");
    assert!(events.contains("oom_kill 0\n"), "{events}");
    let kib = |field: &str| -> u64 {
        let text = fs::read_to_string("/proc/meminfo").expect("procfs");
        let line = text.lines().find_map(|line| line.strip_prefix(field));
        let word = line.and_then(|line| line.split_whitespace().next());
        word.and_then(|word| word.parse().ok()).expect("a figure")
    };
    let (available, total) = (kib("MemAvailable:"), kib("MemTotal:"));
    assert!(available > total / 4, "{available} of {total} KiB");
    ends(&host);
}

#[test]
fn disk_filler_stops_at_its_size_on_the_host_too() {
    const SIZE: u64 = 32 << 20;
    let host = Host::with_images();
    let neighbour = Neighbour::of(&host, &[]);
    let size = SIZE.to_string();
    let args = ["run", "-d", "--name", "hog", "--storage-size", &size];
    let args = [&args[..], &["busybox", "sleep", "100000"]].concat();
    let id = host.casemate(args).succeeds().word();
    // Full once, and once more over what was removed.
    for _ in 0..2 {
        let fill = "rm -f /full; dd if=/dev/zero of=/full bs=64k; sync; stat -c %s /full";
        let filled = host.casemate(["exec", "hog", "sh", "-c", fill]);
        filled.succeeds().complains_of("No space left on device");
        let written: u64 = filled.word().parse().expect("a size");
        assert!((SIZE / 2..SIZE).contains(&written), "{written} bytes");
        neighbour.answers();
        let scratch = host.data().join("scratch");
        let find = format!("find {} -name {id}.img", scratch.display());
        let meta = fs::metadata(output(&find).trim()).expect("its disk is there");
        let taken = meta.blocks() * 512;
        assert_eq!(meta.len(), SIZE);
        // What the host's file system needs to find the blocks comes on top.
        assert!((SIZE / 2..SIZE + (1 << 20)).contains(&taken), "{taken}");
    }
    ends(&host);
}
