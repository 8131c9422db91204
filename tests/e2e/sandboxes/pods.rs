//! Pods as the CRI makes them: several containers in one sandbox, by the annotations that containerd gives them.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use casemate_tests::{Finished, Host, machine};
use rustix::process::Signal;

use super::containerd::{Engine, IMAGE, RUNTIME, SHIM};

const KIND: &str = "io.kubernetes.cri.container-type";
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";

/// A pod on an engine.
struct Pod<'a> {
    engine: &'a Engine<'a>,
    /// Its first process, as the engine knows it.
    pid: String,
}

/// `ctr run` of a container that the CRI would make so.
fn run(engine: &Engine<'_>, kind: &str, options: &[&str], name: &str, script: &str) -> Finished {
    let (kind, sandbox) = (format!("{KIND}={kind}"), format!("{SANDBOX}=pod"));
    let mut args = vec!["run", "--runtime", RUNTIME];
    args.extend(["--annotation", &kind, "--annotation", &sandbox]);
    args.extend(options);
    args.extend([IMAGE, name, "sh", "-c", script]);
    engine.start_ctr(&args).ends()
}

impl<'a> Pod<'a> {
    fn start(engine: &'a Engine<'a>, options: &[&str]) -> Self {
        let options = [&["--detach"], options].concat();
        run(engine, "sandbox", &options, "pod", "sleep 100000").succeeds();
        let tasks = engine.ctr(["task", "ls"]).text();
        let line = tasks.lines().find(|line| line.starts_with("pod "));
        let pid = line.and_then(|line| line.split_whitespace().nth(1));
        let pid = pid.unwrap_or_else(|| panic!("no task: {tasks}"));
        Self {
            engine,
            pid: pid.to_owned(),
        }
    }

    /// A further container, with the namespaces that the CRI gives it.
    fn run(&self, options: &[&str], name: &str, script: &str) -> Finished {
        let namespaces = ["network:net", "ipc:ipc", "uts:uts"].map(|names| {
            let (kind, file) = names.split_once(':').unwrap();
            format!("{kind}:/proc/{}/ns/{file}", self.pid)
        });
        let joined = namespaces.iter().flat_map(|ns| ["--with-ns", ns]);
        let options: Vec<_> = joined.chain(options.iter().copied()).collect();
        run(self.engine, "container", &options, name, script)
    }

    fn exec(&self, name: &str, script: &str) -> Finished {
        let args = ["task", "exec", "--exec-id", "e", name, "sh", "-c", script];
        self.engine.ctr(args)
    }

    /// Kills and deletes a container.
    fn remove(&self, name: &str) {
        let _ = self.engine.ctr(["task", "kill", "-s", "SIGKILL", name]);
        let _ = self.engine.ctr(["task", "delete", "--force", name]);
        self.engine.ctr(["container", "rm", name]).succeeds();
    }
}

/// Waits until the engine knows of no task that runs.
#[track_caller]
fn none_runs(engine: &Engine<'_>, otherwise: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while engine.ctr(["task", "ls"]).text().contains("RUNNING") {
        assert!(Instant::now() < deadline, "{otherwise}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn containers_of_a_pod_share_a_guest_and_have_roots_of_their_own() {
    let host = Host::new();
    let mut engine = Engine::start(&host);
    let shm = host.dir().join("shm");
    let data = host.dir().join("volume");
    for dir in [&shm, &data] {
        fs::create_dir(dir).unwrap();
    }
    fs::write(data.join("file"), "of the host\n").unwrap();
    fs::write(host.dir().join("log"), "").unwrap();
    let bind = |source: &std::path::Path, target: &str, options: &str| {
        format!(
            "type=bind,src={},dst={target},options={options}",
            source.display()
        )
    };
    let shm = bind(&shm, "/dev/shm", "rbind:rw");
    {
        let pod = Pod::start(&engine, &["--mount", &shm]);
        let data_ro = bind(&data, "/data", "rbind:ro");
        let log = bind(&host.dir().join("log"), "/dev/termination-log", "rbind:rw");
        pod.run(
            &[
                "--detach", "--mount", &shm, "--mount", &data_ro, "--mount", &log,
            ],
            "web",
            "echo ended > /dev/termination-log; while true; do echo from web | nc -l -p 4000; done",
        )
        .succeeds();
        let names = "for n in ipc uts net; do readlink /proc/self/ns/$n; done; cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/hostname";
        let of_pod = pod.exec("pod", names).text();
        assert_eq!(pod.exec("web", names).text(), of_pod);
        let pids = "readlink /proc/self/ns/pid";
        assert_ne!(pod.exec("web", pids).text(), pod.exec("pod", pids).text());
        pod.exec(
            "web",
            "cat /data/file; echo x > /data/file || echo x > /data/new; ls /data",
        )
        .mentions("of the host\nfile\n")
        .complains_of("Read-only");
        pod.exec(
            "web",
            "echo of web > /root-of-web; echo shared > /dev/shm/note",
        )
        .succeeds();
        let third = pod.run(
            &["--rm", "--mount", &shm],
            "third",
            "cat /dev/shm/note; ls /root-of-web; ls /data; sleep 1; nc 127.0.0.1 4000 < /dev/null; exit 3",
        );
        third.ends_with(3).mentions("shared\nfrom web\n");
        third
            .complains_of("/root-of-web: No such")
            .complains_of("/data: No such");
        // Its end is that of no other, and its name can be used again.
        pod.run(&["--rm"], "third", "echo again")
            .succeeds()
            .prints("again\n");
        pod.exec("web", "ls / | grep root-of")
            .succeeds()
            .prints("root-of-web\n");
        assert_eq!(
            fs::read_to_string(host.dir().join("log")).unwrap(),
            "ended\n"
        );
        assert_eq!(fs::read_dir(host.dir().join("shm")).unwrap().count(), 0);
        assert_eq!(host.processes(SHIM).len(), 1);
        pod.remove("web");
        pod.exec("pod", "echo alive").succeeds().prints("alive\n");
        pod.remove("pod");
    }
    engine.ctr(["task", "ls", "-q"]).succeeds().prints("");
    engine.end(Signal::TERM);
    host.is_clean();
}

#[test]
fn a_pods_end_is_that_of_its_containers_and_what_is_not_the_pods_is_refused() {
    let host = Host::new();
    let mut engine = Engine::start(&host);
    {
        let orphan = run(&engine, "container", &["--rm"], "orphan", "true");
        orphan.fails().complains_of("the sandbox pod does not run");
        let pod = Pod::start(&engine, &[]);
        let sees = "echo $$ > /pid; test $$ != 1 && ps | grep -c 'sleep 10000[0]'";
        let pids = format!("pid:/proc/{}/ns/pid", pod.pid);
        pod.run(&["--rm", "--with-ns", &pids], "looks", sees)
            .succeeds()
            .prints("1\n");
        for (options, why) in [
            (
                ["--with-ns", "pid:/proc/1/ns/pid"],
                "is not that of the container's sandbox",
            ),
            (
                ["--with-ns", "pid:/run/../proc/self/ns/pid"],
                "is not that of the container's sandbox",
            ),
            (
                [
                    "--mount",
                    "type=bind,src=/dev/shm,dst=/dev/shm,options=rbind",
                ],
                "ipc namespace can't be had",
            ),
            (
                ["--mount", "type=bind,src=/no/such,dst=/x,options=rbind"],
                "does not exist",
            ),
            (
                ["--mount", "type=bind,src=/tmp,dst=/x,options=rbind:rslave"],
                "don't propagate",
            ),
            (
                ["--mount", "type=ext4,src=/dev/null,dst=/x,options=rw"],
                "can't have disks",
            ),
            (
                ["--annotation", "io.kubernetes.cri.sandbox-id=../pod"],
                "is no sandbox's id",
            ),
            (
                ["--annotation", "io.kubernetes.cri.container-type=sandbox"],
                "",
            ),
        ] {
            let options = [&["--rm"], &options[..]].concat();
            let refused = pod.run(&options, "odd", "true");
            if why.is_empty() {
                // It is another pod's first, and has no business with the namespaces of this one.
                refused.succeeds();
            } else {
                refused.fails().complains_of(why);
            }
        }
        pod.run(&["--detach"], "web", "sleep 200000").succeeds();
        engine
            .ctr(["task", "kill", "-s", "SIGKILL", "pod"])
            .succeeds();
        none_runs(&engine, "a container outlives its pod");
        pod.run(&[], "late", "true")
            .fails()
            .complains_of("that has ended");
        engine.ctr(["container", "rm", "late"]).succeeds();
        pod.remove("pod");
        pod.remove("web");
    }
    engine.ctr(["container", "ls", "-q"]).succeeds().prints("");
    engine.end(Signal::TERM);
    host.is_clean();
}

/// A network namespace on the machine, with its loopback; gone when dropped.
struct Netns(String);

impl Netns {
    fn new(name: &str) -> Self {
        // Left by a test that was killed.
        let _ = Command::new("ip").args(["netns", "del", name]).output();
        machine::output(&format!("ip netns add {name}"));
        machine::output(&format!("ip -n {name} link set lo up"));
        Self(name.to_owned())
    }

    /// What comes from a port of its loopback.
    fn read(&self, address: &str, port: &str) -> String {
        let mut read = Command::new("ip");
        read.args(["netns", "exec", &self.0, "timeout", "60", "busybox", "nc"]);
        let output = read.args([address, port]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).output();
    }
}

#[test]
fn a_port_on_the_loopback_of_a_pods_namespace_is_the_guests() {
    let host = Host::new();
    let mut engine = Engine::start(&host);
    let netns = Netns::new("casemate-forward");
    {
        let join = format!("network:/run/netns/{}", netns.0);
        let pod = Pod::start(&engine, &["--with-ns", &join]);
        let serve = "while true; do echo from web | nc -l -p 4000; done";
        let joined = ["--detach", "--with-ns", &join];
        run(
            &engine,
            "container",
            &[
                &joined[..],
                &["--with-ns", &format!("ipc:/proc/{}/ns/ipc", pod.pid)],
            ]
            .concat(),
            "web",
            serve,
        )
        .succeeds();
        let deadline = Instant::now() + Duration::from_secs(60);
        while netns.read("127.0.0.1", "4000") != "from web\n" {
            assert!(Instant::now() < deadline, "the port is not forwarded");
            std::thread::sleep(Duration::from_millis(200));
        }
        assert_eq!(netns.read("::1", "4000"), "from web\n");
        assert_eq!(netns.read("127.0.0.1", "4001"), "");
        // Whoever was turned away takes nothing with him.
        assert_eq!(netns.read("127.0.0.1", "4000"), "from web\n");
        pod.remove("web");
        pod.remove("pod");
    }
    engine.end(Signal::TERM);
    host.is_clean();
}

#[test]
fn a_pod_outlives_containerd_and_everything_is_given_back_after_its_shim() {
    let host = Host::new();
    let mut engine = Engine::start(&host);
    {
        let pod = Pod::start(&engine, &[]);
        pod.run(&["--detach"], "web", "sleep 200000").succeeds();
    }
    engine.end(Signal::KILL);
    engine.begin();
    for name in ["pod", "web"] {
        let args = ["task", "exec", "--exec-id", "e", name, "echo", "still here"];
        engine.ctr(args).succeeds().prints("still here\n");
    }
    machine::kill(&host.processes(SHIM));
    none_runs(&engine, "a dead shim's task runs");
    for name in ["web", "pod"] {
        let _ = engine.ctr(["task", "delete", "--force", name]);
        engine.ctr(["container", "rm", name]).succeeds();
    }
    engine.end(Signal::TERM);
    host.is_clean();
}
