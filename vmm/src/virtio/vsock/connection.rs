//! One connection: a Unix socket on the host's side, credit and half-closes on both.

use super::packet::{HEADER, HOST_CID, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::spill::Spill;
use super::{BUF_ALLOC, BURST, VsockCounters};
use crate::virtio::buffers::{self, Buffers};
use crate::virtio::supply::Supply;
use crate::virtio::{Readiness, Watcher};
use std::io;
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// Both flags of a shutdown.
const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
/// Credit that may gather before the guest is told of it: half of what it can have out,
/// so that it never waits for a reader that keeps up.
const CREDIT_STEP: u32 = BUF_ALLOC as u32 / 2;
/// Most that a closing connection throws away of what the host wrote and the guest never
/// read: more than a Unix socket holds.
const MAX_DISCARD: usize = 4 << 20;

/// The guest broke the protocol: the connection is reset.
#[derive(Debug)]
pub(super) struct Violation;

/// What a turn at the receive queue came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// A packet went out; there may be more.
    Again,
    /// Nothing to say for now.
    Idle,
    /// The guest has no buffers.
    Starved,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
    socket: UnixStream,
    /// What the event loop watches for; `None`: not watched at all.
    watched: Option<Readiness>,
    /// In the device's list of those that may have something for the guest.
    pub(super) queued: bool,
    /// The guest forgot the connection: what it sent is still being passed on.
    pub(super) orphan: bool,

    /// From the guest, not taken by the socket yet.
    spill: Spill<BUF_ALLOC>,
    /// Bytes passed on to the socket (or thrown away, if nobody reads them).
    forwarded: Wrapping<u32>,
    /// What the guest knows of `forwarded`.
    advertised: Wrapping<u32>,
    /// The guest may still send.
    guest_sends: bool,
    /// The host still reads.
    host_receives: bool,

    /// Bytes sent to the guest.
    sent: Wrapping<u32>,
    /// How many of them the guest has read.
    peer_forwarded: Wrapping<u32>,
    /// How many unread ones it can hold.
    peer_alloc: u32,
    /// The guest still reads.
    guest_receives: bool,
    /// The host may still send.
    host_sends: bool,
    /// The socket had something when last asked.
    readable: bool,
    /// The other end of the socket is gone.
    hung_up: bool,

    owes_response: bool,
    owes_shutdown: bool,
    owes_credit: bool,
}

impl Connection {
    /// Accepts the guest's request.
    pub(super) fn new(socket: UnixStream, request: &Header) -> Self {
        Connection {
            guest_port: request.src_port,
            host_port: request.dst_port,
            socket,
            watched: None,
            queued: false,
            orphan: false,
            spill: Spill::default(),
            forwarded: Wrapping(0),
            advertised: Wrapping(0),
            guest_sends: true,
            host_receives: true,
            sent: Wrapping(0),
            peer_forwarded: Wrapping(request.fwd_cnt),
            peer_alloc: request.buf_alloc,
            guest_receives: true,
            host_sends: true,
            readable: false,
            hung_up: false,
            owes_response: true,
            owes_shutdown: false,
            owes_credit: false,
        }
    }

    /// Learns how much the guest has read.
    pub(super) fn update_credit(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = Wrapping(header.fwd_cnt);
    }

    /// Passes `len` bytes from the guest on.
    pub(super) fn take(&mut self, data: &mut Buffers, len: usize) -> Result<(), Violation> {
        if !self.guest_sends || len > BUF_ALLOC - self.spill.len() {
            return Err(Violation);
        }
        let mut left = len;
        while left > 0 && self.host_receives && self.spill.is_empty() {
            match data.send(self.socket.as_fd(), left) {
                Ok(sent) => left -= sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.host_stops_receiving(),
            }
        }
        if self.host_receives {
            self.spill.push(data, left);
            self.forward(len - left);
        } else {
            self.forward(len);
        }
        Ok(())
    }

    /// The guest won't send or receive any more.
    pub(super) fn guest_shutdown(&mut self, flags: u32) {
        if flags & SHUTDOWN_RECEIVE != 0 && self.guest_receives {
            self.guest_receives = false;
            self.readable = false;
            // Fails only if the other end is gone.
            let _ = self.socket.shutdown(Shutdown::Read);
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_sends = false;
            self.finish_sending();
        }
    }

    /// The guest closed for good.
    pub(super) fn guest_closed(&self) -> bool {
        !self.guest_sends && !self.guest_receives
    }

    /// The guest forgot the connection; true if there is nothing left to pass on.
    pub(super) fn abandon(&mut self) -> bool {
        self.orphan = true;
        self.guest_shutdown(SHUTDOWN_BOTH);
        self.done()
    }

    /// Nothing more will ever move.
    pub(super) fn done(&self) -> bool {
        self.orphan && self.spill.is_empty()
    }

    /// The guest wants to know its credit.
    pub(super) fn owe_credit(&mut self) {
        self.owes_credit = true;
    }

    /// The socket is ready.
    pub(super) fn ready(&mut self, readiness: Readiness) {
        if readiness & libc::EPOLLIN as u32 != 0 {
            self.readable = self.guest_receives && self.host_sends;
        }
        if readiness & libc::EPOLLOUT as u32 != 0 {
            self.flush();
        }
        if readiness & (libc::EPOLLHUP | libc::EPOLLERR) as u32 != 0 {
            self.hung_up = true;
            // What it wrote before is still there to be read.
            self.readable = self.guest_receives && self.host_sends;
            self.host_stops_receiving();
        }
    }

    /// Passes on what was held back.
    fn flush(&mut self) {
        while !self.spill.is_empty() {
            match buffers::send(self.socket.as_fd(), self.spill.parts()) {
                Ok(sent) => {
                    self.spill.consume(sent);
                    self.forward(sent);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.host_stops_receiving(),
            }
        }
        self.finish_sending();
    }

    /// Passes on what was held back, waiting for the reader until `deadline`; true if all is gone.
    pub(super) fn flush_until(&mut self, deadline: Instant) -> bool {
        loop {
            self.flush();
            if self.spill.is_empty() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !buffers::wait_writable(self.socket.as_fd(), left) {
                return false;
            }
        }
    }

    /// The end of the guest's bytes follows the last of them.
    fn finish_sending(&mut self) {
        if !self.guest_sends && self.spill.is_empty() {
            // Fails only if the other end is gone.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
    }

    /// Nobody reads the socket's other end: the guest is told, and its bytes go nowhere.
    fn host_stops_receiving(&mut self) {
        let lost = self.spill.len();
        self.spill.consume(lost);
        self.forward(lost);
        if self.host_receives {
            self.host_receives = false;
            self.owes_shutdown = true;
        }
    }

    fn forward(&mut self, bytes: usize) {
        // Bounded by BUF_ALLOC.
        self.forwarded += bytes as u32;
        self.owes_credit |= (self.forwarded - self.advertised).0 >= CREDIT_STEP;
    }

    /// Bytes that the guest can take now.
    fn credit(&self) -> usize {
        // A guest that claims to have read more than was sent has no credit until it makes sense again.
        self.peer_alloc
            .saturating_sub((self.sent - self.peer_forwarded).0) as usize
    }

    fn can_read(&self) -> bool {
        self.readable && self.credit() > 0
    }

    /// Whether a turn would do something.
    pub(super) fn has_something(&self) -> bool {
        !self.orphan
            && (self.owes_response || self.owes_shutdown || self.owes_credit || self.can_read())
    }

    /// Sends the guest one burst of data or one packet of control.
    pub(super) fn turn(&mut self, cid: u64, supply: &mut Supply, counters: &VsockCounters) -> Turn {
        if self.orphan {
            return Turn::Idle;
        }
        if self.owes_response {
            return self.control(cid, supply, op::RESPONSE, 0);
        }
        if self.can_read() {
            let want = self.credit().min(BURST);
            let room = supply.prepare(want).min(want);
            if room == 0 {
                return Turn::Starved;
            }
            match supply.fill(room, |target| target.receive(self.socket.as_fd(), room)) {
                Ok(0) => self.host_stops_sending(),
                Ok(count) => {
                    // Nobody will tell of the rest once the other end is gone.
                    self.readable = count == room || self.hung_up;
                    self.deliver(cid, supply, count);
                    counters.to_guest_bytes.add(count as u64);
                    return Turn::Again;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !self.hung_up => {
                    self.readable = false;
                }
                // ECONNRESET: the other end closed without reading all; what it wrote was read by now.
                Err(_) => {
                    self.host_stops_sending();
                    self.host_stops_receiving();
                }
            }
        }
        if self.owes_shutdown {
            let send = if self.host_sends { 0 } else { SHUTDOWN_SEND };
            let receive = if self.host_receives {
                0
            } else {
                SHUTDOWN_RECEIVE
            };
            return self.control(cid, supply, op::SHUTDOWN, send | receive);
        }
        if self.owes_credit {
            return self.control(cid, supply, op::CREDIT_UPDATE, 0);
        }
        Turn::Idle
    }

    fn host_stops_sending(&mut self) {
        self.readable = false;
        self.host_sends = false;
        self.owes_shutdown = true;
    }

    /// Hands the chains that `count` bytes were read into to the guest.
    fn deliver(&mut self, cid: u64, supply: &mut Supply, count: usize) {
        let mut left = count;
        while left > 0 {
            let template = self.header(cid, op::RW, 0);
            let filled = supply.finish(left, |len, front| {
                front.write(
                    &Header {
                        len: len as u32,
                        ..template
                    }
                    .bytes(),
                );
            });
            // The bytes were read into taken chains: there is one for each.
            let Some(filled) = filled else { break };
            left -= filled;
            self.sent += filled as u32;
        }
    }

    fn control(&mut self, cid: u64, supply: &mut Supply, op: u16, flags: u32) -> Turn {
        if supply.prepare(1) == 0 {
            return Turn::Starved;
        }
        let header = self.header(cid, op, flags);
        match op {
            op::RESPONSE => self.owes_response = false,
            op::SHUTDOWN => self.owes_shutdown = false,
            _ => {}
        }
        supply.finish(0, |_, front| {
            front.write(&header.bytes());
        });
        Turn::Again
    }

    /// A header to the guest. It tells of all credit, so that none is owed afterwards.
    fn header(&mut self, cid: u64, op: u16, flags: u32) -> Header {
        self.advertised = self.forwarded;
        self.owes_credit = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: BUF_ALLOC as u32,
            fwd_cnt: self.forwarded.0,
        }
    }

    /// The refusal that ends the connection on the guest's side.
    pub(super) fn reset_header(&mut self, cid: u64) -> Header {
        self.header(cid, op::RST, 0)
    }

    /// Watches the socket for what can be handled, and nothing else: the loop is level-triggered.
    pub(super) fn watch(&mut self, watcher: &dyn Watcher, token: u64) -> io::Result<()> {
        let wanted = self.wanted();
        if wanted == self.watched {
            return Ok(());
        }
        let fd = self.socket.as_raw_fd();
        match (self.watched, wanted) {
            (None, Some(interest)) => watcher.add(fd, interest, token)?,
            (Some(_), Some(interest)) => watcher.modify(fd, interest, token)?,
            (_, None) => watcher.remove(fd)?,
        }
        self.watched = wanted;
        Ok(())
    }

    fn wanted(&self) -> Option<Readiness> {
        if self.hung_up {
            // Would be reported for ever, and there is nothing more to learn.
            return None;
        }
        let mut interest = 0;
        if self.host_sends && self.guest_receives && !self.readable {
            interest |= libc::EPOLLIN;
        }
        if !self.spill.is_empty() {
            interest |= libc::EPOLLOUT;
        }
        // Even without interest the loop reports a hang-up.
        Some(interest as Readiness)
    }

    /// Stops watching, before the queues are given back or the socket is closed.
    pub(super) fn unwatch(&mut self, watcher: &dyn Watcher) {
        if self.watched.take().is_some() {
            // Fails only if it isn't watched.
            let _ = watcher.remove(self.socket.as_raw_fd());
        }
    }

    /// Bytes held for the host.
    pub(super) fn held(&self) -> usize {
        self.spill.len()
    }
}

impl Drop for Connection {
    /// Closing a Unix socket with unread input makes the other end's last read fail with
    /// ECONNRESET instead of reporting the end of the stream: throw the input away first.
    fn drop(&mut self) {
        if self.socket.shutdown(Shutdown::Read).is_err() {
            return;
        }
        buffers::discard_input(self.socket.as_fd(), MAX_DISCARD);
    }
}

/// Reserve of each receive chain.
pub(super) const RESERVE: usize = HEADER;
