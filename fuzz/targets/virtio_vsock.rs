//! virtio-vsock under any driver, with hosts that write, read, half-close and leave.
#![no_main]

use casemate_fuzz::guest::{Length, Play};
use casemate_vmm::virtio::testing::{Desc, Driver};
use casemate_vmm::virtio::vsock::Vsock;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

const CID: u32 = 3;
const PORTS: u32 = 4;

/// A packet that usually gets past the first checks.
#[derive(Debug, Arbitrary)]
struct Packet {
    op: u8,
    guest_port: bool,
    port: u8,
    flags: u8,
    len: Option<Length>,
    alloc: Length,
    forwarded: u8,
    data: Length,
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let data = self.data.0 % 70_000;
        let mut bytes = Vec::new();
        bytes.extend(u64::from(CID).to_le_bytes());
        bytes.extend(2u64.to_le_bytes());
        bytes.extend((1000 + u32::from(self.guest_port)).to_le_bytes());
        bytes.extend((u32::from(self.port) % PORTS).to_le_bytes());
        bytes.extend(self.len.map_or(data, |len| len.0).to_le_bytes());
        bytes.extend(1u16.to_le_bytes());
        bytes.extend(u16::from(self.op % 9).to_le_bytes());
        bytes.extend(u32::from(self.flags % 4).to_le_bytes());
        bytes.extend(self.alloc.0.to_le_bytes());
        bytes.extend(u32::from(self.forwarded).to_le_bytes());
        bytes.resize(bytes.len() + data as usize, self.op);
        bytes
    }
}

/// Either any driver, or one that speaks the protocol in any order.
#[derive(Debug, Arbitrary)]
enum Input {
    Any(Play),
    Packets(Vec<(Packet, Option<(u8, u32)>)>),
}

/// Posts receive buffers; what they receive doesn't matter.
fn supply(driver: &mut Driver, count: usize) {
    for _ in 0..count {
        driver.queues[0].add(&[Desc::writable(0x20_0000, 3776)]);
    }
    driver.queues[0].kick();
}

fn send(driver: &mut Driver, vsock: &mut Vsock, packet: &[u8]) {
    const BUFFER: u64 = 0x10_0000;
    driver.write(BUFFER, packet);
    let (header, data) = (44, packet.len() as u32 - 44);
    driver.queues[1].add(&[
        Desc::readable(BUFFER, header),
        Desc::readable(BUFFER + 44, data),
    ]);
    driver.queues[1].kick();
    driver.settle(vsock);
    driver.queues[1].take_used();
    let used = driver.queues[0].take_used().len();
    supply(driver, used);
}

struct Hosts(Vec<Option<UnixStream>>);

impl Hosts {
    fn listen(vsock: &mut Vsock) -> Self {
        Hosts((0..PORTS).map(|port| Self::open(vsock, port)).collect())
    }

    fn open(vsock: &mut Vsock, port: u32) -> Option<UnixStream> {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        theirs.set_nonblocking(true).expect("an open socket");
        vsock.listen(port, ours).ok().map(|()| theirs)
    }

    fn act(&mut self, vsock: &mut Vsock, what: u8, number: u32) {
        let port = u32::from(what >> 4) % PORTS;
        let Some(host) = &mut self.0[port as usize] else {
            self.0[port as usize] = Self::open(vsock, port);
            return;
        };
        match what % 9 {
            0..3 => {
                let _ = host.write(&vec![what; number as usize % 300_000]);
            }
            3..5 => {
                let _ = host.read(&mut vec![0; number as usize % 300_000]);
            }
            5 => {
                let _ = host.shutdown(Shutdown::Write);
            }
            6 => {
                let _ = host.shutdown(Shutdown::Read);
            }
            7 => {
                vsock.drain(Duration::ZERO);
            }
            _ => self.0[port as usize] = None,
        }
    }
}

fuzz_target!(|input: Input| {
    let mut vsock = Vsock::new(CID, Some(Box::new(|_| {})));
    let mut hosts = Hosts::listen(&mut vsock);
    match input {
        Input::Any(play) => play.run(&mut vsock, |vsock, what, number| {
            hosts.act(vsock, what, number)
        }),
        Input::Packets(packets) => {
            let mut driver = Driver::new(&vsock);
            driver.activate(&mut vsock);
            supply(&mut driver, 64);
            for (packet, act) in packets.into_iter().take(48) {
                send(&mut driver, &mut vsock, &packet.bytes());
                if let Some((what, number)) = act {
                    hosts.act(&mut vsock, what, number);
                }
                driver.settle(&mut vsock);
            }
        }
    }
});
