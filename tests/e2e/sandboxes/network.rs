//! Containers on networks.

use casemate_tests::Host;
use std::process::Command;
use std::sync::{Mutex, MutexGuard};

/// Bridges, addresses and rules are the whole machine's: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(|e| e.into_inner())
}

/// A host whose containers are on a network unless they say otherwise.
fn networked() -> Host {
    Host::with_images().configured("network = \"bridge\"\n")
}

/// What a program of this machine prints.
fn output(line: &str) -> String {
    let mut words = line.split(' ');
    let program = words.next().expect("a program");
    let output = Command::new(program).args(words).output();
    let output = output.unwrap_or_else(|e| panic!("{line}: {e}"));
    assert!(output.status.success(), "{line}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Everything of the network that a container could leave behind.
fn host_state() -> String {
    let rules: String = output("iptables-save")
        .lines()
        .chain(output("ip6tables-save").lines())
        .filter(|line| !line.starts_with(['#', ':']))
        .map(|line| format!("{line}\n"))
        .collect();
    let links = output("ip -o link show");
    let links = links.lines().filter_map(|line| line.split(": ").nth(1));
    format!("{rules}{}", links.collect::<Vec<_>>().join("\n"))
}

/// The address that a container has on its network.
fn address(host: &Host, name: &str) -> String {
    let shown = host.casemate(["exec", name, "ip", "-4", "-o", "addr", "show", "eth0"]);
    let text = shown.succeeds().text();
    let address = text.split_whitespace().nth(3).expect("an address");
    address.split('/').next().expect("an address").to_owned()
}

#[test]
fn none_has_no_device_at_all() {
    let host = Host::with_images();
    host.run(["--network", "none", "busybox", "ls", "/sys/class/net"])
        .succeeds()
        .prints("lo\n");
    host.is_clean();
}

#[test]
fn guest_reaches_the_host_and_leaves_nothing() {
    let _alone = alone();
    let host = networked();
    host.run(["busybox", "true"]).succeeds();
    let before = host_state();
    let script = "ip -o addr show eth0; ip route; cat /etc/hosts; ping -c 1 -w 20 10.188.0.1";
    host.run(["busybox", "sh", "-c", script])
        .succeeds()
        .mentions("10.188.0.")
        .mentions("default via 10.188.0.1")
        .mentions("1 packets received");
    assert_eq!(host_state(), before);
    host.is_clean();
}

#[test]
fn two_containers_talk() {
    let _alone = alone();
    let host = networked();
    let serve = "echo hello > /tmp/index.html; httpd -f -p 8080 -h /tmp";
    host.casemate(["run", "-d", "--name", "web", "busybox", "sh", "-c", serve])
        .succeeds();
    let get = format!(
        "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 30 {} 8080",
        address(&host, "web")
    );
    host.run(["busybox", "sh", "-c", &get])
        .succeeds()
        .mentions("hello\n");
    host.casemate(["rm", "-f", "web"]).succeeds();
    host.is_clean();
}
