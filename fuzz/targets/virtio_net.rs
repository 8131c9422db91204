//! virtio-net under any driver, with a peer that sends and reads, or leaves.
#![no_main]

use casemate_fuzz::guest::Play;
use casemate_vmm::virtio::net::{Net, NetArgs};
use libfuzzer_sys::fuzz_target;
use std::os::unix::net::UnixDatagram;

fuzz_target!(|play: Play| {
    let (tap, wire) = UnixDatagram::pair().expect("a pair of sockets");
    wire.set_nonblocking(true).expect("an open socket");
    let mut wire = Some(wire);
    let args = NetArgs {
        tap: tap.into(),
        mac: [2; 6],
        mtu: 1500,
        rate_limit: None,
    };
    let mut net = Net::on_socket(args).expect("a device");
    play.run(&mut net, |_, what, number| {
        let Some(socket) = &wire else { return };
        match what % 8 {
            0..4 => {
                let _ = socket.send(&vec![what; number as usize % 70_000]);
            }
            4..7 => {
                let _ = socket.recv(&mut [0; 1 << 17]);
            }
            _ => wire = None,
        }
    });
});
