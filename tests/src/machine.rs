//! The machine as a whole: what it has, before and after.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::Host;

/// What a program of this machine prints.
pub fn output(line: &str) -> String {
    let mut words = line.split(' ');
    let program = words.next().expect("a program");
    let output = Command::new(program).args(words).output();
    let output = output.unwrap_or_else(|e| panic!("{line}: {e}"));
    assert!(output.status.success(), "{line}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An emulated host has no way out, which passt wants to see: makes one that leads nowhere, on 192.0.2.2.
pub fn way_out() {
    for line in [
        "ip link add out0 type dummy",
        "ip addr replace 192.0.2.2/24 dev out0",
        "ip link set out0 up",
        "ip route replace default via 192.0.2.1",
    ] {
        let words: Vec<&str> = line.split(' ').collect();
        let _ = Command::new(words[0]).args(&words[1..]).output();
    }
}

/// Everything of the network that a container could leave behind.
pub fn network_state() -> String {
    let rules: String = output("iptables-save")
        .lines()
        .chain(output("ip6tables-save").lines())
        .filter(|line| !line.starts_with(['#', ':']))
        .map(|line| format!("{line}\n"))
        .collect();
    format!("{rules}{}", links().join("\n"))
}

fn links() -> Vec<String> {
    let links = output("ip -o link show");
    let links = links.lines().filter_map(|line| line.split(": ").nth(1));
    links.map(str::to_owned).collect()
}

/// Chains and tables, which [`network_state`] leaves out: the first container on a network makes some that stay.
fn chains() -> Vec<String> {
    let rules = output("nft list ruleset");
    let headers = rules.lines().map(str::trim);
    let headers = headers.filter(|line| line.starts_with("chain ") || line.starts_with("table "));
    headers.map(str::to_owned).collect()
}

/// Kills these processes with signal 9 and waits until they are truly gone: only then are their locks free.
pub fn kill(pids: &[Pid]) -> usize {
    for pid in pids {
        // It may have died with another one in the meantime.
        let _ = kill_process(*pid, Signal::KILL);
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    for pid in pids {
        while lives(*pid) {
            assert!(Instant::now() < deadline, "{pid:?} outlives its death");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    pids.len()
}

fn lives(pid: Pid) -> bool {
    let process = format!("/proc/{}", pid.as_raw_nonzero());
    // A zombie holds nothing any more, once all of its threads are gone.
    let threads = fs::read_dir(format!("{process}/task")).map_or(0, Iterator::count);
    let stat = fs::read_to_string(format!("{process}/stat"));
    threads > 1 || stat.is_ok_and(|stat| !stat.contains(") Z ") && !stat.contains(") X "))
}

/// What a host and its machine have at one time: a line for each process, mount, link, namespace, rule, control
/// group and file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// Looks at everything.
    pub fn take(host: &Host) -> Self {
        let mut lines = BTreeSet::new();
        let mut add = |kind: &str, found: Vec<String>| {
            // Lines that are the same count: what is there twice must not be left once more.
            for line in found {
                let line = format!("{kind} {line}");
                let copies = (1..).map(|n| format!("{line} #{n}"));
                let mut copies = copies.skip_while(|line| lines.contains(line));
                lines.extend(copies.next());
            }
        };
        let lines_of = |text: String| text.lines().map(str::to_owned).collect();
        add("casemate", host.all_processes());
        add(
            "mount",
            lines_of(fs::read_to_string("/proc/self/mounts").unwrap_or_default()),
        );
        add("netns", lines_of(output("ip netns list")));
        add("links, rules", lines_of(network_state()));
        add("nft", chains());
        add("cgroup", tree(Path::new("/sys/fs/cgroup"), true));
        add("file", tree(host.dir(), false));
        Self(lines)
    }

    /// What came and what went since `before`; none: nothing.
    pub fn changes_since(&self, before: &Self) -> Vec<String> {
        let came = self.0.difference(&before.0).map(|line| format!("+ {line}"));
        let went = before.0.difference(&self.0).map(|line| format!("- {line}"));
        came.chain(went).collect()
    }
}

/// Paths below a directory; those of directories only, if so wished.
fn tree(dir: &Path, directories: bool) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_dir || !directories {
            found.push(entry.path().display().to_string());
        }
        if is_dir {
            found.extend(tree(&entry.path(), directories));
        }
    }
    found
}
