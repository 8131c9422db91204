//! The device against a mock guest that speaks the protocol, well and badly.

use super::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;
use crate::virtio::testing::{Desc, Driver, HOLE, MEMORY_END};
use proptest::prelude::*;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::{Arc as StdArc, Mutex};

mod ends;

const CID: u32 = 7;
const GUEST_PORT: u32 = 5000;
const PORT: u32 = 1024;
/// What Linux posts: a page minus its bookkeeping.
const RX_BUFFER: u32 = 3776;
/// What the mock guest can hold for each connection.
const GUEST_ALLOC: u32 = 64 << 10;

struct Guest {
    vsock: Vsock,
    driver: Driver,
    /// Address of each receive buffer by its head.
    rx_buffers: BTreeMap<u32, u64>,
    tx_buffer: u64,
    /// Bytes of data read so far, as told to the device.
    fwd_cnt: u32,
    /// What the device told.
    device_credit: (u32, u32),
    sent: u32,
}

impl Guest {
    fn new() -> Self {
        Self::with(Vsock::new(CID, None))
    }

    fn with(mut vsock: Vsock) -> Self {
        let mut driver = Driver::new(&vsock);
        driver.activate(&mut vsock);
        let tx_buffer = driver.alloc(128 << 10);
        let rx_buffers = BTreeMap::new();
        Guest {
            vsock,
            driver,
            rx_buffers,
            tx_buffer,
            fwd_cnt: 0,
            device_credit: (0, 0),
            sent: 0,
        }
    }

    /// A guest with all receive buffers posted and `PORT` listening; returns the host's end.
    fn listening() -> (Self, UnixStream) {
        let mut guest = Guest::new();
        let host = guest.listen(PORT);
        guest.supply(RX_SIZE.into());
        (guest, host)
    }

    /// The same, connected.
    fn connected() -> (Self, UnixStream) {
        let (mut guest, host) = Self::listening();
        guest.send(op::REQUEST, 0, &[]);
        let packets = guest.receive();
        assert_eq!(packets[0].0.op, op::RESPONSE);
        (guest, host)
    }

    fn listen(&mut self, port: u32) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.vsock.listen(port, ours).unwrap();
        theirs.set_nonblocking(true).unwrap();
        theirs
    }

    fn supply(&mut self, count: usize) {
        for _ in 0..count {
            let address = self.driver.alloc(RX_BUFFER.into());
            self.post(address);
        }
        self.driver.queues[0].kick();
    }

    fn post(&mut self, address: u64) {
        let head = self.driver.queues[0].add(&[Desc::writable(address, RX_BUFFER)]);
        self.rx_buffers.insert(head.into(), address);
    }

    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: GUEST_PORT,
            dst_port: PORT,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: GUEST_ALLOC,
            fwd_cnt: self.fwd_cnt,
        }
    }

    fn send(&mut self, op: u16, flags: u32, data: &[u8]) {
        let header = Header {
            flags,
            len: data.len() as u32,
            ..self.header(op)
        };
        self.send_raw(&header, data);
    }

    /// Sends a packet and lets the device rest.
    fn send_raw(&mut self, header: &Header, data: &[u8]) {
        self.driver.write(self.tx_buffer, &header.bytes());
        self.driver.write(self.tx_buffer + 64, data);
        let mut chain = vec![Desc::readable(self.tx_buffer, HEADER as u32)];
        if !data.is_empty() {
            chain.push(Desc::readable(self.tx_buffer + 64, data.len() as u32));
        }
        self.transmit(&chain);
        self.sent = self.sent.wrapping_add(data.len() as u32);
    }

    fn transmit(&mut self, chain: &[Desc]) {
        let head = self.driver.queues[1].add(chain);
        self.driver.queues[1].kick();
        self.driver.settle(&mut self.vsock);
        assert_eq!(self.driver.queues[1].take_used(), [(head.into(), 0)]);
    }

    /// Takes what the device sent, without posting the buffers anew.
    fn receive_without_refill(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.driver.settle(&mut self.vsock);
        let mut packets = Vec::new();
        for (head, len) in self.driver.queues[0].take_used() {
            let address = self.rx_buffers.remove(&head).unwrap();
            let bytes = self.driver.read(address, len as usize);
            let header = Header::parse(bytes[..HEADER].try_into().unwrap());
            assert_eq!(header.len as usize, bytes.len() - HEADER);
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
            self.device_credit = (header.buf_alloc, header.fwd_cnt);
            packets.push((header, bytes[HEADER..].to_vec()));
        }
        packets
    }

    /// Takes what the device sent and posts as many buffers.
    fn receive(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            let known: Vec<u64> = self.rx_buffers.values().copied().collect();
            let packets = self.receive_without_refill();
            let left: Vec<u64> = self.rx_buffers.values().copied().collect();
            for address in known.into_iter().filter(|address| !left.contains(address)) {
                self.post(address);
            }
            if packets.is_empty() {
                return all;
            }
            self.driver.queues[0].kick();
            all.extend(packets);
        }
    }

    fn ops(&mut self) -> Vec<u16> {
        self.receive().iter().map(|(header, _)| header.op).collect()
    }

    /// Tells the device that everything was read.
    fn credit(&mut self, read: usize) {
        self.fwd_cnt = self.fwd_cnt.wrapping_add(read as u32);
        self.send(op::CREDIT_UPDATE, 0, &[]);
    }

    /// Bytes that the device would accept now.
    fn may_send(&self) -> usize {
        let (alloc, forwarded) = self.device_credit;
        alloc.wrapping_sub(self.sent.wrapping_sub(forwarded)) as usize
    }

    fn counter(&self, name: &str) -> u64 {
        self.vsock
            .counters()
            .iter()
            .find(|(n, _)| *n == name)
            .unwrap()
            .1
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i % 251) as u8 ^ (i >> 12) as u8)
        .collect()
}

/// Reads what is there; true if the stream ended.
fn read_available(host: &mut UnixStream, out: &mut Vec<u8>) -> bool {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match host.read(&mut buffer) {
            Ok(0) => return true,
            Ok(n) => out.extend(&buffer[..n]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
            Err(error) => panic!("the host's end fails: {error}"),
        }
    }
}

fn data_of(packets: &[(Header, Vec<u8>)]) -> Vec<u8> {
    packets.iter().flat_map(|(_, data)| data.clone()).collect()
}

#[test]
fn request_to_listening_port_is_accepted_once() {
    let ports = StdArc::new(Mutex::new(Vec::new()));
    let seen = StdArc::clone(&ports);
    let mut guest = Guest::with(Vsock::new(
        CID,
        Some(Box::new(move |port| seen.lock().unwrap().push(port))),
    ));
    let _host = guest.listen(PORT);
    guest.supply(8);

    guest.send(op::REQUEST, 0, &[]);
    let packets = guest.receive();
    assert_eq!(packets.len(), 1);
    let response = packets[0].0;
    assert_eq!(
        (response.op, response.src_port, response.dst_port),
        (op::RESPONSE, PORT, GUEST_PORT)
    );
    assert_eq!(response.buf_alloc as usize, BUF_ALLOC);

    let second = Header {
        src_port: GUEST_PORT + 1,
        ..guest.header(op::REQUEST)
    };
    guest.send_raw(&second, &[]);
    assert_eq!(guest.ops(), [op::RST]);
    assert_eq!(*ports.lock().unwrap(), [PORT]);
    assert_eq!(
        (guest.counter("connections"), guest.counter("refused")),
        (1, 1)
    );
}

#[test]
fn listen_same_port_twice_is_refused_until_it_is_used() {
    let (mut guest, _host) = Guest::listening();
    let (socket, _other) = UnixStream::pair().unwrap();
    let refusal = guest
        .vsock
        .listen(PORT, socket.try_clone().unwrap())
        .unwrap_err();
    assert!(refusal.to_string().contains("1024"), "{refusal}");
    guest.send(op::REQUEST, 0, &[]);
    guest.vsock.listen(PORT, socket).unwrap();
}

#[test]
fn packet_for_nobody_gets_a_reset() {
    let mut guest = Guest::new();
    guest.supply(64);
    let base = guest.header(op::REQUEST);
    let strays = [
        base,
        guest.header(op::RW),
        guest.header(op::SHUTDOWN),
        guest.header(op::CREDIT_REQUEST),
        guest.header(99),
        Header { dst_cid: 3, ..base },
        Header {
            dst_cid: u64::MAX,
            ..base
        },
        Header { kind: 2, ..base },
    ];
    for stray in strays {
        guest.driver.write(guest.tx_buffer, &stray.bytes());
        guest.transmit(&[Desc::readable(guest.tx_buffer, HEADER as u32)]);
        let used = guest.driver.queues[0].take_used();
        let [(head, len)] = used[..] else {
            panic!("{stray:?}: {used:?}")
        };
        let bytes = guest.driver.read(guest.rx_buffers[&head], len as usize);
        let reset = Header::parse(bytes[..].try_into().unwrap());
        assert_eq!(reset, stray.reset());
    }
    guest.send(op::RST, 0, &[]);
    assert!(guest.ops().is_empty());
}

#[test]
fn packet_with_forged_source_is_dropped() {
    let (mut guest, _host) = Guest::listening();
    let forged = Header {
        src_cid: 8,
        ..guest.header(op::REQUEST)
    };
    guest.send_raw(&forged, &[]);
    assert!(guest.ops().is_empty());
    assert_eq!(guest.counter("malformed_packets"), 1);
}

#[test]
fn data_both_ways_arrives() {
    let (mut guest, mut host) = Guest::connected();
    guest.send(op::RW, 0, b"hello host");
    host.write_all(b"hello guest").unwrap();

    let packets = guest.receive();
    let mut seen = Vec::new();
    assert!(!read_available(&mut host, &mut seen));

    assert_eq!(seen, b"hello host");
    assert_eq!(data_of(&packets), b"hello guest");
    assert_eq!(packets[0].0.fwd_cnt, 10);
    assert_eq!(guest.counter("from_guest_bytes"), 10);
    assert_eq!(guest.counter("to_guest_bytes"), 11);
}

#[test]
fn data_before_response_waits_for_buffers_in_order() {
    let mut guest = Guest::new();
    let mut host = guest.listen(PORT);
    host.write_all(b"early").unwrap();
    guest.send(op::REQUEST, 0, &[]);
    guest.driver.settle(&mut guest.vsock);

    guest.supply(1);
    assert_eq!(guest.receive_without_refill()[0].0.op, op::RESPONSE);
    guest.supply(1);
    let packets = guest.receive_without_refill();
    assert_eq!(
        (packets[0].0.op, &packets[0].1[..]),
        (op::RW, &b"early"[..])
    );
}

#[test]
fn guest_data_slow_reader_is_held_within_credit_and_none_is_lost() {
    let (mut guest, mut host) = Guest::connected();
    let total = 4 << 20;
    let data = pattern(total);
    let mut at = 0;
    let mut seen: Vec<u8> = Vec::new();
    let mut stalls = 0;
    while seen.len() < total {
        guest.receive();
        let n = guest.may_send().min(MAX_PACKET).min(total - at);
        if n > 0 {
            guest.send(op::RW, 0, &data[at..at + n]);
            at += n;
            continue;
        }
        // Out of credit: only now the reader moves, a little.
        stalls += 1;
        let mut buffer = vec![0; 100_000];
        let n = host.read(&mut buffer).unwrap();
        seen.extend(&buffer[..n]);
    }
    assert!(seen == data);
    assert!(stalls > 10, "the reader was never slow");
    assert_eq!(guest.counter("violations"), 0);
}

#[test]
fn guest_data_beyond_credit_resets_the_connection() {
    let (mut guest, host) = Guest::connected();
    // Nobody reads: the socket takes some, the ring takes BUF_ALLOC, then it is over.
    for _ in 0..32 {
        guest.send(op::RW, 0, &pattern(MAX_PACKET));
        if guest.counter("violations") > 0 {
            break;
        }
    }
    assert_eq!(guest.counter("violations"), 1);
    assert_eq!(guest.ops().last(), Some(&op::RST));

    // What was accepted before is still delivered.
    let mut host = host;
    let mut seen = Vec::new();
    while !read_available(&mut host, &mut seen) {
        guest.driver.settle(&mut guest.vsock);
    }
    assert!(seen.len() >= BUF_ALLOC);
    assert_eq!(guest.counter("open_connections"), 0);
}

#[test]
fn guest_data_len_larger_than_chain_or_bound_resets_the_connection() {
    for len in [11, MAX_PACKET as u32 + 1, u32::MAX] {
        let (mut guest, _host) = Guest::connected();
        let lie = Header {
            len,
            ..guest.header(op::RW)
        };
        guest.send_raw(&lie, &[1; 10]);
        assert_eq!(guest.ops(), [op::RST], "{len}");
    }
}

#[test]
fn guest_data_chain_longer_than_len_excess_is_ignored() {
    let (mut guest, mut host) = Guest::connected();
    let header = Header {
        len: 3,
        ..guest.header(op::RW)
    };
    guest.send_raw(&header, b"abcdef");
    let mut seen = Vec::new();
    read_available(&mut host, &mut seen);
    assert_eq!(seen, b"abc");
}

#[test]
fn credit_request_is_answered() {
    let (mut guest, _host) = Guest::connected();
    guest.send(op::RW, 0, b"12345");
    guest.send(op::CREDIT_REQUEST, 0, &[]);
    let packets = guest.receive();
    assert_eq!(
        (packets[0].0.op, packets[0].0.fwd_cnt),
        (op::CREDIT_UPDATE, 5)
    );
}

#[test]
fn host_data_waits_for_guest_credit_and_the_writer_blocks() {
    let (mut guest, mut host) = Guest::connected();
    let mut written = 0;
    let data = pattern(8 << 20);
    let mut got = Vec::new();
    loop {
        match host.write(&data[written..]) {
            Ok(n) => written += n,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let packets = guest.receive();
                if packets.is_empty() {
                    break;
                }
                got.extend(data_of(&packets));
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(
        got.len(),
        GUEST_ALLOC as usize,
        "exactly the credit went out"
    );
    assert!(written < data.len());

    while got.len() < data.len() {
        let before = got.len();
        guest.credit(before - guest.fwd_cnt as usize);
        got.extend(data_of(&guest.receive()));
        if written < data.len() {
            match host.write(&data[written..]) {
                Ok(n) => written += n,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
    }
    assert!(got == data);
}

#[test]
fn host_data_no_receive_buffers_loop_does_not_spin() {
    let (mut guest, mut host) = Guest::connected();
    // Take all buffers away.
    host.write_all(&pattern(60_000)).unwrap();
    while !guest.receive_without_refill().is_empty() {}
    let left = guest.rx_buffers.len();
    for _ in 0..=left {
        let _ = host.write(&pattern(3000));
        guest.receive_without_refill();
        let sent = guest.counter("to_guest_bytes") as u32;
        guest.fwd_cnt = sent;
        guest.send(op::CREDIT_UPDATE, 0, &[]);
    }
    assert!(guest.rx_buffers.is_empty());
    let _ = host.write(&pattern(3000));
    // `settle` panics if the device never comes to rest.
    guest.driver.settle(&mut guest.vsock);
    drop(host);
    guest.driver.settle(&mut guest.vsock);

    guest.supply(4);
    assert!(!guest.receive().is_empty());
}

#[test]
fn request_again_on_a_live_connection_resets_it() {
    let (mut guest, mut host) = Guest::connected();
    guest.send(op::REQUEST, 0, &[]);
    assert_eq!(guest.ops(), [op::RST]);
    let mut seen = Vec::new();
    assert!(read_available(&mut host, &mut seen));
}

#[test]
fn guest_claims_to_have_read_more_than_sent_gets_nothing_and_harms_nothing() {
    let (mut guest, mut host) = Guest::connected();
    guest.fwd_cnt = 1000;
    guest.send(op::CREDIT_UPDATE, 0, &[]);
    host.write_all(b"data").unwrap();
    assert!(guest.ops().is_empty());
    guest.fwd_cnt = 0;
    guest.send(op::CREDIT_UPDATE, 0, &[]);
    assert_eq!(data_of(&guest.receive()), b"data");
}

#[test]
fn refusals_without_receive_buffers_guest_waits_and_none_is_lost() {
    let mut guest = Guest::new();
    let total = usize::from(TX_SIZE) * 2;
    let mut returned = 0;
    let mut offered = 0;
    let mut refused = 0;
    while refused < total {
        while offered < total && offered - returned < usize::from(TX_SIZE) / 2 {
            let header = Header {
                src_port: offered as u32,
                ..guest.header(op::REQUEST)
            };
            let address = guest.driver.alloc_with(&header.bytes());
            guest.driver.queues[1].add(&[Desc::readable(address, HEADER as u32)]);
            offered += 1;
        }
        guest.driver.queues[1].kick();
        guest.driver.settle(&mut guest.vsock);
        let used = guest.driver.queues[1].take_used().len();
        returned += used;
        if used == 0 {
            assert!(returned - refused <= MAX_RESETS);
            guest.supply(4);
            refused += guest.receive_without_refill().len();
        }
    }
    assert_eq!((returned, refused), (total, total));
}

#[test]
fn receive_buffers_hostile_are_handed_back_and_good_ones_used() {
    let mut guest = Guest::new();
    let _host = guest.listen(PORT);
    let bad: [&[Desc]; 7] = [
        &[Desc::writable(HOLE, 4096)],
        &[Desc::writable(HOLE - 10, 4096)],
        &[Desc::writable(0x20_0000, HEADER as u32)],
        &[Desc::writable(0x20_0000, 0)],
        &[Desc::readable(0x20_0000, 4096)],
        &[
            Desc::readable(0x20_0000, 4096),
            Desc::writable(MEMORY_END, 4096),
        ],
        &[Desc::indirect(0x20_0000, 7)],
    ];
    for chain in bad {
        guest.driver.queues[0].add(chain);
    }
    let split = guest.driver.alloc(128);
    guest.driver.queues[0].add(&[Desc::writable(split, 20), Desc::writable(split + 64, 60)]);
    guest.driver.queues[0].kick();

    guest.send(op::REQUEST, 0, &[]);

    let used = guest.driver.queues[0].take_used();
    assert!(
        used[..bad.len()].iter().all(|(_, len)| *len == 0),
        "{used:?}"
    );
    assert_eq!(used[bad.len()].1, HEADER as u32);
    let mut bytes = guest.driver.read(split, 20);
    bytes.extend(guest.driver.read(split + 64, 24));
    assert_eq!(
        Header::parse(bytes[..].try_into().unwrap()).op,
        op::RESPONSE
    );
}

#[test]
fn transmit_chains_hostile_are_handed_back() {
    let (mut guest, _host) = Guest::listening();
    let chains: [&[Desc]; 7] = [
        &[Desc::readable(0x20_0000, HEADER as u32 - 1)],
        &[Desc::readable(0x20_0000, 0)],
        &[Desc::readable(HOLE, HEADER as u32)],
        &[Desc::readable(HOLE - 20, HEADER as u32)],
        &[Desc::readable(u64::MAX - 20, HEADER as u32)],
        &[Desc::writable(0x20_0000, 4096)],
        &[Desc::writable(0x20_0000, 64), Desc::readable(0x20_0000, 64)],
    ];
    for chain in chains {
        guest.transmit(chain);
    }
    guest.driver.queues[1].set_desc(40, Desc::readable(0x20_0000, 64).then(40));
    guest.driver.queues[1].offer(40);
    guest.driver.queues[1].offer(TX_SIZE);
    guest.driver.queues[1].kick();
    guest.driver.settle(&mut guest.vsock);
    assert_eq!(guest.driver.queues[1].take_used(), [(40, 0)]);
    guest.send(op::REQUEST, 0, &[]);
    assert_eq!(guest.ops(), [op::RESPONSE]);
}

#[test]
fn connections_beyond_the_bound_are_refused() {
    let mut guest = Guest::new();
    guest.supply(RX_SIZE.into());
    let mut hosts = Vec::new();
    for port in 0..MAX_CONNECTIONS as u32 {
        hosts.push(guest.listen(port));
        let header = Header {
            dst_port: port,
            ..guest.header(op::REQUEST)
        };
        guest.send_raw(&header, &[]);
        guest.receive();
    }
    assert_eq!(guest.counter("open_connections"), MAX_CONNECTIONS as u64);
    hosts.push(guest.listen(9999));
    let header = Header {
        dst_port: 9999,
        ..guest.header(op::REQUEST)
    };
    guest.send_raw(&header, &[]);
    assert_eq!(guest.ops(), [op::RST]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any headers in any order: no panic, no spinning, and an honest connection still works afterwards.
    #[test]
    fn packets_any_device_survives(
        packets in proptest::collection::vec((0..10u16, 0..4u32, 0..100_000u32, any::<u32>(), any::<u32>(), 0..2000usize), 1..40),
    ) {
        let (mut guest, mut host) = Guest::listening();
        for (op, flags, len, buf_alloc, fwd_cnt, data) in packets {
            let len = if len % 3 == 0 { len } else { data as u32 };
            let header = Header { op, flags, len, buf_alloc, fwd_cnt, ..guest.header(op) };
            guest.send_raw(&header, &pattern(data));
            let _ = host.write(&pattern(data));
            guest.receive();
            let mut sink = Vec::new();
            if read_available(&mut host, &mut sink) && guest.vsock.listeners.is_empty() {
                host = guest.listen(PORT);
            }
        }
        guest.send(op::RST, 0, &[]);
        guest.receive();
        guest.fwd_cnt = 0;
        if guest.vsock.listeners.is_empty() {
            host = guest.listen(PORT);
        }
        guest.send(op::REQUEST, 0, &[]);
        prop_assert_eq!(guest.ops()[0], op::RESPONSE);
        guest.send(op::RW, 0, b"fine");
        let mut seen = Vec::new();
        read_available(&mut host, &mut seen);
        prop_assert_eq!(seen, b"fine");
    }
}
