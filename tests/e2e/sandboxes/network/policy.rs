//! Where containers may send to.

use super::{HELLO, REFUSED, Server, alone, answer, asks, host_state, networked, serve};
use casemate_tests::Host;
use casemate_tests::machine::way_out;
use std::collections::HashMap;
use std::process::Command;
use std::sync::{Arc, Mutex};

/// A resolver of the host at port 53 of an address: it knows IPv4 addresses, which can change.
pub(super) struct Resolver {
    ip: String,
    names: Arc<Mutex<HashMap<String, [u8; 4]>>>,
}

impl Resolver {
    pub(super) fn at(ip: &str) -> Self {
        let socket = std::net::UdpSocket::bind((ip, 53)).expect("port 53");
        let names = Arc::new(Mutex::new(HashMap::new()));
        let known = names.clone();
        std::thread::spawn(move || {
            let mut question = [0; 512];
            while let Ok((length, asker)) = socket.recv_from(&mut question) {
                let known = known.lock().unwrap_or_else(|e| e.into_inner());
                let _ = socket.send_to(&reply(&question[..length], &known), asker);
            }
        });
        Self {
            ip: ip.to_owned(),
            names,
        }
    }

    fn set(&self, name: &str, ip: &str) {
        let ip: std::net::Ipv4Addr = ip.parse().expect("an address");
        let mut names = self.names.lock().unwrap_or_else(|e| e.into_inner());
        names.insert(name.to_owned(), ip.octets());
    }
}

/// The answer to a question for a name's IPv4 address: all of them are for names of two labels.
fn reply(question: &[u8], known: &HashMap<String, [u8; 4]>) -> Vec<u8> {
    let first = usize::from(question[12]);
    let second = usize::from(question[13 + first]);
    let end = 15 + first + second;
    let text = |range| String::from_utf8_lossy(&question[range]).into_owned();
    let name = [text(13..13 + first), text(14 + first..14 + first + second)].join(".");
    let mut reply = question[..end + 4].to_vec();
    reply[2..4].copy_from_slice(&[0x81, 0x80]);
    match known.get(&name) {
        Some(ip) if question[end..end + 2] == [0, 1] => {
            reply[7] = 1;
            reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            reply.extend(ip);
        }
        Some(_) => {}
        None => reply[3] |= 3,
    }
    reply
}

/// Metadata and policies, on a network whose containers reach the host at `server`.
pub(super) fn keeps_to_its_policy(host: &Host, server: &Server, metadata: &Server) {
    asks(host, server, &[], "", HELLO);
    asks(host, metadata, &[], "", REFUSED);
    let allow = ["--egress-allow", "169.254.169.254"];
    asks(host, metadata, &allow, "", HELLO);
    asks(host, server, &allow, "", HELLO);
    let deny = ["--egress", "deny"];
    asks(host, server, &deny, "", REFUSED);
    let exact = format!("{}/tcp", server.address);
    let but = ["--egress", "deny", "--egress-allow", &exact];
    asks(host, server, &but, "", HELLO);
    let elsewhere = format!("{}/udp", server.address);
    let but = ["--egress", "deny", "--egress-allow", &elsewhere];
    asks(host, server, &but, "", REFUSED);
}

#[test]
fn policy_holds_on_a_bridge_whatever_the_guest_calls_itself() {
    let _alone = alone();
    way_out();
    host_has(METADATA);
    let host = networked();
    host.run(["busybox", "true"]).succeeds();
    let before = host_state();
    let (server, metadata) = (Server::at("10.188.0.1"), Server::at(METADATA));
    keeps_to_its_policy(&host, &server, &metadata);
    // What comes in is answered.
    serve(&host, "web", &["--egress", "deny", "-p", "18080:8080"]);
    assert_eq!(answer("127.0.0.1:18080"), "web\n");
    host.casemate(["rm", "-f", "web"]).succeeds();

    let but = format!("{}/tcp", server.address);
    let options = [
        "--cap-add",
        "NET_ADMIN",
        "--cap-add",
        "NET_RAW",
        "--egress",
        "deny",
    ];
    let rename = "ip addr flush dev eth0; ip addr add 10.188.0.99/24 dev eth0;";
    let allowed = [&options[..], &["--egress-allow", but.as_str()]].concat();
    asks(&host, &server, &allowed, ":;", HELLO);
    asks(&host, &server, &allowed, rename, REFUSED);
    let tagged = "ip link add link eth0 name eth0.5 type vlan id 5; ip link set eth0.5 up;";
    asks(&host, &server, &options, tagged, REFUSED);
    let links = |state: &str| state.lines().last().map(str::to_owned);
    assert_eq!(links(&host_state()), links(&before));
    host.is_clean();
}

/// A container that may send nowhere but to a name gets to the addresses that it has, and to no others.
pub(super) fn follows_a_name(host: &Host, resolver: &Resolver, servers: [&Server; 2]) {
    let [ip, other] = servers.map(|server| server.address.ip().to_string());
    let [ask, ask_other] = servers.map(|server| format!("{} || echo no way", server.ask(6)));
    let [port, other_port] = servers.map(|server| server.address.port());
    resolver.set("allowed.example", &ip);
    resolver.set("other.example", &ip);
    resolver.set("evil.example", "169.254.169.254");
    let first = format!("allowed.example:{port}/tcp");
    let second = format!("*.example:{other_port}");
    let mut args = vec!["run", "-d", "--name", "asker", "--dns", &resolver.ip];
    args.extend(["--egress", "deny"]);
    for allowed in [&first, &second, "evil.example"] {
        args.extend(["--egress-allow", allowed]);
    }
    args.extend(["busybox", "sleep", "1000"]);
    host.casemate(args).succeeds();
    let run = |script: &str| host.casemate(["exec", "asker", "sh", "-c", script]);
    let lookup = |name: &str| run(&format!("nslookup -type=a {name}")).text();

    run(&ask).prints("no way\n");
    assert!(lookup("allowed.example").contains(&format!("Address: {ip}\n")));
    run(&ask).prints(HELLO);
    run(&ask_other).prints("no way\n");
    // To metadata no name leads, and of names that aren't exceptions nothing is said.
    assert!(!lookup("evil.example").contains("169.254"));
    assert!(lookup("elsewhere.com 2>&1").contains("REFUSED"));
    // Whatever the guest is told is let through.
    resolver.set("allowed.example", &other);
    assert!(lookup("allowed.example").contains(&format!("Address: {other}\n")));
    run(&ask_other).prints(HELLO);
    run(&ask).prints(HELLO);
    host.casemate(["rm", "-f", "asker"]).succeeds();
}

/// Where clouds tell secrets.
pub(super) const METADATA: &str = "169.254.169.254";
/// An address of the host that is reached by way of nothing else.
pub(super) const ELSEWHERE: &str = "198.51.100.7";

/// Gives the host a further address.
pub(super) fn host_has(ip: &str) {
    let _ = Command::new("ip")
        .args(["addr", "replace", &format!("{ip}/32"), "dev", "out0"])
        .output();
}

#[test]
fn policy_follows_names_on_a_bridge() {
    let _alone = alone();
    way_out();
    host_has(ELSEWHERE);
    let host = networked();
    host.run(["busybox", "true"]).succeeds();
    let resolver = Resolver::at("10.188.0.1");
    let servers = [&Server::at("10.188.0.1"), &Server::at(ELSEWHERE)];
    follows_a_name(&host, &resolver, servers);
    // So are containers beside it.
    serve(&host, "web", &[]);
    let script = "nslookup -type=a web > /dev/null; nc -w 20 $(nslookup -type=a web | sed -n 's/^Address: //p' | tail -n 1) 8080";
    let beside = ["--egress", "deny", "--egress-allow", "web:8080"];
    host.run([&beside[..], &["busybox", "sh", "-c", script]].concat())
        .prints("web\n");
    host.casemate(["rm", "-f", "web"]).succeeds();
    host.run(["--egress-allow", "allowed.example", "busybox", "true"])
        .ends_with(125)
        .complains_of("a name needs --egress deny");
    host.is_clean();
}
