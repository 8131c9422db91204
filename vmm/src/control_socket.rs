//! The VMM's end of the control socket: packets in and out, nothing of what they mean.

use crate::control::{MAX_MESSAGE, Message, Request};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

/// Most descriptors in one packet: Linux's own limit (SCM_MAX_FD).
const MAX_DESCRIPTORS: usize = 253;

/// An inherited SOCK_SEQPACKET socket.
#[derive(Debug)]
pub struct ControlSocket(OwnedFd);

/// What a read brought.
#[derive(Debug)]
pub enum Received {
    /// A request with the descriptors that came with it.
    Request(Request, Vec<OwnedFd>),
    /// Something else; the reason is for the shim.
    Malformed {
        /// The packet's `id`, 0 if it has none.
        id: u64,
        /// What's wrong.
        reason: String,
    },
    /// Nothing yet.
    Nothing,
    /// The other end is closed.
    Closed,
}

impl ControlSocket {
    /// Takes the inherited socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Takes the next packet, without waiting.
    pub fn receive(&self) -> io::Result<Received> {
        let mut packet = vec![0; MAX_MESSAGE];
        let mut space =
            vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(
            self.0.as_fd(),
            &mut [IoSliceMut::new(&mut packet)],
            &mut ancillary,
            flags,
        );
        let received = match received {
            Ok(received) => received,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                return Ok(Received::Nothing);
            }
            Err(rustix::io::Errno::CONNRESET) => return Ok(Received::Closed),
            Err(error) => return Err(error.into()),
        };
        let descriptors: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(rights) => Some(rights),
                _ => None,
            })
            .flatten()
            .collect();
        if received.bytes == 0 && descriptors.is_empty() {
            return Ok(Received::Closed); // an empty packet is no message
        }
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Ok(Received::Malformed {
                id: 0,
                reason: format!(
                    "packet larger than {MAX_MESSAGE} bytes or {MAX_DESCRIPTORS} descriptors"
                ),
            });
        }
        Ok(match parse(&packet[..received.bytes]) {
            Ok(request) => Received::Request(request, descriptors),
            Err((id, reason)) => Received::Malformed { id, reason },
        })
    }

    /// Sends a message. One that a stuck reader has no room for is lost: the guest comes first.
    pub fn send(&self, message: &Message) {
        let Ok(packet) = serde_json::to_vec(message) else {
            return;
        };
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let _ = send(&self.0, &packet, flags);
    }
}

impl AsRawFd for ControlSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A request, or the id to answer to and what is wrong.
fn parse(packet: &[u8]) -> Result<Request, (u64, String)> {
    serde_json::from_slice(packet).map_err(|error| {
        let id = serde_json::from_slice::<serde_json::Value>(packet)
            .ok()
            .and_then(|value| value.get("id")?.as_u64());
        (id.unwrap_or(0), format!("not a request: {error}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Answer, Command, CpuLimit};
    use proptest::prelude::*;
    use rustix::net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SocketFlags, SocketType, sendmsg,
        socketpair,
    };
    use std::io::IoSlice;
    use std::mem::MaybeUninit;

    fn pair() -> (ControlSocket, OwnedFd) {
        let (a, b) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("socketpair");
        (ControlSocket::new(a), b)
    }

    fn say(shim: &OwnedFd, packet: &[u8]) {
        send(shim, packet, SendFlags::empty()).expect("sent");
    }

    #[test]
    fn receive_request_parses_command() {
        let (socket, shim) = pair();
        say(&shim, br#"{"id":7,"command":"balloon","mib":64}"#);

        match socket.receive().expect("received") {
            Received::Request(request, fds) => {
                assert_eq!(request.id, 7);
                assert_eq!(request.command, Command::Balloon { mib: 64 });
                assert!(fds.is_empty());
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn receive_descriptors_come_with_their_request() {
        let (socket, shim) = pair();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let rights = [shim.as_fd(), shim.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&rights)));
        let packet = br#"{"id":1,"command":"swap-disk","disk":"root"}"#;
        sendmsg(
            &shim,
            &[IoSlice::new(packet)],
            &mut ancillary,
            SendFlags::empty(),
        )
        .expect("sent");

        match socket.receive().expect("received") {
            Received::Request(_, fds) => assert_eq!(fds.len(), 2),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn receive_malformed_request_keeps_its_id() {
        for (packet, expected) in [
            (&br#"{"id":9,"command":"explode"}"#[..], 9),
            (br#"{"id":9,"command":"balloon"}"#, 9),
            (br#"{"id":-1,"command":"pause"}"#, 0),
            (b"\xff\xfe", 0),
            (b"[]", 0),
        ] {
            let (socket, shim) = pair();
            say(&shim, packet);

            match socket.receive().expect("received") {
                Received::Malformed { id, reason } => {
                    assert_eq!(id, expected);
                    assert!(reason.starts_with("not a request"), "{reason}");
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn receive_oversized_packet_is_malformed() {
        let (socket, shim) = pair();
        say(&shim, &[b' '; MAX_MESSAGE + 1]);

        let received = socket.receive().expect("received");

        assert!(matches!(received, Received::Malformed { .. }));
    }

    #[test]
    fn receive_after_close_is_closed() {
        let (socket, shim) = pair();
        assert!(matches!(socket.receive(), Ok(Received::Nothing)));

        drop(shim);

        assert!(matches!(socket.receive(), Ok(Received::Closed)));
    }

    #[test]
    fn send_to_stuck_reader_does_not_wait() {
        let (socket, _shim) = pair();
        let message = Message::Reply {
            id: 1,
            result: Ok(Answer::Done),
        };

        for _ in 0..10_000 {
            socket.send(&message);
        }
    }

    proptest! {
        #[test]
        fn parse_anything_never_panics(packet in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&packet);
        }

        #[test]
        fn parse_every_request_that_can_be_written(
            id: u64, mib: u32, port: u32, disk in "[a-z]{0,20}", quota_us: u64, period_us: u64,
        ) {
            for command in [
                Command::Pause, Command::Resume, Command::Statistics, Command::Stop,
                Command::Balloon { mib }, Command::VsockListen { port }, Command::SwapDisk { disk: disk.clone() },
                Command::LimitCpu { limit: None }, Command::LimitCpu { limit: Some(CpuLimit { quota_us, period_us }) },
            ] {
                let request = Request { id, command };
                let packet = serde_json::to_vec(&request).expect("serializable");
                prop_assert_eq!(parse(&packet), Ok(request));
            }
        }
    }
}
