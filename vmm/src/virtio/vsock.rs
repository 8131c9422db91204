//! virtio-vsock that ends in Unix sockets: no vhost, no CID to allocate on the host.
//!
//! The guest connects to ports of the host; each port that the shim registered
//! takes one connection, anything else is refused. Data goes from guest memory
//! into the Unix socket, and from it into guest memory, without a copy of ours;
//! only what a slow reader doesn't take is held, in a ring as large as the credit
//! that the guest has. When the guest's own credit or its buffers are used up, the
//! Unix socket isn't read, so that its writer waits. Ends of streams follow the
//! last byte, in both directions, and survive the guest's death.
//!
//! System calls: sendmsg, recvmsg, recvfrom, shutdown, close, epoll_ctl, read and
//! write (eventfds), poll (only in [`Vsock::drain`]), and mmap and munmap for buffers.

mod connection;
mod packet;
mod spill;

#[cfg(test)]
mod tests;

use super::counters::counters;
use super::ring::{Chain, Ring};
use super::saved::{self, RestoreError};
use super::supply::Supply;
use super::{Activation, ActiveQueue, Device, Interrupt, Readiness, Watcher};
use connection::{Connection, RESERVE, Turn};
use packet::{HEADER, HOST_CID, Header, TYPE_STREAM, op};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// Entries of the receive queue. Linux fills it with 4 KiB buffers while it boots.
const RX_SIZE: u16 = 64;
/// Entries of the transmit queue: two for each packet of up to 64 KiB.
const TX_SIZE: u16 = 64;
/// Entries of the event queue: Linux supplies 8 buffers.
const EVENT_SIZE: u16 = 8;
/// Bytes that the guest may have out on a connection, and so the most that a slow reader
/// makes us hold: what Linux has for its side, and twice what it sends while we answer.
const BUF_ALLOC: usize = 256 << 10;
/// Bytes in one packet of the guest: what Linux sends at most (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
const MAX_PACKET: usize = 64 << 10;
/// Bytes read from a Unix socket at once: one system call fills some 17 of Linux' buffers.
const BURST: usize = 64 << 10;
/// Connections at once: three streams each for some 300 processes. With the ring of each
/// full it bounds the memory that a guest and its slow readers can claim to 256 MiB.
const MAX_CONNECTIONS: usize = 1024;
/// Refusals waiting for receive buffers; the guest's packets wait when there are more.
const MAX_RESETS: usize = 64;
/// Packets of the guest handled before other devices get their turn: 2 MiB at most.
const PACKETS_PER_TURN: usize = 32;
/// Bursts and control packets to the guest before other devices get their turn.
const TURNS_PER_TURN: usize = 32;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET: all connections are gone.
const EVENT_TRANSPORT_RESET: u32 = 0;

/// Tokens below are the queues' kicks; connections count up from here.
const FIRST_CONNECTION: u64 = 16;
const TOKEN_RX: u64 = 0;
const TOKEN_TX: u64 = 1;
const TOKEN_EVENT: u64 = 2;

counters! {
    /// What the device did.
    pub struct VsockCounters {
        /// Connections that the guest made.
        connections,
        /// Connection attempts refused.
        refused,
        /// Bytes from the guest.
        from_guest_bytes,
        /// Bytes to the guest.
        to_guest_bytes,
        /// Connections reset because the guest broke the protocol.
        violations,
        /// Packets that make no sense, dropped.
        malformed_packets,
        /// Descriptor chains that couldn't be walked.
        malformed_chains,
    }
}

/// Called with the port at each connection of the guest.
pub type OnConnect = Box<dyn FnMut(u32) + Send>;

/// A virtio-vsock device.
pub struct Vsock {
    cid: u32,
    /// Ports that take a connection, with the socket that becomes it.
    listeners: BTreeMap<u32, UnixStream>,
    table: Table,
    counters: VsockCounters,
    on_connect: Option<OnConnect>,
    /// The guest must be told that its connections are gone.
    owes_transport_reset: bool,
    /// The driver started from nothing: the table is of its predecessor.
    stale: bool,
    active: Option<Active>,
}

/// All connections.
#[derive(Default)]
struct Table {
    next_id: u64,
    by_id: BTreeMap<u64, Connection>,
    /// (guest's port, host's port) of those that the guest still knows.
    by_ports: BTreeMap<(u32, u32), u64>,
    /// Those that may have something for the guest, in turn.
    queue: VecDeque<u64>,
    /// Refusals owed to the guest.
    resets: VecDeque<Header>,
}

impl Table {
    /// Lines a connection up if it has something for the guest.
    fn enqueue(&mut self, id: u64) {
        if let Some(connection) = self.by_id.get_mut(&id)
            && !connection.queued
            && connection.has_something()
        {
            connection.queued = true;
            self.queue.push_back(id);
        }
    }
}

struct Active {
    rx: Supply,
    tx: Ring,
    event: Ring,
    chain: Chain,
    interrupt: Arc<dyn Interrupt>,
    watcher: Box<dyn Watcher>,
}

/// What the device remembers: connections don't survive, and the guest is told so.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VsockState {
    cid: u32,
}

impl Vsock {
    /// Builds the device for the guest's context id.
    pub fn new(cid: u32, on_connect: Option<OnConnect>) -> Self {
        Vsock {
            cid,
            listeners: BTreeMap::new(),
            table: Table {
                next_id: FIRST_CONNECTION,
                ..Table::default()
            },
            counters: VsockCounters::default(),
            on_connect,
            owes_transport_reset: false,
            stale: false,
            active: None,
        }
    }

    /// Builds the device from a saved one, with this context id; connections are gone and the guest will be told.
    pub fn restore(
        cid: u32,
        on_connect: Option<OnConnect>,
        state: &serde_json::Value,
    ) -> Result<Self, RestoreError> {
        // The guest reads its CID anew when it learns of the reset.
        let VsockState { cid: _ } = saved::parse("vsock", state)?;
        let mut vsock = Vsock::new(cid, on_connect);
        vsock.owes_transport_reset = true;
        Ok(vsock)
    }

    /// Lets the guest connect once to `port` of the host; `socket` becomes the connection.
    pub fn listen(&mut self, port: u32, socket: UnixStream) -> io::Result<()> {
        match self.listeners.entry(port) {
            std::collections::btree_map::Entry::Occupied(_) => {
                let why = format!("vsock port {port} already waits for its connection");
                Err(io::Error::new(io::ErrorKind::AddrInUse, why))
            }
            std::collections::btree_map::Entry::Vacant(entry) => {
                entry.insert(socket);
                Ok(())
            }
        }
    }

    /// Passes on all that the guest has sent, for the end of the VM: packets still in the queue, then what slow
    /// readers haven't taken, waiting for them until `timeout`. Returns the bytes that were lost nevertheless.
    pub fn drain(&mut self, timeout: Duration) -> usize {
        let deadline = Instant::now() + timeout;
        // A queue holds at most its size, which some turns empty.
        for _ in 0..=usize::from(TX_SIZE) / PACKETS_PER_TURN {
            self.handle(TOKEN_TX, libc::EPOLLIN as u32);
        }
        let mut lost = 0;
        for connection in self.table.by_id.values_mut() {
            if !connection.flush_until(deadline) {
                lost += connection.held();
            }
        }
        lost
    }

    /// What the device did so far, by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut list = self.counters.list();
        list.push(("open_connections", self.table.by_id.len() as u64));
        list
    }

    /// Takes packets off the transmit queue.
    fn transmit(&mut self, active: &mut Active) {
        active.tx.acknowledge();
        let mut more = true;
        for _ in 0..PACKETS_PER_TURN {
            if self.table.resets.len() >= MAX_RESETS {
                // Goes on when the guest has taken some.
                more = false;
                break;
            }
            if !active.tx.pop(&mut active.chain) {
                more = active.tx.rearm();
                break;
            }
            self.packet(&mut active.chain, active.watcher.as_ref());
            active.tx.push(active.chain.head, 0);
        }
        if more {
            active.tx.kick_self();
        }
        active.tx.notify(active.interrupt.as_ref());
    }

    /// Handles one packet of the guest.
    fn packet(&mut self, chain: &mut Chain, watcher: &dyn Watcher) {
        let Some(bytes) = chain.readable.read::<HEADER>() else {
            self.counters.malformed_packets.add(1);
            return;
        };
        let header = Header::parse(&bytes);
        if header.src_cid != u64::from(self.cid) {
            self.counters.malformed_packets.add(1);
            return;
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            self.refuse(&header);
            return;
        }
        let Some(&id) = self.table.by_ports.get(&(header.src_port, header.dst_port)) else {
            match header.op {
                op::REQUEST => self.connect(&header, watcher),
                _ => self.refuse(&header),
            }
            return;
        };
        let Some(connection) = self.table.by_id.get_mut(&id) else {
            return;
        };
        connection.update_credit(&header);
        let len = header.len as usize;
        let kept = match header.op {
            op::RW if len <= MAX_PACKET && len <= chain.readable.len() => {
                self.counters.from_guest_bytes.add(u64::from(header.len));
                connection.take(&mut chain.readable, len).is_ok()
            }
            op::SHUTDOWN => {
                connection.guest_shutdown(header.flags);
                if connection.guest_closed() {
                    // The guest waits for this answer before it forgets the connection.
                    let answer = connection.reset_header(self.cid.into());
                    self.table.resets.push_back(answer);
                    self.forget(id, watcher);
                    return;
                }
                true
            }
            op::RST => {
                self.forget(id, watcher);
                return;
            }
            op::CREDIT_UPDATE => true,
            op::CREDIT_REQUEST => {
                connection.owe_credit();
                true
            }
            _ => false,
        };
        if kept {
            self.settle(id, watcher)
        } else {
            self.violation(id, watcher)
        }
    }

    /// Answers a packet that belongs to no connection.
    fn refuse(&mut self, header: &Header) {
        if header.op == op::RST {
            return;
        }
        if header.op == op::REQUEST {
            self.counters.refused.add(1);
        }
        self.table.resets.push_back(header.reset());
    }

    /// The guest asks for a connection.
    fn connect(&mut self, header: &Header, watcher: &dyn Watcher) {
        if self.table.by_id.len() >= MAX_CONNECTIONS {
            self.refuse(header);
            return;
        }
        let Some(socket) = self.listeners.remove(&header.dst_port) else {
            self.refuse(header);
            return;
        };
        let id = self.table.next_id;
        self.table.next_id += 1;
        self.table
            .by_ports
            .insert((header.src_port, header.dst_port), id);
        self.table.by_id.insert(id, Connection::new(socket, header));
        self.counters.connections.add(1);
        if let Some(on_connect) = &mut self.on_connect {
            on_connect(header.dst_port);
        }
        self.settle(id, watcher);
    }

    /// The guest broke the protocol on a connection.
    fn violation(&mut self, id: u64, watcher: &dyn Watcher) {
        self.counters.violations.add(1);
        if let Some(connection) = self.table.by_id.get_mut(&id) {
            let reset = connection.reset_header(self.cid.into());
            self.table.resets.push_back(reset);
        }
        self.forget(id, watcher);
    }

    /// The guest doesn't know the connection any more: it lives on until what was sent is passed on.
    fn forget(&mut self, id: u64, watcher: &dyn Watcher) {
        if let Some(connection) = self.table.by_id.get_mut(&id) {
            self.table
                .by_ports
                .remove(&(connection.guest_port, connection.host_port));
            connection.abandon();
            self.settle(id, watcher);
        }
    }

    /// Brings what is watched and queued in line with a connection's state.
    fn settle(&mut self, id: u64, watcher: &dyn Watcher) {
        let Some(connection) = self.table.by_id.get_mut(&id) else {
            return;
        };
        if connection.done() {
            connection.unwatch(watcher);
            self.table.by_id.remove(&id);
            return;
        }
        self.table.enqueue(id);
        let Some(connection) = self.table.by_id.get_mut(&id) else {
            return;
        };
        // Without a watch the connection would hang: end it instead. Only lack of kernel memory comes here.
        if connection.watch(watcher, id).is_err() {
            connection.unwatch(watcher);
            let known = !connection.orphan;
            let reset = connection.reset_header(self.cid.into());
            let ports = (connection.guest_port, connection.host_port);
            self.table.by_id.remove(&id);
            if known {
                self.table.by_ports.remove(&ports);
                self.table.resets.push_back(reset);
            }
        }
    }

    /// Sends the guest what is owed to it, connection by connection.
    fn receive(&mut self, active: &mut Active) {
        let refusals_waited = self.table.resets.len() >= MAX_RESETS;
        let mut starved = false;
        for _ in 0..TURNS_PER_TURN {
            if let Some(reset) = self.table.resets.front() {
                if active.rx.prepare(1) == 0 {
                    starved = true;
                    break;
                }
                let bytes = reset.bytes();
                active.rx.finish(0, |_, front| {
                    front.write(&bytes);
                });
                self.table.resets.pop_front();
                continue;
            }
            let Some(id) = self.table.queue.pop_front() else {
                break;
            };
            let Some(connection) = self.table.by_id.get_mut(&id) else {
                continue;
            };
            match connection.turn(self.cid.into(), &mut active.rx, &self.counters) {
                Turn::Again => self.table.queue.push_back(id),
                Turn::Idle => {
                    connection.queued = false;
                    self.settle(id, active.watcher.as_ref());
                }
                Turn::Starved => {
                    self.table.queue.push_front(id);
                    starved = true;
                    break;
                }
            }
        }
        let waiting = !self.table.resets.is_empty() || !self.table.queue.is_empty();
        if waiting && (!starved || active.rx.rearm()) {
            active.rx.ring().kick_self();
        }
        active.rx.notify(active.interrupt.as_ref());
        if refusals_waited && self.table.resets.len() < MAX_RESETS {
            active.tx.kick_self();
        }
    }

    /// Tells the guest that its connections are gone, if it must be told.
    fn send_event(&mut self, active: &mut Active) {
        active.event.acknowledge();
        while self.owes_transport_reset {
            if !active.event.pop(&mut active.chain) {
                if active.event.rearm() {
                    active.event.kick_self();
                }
                break;
            }
            let written = active
                .chain
                .writable
                .write(&EVENT_TRANSPORT_RESET.to_le_bytes());
            self.owes_transport_reset = !written;
            active
                .event
                .push(active.chain.head, if written { 4 } else { 0 });
        }
        active.event.notify(active.interrupt.as_ref());
    }
}

impl Device for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[RX_SIZE, TX_SIZE, EVENT_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        saved::read_config(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation {
            memory,
            queues,
            features,
            interrupt,
            watcher,
        } = activation;
        let memory = Arc::new(memory);
        let [rx, tx, event] = Ring::all(&memory, queues, features)?;
        // Its connections end in the event loop: closing sockets isn't for a vCPU's thread.
        self.stale = rx.fresh() && tx.fresh();
        for (ring, token) in [(&rx, TOKEN_RX), (&tx, TOKEN_TX), (&event, TOKEN_EVENT)] {
            ring.watch(watcher.as_ref(), token)?;
        }
        if !self.stale {
            let ids: Vec<u64> = self.table.by_id.keys().copied().collect();
            for id in ids {
                self.settle(id, watcher.as_ref());
            }
        }
        let chain = Chain::new(&memory);
        let rx = Supply::new(&memory, rx, RESERVE);
        self.active = Some(Active {
            rx,
            tx,
            event,
            chain,
            interrupt,
            watcher,
        });
        Ok(())
    }

    fn handle(&mut self, token: u64, readiness: Readiness) {
        let Some(mut active) = self.active.take() else {
            return;
        };
        if std::mem::take(&mut self.stale) {
            let next_id = self.table.next_id;
            self.table = Table {
                next_id,
                ..Table::default()
            };
        }
        match token {
            TOKEN_RX => active.rx.ring().acknowledge(),
            TOKEN_TX => self.transmit(&mut active),
            TOKEN_EVENT => self.send_event(&mut active),
            id => {
                if let Some(connection) = self.table.by_id.get_mut(&id) {
                    connection.ready(readiness);
                    self.table.enqueue(id);
                }
            }
        }
        self.receive(&mut active);
        if token >= FIRST_CONNECTION {
            // Only now: a connection whose input was read keeps its watch as it is.
            self.settle(token, active.watcher.as_ref());
        }
        let rings = [active.rx.ring(), &active.tx, &active.event];
        self.counters
            .malformed_chains
            .set(rings.iter().map(|ring| ring.malformed()).sum());
        self.active = Some(active);
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        let Some(Active {
            rx,
            tx,
            event,
            chain: _,
            interrupt: _,
            watcher,
        }) = self.active.take()
        else {
            return Vec::new();
        };
        for connection in self.table.by_id.values_mut() {
            connection.unwatch(watcher.as_ref());
        }
        for ring in [rx.ring(), &tx, &event] {
            if ring.usable() {
                // Fails only if it was never added.
                let _ = watcher.remove(ring.kick().as_raw_fd());
            }
        }
        vec![rx.into_inner(), tx.into_inner(), event.into_inner()]
    }

    fn save(&self) -> serde_json::Value {
        let Vsock {
            cid,
            listeners: _,
            table: _,
            counters: _,
            on_connect: _,
            owes_transport_reset: _,
            stale: _,
            active: _,
        } = self;
        saved::value(&VsockState { cid: *cid })
    }
}
