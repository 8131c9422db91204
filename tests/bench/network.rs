//! The network: a guest and its host over the CNI bridge, against a container of runc with a veth on the same network.

use std::fs;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::container::Container;
use crate::figures::Figure;
use crate::host::done;
use crate::inside::{Installed, STATE, emit};

pub(crate) const NETWORK: &str = "measured";
pub(crate) const GATEWAY: &str = "10.99.0.1";
/// Where containers send packets back.
const ECHO: u16 = 9000;
/// Bytes of a stream.
const STREAM: &str = "256M";
const ROUND_TRIPS: u32 = 500;
/// Nothing here waits longer, even on a slow emulated host: its clock stands still while it works.
const PATIENCE: Duration = Duration::from_secs(60);

/// All figures of this group.
pub(crate) fn figures(at: &Installed, samples: usize) -> Result<()> {
    create_network(at)?;
    let options = ["--network", NETWORK, "--memory", "256m"];
    let echo = ["network", "guest-tool", "udp-echo", &ECHO.to_string()];
    let ours = Container::start(at, "ours", &[&options[..], &echo].concat())?;
    let our_address = ours.inspect("{{.NetworkSettings.IPAddress}}")?;
    let theirs = Theirs::start(at)?;
    let server = Server::start()?;

    let ours_exec = |args: &[&str]| ours.exec(args);
    let theirs_exec = |args: &[&str]| theirs.exec(args);
    for (key, direction) in [
        ("net_tcp_vs_veth", None),
        ("net_tcp_in_vs_veth", Some("--reverse")),
    ] {
        let pairs = in_turn(
            samples,
            || stream(&ours_exec, direction),
            || stream(&theirs_exec, direction),
        )?;
        emit(&Figure::ratio(key, "MiB/s", pairs))?;
    }
    let pairs = in_turn(
        samples,
        || round_trip(&our_address),
        || round_trip(&theirs.address),
    )?;
    emit(&Figure::ratio("net_latency_vs_veth", "µs", pairs))?;
    drop(server);
    theirs.end()?;
    ours.end()
}

/// A network that both sides get an interface on.
pub(crate) fn create_network(at: &Installed) -> Result<()> {
    let create = ["network", "create", "--subnet", "10.99.0.0/24", NETWORK];
    done(&mut at.casemate(&create)).map(drop)
}

/// Pairs of both sides, after one that does not count.
fn in_turn(
    samples: usize,
    ours: impl Fn() -> Result<f64>,
    theirs: impl Fn() -> Result<f64>,
) -> Result<Vec<(f64, f64)>> {
    let all = (0..=samples).map(|_| Ok((ours()?, theirs()?)));
    all.skip(1).collect()
}

/// MiB/s of one TCP stream, as its receiver saw it.
fn stream(exec: &dyn Fn(&[&str]) -> Command, direction: Option<&str>) -> Result<f64> {
    let mut args = vec!["iperf3", "--client", GATEWAY, "--bytes", STREAM, "--json"];
    args.extend(direction);
    let out = done(&mut exec(&args))?;
    let report: Value = serde_json::from_slice(&out.stdout).context("iperf3's report")?;
    let speed = report["end"]["sum_received"]["bits_per_second"].as_f64();
    let speed =
        speed.with_context(|| format!("no end.sum_received in iperf3's report {report}"))?;
    Ok(speed / 8.0 / f64::from(1 << 20))
}

/// Microseconds that a packet of one byte takes to a container's process and back.
fn round_trip(address: &str) -> Result<f64> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect((address, ECHO))?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut buffer = [0; 16];
    let deadline = Instant::now() + PATIENCE;
    // The first may be lost, before anybody listens.
    loop {
        socket.send(b"x")?;
        match socket.recv(&mut buffer) {
            Ok(_) => break,
            Err(error) => ensure!(Instant::now() < deadline, "{address}: no echo: {error}"),
        }
    }
    let begun = Instant::now();
    for _ in 0..ROUND_TRIPS {
        socket.send(b"x")?;
        match socket.recv(&mut buffer) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                bail!("{address}: a packet was lost")
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(begun.elapsed().as_secs_f64() * 1e6 / f64::from(ROUND_TRIPS))
}

/// `iperf3 --server` on the host; ended when dropped.
struct Server(Child);

impl Server {
    fn start() -> Result<Self> {
        let mut server = Command::new("iperf3");
        server.args(["--server", "--bind", GATEWAY]);
        // It complains of a connection without a word, as the one below is.
        server.stdin(Stdio::null()).stdout(Stdio::null());
        server.stderr(Stdio::null());
        let server = Self(server.spawn().context("iperf3 (Debian package)")?);
        let deadline = Instant::now() + PATIENCE;
        while std::net::TcpStream::connect((GATEWAY, 5201)).is_err() {
            ensure!(Instant::now() < deadline, "iperf3 doesn't listen");
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// runc's container: a namespace that the same plugins, called in the same way, gave an interface.
struct Theirs {
    cni: Cni,
    address: String,
}

impl Theirs {
    const NAME: &str = "theirs";

    fn start(at: &Installed) -> Result<Self> {
        done(Command::new("ip").args(["netns", "add", Self::NAME]))?;
        let cni = Cni::of(at)?;
        let result = cni.add()?;
        let address = result["ips"][0]["address"].as_str();
        let address = address.and_then(|address| address.split('/').next());
        let address = address.with_context(|| format!("no address in {result}"))?;
        let bundle = Self::bundle(at)?;
        let mut run = Command::new("runc");
        run.args(["run", "--detach", "--bundle"]).arg(bundle);
        // What it starts keeps the streams open: nobody may wait for their end.
        run.arg(Self::NAME)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let status = run.status()?;
        ensure!(status.success(), "{run:?}: {status}");
        let address = address.to_owned();
        Ok(Self { cni, address })
    }

    /// The bench's bundle in that namespace, sending packets back.
    fn bundle(at: &Installed) -> Result<PathBuf> {
        let dir = std::env::temp_dir().join("casemate-bench-network");
        fs::create_dir_all(&dir)?;
        let spec = fs::read(at.bundle.join("config.json"))?;
        let mut spec: Value = serde_json::from_slice(&spec)?;
        spec["root"]["path"] = json!(at.bundle.join("rootfs"));
        // iperf3 keeps its buffer in /tmp.
        spec["root"]["readonly"] = json!(false);
        spec["process"]["args"] = json!(["/bin/guest-tool", "udp-echo", ECHO.to_string()]);
        let namespaces = spec["linux"]["namespaces"].as_array_mut();
        for namespace in namespaces.context("runc's spec has namespaces")? {
            if namespace["type"] == "network" {
                namespace["path"] = json!(format!("/run/netns/{}", Self::NAME));
            }
        }
        fs::write(dir.join("config.json"), serde_json::to_vec(&spec)?)?;
        Ok(dir)
    }

    fn exec(&self, args: &[&str]) -> Command {
        let mut exec = Command::new("runc");
        exec.args(["exec", Self::NAME]).args(args);
        exec
    }

    fn end(self) -> Result<()> {
        done(Command::new("runc").args(["delete", "--force", Self::NAME]))?;
        self.cni.call("DEL")?;
        done(Command::new("ip").args(["netns", "del", Self::NAME])).map(drop)
    }
}

/// The plugins of casemate's own network.
struct Cni {
    network: Value,
}

impl Cni {
    fn of(at: &Installed) -> Result<Self> {
        let file = at.data.join("networks").join(format!("{NETWORK}.conflist"));
        let network = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        let mut network: Value = serde_json::from_slice(&network)?;
        // One list of addresses in use, or both sides get the same one.
        let plugins = network["plugins"].as_array_mut();
        for plugin in plugins.context("a network has plugins")? {
            if let Some(ipam) = plugin["ipam"].as_object_mut() {
                ipam.insert("dataDir".to_owned(), json!(format!("{STATE}/addresses")));
            }
        }
        Ok(Self { network })
    }

    /// The last plugin's result.
    fn add(&self) -> Result<Value> {
        self.call("ADD")
    }

    fn call(&self, command: &str) -> Result<Value> {
        let plugins = self.network["plugins"].as_array();
        let mut plugins = plugins.context("a network has plugins")?.clone();
        if command == "DEL" {
            plugins.reverse();
        }
        let mut result = Value::Null;
        for mut plugin in plugins {
            plugin["name"] = self.network["name"].clone();
            plugin["cniVersion"] = self.network["cniVersion"].clone();
            if !result.is_null() {
                plugin["prevResult"] = result.clone();
            }
            let kind = plugin["type"].as_str().context("a plugin has a type")?;
            let program = Path::new("/usr/lib/cni").join(kind);
            let input = tempfile::tempfile()?;
            serde_json::to_writer(&input, &plugin)?;
            std::io::Seek::rewind(&mut &input)?;
            let mut process = Command::new(&program);
            process.stdin(input).env("CNI_PATH", "/usr/lib/cni");
            process
                .env("CNI_COMMAND", command)
                .env("CNI_IFNAME", "eth0");
            process.env("CNI_CONTAINERID", Theirs::NAME);
            process.env("CNI_NETNS", format!("/run/netns/{}", Theirs::NAME));
            let out = process.output().with_context(|| format!("{program:?}"))?;
            let said = String::from_utf8_lossy(&out.stdout);
            ensure!(out.status.success(), "{program:?} {command}: {said}");
            if command == "ADD" {
                result = serde_json::from_slice(&out.stdout)?;
            }
        }
        Ok(result)
    }
}
