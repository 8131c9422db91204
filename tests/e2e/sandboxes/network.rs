//! Containers on networks.

mod policy;
mod user;

use casemate_tests::machine::{network_state as host_state, output, way_out};
use casemate_tests::{Host, only_one};
use std::fs::File;
use std::process::Command;

/// Bridges, addresses and rules are the whole machine's: one test at a time, until the file is closed.
pub(crate) fn alone() -> File {
    only_one("network.lock")
}

/// A host whose containers are on a network unless they say otherwise.
pub(crate) fn networked() -> Host {
    Host::with_images().configured("network = \"bridge\"\n")
}

/// The address that a container has on its network.
pub(crate) fn address(host: &Host, name: &str) -> String {
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

/// Starts a container that answers every connection to its port 8080 with its name.
fn serve(host: &Host, name: &str, options: &[&str]) {
    let script = format!("while :; do echo {name} | nc -l -p 8080; done");
    let mut args = vec!["run", "-d", "--name", name];
    args.extend_from_slice(options);
    args.extend_from_slice(&["busybox", "sh", "-c", &script]);
    host.casemate(args).succeeds();
}

/// What a server says first.
fn answer(address: &str) -> String {
    use std::io::Read;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let mut buffer = [0; 64];
        let read = std::net::TcpStream::connect(address).and_then(|mut stream| {
            stream.set_read_timeout(Some(std::time::Duration::from_secs(20)))?;
            stream.read(&mut buffer)
        });
        match read {
            Ok(n) if n > 0 => return String::from_utf8_lossy(&buffer[..n]).into_owned(),
            other => assert!(std::time::Instant::now() < deadline, "{address}: {other:?}"),
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

#[test]
fn published_port_is_the_hosts() {
    let _alone = alone();
    let host = networked();
    let before = host_state();
    let ports = [
        "-p",
        "18080:8080",
        "-p",
        "127.0.0.1:18081:8080",
        "-p",
        "15353:53/udp",
    ];
    serve(&host, "web", &ports);
    let inside = format!("{}:8080", address(&host, "web"));
    for address in [
        inside.as_str(),
        "127.0.0.1:18081",
        "127.0.0.1:18080",
        "10.188.0.1:18080",
    ] {
        assert_eq!(answer(address), "web\n", "{address}");
    }
    let shown = host.casemate(["port", "web"]);
    shown.succeeds().prints(
        "8080/tcp -> 0.0.0.0:18080\n8080/tcp -> 127.0.0.1:18081\n53/udp -> 0.0.0.0:15353\n",
    );
    host.casemate(["ps"])
        .succeeds()
        .mentions("0.0.0.0:18080->8080/tcp");
    let ip = "{{.NetworkSettings.IPAddress}}:8080";
    host.casemate(["inspect", "--format", ip, "web"])
        .succeeds()
        .prints(&format!("{inside}\n"));
    host.casemate(["run", "-d", "-p", "18080:80", "busybox", "true"])
        .ends_with(125)
        .complains_of("port 0.0.0.0:18080/tcp of the host can't be had");
    host.casemate(["network", "rm", "bridge"])
        .fails()
        .complains_of("in use by container web");
    host.casemate(["rm", "-f", "web"]).succeeds();
    host.casemate(["network", "rm", "bridge"]).succeeds();
    let after = host_state();
    let ours = |text: &str| text.matches("15353").count() + text.matches("18080").count();
    assert_eq!((ours(&before), ours(&after)), (0, 0), "{after}");
    host.is_clean();
}

/// What a server of UDP says to a "ping"; empty: nothing, for long enough.
fn datagram(address: &str) -> String {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("a port");
    let timeout = Some(std::time::Duration::from_millis(500));
    socket.set_read_timeout(timeout).expect("set");
    let mut buffer = [0; 64];
    let mut answers = (0..60).map(|_| {
        let _ = socket.send_to(b"ping", address);
        let length = socket.recv(&mut buffer).unwrap_or(0);
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    });
    answers.find(|said| !said.is_empty()).unwrap_or_default()
}

#[test]
fn killed_sandbox_gives_its_network_back() {
    let _alone = alone();
    let host = networked();
    host.run(["-p", "18080:8080", "busybox", "true"]).succeeds();
    let before = host_state();
    for process in ["containerd-shim-casemate-v2", "casemate-vmm"] {
        serve(&host, "web", &["-p", "18080:8080"]);
        assert_ne!(host_state(), before);
        for pid in host.processes(process) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !host.casemate(["ps", "-q"]).text().is_empty() {
            assert!(std::time::Instant::now() < deadline, "{process} was killed");
        }
        // The network goes with the container's end, the container with its removal.
        host.casemate(["rm", "web"]).succeeds();
        assert_eq!(host_state(), before, "{process} was killed");
        host.is_clean();
    }
}

#[test]
fn names_and_addresses_are_as_wished() {
    let _alone = alone();
    let host = networked();
    let create = [
        "network",
        "create",
        "--subnet",
        "10.77.5.0/24",
        "--label",
        "a=b",
        "own",
    ];
    host.casemate(create).succeeds();
    let script = "cat /etc/hosts /etc/resolv.conf; ip -o addr show eth0; ip -o link show eth0";
    let run = host.run([
        "--network",
        "own",
        "--ip",
        "10.77.5.77",
        "--mac-address",
        "02:00:00:00:77:77",
        "--add-host",
        "db:10.0.0.9",
        "--add-host",
        "host:host-gateway",
        "--dns",
        "10.77.5.1",
        "--dns-search",
        "a.example",
        "--hostname",
        "box",
        "busybox",
        "sh",
        "-c",
        script,
    ]);
    for text in [
        "10.77.5.77\tbox\n",
        "10.0.0.9\tdb\n",
        "10.77.5.1\thost\n",
        "nameserver 127.0.0.11\n",
        "search a.example\n",
        "inet 10.77.5.77/24",
        "02:00:00:00:77:77",
    ] {
        run.succeeds().mentions(text);
    }
    host.casemate(["network", "ls"]).succeeds().mentions("own");
    let format = "{{json .IPAM.Config}} {{.Labels.a}}";
    host.casemate(["network", "inspect", "own", "--format", format])
        .succeeds()
        .prints("[{\"Gateway\":\"10.77.5.1\",\"Subnet\":\"10.77.5.0/24\"}] b\n");
    host.casemate(["network", "create", "--ipv6", "--internal", "six"])
        .succeeds();
    let six = host.run([
        "--network",
        "six",
        "busybox",
        "sh",
        "-c",
        "ip -o addr show eth0; ip route",
    ]);
    six.succeeds().mentions("inet6 fd");
    assert!(!six.text().contains("default"), "{}", six.text());
    host.casemate(["network", "rm", "six"]).succeeds();
    host.casemate(["network", "prune", "-f"])
        .succeeds()
        .prints("Deleted: own\n");
    host.run(["--network", "own", "busybox", "true"])
        .ends_with(125)
        .complains_of("network own not found");
    host.is_clean();
}

#[test]
fn host_without_plugins_says_what_to_install() {
    let host = Host::with_images().configured("network = \"bridge\"\ncni_dir = \"/nowhere\"\n");
    host.run(["busybox", "true"])
        .ends_with(125)
        .complains_of("containernetworking-plugins");
    host.run(["--network", "none", "-p", "80:80", "busybox", "true"])
        .ends_with(125)
        .complains_of("--publish needs a network");
    host.is_clean();
}

/// A server of the host that answers every connection.
struct Server {
    address: std::net::SocketAddr,
    /// The hash of each transfer that it took.
    hashes: std::sync::mpsc::Receiver<String>,
}

impl Server {
    /// Serves at an address of the host: says hello and closes its half, so that who asked is done.
    fn at(ip: &str) -> Self {
        Self::new(ip, true)
    }

    /// Takes what comes until the other closes.
    fn taking(ip: &str) -> Self {
        Self::new(ip, false)
    }

    fn new(ip: &str, says_hello: bool) -> Self {
        use std::io::{Read, Write};
        let listener = std::net::TcpListener::bind((ip, 0)).expect("a port");
        let address = listener.local_addr().expect("an address");
        let (tell, hashes) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.expect("a connection");
                let tell = tell.clone();
                std::thread::spawn(move || {
                    if says_hello {
                        let _ = stream.write_all(HELLO.as_bytes());
                        let _ = stream.shutdown(std::net::Shutdown::Write);
                    }
                    let mut all = Vec::new();
                    let _ = stream.read_to_end(&mut all);
                    let _ = tell.send(sha256(&all));
                });
            }
        });
        Self { address, hashes }
    }

    /// A shell command that prints what the server says.
    fn ask(&self, seconds: u32) -> String {
        let (ip, port) = (self.address.ip(), self.address.port());
        // Its input stays open: Debian 12's passt sends twice to one who has closed his half, or never tells him
        // that the other has closed too.
        format!("(sleep 2; echo) | nc -w {seconds} {ip} {port}")
    }
}

/// The hash of some bytes, as sha256sum prints it.
fn sha256(bytes: &[u8]) -> String {
    use std::io::Write;
    let file = tempfile::NamedTempFile::new().expect("a file");
    file.as_file().write_all(bytes).expect("written");
    let sum = output(&format!("sha256sum {}", file.path().display()));
    sum.split(' ').next().expect("a hash").to_owned()
}

#[test]
fn large_transfer_arrives_as_it_was_sent() {
    let _alone = alone();
    let host = networked();
    // Its bridge is there from the first container on.
    host.run(["busybox", "true"]).succeeds();
    let server = Server::taking("10.188.0.1");
    let script = format!(
        "dd if=/dev/urandom of=/big bs=1M count=24 2> /dev/null; sha256sum < /big; {} < /big > /dev/null",
        server.ask(60).replace("(sleep 2; echo) |", "")
    );
    let sent = host.run(["busybox", "sh", "-c", &script]);
    let hash = sent.succeeds().text();
    let hash = hash.split(' ').next().expect("a hash");
    assert_eq!(server.hashes.recv().expect("received"), hash);

    let echo = [
        "-p",
        "15353:7777/udp",
        "busybox",
        "guest-tool",
        "udp-echo",
        "7777",
    ];
    host.casemate([&["run", "-d", "--name", "echo"][..], &echo].concat())
        .succeeds();
    for to in [
        format!("{}:7777", address(&host, "echo")),
        "10.188.0.1:15353".to_owned(),
    ] {
        assert_eq!(datagram(&to), "ping", "{to}");
    }
    host.casemate(["rm", "-f", "echo"]).succeeds();
    host.is_clean();
}

/// A container that asks the server gets this from it.
#[track_caller]
fn asks(host: &Host, server: &Server, options: &[&str], before: &str, expected: &str) {
    // Patient with what shall come.
    let seconds = if expected == HELLO { 30 } else { 6 };
    let script = format!("{before} {} || echo no way", server.ask(seconds));
    let mut args = options.to_vec();
    args.extend_from_slice(&["busybox", "sh", "-c", &script]);
    let run = host.run(args);
    run.prints(expected);
}

const HELLO: &str = "from the host\n";
const REFUSED: &str = "no way\n";

/// The host has IPv6, at 2001:db8::2, for as long as this is there.
struct Six;

impl Six {
    fn new() -> Self {
        Self::all("add");
        Self
    }

    fn all(verb: &str) {
        for line in [
            format!("ip -6 addr {verb} 2001:db8::2/64 dev out0 nodad"),
            format!("ip -6 route {verb} default via 2001:db8::1 dev out0"),
        ] {
            let words: Vec<&str> = line.split(' ').collect();
            let _ = Command::new(words[0]).args(&words[1..]).output();
        }
    }
}

impl Drop for Six {
    fn drop(&mut self) {
        Self::all("del");
    }
}

#[test]
fn network_with_ipv6_publishes_and_keeps_to_policies() {
    let _alone = alone();
    way_out();
    let _six = Six::new();
    let host = networked();
    let create = [
        "network",
        "create",
        "--ipv6",
        "--subnet",
        "10.77.6.0/24",
        "--subnet",
        "fd77:6::/64",
        "six",
    ];
    host.casemate(create).succeeds();
    serve(
        &host,
        "web",
        &[
            "--network",
            "six",
            "--ip6",
            "fd77:6::77",
            "-p",
            "18080:8080",
        ],
    );
    for address in [
        "[fd77:6::77]:8080",
        "[2001:db8::2]:18080",
        "127.0.0.1:18080",
    ] {
        assert_eq!(answer(address), "web\n", "{address}");
    }
    for (network, address, complaint) in [
        ("bridge", "[2001:db8::2]", "network bridge has no IPv6"),
        ("six", "[::1]", "Linux sends nothing on from there"),
    ] {
        let port = format!("{address}:18081:8080");
        host.run(["--network", network, "-p", &port, "busybox", "true"])
            .ends_with(125)
            .complains_of(complaint);
    }
    let get = "(sleep 2; echo) | nc -w 6 fd77:6::77 8080 || echo no way";
    let asks = |options: &[&str], expected: &str| {
        let options = [
            &["--network", "six"],
            options,
            &["busybox", "sh", "-c", get],
        ]
        .concat();
        host.run(options).prints(expected);
    };
    asks(&[], "web\n");
    asks(&["--egress", "deny"], "no way\n");
    let allow = [
        "--egress",
        "deny",
        "--egress-allow",
        "[fd77:6::77]:8080/tcp",
    ];
    asks(&allow, "web\n");
    host.casemate(["rm", "-f", "web"]).succeeds();
    host.casemate(["network", "rm", "six"]).succeeds();
    host.is_clean();
}

#[test]
fn internal_network_leads_nowhere() {
    let _alone = alone();
    way_out();
    let host = networked();
    host.casemate([
        "network",
        "create",
        "--internal",
        "--subnet",
        "10.77.7.0/24",
        "inside",
    ])
    .succeeds();
    // A bridge with a way out, which makes the host a router.
    serve(&host, "outside", &["--ip", "10.188.0.99"]);
    serve(&host, "web", &["--network", "inside", "--ip", "10.77.7.77"]);
    let (server, hello) = (Server::at("192.0.2.2"), "nc -w 20 10.77.7.77 8080;");
    let inside = ["--network", "inside"];
    asks(&host, &server, &inside, hello, "web\nno way\n");
    // Nor for one who knows where the bridge is.
    let options = [&inside[..], &["--cap-add", "NET_ADMIN"]].concat();
    let forced = "ip route add default via 10.77.7.77 dev eth0;";
    asks(&host, &server, &options, forced, REFUSED);
    let bridge = host.casemate(["network", "inspect", "inside", "--format", "{{.Bridge}}"]);
    let bridge = bridge.succeeds().text();
    let mac = output(&format!("cat /sys/class/net/{}/address", bridge.trim()));
    let script = format!(
        "ip neigh add 10.77.7.1 lladdr {} dev eth0; ip route add default via 10.77.7.1 dev eth0; \
         ping -c 3 -w 6 10.188.0.99 | grep received",
        mac.trim()
    );
    let heard = || host.casemate(["exec", "outside", "grep", "^Icmp:", "/proc/net/snmp"]);
    let before = heard().succeeds().text();
    let options = [&options[..], &["busybox", "sh", "-c", &script]].concat();
    host.run(options).mentions(" 0 packets received");
    heard().prints(&before);
    host.casemate(["rm", "-f", "web", "outside"]).succeeds();
    host.casemate(["network", "rm", "inside"]).succeeds();
    host.is_clean();
}

#[test]
fn containers_find_each_other_by_name() {
    let _alone = alone();
    let host = networked();
    serve(&host, "web", &["--network-alias", "www"]);
    let ip = address(&host, "web");
    let lookup = |name: &str| {
        let script = format!("cat /etc/resolv.conf; nslookup -type=a {name}");
        host.run(["busybox", "sh", "-c", &script]).text()
    };
    for name in ["web", "www", "WEB.bridge"] {
        let said = lookup(name);
        assert!(said.contains(&format!("Address: {ip}")), "{name}: {said}");
    }
    // One that comes later is found by one that is there.
    let long = ["run", "-d", "--name", "late", "busybox", "sleep", "1000"];
    host.casemate(long).succeeds();
    host.casemate(["exec", "web", "nslookup", "-type=a", "late"])
        .succeeds()
        .mentions(&address(&host, "late"));
    host.casemate(["network", "create", "other"]).succeeds();
    let said = host.run([
        "--network",
        "other",
        "busybox",
        "nslookup",
        "-type=a",
        "web",
    ]);
    assert!(!said.text().contains(&ip), "{}", said.text());
    host.casemate(["rm", "-f", "web", "late"]).succeeds();
    host.casemate(["network", "rm", "other"]).succeeds();
    host.is_clean();
}
