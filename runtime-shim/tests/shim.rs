//! The shim against a fake VMM and agent: its Task API, and what a hostile guest can't do to it.

use casemate::fds;
use casemate::rpc::{self, KILLED, SIGKILL, SIGTERM};
use casemate::state::{Meta, SandboxDir, StateRoot};
use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::TaskClient;
use rustix::fs::{FileType, Mode};
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use ttrpc::Code;

/// Nothing here takes longer, but for what waits for a bound on purpose.
const SOON: Duration = Duration::from_secs(30);
const ID: &str = "c1";

/// A shim with a fake VMM behind it.
struct Fixture {
    _dir: TempDir,
    root: StateRoot,
    bundle: PathBuf,
    shim: Child,
    task: TaskClient,
    lifeline: Option<OwnedFd>,
    _sandbox: SandboxDir,
}

fn fake_vmm() -> PathBuf {
    // Beside the test's own binary: target/PROFILE/deps/… and target/PROFILE/examples/.
    let exe = std::env::current_exe().unwrap();
    let profile = exe.parent().and_then(Path::parent).unwrap();
    profile.join("examples/fake-vmm")
}

fn meta() -> Meta {
    Meta {
        id: ID.into(),
        name: "name1".into(),
        image: "fake".into(),
        image_id: "sha256:0".into(),
        created: 1,
        auto_remove: true,
        ..Meta::default()
    }
}

fn spec(args: &[&str]) -> String {
    serde_json::json!({
        "ociVersion": "1.2.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/"},
        "root": {"path": "rootfs"},
    })
    .to_string()
}

impl Fixture {
    /// A shim whose guest plays `role` and whose container runs `args`.
    fn new(role: &str, args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("casemate");
        std::fs::create_dir(&config).unwrap();
        for (name, text) in [
            ("initrd", role),
            ("kernel", "k"),
            ("kvm", ""),
            ("disk", "d"),
        ] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let path = |name: &str| dir.path().join(name).display().to_string();
        let text = format!(
            "kernel = {:?}\ninitrd = {:?}\nvmm = {:?}\nkvm = {:?}\nstart_timeout = {}\n",
            path("kernel"),
            path("initrd"),
            fake_vmm(),
            path("kvm"),
            // The one that is waited for in vain; the others have all the time of a busy machine.
            if role == "silent" { 3 } else { 60 },
        );
        std::fs::write(config.join("config.toml"), text).unwrap();

        let root = StateRoot::open(&dir.path().join("state"), "default").unwrap();
        let sandbox = root.create(&meta()).unwrap();
        let bundle = sandbox.path().to_owned();
        std::fs::write(bundle.join("config.json"), spec(args)).unwrap();
        let socket = bundle.join("task.sock");
        let listener = OwnedFd::from(UnixListener::bind(&socket).unwrap());
        let (theirs, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_containerd-shim-casemate-v2"));
        command
            .args(["--serve", "--discard", "--dir"])
            .arg(&bundle)
            .args(["--listen-fd", &listener.as_raw_fd().to_string()])
            .args(["--lock-fd", &sandbox.lock_fd().as_raw_fd().to_string()])
            .args(["--lifeline-fd", &theirs.as_raw_fd().to_string()])
            .env("XDG_CONFIG_HOME", dir.path())
            .stdin(Stdio::null());
        let passed = [listener.as_fd(), sandbox.lock_fd().as_fd(), theirs.as_fd()];
        let shim = fds::spawn_with(&mut command, &passed).unwrap();
        let connection = UnixStream::connect(&socket).unwrap();
        Self {
            task: TaskClient::new(rpc::client(connection).unwrap()),
            _dir: dir,
            root,
            bundle,
            shim,
            lifeline: Some(ours),
            _sandbox: sandbox,
        }
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.bundle.join(name);
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, mode, 0).unwrap();
        path.display().to_string()
    }

    fn disk(&self) -> api::Mount {
        api::Mount {
            type_: "erofs".into(),
            source: self._dir.path().join("disk").display().to_string(),
            options: vec!["ro".into()],
            ..Default::default()
        }
    }

    async fn create(&self, stdin: &str, stdout: &str) -> ttrpc::Result<api::CreateTaskResponse> {
        let request = api::CreateTaskRequest {
            id: ID.into(),
            bundle: self.bundle.display().to_string(),
            rootfs: vec![self.disk()],
            stdin: stdin.into(),
            stdout: stdout.into(),
            ..Default::default()
        };
        self.task.create(rpc::context(Some(SOON)), &request).await
    }

    async fn start(&self, exec_id: &str) -> ttrpc::Result<api::StartResponse> {
        let request = api::StartRequest {
            id: ID.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.task.start(rpc::context(Some(SOON)), &request).await
    }

    async fn wait(&self, exec_id: &str) -> u32 {
        let request = api::WaitRequest {
            id: ID.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let answer = self.task.wait(rpc::context(Some(SOON)), &request).await;
        answer.unwrap().exit_status
    }

    async fn state(&self) -> ttrpc::Result<api::StateResponse> {
        let request = api::StateRequest {
            id: ID.into(),
            ..Default::default()
        };
        self.task.state(rpc::context(Some(SOON)), &request).await
    }

    async fn exec(&self, exec_id: &str, args: &[&str], stdout: &str) -> ttrpc::Result<()> {
        let process = serde_json::json!({"args": args, "cwd": "/"}).to_string();
        let request = api::ExecProcessRequest {
            id: ID.into(),
            exec_id: exec_id.into(),
            stdout: stdout.into(),
            spec: Some(protobuf::well_known_types::any::Any {
                value: process.into_bytes(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let call = self.task.exec(rpc::context(Some(SOON)), &request);
        call.await.map(|_| ())
    }

    async fn kill(&self, signal: u32) -> ttrpc::Result<()> {
        let request = api::KillRequest {
            id: ID.into(),
            signal,
            ..Default::default()
        };
        let call = self.task.kill(rpc::context(Some(SOON)), &request);
        call.await.map(|_| ())
    }

    async fn delete(&self) -> ttrpc::Result<api::DeleteResponse> {
        let request = api::DeleteRequest {
            id: ID.into(),
            ..Default::default()
        };
        self.task.delete(rpc::context(Some(SOON)), &request).await
    }

    async fn shutdown(&mut self) {
        let request = api::ShutdownRequest {
            id: ID.into(),
            ..Default::default()
        };
        let _ = self.task.shutdown(rpc::context(Some(SOON)), &request).await;
        self.shim_ends();
    }

    /// Waits for the shim's end, which must come.
    fn shim_ends(&mut self) {
        for _ in 0..3000 {
            if self.shim.try_wait().unwrap().is_some() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the shim did not end");
    }

    /// Resident memory of the shim in KiB.
    fn shim_rss(&self) -> u64 {
        let path = format!("/proc/{}/status", self.shim.id());
        let text = std::fs::read_to_string(path).unwrap();
        let line = text.lines().find(|l| l.starts_with("VmRSS")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    fn vmm_pid(&self) -> Option<i32> {
        let taken = casemate::journal::Journal::in_dir(&self.bundle)
            .read()
            .ok()?;
        taken.into_iter().find_map(|t| match t {
            casemate::journal::Taken::Process { role, pid, .. } if role == "vmm" => Some(pid),
            _ => None,
        })
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = self.shim.kill();
        let _ = self.shim.wait();
    }
}

fn alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

fn gone_soon(pid: i32) -> bool {
    for _ in 0..500 {
        if !alive(pid) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    rpc::parts(&result.unwrap_err()).0
}

/// Opens a FIFO as a front door does: before the shim does.
fn reader(path: &str) -> std::fs::File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

async fn read_exactly(file: std::fs::File, length: usize) -> Vec<u8> {
    let (tell, told) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let mut bytes = vec![0; length];
        let mut file = file;
        file.read_exact(&mut bytes).unwrap();
        let _ = tell.send(bytes);
    });
    tokio::time::timeout(SOON, told).await.unwrap().unwrap()
}

#[tokio::test]
async fn container_lives_and_ends_as_the_task_api_says() {
    let mut f = Fixture::new("plays", &["echo", "hello"]);
    let stdout = f.fifo("out");
    let out = reader(&stdout);

    let pid = f.create("", &stdout).await.unwrap().pid;
    assert_eq!(f.vmm_pid(), Some(pid as i32));
    assert_eq!(f.state().await.unwrap().status, api::Status::CREATED.into());
    assert_eq!(code(f.create("", "").await), Code::ALREADY_EXISTS);
    f.start("").await.unwrap();
    assert_eq!(code(f.start("").await), Code::FAILED_PRECONDITION);
    assert_eq!(f.wait("").await, 0);
    assert_eq!(read_exactly(out, 6).await, b"hello\n");
    assert_eq!(f.state().await.unwrap().status, api::Status::STOPPED.into());
    assert_eq!(code(f.kill(SIGKILL).await), Code::NOT_FOUND);
    f.delete().await.unwrap();
    assert!(gone_soon(pid as i32));
    assert_eq!(code(f.state().await), Code::NOT_FOUND);
    f.shutdown().await;
}

#[tokio::test]
async fn stdin_reaches_the_process_and_close_io_ends_it() {
    let f = Fixture::new("plays", &["cat"]);
    let (stdin, stdout) = (f.fifo("in"), f.fifo("out"));
    let out = reader(&stdout);
    let mut input = reader(&stdin);
    f.create(&stdin, &stdout).await.unwrap();
    f.start("").await.unwrap();
    let sent: Vec<u8> = (0..5_000_000u32).map(|i| (i * 7 % 251) as u8).collect();
    let copy = sent.clone();
    let writer = std::thread::spawn(move || input.write_all(&copy).unwrap());
    assert!(read_exactly(out, sent.len()).await == sent);
    writer.join().unwrap();
    let close = api::CloseIORequest {
        id: ID.into(),
        stdin: true,
        ..Default::default()
    };
    let context = rpc::context(Some(SOON));
    f.task.close_io(context, &close).await.unwrap();
    assert_eq!(f.wait("").await, 0);
}

#[tokio::test]
async fn exec_adds_a_process_with_streams_of_its_own() {
    let f = Fixture::new("plays", &["sleep"]);
    f.create("", "").await.unwrap();
    assert_eq!(
        code(f.exec("e1", &["true"], "").await),
        Code::FAILED_PRECONDITION
    );
    f.start("").await.unwrap();
    let stdout = f.fifo("exec-out");
    let out = reader(&stdout);
    f.exec("e1", &["echo", "more"], &stdout).await.unwrap();
    assert_eq!(
        code(f.exec("e1", &["true"], "").await),
        Code::ALREADY_EXISTS
    );
    f.start("e1").await.unwrap();
    assert_eq!(f.wait("e1").await, 0);
    assert_eq!(read_exactly(out, 5).await, b"more\n");
    assert_eq!(code(f.delete().await), Code::FAILED_PRECONDITION);
    f.kill(SIGTERM).await.unwrap();
    assert_eq!(f.wait("").await, 128 + SIGTERM);
}

#[tokio::test]
async fn start_of_missing_or_forbidden_command_keeps_the_agents_code() {
    for (word, expected) in [
        ("missing", Code::NOT_FOUND),
        ("forbidden", Code::PERMISSION_DENIED),
    ] {
        let f = Fixture::new("plays", &[word]);
        f.create("", "").await.unwrap();
        assert_eq!(code(f.start("").await), expected);
        f.delete().await.unwrap();
    }
}

#[tokio::test]
async fn guest_that_never_answers_is_ended_with_its_last_lines() {
    let f = Fixture::new("silent", &["true"]);
    let error = f.create("", "").await.unwrap_err();
    let (_, text) = rpc::parts(&error);
    assert!(text.contains("kernel boot"), "{text}");
    assert!(text.contains("last line"), "{text}");
    assert!(!text.contains('\u{1b}'), "{text:?}");
    assert!(gone_soon(f.vmm_pid().unwrap()));
}

#[tokio::test]
async fn guest_that_dies_at_start_is_told_at_once() {
    for (role, part) in [
        ("dies", "ended with code 14"),
        ("panics", "kernel panicked"),
        ("closes", "agent failed"),
        ("huge-error", "]0;x"),
        ("floods-agent", "agent failed"),
    ] {
        let f = Fixture::new(role, &["true"]);
        let (code, text) = rpc::parts(&f.create("", "").await.unwrap_err());
        assert!(text.contains(part), "{role}: {text}");
        assert!(text.len() < 10_000 && !text.contains('\u{1b}'), "{role}");
        assert_eq!(code, Code::INTERNAL, "{role}");
        assert!(f.shim_rss() < 64 << 10, "{role}: {} KiB", f.shim_rss());
        assert!(gone_soon(f.vmm_pid().unwrap()), "{role}");
        // The failure left room for another try.
        assert_eq!(self::code(f.state().await), Code::NOT_FOUND);
    }
}

#[tokio::test]
async fn vmm_that_talks_nonsense_is_ignored() {
    for role in ["floods-control", "garbage-control", "lies"] {
        let f = Fixture::new(role, &["exit", "3"]);
        f.create("", "").await.unwrap();
        f.start("").await.unwrap();
        let expected = if role == "lies" { 255 } else { 3 };
        assert_eq!(f.wait("").await, expected, "{role}");
    }
}

#[tokio::test]
async fn guest_that_crashes_ends_the_container_with_its_reason() {
    let f = Fixture::new("plays", &["crash"]);
    f.create("", "").await.unwrap();
    f.start("").await.unwrap();
    assert_eq!(f.wait("").await, KILLED);
    let status = f.root.find(ID).unwrap().status;
    assert!(status.error.contains("kernel panicked"), "{status:?}");
}

#[tokio::test]
async fn killed_vmm_ends_the_container() {
    let f = Fixture::new("plays", &["sleep"]);
    let pid = f.create("", "").await.unwrap().pid;
    f.start("").await.unwrap();
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(f.wait("").await, KILLED);
}

#[tokio::test]
async fn killed_shim_takes_its_vmm_along_and_the_next_command_tidies_up() {
    let mut f = Fixture::new("plays", &["sleep"]);
    f.create("", "").await.unwrap();
    f.start("").await.unwrap();
    let vmm = f.vmm_pid().unwrap();
    f.shim.kill().unwrap();
    f.shim.wait().unwrap();
    assert!(gone_soon(vmm));
    // The test still holds the lock, as a living front door would.
    f.root.reclaim_dead().unwrap();
    assert!(f.bundle.exists());
}

#[tokio::test]
async fn shim_whose_front_door_died_ends_its_sandbox() {
    let mut f = Fixture::new("plays", &["sleep"]);
    f.create("", "").await.unwrap();
    f.start("").await.unwrap();
    let vmm = f.vmm_pid().unwrap();
    f.lifeline = None;
    f.shim_ends();
    assert!(gone_soon(vmm));
    assert!(!f.bundle.exists());
}

#[tokio::test]
async fn odd_requests_get_the_code_that_containerd_expects() {
    let f = Fixture::new("plays", &["sleep"]);
    let bundle = f.bundle.display().to_string();
    let request = |id: &str, bundle: &str, rootfs: Vec<api::Mount>| api::CreateTaskRequest {
        id: id.into(),
        bundle: bundle.into(),
        rootfs,
        ..Default::default()
    };
    let relative = api::Mount {
        source: "relative".into(),
        ..f.disk()
    };
    let bind = api::Mount {
        type_: "bind".into(),
        ..f.disk()
    };
    for (request, expected) in [
        (
            request("../up", &bundle, vec![f.disk()]),
            Code::INVALID_ARGUMENT,
        ),
        (request("", &bundle, vec![f.disk()]), Code::INVALID_ARGUMENT),
        (
            request(ID, "/no/such", vec![f.disk()]),
            Code::FAILED_PRECONDITION,
        ),
        (request(ID, &bundle, vec![]), Code::INVALID_ARGUMENT),
        (request(ID, &bundle, vec![relative]), Code::INVALID_ARGUMENT),
        (request(ID, &bundle, vec![bind]), Code::INVALID_ARGUMENT),
    ] {
        let result = f.task.create(rpc::context(Some(SOON)), &request).await;
        assert_eq!(code(result), expected, "{request:?}");
    }
    assert_eq!(code(f.start("").await), Code::NOT_FOUND);
    f.create("", "").await.unwrap();
    assert_eq!(code(f.start("none").await), Code::NOT_FOUND);
    f.start("").await.unwrap();
    let checkpoint = api::CheckpointTaskRequest {
        id: ID.into(),
        ..Default::default()
    };
    let context = rpc::context(Some(SOON));
    let result = f.task.checkpoint(context, &checkpoint).await;
    assert_eq!(code(result), Code::UNIMPLEMENTED);
}

#[tokio::test]
async fn vmm_inherits_what_it_is_told_of_and_nothing_else() {
    let f = Fixture::new("plays", &["sleep"]);
    let pid = f.create("", "").await.unwrap().pid;
    let dir = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let open: Vec<String> = dir
        .map(|e| {
            std::fs::read_link(e.unwrap().path())
                .unwrap()
                .display()
                .to_string()
        })
        .collect();
    // The shim's own: the lock and the lifeline's pipe.
    let lifeline = rustix::fs::fstat(f.lifeline.as_ref().unwrap()).unwrap();
    let lifeline = format!("pipe:[{}]", lifeline.st_ino);
    for text in &open {
        assert!(!text.ends_with("/lock") && *text != lifeline, "{open:?}");
    }
}
