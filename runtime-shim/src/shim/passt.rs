//! An ordinary user's network: passt and the process that holds the namespaces.

use super::bounds::Bounds;
use super::network::NetworkFailure;
use crate::fds;
use crate::journal::Journal;
use crate::network::user::{
    ADDRESS, ADDRESS6, GATEWAY, GATEWAY6, MTU, PREFIX, PREFIX6, READY, arguments,
};
use crate::network::wish::{self, Mac, Wish};
use crate::settings::Settings;
use casemate_protocol::text::printable_lines;
use casemate_protocol::{NAMES_PORT, agent as proto};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};

/// The role of both processes in the journal.
pub(crate) const ROLE: &str = "network";
/// Both start in milliseconds; an emulated host may take seconds.
const PATIENCE: Timespec = Timespec {
    tv_sec: 30,
    tv_nsec: 0,
};
/// What is told of their last words.
const MAX_WORDS: usize = 2048;

/// Two processes, which go with this.
pub(super) struct Passt {
    holder: Process,
    passt: Process,
    /// Ends with the holder.
    control: OwnedFd,
}

/// A process that goes with this.
struct Process {
    child: Child,
    said: File,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    fn start(command: &mut Command, passed: &[&OwnedFd], journal: &Journal) -> io::Result<Self> {
        let said = fds::bounded_file("network-stderr", MAX_WORDS as u64)?;
        let passed: Vec<_> = passed.iter().map(|fd| fd.as_fd()).collect();
        command
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said.try_clone()?);
        let child = fds::spawn_with(command, &passed)?;
        // One that is gone already is noticed soon.
        let _ = journal.record_process(ROLE, child.id() as i32);
        Ok(Self { child, said })
    }

    /// What it said, but for what passt says where there is no syslog.
    fn words(&self) -> String {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; MAX_WORDS];
        let got = self.said.read_at(&mut bytes, 0).unwrap_or(0);
        let end = bytes[..got].iter().position(|b| *b == 0).unwrap_or(got);
        let text = String::from_utf8_lossy(&bytes[..end]).into_owned();
        let lines = text.lines().filter(|line| !line.contains("to syslog"));
        printable_lines(&lines.collect::<Vec<_>>().join("; ")).into_owned()
    }
}

fn pair(kind: SocketType) -> io::Result<(OwnedFd, OwnedFd)> {
    let family = AddressFamily::UNIX;
    Ok(rustix::net::socketpair(
        family,
        kind,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

impl Passt {
    /// Starts both and gives the VMM's tap, and the socket over which the holder takes rules for names.
    pub(super) fn start(
        settings: &Settings,
        wish: &Wish,
        guest: Mac,
        six: bool,
        bounds: &Bounds,
        journal: &Journal,
    ) -> Result<(Self, OwnedFd, OwnedFd), NetworkFailure> {
        let failed = |source| NetworkFailure::User {
            message: "can't start its processes".to_owned(),
            source: Some(source),
        };
        let (control, theirs) = pair(SocketType::SEQPACKET).map_err(failed)?;
        let (relay, stream) = pair(SocketType::STREAM).map_err(failed)?;
        let (gate, gates) = pair(SocketType::SEQPACKET).map_err(failed)?;
        let mut command = Command::new(&settings.shim);
        command.args(["--hold-network", &theirs.as_raw_fd().to_string()]);
        command.args([&relay, &gates].map(|fd| fd.as_raw_fd().to_string()));
        command.arg(guest.to_string());
        if let Some(policy) = &wish.egress {
            let policy = serde_json::to_string(policy).map_err(|e| failed(e.into()))?;
            command.arg(policy);
        }
        bounds.hold(&mut command);
        let holder =
            Process::start(&mut command, &[&theirs, &relay, &gates], journal).map_err(failed)?;
        drop((theirs, relay, gates));
        let tap = receive(&control).map_err(|source| NetworkFailure::User {
            message: holder.words(),
            source: Some(source),
        })?;
        let mut command = Command::new(settings.passt());
        command.args(arguments(stream.as_raw_fd(), &wish.ports, six));
        bounds.hold(&mut command);
        let passt = Process::start(&mut command, &[&stream], journal).map_err(|source| {
            NetworkFailure::User {
                message: format!("can't start {}", settings.passt().display()),
                source: Some(source),
            }
        })?;
        let both = Self {
            holder,
            passt,
            control,
        };
        Ok((both, tap, gate))
    }

    /// Waits until passt speaks.
    pub(super) fn ready(&self) -> Result<(), NetworkFailure> {
        let mut buffer = [0; 16];
        let received = wait(&self.control).and_then(|()| {
            Ok(rustix::net::recv(
                &self.control,
                &mut buffer,
                RecvFlags::empty(),
            )?)
        });
        match received {
            Ok((_, length)) if buffer[..length] == *READY => Ok(()),
            _ => Err(NetworkFailure::User {
                message: format!("passt does not answer: {}", self.words()),
                source: None,
            }),
        }
    }

    fn words(&self) -> String {
        let both = [self.passt.words(), self.holder.words()];
        both.join("; ")
    }

    /// What ends when passt or the holder does.
    pub(super) fn end(&self) -> io::Result<OwnedFd> {
        self.control.try_clone()
    }
}

fn wait(fd: &OwnedFd) -> io::Result<()> {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    match rustix::event::poll(&mut fds, Some(&PATIENCE))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

/// The descriptor that the holder sends.
fn receive(control: &OwnedFd) -> io::Result<OwnedFd> {
    wait(control)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = [0; 16];
    rustix::net::recvmsg(
        control,
        &mut [IoSliceMut::new(&mut buffer)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message
            && let Some(fd) = fds.next()
        {
            return Ok(fd);
        }
    }
    Err(io::Error::other(
        "the process that holds its namespaces ended",
    ))
}

/// What the agent is told of it, with IPv6 if `six`.
pub(super) fn request(Mac(mac): Mac, six: bool) -> proto::NetworkRequest {
    let name = wish::interface(0);
    let address = |ip: &[u8], prefix: u8| proto::Address {
        ip: ip.to_vec(),
        prefix: prefix.into(),
        ..Default::default()
    };
    let route = |any: &[u8], gateway: &[u8]| proto::Route {
        destination: any.to_vec(),
        gateway: gateway.to_vec(),
        interface: name.clone(),
        ..Default::default()
    };
    let mut addresses = vec![address(&ADDRESS.octets(), PREFIX)];
    let mut routes = vec![route(&[0; 4], &GATEWAY.octets())];
    if six {
        addresses.push(address(&ADDRESS6.octets(), PREFIX6));
        routes.push(route(&[0; 16], &GATEWAY6.octets()));
    }
    proto::NetworkRequest {
        interfaces: vec![proto::Interface {
            device_mac: mac.to_vec(),
            name: name.clone(),
            mtu: MTU.into(),
            addresses,
            ..Default::default()
        }],
        routes,
        names_port: NAMES_PORT,
        ..Default::default()
    }
}
