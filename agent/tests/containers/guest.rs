//! The agent as PID 1 of a pid namespace, with Unix sockets for vsock: all of it but the VM. Needs root and a static busybox.

use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use casemate_protocol::agent::{self, CreateContainerRequest, ExecRequest, ProcessRequest};
use casemate_protocol::agent_ttrpc::AgentClient;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use ttrpc::r#async::transport::Socket;

/// Bound on anything a test waits for: the machine may be slow, a hang must still end.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Guest {
    pub(crate) client: AgentClient,
    pub(crate) dir: tempfile::TempDir,
    child: tokio::process::Child,
    control: std::os::fd::OwnedFd,
    next_port: AtomicU32,
}

/// The host's side of a process's streams.
pub(crate) struct Streams {
    pub(crate) stdio: agent::Stdio,
    listeners: Vec<Option<UnixListener>>,
}

pub(crate) struct Output {
    pub(crate) status: u32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

pub(crate) fn ctx() -> ttrpc::context::Context {
    ttrpc::context::with_timeout(PATIENCE.as_nanos() as i64)
}

/// The code and the message of a refusal, which the answer must be.
pub(crate) fn refusal<T>(answer: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match answer {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message),
        Err(other) => panic!("not a status: {other:?}"),
        Ok(_) => panic!("not refused"),
    }
}

impl Guest {
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let control = UnixListener::bind(dir.path().join("1024")).unwrap();
        let agent = std::env::current_exe()
            .unwrap()
            .parent()
            .unwrap()
            .join("../examples/agent-on-unix-sockets");
        assert!(
            agent.exists(),
            "{} is missing: build the examples",
            agent.display()
        );
        make_rootfs(&dir.path().join("image"));
        // A hierarchy of its own: a cgroup made the root of a cgroup namespace, the agent in a leaf of it.
        let inner = "umount /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && mkdir /sys/fs/cgroup/agent && \
            echo 1 >/sys/fs/cgroup/agent/cgroup.procs && exec \"$0\" \"$1\"";
        let script = format!(
            "umount -R /sys/fs/cgroup 2>/dev/null; mount -t cgroup2 cgroup2 /sys/fs/cgroup && mount -t tmpfs run /run && \
             cd /sys/fs/cgroup && mkdir {name} && echo 1 >{name}/cgroup.procs && cd / && \
             exec unshare --cgroup sh -c '{inner}' \"$0\" \"$1\"",
            name = cgroup_name(&dir),
        );
        let child = tokio::process::Command::new("unshare")
            .args([
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "--propagation",
                "private",
                "sh",
                "-c",
                &script,
            ])
            .args([agent.as_os_str(), dir.path().as_os_str()])
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let (stream, _) = tokio::time::timeout(PATIENCE, control.accept())
            .await
            .expect("the agent connects")
            .unwrap();
        let control = std::os::fd::AsFd::as_fd(&stream)
            .try_clone_to_owned()
            .unwrap();
        let client = AgentClient::new(ttrpc::r#async::Client::new(Socket::new(stream)));
        Self {
            client,
            dir,
            child,
            control,
            next_port: AtomicU32::new(0x1_0000),
        }
    }

    /// As if the host had closed it.
    pub(crate) fn cut_control(&self) {
        rustix::net::shutdown(&self.control, rustix::net::Shutdown::Both).unwrap();
    }

    pub(crate) fn streams(&self, terminal: bool) -> Streams {
        let listen = |wanted: bool| {
            wanted.then(|| {
                let port = self.next_port.fetch_add(1, Ordering::Relaxed);
                (
                    port,
                    UnixListener::bind(self.dir.path().join(port.to_string())).unwrap(),
                )
            })
        };
        let all = [listen(true), listen(true), listen(!terminal)];
        let port = |i: usize| all[i].as_ref().map_or(0, |(port, _)| *port);
        let stdio = agent::Stdio {
            terminal,
            stdin_port: port(0),
            stdout_port: port(1),
            stderr_port: port(2),
            rows: if terminal { 33 } else { 0 },
            cols: if terminal { 77 } else { 0 },
            ..Default::default()
        };
        Streams {
            stdio,
            listeners: all
                .into_iter()
                .map(|l| l.map(|(_, listener)| listener))
                .collect(),
        }
    }

    pub(crate) fn request(
        &self,
        id: &str,
        spec: &Value,
        streams: &Streams,
    ) -> CreateContainerRequest {
        let target = format!("/run/casemate/{id}/rootfs");
        let mount =
            |type_: &str, source: &str, target: String, options: Vec<String>| agent::Mount {
                type_: type_.into(),
                source: source.into(),
                target,
                options,
                ..Default::default()
            };
        let path = |name: &str| format!("/run/casemate/{id}/{name}");
        CreateContainerRequest {
            id: id.into(),
            spec_json: spec.to_string().into_bytes(),
            mounts: vec![
                mount(
                    "bind",
                    self.dir.path().join("image").to_str().unwrap(),
                    path("image"),
                    vec!["ro".into()],
                ),
                mount("tmpfs", "none", path("scratch"), vec![]),
                mount(
                    "overlay",
                    "none",
                    target.clone(),
                    vec![
                        format!("lowerdir={}", path("image")),
                        format!("upperdir={}", path("scratch/upper")),
                        format!("workdir={}", path("scratch/work")),
                    ],
                ),
            ],
            rootfs: target,
            stdio: Some(streams.stdio.clone()).into(),
            ..Default::default()
        }
    }

    pub(crate) async fn create(&self, id: &str, spec: &Value) -> ttrpc::Result<Streams> {
        let streams = self.streams(spec["process"]["terminal"] == json!(true));
        self.client
            .create_container(ctx(), &self.request(id, spec, &streams))
            .await
            .map(|_| streams)
    }

    /// Creates, starts, feeds, waits, deletes.
    pub(crate) async fn run_with(
        &self,
        id: &str,
        spec: &Value,
        input: &[u8],
    ) -> ttrpc::Result<Output> {
        let streams = self.create(id, spec).await?;
        let collected = streams.accept().await;
        let output = match self.try_start(id).await {
            Ok(_) => Ok(collected.finish(self, id, "", input).await),
            Err(error) => Err(error),
        };
        self.delete(id).await;
        output
    }

    pub(crate) async fn run(&self, args: &[&str]) -> Output {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!(
            "t{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        self.run_with(&id, &spec(args), b"").await.unwrap()
    }

    async fn try_start(&self, id: &str) -> ttrpc::Result<agent::StartContainerResponse> {
        let request = agent::StartContainerRequest {
            id: id.into(),
            ..Default::default()
        };
        self.client.start_container(ctx(), &request).await
    }

    pub(crate) async fn start_container(&self, id: &str) {
        self.try_start(id).await.unwrap();
    }

    /// Creates as requested, starts, waits.
    pub(crate) async fn run_as_requested(
        &self,
        request: &CreateContainerRequest,
        streams: Streams,
    ) -> Output {
        let created = self.client.create_container(ctx(), request).await;
        created.unwrap();
        let collected = streams.accept().await;
        self.start_container(&request.id).await;
        collected.finish(self, &request.id, "", b"").await
    }

    /// Creates and starts.
    pub(crate) async fn started(&self, id: &str, spec: &Value) -> Collected {
        let collected = self.create(id, spec).await.unwrap().accept().await;
        self.start_container(id).await;
        collected
    }

    /// Starts a container that lasts until it is ended.
    pub(crate) async fn sleeping(&self, id: &str) -> Collected {
        self.started(id, &spec(&["sleep", "1000"])).await
    }

    pub(crate) async fn delete(&self, id: &str) {
        let deleted = self.client.delete_container(ctx(), &request(id)).await;
        deleted.unwrap();
    }

    /// Executes, feeds, waits.
    pub(crate) async fn exec_with(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        user: &str,
        input: &[u8],
    ) -> Output {
        let collected = self.exec(id, exec_id, process, user).await.unwrap();
        collected.finish(self, id, exec_id, input).await
    }

    pub(crate) async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        user: &str,
    ) -> ttrpc::Result<Collected> {
        let streams = self.streams(process["terminal"] == json!(true));
        let request = ExecRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            process_json: process.to_string().into_bytes(),
            stdio: Some(streams.stdio.clone()).into(),
            user: user.into(),
            ..Default::default()
        };
        self.client.exec(ctx(), &request).await?;
        Ok(streams.accept().await)
    }

    /// The status of a process that ends by itself.
    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> agent::WaitResponse {
        self.client
            .wait(
                ctx(),
                &ProcessRequest {
                    id: id.into(),
                    exec_id: exec_id.into(),
                    ..Default::default()
                },
            )
            .await
            .unwrap()
    }

    /// The agent's own pid as this process sees it.
    pub(crate) fn agent_pid(&self) -> String {
        let unshare = self.child.id().unwrap();
        let children =
            std::fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).unwrap();
        children.trim().to_owned() // each further step of the script is an exec
    }
}

fn cgroup_name(dir: &tempfile::TempDir) -> String {
    let name = dir.path().file_name().unwrap().to_str().unwrap();
    format!("agent-test-{}", name.replace('.', ""))
}

impl Drop for Guest {
    /// Ends the agent with all that it started, and removes its cgroups.
    fn drop(&mut self) {
        let _ = self.child.start_kill();
        let script = "umount -R /sys/fs/cgroup 2>/dev/null; mount -t cgroup2 cgroup2 /sys/fs/cgroup && cd /sys/fs/cgroup && \
            for i in $(seq 100); do rmdir $0/* $0 2>/dev/null; [ -d $0 ] || break; sleep 0.05; done";
        let _ = std::process::Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                script,
                &cgroup_name(&self.dir),
            ])
            .status();
    }
}

/// Accepted connections.
pub(crate) struct Collected {
    pub(crate) stdin: Option<UnixStream>,
    pub(crate) stdout: Option<UnixStream>,
    pub(crate) stderr: Option<UnixStream>,
}

impl Streams {
    pub(crate) async fn accept(self) -> Collected {
        let mut streams = Vec::new();
        for listener in self.listeners {
            streams.push(match listener {
                Some(listener) => Some(
                    tokio::time::timeout(PATIENCE, listener.accept())
                        .await
                        .unwrap()
                        .unwrap()
                        .0,
                ),
                None => None,
            });
        }
        let stderr = streams.pop().unwrap();
        let stdout = streams.pop().unwrap();
        Collected {
            stdin: streams.pop().unwrap(),
            stdout,
            stderr,
        }
    }
}

async fn read_all(stream: Option<UnixStream>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes))
            .await
            .expect("the stream ends")
            .unwrap();
    }
    bytes
}

impl Collected {
    pub(crate) async fn finish(
        self,
        guest: &Guest,
        id: &str,
        exec_id: &str,
        input: &[u8],
    ) -> Output {
        let Collected {
            stdin,
            stdout,
            stderr,
        } = self;
        let feed = async {
            if let Some(mut stdin) = stdin {
                let _ = stdin.write_all(input).await;
                let _ = stdin.shutdown().await;
                std::future::pending::<()>().await; // only half-closed
            }
        };
        let rest =
            async { tokio::join!(read_all(stdout), read_all(stderr), guest.wait(id, exec_id)) };
        let (stdout, stderr, end) = tokio::select! {
            all = rest => all,
            () = feed => unreachable!(),
        };
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Output {
            status: end.exit_status,
            stdout: text(stdout),
            stderr: text(stderr),
        }
    }
}

pub(crate) fn spec(args: &[&str]) -> Value {
    let caps = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_KILL",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
    ];
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs"},
        "hostname": "casemate",
        "process": {
            "cwd": "/",
            "args": args,
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "A=b"],
            "user": {"uid": 0, "gid": 0},
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "noNewPrivileges": true,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

pub(crate) fn shell(script: &str) -> Value {
    spec(&["sh", "-c", script])
}

fn make_rootfs(root: &Path) {
    for dir in [
        "bin", "etc", "tmp", "root", "proc", "dev", "sys", "home/web", "secret",
    ] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox"))
        .expect("a static busybox at /bin/busybox");
    for applet in [
        "sh", "cat", "true", "id", "ls", "env", "sleep", "mount", "hostname", "ip", "stty", "tty",
        "dd", "ps", "touch", "kill", "seq", "head", "grep", "mknod", "chown", "wc", "stat",
        "readlink", "mkdir", "ulimit", "tr", "tail",
    ] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    std::fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001::/home/web:/bin/sh\n",
    )
    .unwrap();
    std::fs::write(
        root.join("etc/group"),
        "root:x:0:\nweb:x:1001:\nextra:x:1234:web\n",
    )
    .unwrap();
    std::fs::write(root.join("etc/notes"), "no program\n").unwrap();
    std::fs::write(root.join("secret/file"), "from the image\n").unwrap();
}

/// The container of that id.
pub(crate) fn request(id: &str) -> agent::ContainerRequest {
    agent::ContainerRequest {
        id: id.into(),
        ..Default::default()
    }
}

/// `spec` with another value at `pointer`.
pub(crate) fn changed(mut spec: Value, pointer: &str, value: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    spec.pointer_mut(parent).unwrap()[key] = value;
    spec
}
