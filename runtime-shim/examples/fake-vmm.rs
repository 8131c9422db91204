//! Plays VMM and agent for the shim's tests: no KVM, and as hostile as asked for.
//!
//! What it plays is in its "initrd": one word. The container's command is played
//! too: `echo TEXT`, `cat`, `exit N`, `sleep`, `missing`, `forbidden`.

use async_trait::async_trait;
use casemate::fds;
use casemate_protocol::agent as proto;
use casemate_protocol::agent_ttrpc::{Agent, create_agent};
use casemate_vmm::config::VmConfig;
use casemate_vmm::control::{Answer, Command, Message, Phase, Request};
use rustix::net::{RecvFlags, SendFlags};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::exit;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use ttrpc::Code;
use ttrpc::r#async::TtrpcContext;

const CONTROL_PORT: u32 = casemate_protocol::CONTROL_PORT;

fn read_all(number: i32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut file = std::fs::File::from(fds::inherit(number).expect("inherited"));
    std::io::Seek::rewind(&mut file).expect("seekable");
    file.read_to_end(&mut bytes).expect("readable");
    bytes
}

fn say(control: &OwnedFd, message: &Message) {
    let bytes = serde_json::to_vec(message).expect("serializable");
    let _ = rustix::net::send(control, &bytes, SendFlags::NOSIGNAL);
}

fn end(control: &OwnedFd, code: u8, reason: &str) -> ! {
    say(
        control,
        &Message::Ended {
            code,
            reason: reason.into(),
            guest_log: "[ 1.0] fake kernel\n[ 1.1] \u{1b}[31mlast line\n".into(),
        },
    );
    exit(code.into())
}

fn main() {
    let number = std::env::args().nth(2).and_then(|n| n.parse().ok());
    let config: VmConfig =
        serde_json::from_slice(&read_all(number.expect("--config-fd N"))).expect("a VmConfig");
    let role = String::from_utf8(read_all(config.initrd.expect("an initrd"))).expect("a word");
    let control = Arc::new(fds::inherit(config.control.expect("control")).expect("control"));
    let ports: BTreeMap<u32, OwnedFd> = config
        .vsock
        .as_ref()
        .map(|v| &v.ports[..])
        .unwrap_or_default()
        .iter()
        .map(|p| (p.port, fds::inherit(p.fd).expect("port")))
        .collect();
    for phase in [Phase::Main, Phase::Confined, Phase::FirstRun] {
        say(&control, &Message::Phase { phase, at_ns: 1 });
    }
    match role.trim() {
        "dies" => exit(14),
        "panics" => end(&control, 11, "the guest's kernel panicked"),
        "floods-control" => flood_control(&control),
        "garbage-control" => {
            let _ = rustix::net::send(&*control, b"not json", SendFlags::NOSIGNAL);
        }
        _ => {}
    }
    let ports = Arc::new(Mutex::new(ports));
    let listening = ports.clone();
    let asked = control.clone();
    std::thread::spawn(move || answer_control(&asked, &listening));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(play(role.trim(), ports, control));
}

fn flood_control(control: &OwnedFd) {
    for at_ns in 0..100_000 {
        let phase = Phase::Main;
        say(control, &Message::Phase { phase, at_ns });
    }
}

fn answer_control(control: &OwnedFd, ports: &Mutex<BTreeMap<u32, OwnedFd>>) {
    let mut buffer = vec![0; 65536];
    loop {
        let mut space = [std::mem::MaybeUninit::uninit(); 128];
        let mut ancillary = rustix::net::RecvAncillaryBuffer::new(&mut space);
        let mut slices = [std::io::IoSliceMut::new(&mut buffer)];
        let got = rustix::net::recvmsg(
            control,
            &mut slices,
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        );
        let length = match got {
            Ok(got) if got.bytes > 0 => got.bytes,
            // The shim is gone.
            _ => exit(13),
        };
        let passed: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                rustix::net::RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        let request: Request = serde_json::from_slice(&buffer[..length]).expect("a request");
        match request.command {
            Command::Stop => end(control, 13, "stopped"),
            Command::VsockListen { port } => {
                let fd = passed.into_iter().next().expect("a descriptor");
                ports.lock().expect("unpoisoned").insert(port, fd);
            }
            _ => {}
        }
        let result = Ok(Answer::Done);
        say(
            control,
            &Message::Reply {
                id: request.id,
                result,
            },
        );
    }
}

type Ports = Arc<Mutex<BTreeMap<u32, OwnedFd>>>;

async fn play(role: &str, ports: Ports, control: Arc<OwnedFd>) {
    let fd = ports
        .lock()
        .expect("unpoisoned")
        .remove(&CONTROL_PORT)
        .expect("the control port");
    let stream = UnixStream::from(fd);
    match role {
        "silent" => std::future::pending().await,
        "closes" => {
            drop(stream);
            return std::future::pending().await;
        }
        "floods-agent" => flood_agent(stream),
        _ => {}
    }
    stream.set_nonblocking(true).expect("a socket");
    let stream = tokio::net::UnixStream::from_std(stream).expect("a socket");
    let fake = Fake {
        role: role.to_owned(),
        ports,
        control,
        args: Mutex::default(),
        stdio: Mutex::default(),
        exits: Arc::new(watch::Sender::new(BTreeMap::new())),
    };
    let connections = futures::stream::once(async { Ok(stream) });
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(ttrpc::r#async::transport::Listener::new(connections))
        .register_service(create_agent(Arc::new(fake)));
    server.start().await.expect("serving");
    std::future::pending().await
}

/// Data frames for the first call, for ever.
fn flood_agent(mut stream: UnixStream) -> ! {
    stream.set_nonblocking(false).expect("a socket");
    let mut frame = 1024u32.to_be_bytes().to_vec();
    frame.extend(1u32.to_be_bytes());
    frame.extend([3, 4]);
    frame.resize(10 + 1024, 0);
    while stream.write_all(&frame).is_ok() {}
    std::thread::sleep(std::time::Duration::from_secs(3600));
    exit(0)
}

struct Fake {
    role: String,
    ports: Ports,
    control: Arc<OwnedFd>,
    args: Mutex<Vec<String>>,
    stdio: Mutex<proto::Stdio>,
    exits: Arc<watch::Sender<BTreeMap<String, u32>>>,
}

fn status(code: Code, text: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, text))
}

impl Fake {
    /// Plays a command on its streams.
    fn run(&self, exec_id: &str, args: &[String], stdio: &proto::Stdio) -> ttrpc::Result<()> {
        let take = |port| {
            let fd = self.ports.lock().expect("unpoisoned").remove(&port)?;
            let stream = UnixStream::from(fd);
            stream.set_nonblocking(false).expect("a socket");
            Some(stream)
        };
        let word = args.first().map(String::as_str).unwrap_or_default();
        match word {
            "missing" => return Err(status(Code::NOT_FOUND, "missing: no such file")),
            "forbidden" => return Err(status(Code::PERMISSION_DENIED, "forbidden: no")),
            _ => {}
        }
        let (stdin, stdout) = (take(stdio.stdin_port), take(stdio.stdout_port));
        let stderr = take(stdio.stderr_port);
        let (exits, exec_id) = (self.exits.clone(), exec_id.to_owned());
        let args = args.to_vec();
        let control = self.control.clone();
        std::thread::spawn(move || {
            let code = command(&args, stdin, stdout, &control);
            drop(stderr);
            exits.send_modify(|all| {
                all.insert(exec_id, code);
            });
        });
        Ok(())
    }
}

fn command(
    args: &[String],
    stdin: Option<UnixStream>,
    stdout: Option<UnixStream>,
    control: &OwnedFd,
) -> u32 {
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["echo", text] => {
            let mut out = stdout.expect("stdout");
            writeln!(out, "{text}").expect("written");
            0
        }
        ["cat"] => {
            let (mut from, mut to) = (stdin.expect("stdin"), stdout.expect("stdout"));
            std::io::copy(&mut from, &mut to).expect("copied");
            0
        }
        ["exit", code] => code.parse().expect("a number"),
        ["crash"] => end(control, 11, "the guest's kernel panicked"),
        _ => {
            std::thread::sleep(std::time::Duration::from_secs(3600));
            0
        }
    }
}

fn args_of(json: &[u8]) -> Vec<String> {
    let value: serde_json::Value = serde_json::from_slice(json).expect("JSON");
    let process = value.get("process").unwrap_or(&value);
    let args = process["args"].as_array().expect("args");
    let text = |v: &serde_json::Value| v.as_str().expect("a string").to_owned();
    args.iter().map(text).collect()
}

#[async_trait]
impl Agent for Fake {
    async fn hello(
        &self,
        _: &TtrpcContext,
        _: proto::HelloRequest,
    ) -> ttrpc::Result<proto::HelloResponse> {
        if self.role == "huge-error" {
            return Err(status(Code::INTERNAL, &"\u{1b}]0;x\u{7}".repeat(100_000)));
        }
        Ok(proto::HelloResponse::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        req: proto::CreateContainerRequest,
    ) -> ttrpc::Result<proto::CreateContainerResponse> {
        *self.args.lock().expect("unpoisoned") = args_of(&req.spec_json);
        *self.stdio.lock().expect("unpoisoned") = req.stdio.unwrap_or_default();
        Ok(proto::CreateContainerResponse::new())
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        _: proto::StartContainerRequest,
    ) -> ttrpc::Result<proto::StartContainerResponse> {
        let args = self.args.lock().expect("unpoisoned").clone();
        let stdio = self.stdio.lock().expect("unpoisoned").clone();
        self.run("", &args, &stdio)?;
        Ok(proto::StartContainerResponse::new())
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        req: proto::ExecRequest,
    ) -> ttrpc::Result<proto::ExecResponse> {
        let args = args_of(&req.process_json);
        self.run(&req.exec_id, &args, &req.stdio.unwrap_or_default())?;
        Ok(proto::ExecResponse::new())
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        req: proto::ProcessRequest,
    ) -> ttrpc::Result<proto::WaitResponse> {
        let mut exits = self.exits.subscribe();
        let all = exits
            .wait_for(|all| all.contains_key(&req.exec_id))
            .await
            .expect("the sender lives");
        let exit_status = match self.role.as_str() {
            "lies" => u32::MAX,
            _ => all[&req.exec_id],
        };
        Ok(proto::WaitResponse {
            exit_status,
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, req: proto::KillRequest) -> ttrpc::Result<proto::Empty> {
        self.exits.send_modify(|all| {
            all.insert(req.exec_id, 128 + req.signal);
        });
        Ok(proto::Empty::new())
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        _: proto::ContainerRequest,
    ) -> ttrpc::Result<proto::Empty> {
        Ok(proto::Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: proto::Empty) -> ttrpc::Result<proto::Empty> {
        Ok(proto::Empty::new())
    }
}
