//! containerd with `--runtime io.containerd.casemate.v2`: Debian's own, started anew for each test.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use casemate_tests::{Finished, Host, Running, machine, paths};
use rustix::process::Signal;

pub(crate) const IMAGE: &str = "docker.io/library/busybox:latest";
pub(crate) const RUNTIME: &str = "io.containerd.casemate.v2";
pub(crate) const SHIM: &str = "containerd-shim-casemate-v2";

/// A containerd of the test's own.
pub(crate) struct Engine<'a> {
    host: &'a Host,
    daemon: Option<Running>,
}

impl<'a> Engine<'a> {
    pub(crate) fn start(host: &'a Host) -> Self {
        let dir = host.dir().join("containerd");
        let at = |name: &str| dir.join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = {:?}\n",
            at("root"),
            at("state"),
            at("c.sock")
        );
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("config.toml"), config).unwrap();
        let mut engine = Self { host, daemon: None };
        engine.begin();
        let archive = paths::fixtures().join("busybox.tar");
        engine
            .ctr(["image", "import", &archive.display().to_string()])
            .succeeds();
        engine
    }

    /// Starts the daemon and waits until it answers.
    pub(crate) fn begin(&mut self) {
        let mut command = Command::new("containerd");
        self.host.prepare(&mut command);
        let path = std::env::join_paths([
            paths::prefix().join("bin"),
            "/usr/sbin".into(),
            "/usr/bin".into(),
            "/sbin".into(),
            "/bin".into(),
        ]);
        command
            .env("PATH", path.unwrap())
            .args(["--config", "containerd/config.toml"]);
        let daemon = Running::start(command).within(Duration::from_secs(3600));
        self.daemon = Some(daemon);
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.ctr(["version"]).code() != 0 {
            assert!(Instant::now() < deadline, "containerd doesn't answer");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    pub(crate) fn end(&mut self, signal: Signal) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.gets(signal);
            daemon.ends();
        }
    }

    pub(crate) fn start_ctr(&self, args: &[&str]) -> Running {
        let mut command = Command::new("ctr");
        self.host.prepare(&mut command);
        command.args(["--address", "containerd/c.sock"]).args(args);
        Running::start(command)
    }

    pub(crate) fn ctr<const N: usize>(&self, args: [&str; N]) -> Finished {
        self.start_ctr(&args).ends()
    }

    /// `ctr run --rm` of a shell's script.
    fn runs(&self, name: &str, script: &str) -> Finished {
        self.ctr([
            "run",
            "--rm",
            "--runtime",
            RUNTIME,
            IMAGE,
            name,
            "sh",
            "-c",
            script,
        ])
    }

    /// `ctr run --detach` of something that waits.
    fn waits(&self, name: &str) {
        self.ctr([
            "run",
            "--detach",
            "--runtime",
            RUNTIME,
            IMAGE,
            name,
            "sleep",
            "100000",
        ])
        .succeeds();
    }
}

impl Drop for Engine<'_> {
    fn drop(&mut self) {
        self.end(Signal::TERM);
    }
}

#[test]
fn ctr_runs_a_container_on_a_kernel_of_its_own() {
    let host = Host::new();
    let mut engine = Engine::start(&host);
    let own = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let out = engine.runs("one", "cat /proc/sys/kernel/random/boot_id; echo error >&2; id -u; echo new > /file; cat /file; exit 7");
    out.ends_with(7).complains_of("error");
    let text = out.text();
    assert!(
        text.ends_with("\n0\nnew\n") && !text.starts_with(own.trim()),
        "{text}"
    );
    engine.ctr(["task", "ls", "-q"]).succeeds().prints("");
    engine.ctr(["container", "ls", "-q"]).succeeds().prints("");
    engine.end(Signal::TERM);
    host.is_clean();
}

#[test]
fn ctr_sees_the_whole_life_of_a_task() {
    let host = Host::new();
    let mut engine = Engine::start(&host);
    let mut events = engine.start_ctr(&["events"]);
    engine.waits("one");
    engine
        .ctr([
            "task",
            "exec",
            "--exec-id",
            "e1",
            "one",
            "sh",
            "-c",
            "echo inside; exit 3",
        ])
        .ends_with(3)
        .prints("inside\n");
    engine.ctr(["task", "pause", "one"]).succeeds();
    engine.ctr(["task", "ls"]).succeeds().mentions("PAUSED");
    engine.ctr(["task", "resume", "one"]).succeeds();
    engine
        .ctr(["task", "metrics", "one"])
        .succeeds()
        .mentions("memory.usage");
    engine
        .ctr(["task", "kill", "-s", "SIGKILL", "one"])
        .succeeds();
    engine
        .ctr(["task", "delete", "one"])
        .complains_of("exit code 137");
    engine.ctr(["container", "rm", "one"]).succeeds();
    events.prints("/tasks/delete");
    events.gets(Signal::INT);
    let told = events.ends().text();
    let mut rest = told.as_str();
    for topic in [
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exit",
        "paused",
        "resumed",
        "exit",
        "delete",
    ] {
        let topic = format!("/tasks/{topic} ");
        let at = rest.find(&topic);
        let at = at.unwrap_or_else(|| panic!("{topic} is not told, or too early: {told}"));
        rest = &rest[at + topic.len()..];
    }
    engine.end(Signal::TERM);
    host.is_clean();
}

#[test]
fn containerd_killed_finds_its_tasks_again_and_cleans_up_after_a_dead_shim() {
    let host = Host::new();
    let mut engine = Engine::start(&host);
    engine.waits("one");
    engine.waits("two");
    engine.end(Signal::KILL);
    let all = host.all_processes();
    assert_eq!(host.processes("casemate-vmm").len(), 4, "{all:#?}");
    engine.begin();
    engine
        .ctr([
            "task",
            "exec",
            "--exec-id",
            "e",
            "one",
            "echo",
            "still here",
        ])
        .succeeds()
        .prints("still here\n");
    machine::kill(&host.processes(SHIM));
    let deadline = Instant::now() + Duration::from_secs(60);
    while engine.ctr(["task", "ls"]).text().contains("RUNNING") {
        assert!(Instant::now() < deadline, "a dead shim's task runs");
        std::thread::sleep(Duration::from_millis(200));
    }
    for name in ["one", "two"] {
        let _ = engine.ctr(["task", "delete", "--force", name]);
        engine.ctr(["container", "rm", name]).succeeds();
    }
    engine.ctr(["task", "ls", "-q"]).succeeds().prints("");
    engine.end(Signal::TERM);
    host.is_clean();
}
