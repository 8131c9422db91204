//! Networks of ordinary users, by way of passt.

use super::policy::{ELSEWHERE, METADATA, Resolver, follows_a_name, host_has, keeps_to_its_policy};
use super::{HELLO, REFUSED, Server, Six, alone, answer, asks, datagram};
use casemate_tests::Host;
use casemate_tests::machine::way_out;

/// Whose network is passt.
fn user() -> Host {
    Host::with_images()
        .configured("network = \"passt\"\n")
        .of_user(65_534)
}

#[test]
fn users_published_ports_are_the_hosts() {
    let _alone = alone();
    way_out();
    let host = user();
    let ports = [
        "-p",
        "18080-18082:8080-8082",
        "-p",
        "127.0.0.1:18083:8080",
        "-p",
        "15353:7777/udp",
        "--egress",
        "deny",
    ];
    let script = "guest-tool udp-echo 7777 & for port in 8080 8082; do
        while :; do echo $port | nc -l -p $port; done & done; wait";
    let args = ["run", "-d", "--name", "web"];
    let args = [
        &args[..],
        &ports,
        &["--expose", "99", "-P", "busybox", "sh", "-c", script],
    ]
    .concat();
    host.casemate(args).succeeds();
    for (address, said) in [
        ("127.0.0.1:18080", "8080\n"),
        ("192.0.2.2:18082", "8082\n"),
        ("127.0.0.1:18083", "8080\n"),
    ] {
        assert_eq!(answer(address), said, "{address}");
    }
    assert_eq!(datagram("192.0.2.2:15353"), "ping");
    let elsewhere = std::net::TcpStream::connect("192.0.2.2:18083");
    assert!(elsewhere.is_err(), "{elsewhere:?}");
    let shown = host.casemate(["port", "web"]);
    shown
        .succeeds()
        .mentions("8082/tcp -> 0.0.0.0:18082\n8080/tcp -> 127.0.0.1:18083\n7777/udp -> 0.0.0.0:15353\n99/tcp -> 0.0.0.0:");
    host.casemate(["ps"])
        .succeeds()
        .mentions("127.0.0.1:18083->8080/tcp");
    let format = "{{json .NetworkSettings.Ports}}";
    host.casemate(["inspect", "--format", format, "web"])
        .succeeds()
        .mentions(r#""7777/udp":[{"HostIp":"0.0.0.0","HostPort":"15353"}]"#);

    for (port, complaint) in [
        (
            "18082:80",
            "port 0.0.0.0:18082/tcp of the host can't be had",
        ),
        (
            "15353:53/udp",
            "port 0.0.0.0:15353/udp of the host can't be had",
        ),
        (
            "80:80",
            "port 0.0.0.0:80/tcp of the host can't be had by an ordinary user",
        ),
    ] {
        host.casemate(["run", "--rm", "-p", port, "busybox", "true"])
            .ends_with(125)
            .complains_of(complaint);
    }
    // What was published a moment ago can be so again.
    host.casemate(["restart", "-t", "0", "web"]).succeeds();
    assert_eq!(answer("127.0.0.1:18080"), "8080\n");
    host.casemate(["rm", "-f", "web"]).succeeds();
    host.is_clean();
}

#[test]
fn user_has_a_network_by_way_of_passt() {
    let _alone = alone();
    way_out();
    let host = user();
    // Whoever runs the host's services, they are reached by the addresses of its own interfaces.
    let listener = std::net::TcpListener::bind("192.0.2.2:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let server = std::thread::spawn(move || {
        use std::io::{Read, Write};
        let (mut stream, _) = listener.accept().expect("a connection");
        let mut text = [0; 6];
        stream.read_exact(&mut text).expect("read");
        stream.write_all(b"from the host").expect("written");
        text
    });
    let script = format!(
        "ip -o addr show eth0; cat /etc/resolv.conf; (echo hello; sleep 3) | nc -w 20 192.0.2.2 {port}"
    );
    host.run(["busybox", "sh", "-c", &script])
        .succeeds()
        .mentions("10.189.0.2/24")
        .mentions("nameserver 127.0.0.11")
        .mentions("from the host");
    assert_eq!(&server.join().expect("served"), b"hello\n");

    let long = ["run", "-d", "--name", "web", "busybox", "sleep", "1000"];
    host.casemate(long).succeeds();
    let passts = ["passt", "passt.avx2"].map(|name| host.processes(name));
    for pid in passts.into_iter().flatten() {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !host.casemate(["ps", "-q"]).text().is_empty() {
        assert!(std::time::Instant::now() < deadline, "passt was killed");
    }
    host.casemate([
        "inspect",
        "--format",
        "{{.State.Status}} {{.State.Error}}",
        "web",
    ])
    .succeeds()
    .mentions("exited its network's process (passt) ended");
    host.casemate(["rm", "web"]).succeeds();
    host.is_clean();
}

#[test]
fn policy_holds_for_a_user() {
    let _alone = alone();
    way_out();
    host_has(METADATA);
    let host = user();
    let (server, metadata) = (Server::at("192.0.2.2"), Server::at(METADATA));
    keeps_to_its_policy(&host, &server, &metadata);
    host.is_clean();
}

#[test]
fn policy_follows_names_for_a_user() {
    let _alone = alone();
    way_out();
    host_has(ELSEWHERE);
    let host = user();
    let resolver = Resolver::at("192.0.2.2");
    let servers = [&Server::at("192.0.2.2"), &Server::at(ELSEWHERE)];
    follows_a_name(&host, &resolver, servers);
    host.is_clean();
}

#[test]
fn user_has_ipv6_where_the_host_has_it() {
    let _alone = alone();
    way_out();
    let _six = Six::new();
    let host = user();
    let server = Server::at("2001:db8::2");
    asks(&host, &server, &[], "", HELLO);
    asks(&host, &server, &["--egress", "deny"], "", REFUSED);
    let exact = format!("{}/tcp", server.address);
    let but = ["--egress", "deny", "--egress-allow", &exact];
    asks(&host, &server, &but, "", HELLO);
    let ports = [
        "-p",
        "18080:8080",
        "-p",
        "[::1]:18081:8080",
        "-p",
        "15353:7777/udp",
    ];
    let script = "guest-tool udp-echo 7777 & while :; do echo web | nc -l -p 8080; done";
    let args = ["run", "-d", "--name", "web", "--egress", "deny"];
    host.casemate([&args[..], &ports, &["busybox", "sh", "-c", script]].concat())
        .succeeds();
    for address in [
        "[2001:db8::2]:18080",
        "[::1]:18080",
        "[::1]:18081",
        "127.0.0.1:18080",
    ] {
        assert_eq!(answer(address), "web\n", "{address}");
    }
    host.casemate(["port", "web", "8080"])
        .succeeds()
        .prints("0.0.0.0:18080\n[::1]:18081\n");
    let format = "{{.NetworkSettings.GlobalIPv6Address}}";
    host.casemate(["inspect", "--format", format, "web"])
        .succeeds()
        .prints("fdca:5e3a:7e00::2\n");
    host.casemate(["rm", "-f", "web"]).succeeds();
    host.is_clean();
}
