//! The device against the mock driver, with a pair of datagram sockets in place of a tap.

use super::*;
use crate::virtio::testing::{Desc, Driver, HOLE, MEMORY_END, SEAM};
use proptest::prelude::*;
use std::os::unix::net::UnixDatagram;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MTU: u16 = 1500;
const RX: usize = 0;
const TX: usize = 1;

struct Guest {
    net: Net,
    driver: Driver,
    wire: UnixDatagram,
}

fn device(rate_limit: Option<RateLimit>) -> (Net, UnixDatagram) {
    let (tap, wire) = UnixDatagram::pair().unwrap();
    wire.set_nonblocking(true).unwrap();
    let net = Net::on_socket(NetArgs {
        tap: tap.into(),
        mac: MAC,
        mtu: MTU,
        rate_limit,
    })
    .unwrap();
    (net, wire)
}

impl Guest {
    fn new() -> Self {
        Self::limited(None, !0)
    }

    fn limited(rate_limit: Option<RateLimit>, features: u64) -> Self {
        let (mut net, wire) = device(rate_limit);
        let driver = Driver::new(&net);
        let features = net.features() & features;
        net.activate(driver.activation(features)).unwrap();
        Guest { net, driver, wire }
    }

    /// Posts `count` receive buffers of `len` bytes; returns the first one's address.
    fn supply(&mut self, count: usize, len: u64) -> u64 {
        let start = self.driver.alloc(len * count as u64);
        for i in 0..count as u64 {
            self.driver.queues[RX].add(&[Desc::writable(start + i * len, len as u32)]);
        }
        self.driver.queues[RX].kick();
        start
    }

    fn settle(&mut self) {
        self.driver.settle(&mut self.net);
    }

    fn send(&mut self, frame: &[u8]) -> Vec<(u32, u32)> {
        let address = self.driver.alloc_with(frame);
        self.driver.queues[TX].add(&[Desc::readable(address, frame.len() as u32)]);
        self.driver.queues[TX].kick();
        self.settle();
        self.driver.queues[TX].take_used()
    }

    /// Takes a frame off the wire.
    fn wire(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1 << 17];
        let len = self.wire.recv(&mut frame).ok()?;
        frame.truncate(len);
        Some(frame)
    }

    fn counter(&self, name: &str) -> u64 {
        self.net
            .counters()
            .iter()
            .find(|(n, _)| *n == name)
            .unwrap()
            .1
    }
}

/// A frame with its offload header of zeros.
fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER];
    frame.extend((0..len - VNET_HEADER).map(|i| (i % 251) as u8 ^ seed));
    frame
}

/// The same as the guest sees it, in `buffers` buffers.
fn received(len: usize, seed: u8, buffers: u16) -> Vec<u8> {
    let mut frame = frame(len, seed);
    frame[NUM_BUFFERS..VNET_HEADER].copy_from_slice(&buffers.to_le_bytes());
    frame
}

#[test]
fn config_holds_mac_link_and_mtu() {
    let (net, _wire) = device(None);
    let mut space = [0xff; 16];
    net.read_config(0, &mut space);
    assert_eq!(space, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0xdc, 5, 0, 0, 0, 0]);
    net.read_config(u64::MAX, &mut space);
    assert_eq!(space, [0; 16]);
}

#[test]
fn frame_from_guest_reaches_the_wire_whole() {
    let mut guest = Guest::new();
    assert_eq!(guest.send(&frame(1526, 1)).len(), 1);
    assert_eq!(guest.wire().unwrap(), frame(1526, 1));
    assert_eq!(
        (guest.counter("tx_frames"), guest.counter("tx_bytes")),
        (1, 1514)
    );
}

#[test]
fn frame_from_guest_in_pieces_across_regions_is_one_frame() {
    let mut guest = Guest::new();
    let whole = frame(60_000, 1);
    let head = guest.driver.alloc_with(&whole[..20]);
    guest.driver.write(SEAM - 30_000, &whole[20..]);
    guest.driver.queues[TX].add(&[
        Desc::readable(head, 5),
        Desc::readable(head + 5, 15),
        Desc::readable(SEAM - 30_000, 0),
        Desc::readable(SEAM - 30_000, 59_980),
    ]);
    guest.driver.queues[TX].kick();
    guest.settle();
    assert!(guest.wire().unwrap() == whole);
}

#[test]
fn frame_from_guest_hostile_is_dropped_and_the_next_one_passes() {
    let mut guest = Guest::new();
    let chains: [&[Desc]; 9] = [
        &[Desc::readable(0x20_0000, MIN_FRAME as u32 - 1)],
        &[Desc::readable(0x20_0000, 0)],
        &[Desc::readable(0x20_0000, MAX_FRAME as u32 + 1)],
        &[Desc::readable(HOLE, 100)],
        &[Desc::readable(HOLE - 50, 100)],
        &[Desc::readable(u64::MAX - 50, 100)],
        &[Desc::writable(0x20_0000, 100)],
        &[
            Desc::writable(0x20_0000, 100),
            Desc::readable(0x20_0000, 100),
        ],
        &[Desc::indirect(0x20_0000, 33)],
    ];
    for chain in chains {
        guest.driver.queues[TX].add(chain);
        guest.driver.queues[TX].kick();
        guest.settle();
        assert_eq!(guest.driver.queues[TX].take_used().len(), 1, "{chain:?}");
    }
    assert_eq!(guest.wire(), None);
    guest.send(&frame(100, 1));
    assert_eq!(guest.wire().unwrap(), frame(100, 1));
    assert_eq!(guest.counter("tx_frames"), 1);
}

#[test]
fn frame_from_guest_wire_is_full_waits_and_none_is_lost() {
    let mut guest = Guest::new();
    for seed in 0..100 {
        let address = guest.driver.alloc_with(&frame(20_000, seed));
        guest.driver.queues[TX].add(&[Desc::readable(address, 20_000)]);
    }
    guest.driver.queues[TX].kick();
    guest.settle();
    let sent = guest.driver.queues[TX].take_used().len();
    assert!(sent < 100, "the wire never filled");
    for seed in 0..100 {
        assert_eq!(guest.wire().unwrap(), frame(20_000, seed));
        guest.settle();
    }
    assert_eq!(sent + guest.driver.queues[TX].take_used().len(), 100);
}

#[test]
fn frame_to_guest_fills_one_buffer() {
    let mut guest = Guest::new();
    let start = guest.supply(64, 2048);
    guest.wire.send(&frame(1000, 3)).unwrap();
    guest.settle();
    assert_eq!(guest.driver.queues[RX].take_used(), [(0, 1000)]);
    assert_eq!(guest.driver.read(start, 1000), received(1000, 3, 1));
    assert_eq!(
        (guest.counter("rx_frames"), guest.counter("rx_bytes")),
        (1, 988)
    );
}

#[test]
fn frame_to_guest_large_spans_buffers_in_order() {
    let mut guest = Guest::new();
    let start = guest.supply(33, 2048);
    for (len, seed) in [(60_000, 1), (100, 2), (2048, 3)] {
        guest.wire.send(&frame(len, seed)).unwrap();
    }
    // The first takes all: the others wait until a large one would fit again.
    guest.settle();
    let used = guest.driver.queues[RX].take_used();
    assert_eq!(used.len(), 30);
    assert_eq!(
        used.iter().map(|(_, len)| *len as usize).sum::<usize>(),
        60_000
    );
    assert!(guest.driver.read(start, 60_000) == received(60_000, 1, 30));
    assert_eq!(guest.counter("rx_starved"), 1);

    guest.supply(31, 2048);
    guest.settle();
    let used = guest.driver.queues[RX].take_used();
    assert_eq!(used, [(30, 100), (31, 2048)]);
    assert_eq!(
        guest.driver.read(start + 31 * 2048, 2048),
        received(2048, 3, 1)
    );
}

#[test]
fn frame_to_guest_no_buffers_waits_without_spinning() {
    let mut guest = Guest::new();
    guest.wire.send(&frame(1000, 3)).unwrap();
    guest.settle();
    assert_eq!(guest.driver.queues[RX].take_used(), []);
    let start = guest.supply(64, 2048);
    guest.settle();
    assert_eq!(guest.driver.queues[RX].take_used(), [(0, 1000)]);
    assert_eq!(guest.driver.read(start, 1000), received(1000, 3, 1));
}

#[test]
fn frame_to_guest_without_mergeable_buffers_each_has_its_own() {
    let mut guest = Guest::limited(None, !(1 << VIRTIO_NET_F_MRG_RXBUF));
    let start = guest.supply(2, 70_000);
    guest.wire.send(&frame(60_000, 1)).unwrap();
    guest.wire.send(&frame(100, 2)).unwrap();
    guest.settle();
    assert_eq!(guest.driver.queues[RX].take_used(), [(0, 60_000), (1, 100)]);
    assert!(guest.driver.read(start, 60_000) == received(60_000, 1, 1));
    assert_eq!(guest.driver.read(start + 70_000, 100), received(100, 2, 1));
}

#[test]
fn frame_to_guest_no_offloads_small_ring_is_enough() {
    let mut guest = Guest::limited(None, 1 << VIRTIO_NET_F_MRG_RXBUF);
    guest.supply(1, 2048);
    guest.wire.send(&frame(1500, 1)).unwrap();
    guest.settle();
    assert_eq!(guest.driver.queues[RX].take_used(), [(0, 1500)]);
}

#[test]
fn receive_buffers_hostile_are_handed_back_and_good_ones_used() {
    let mut guest = Guest::new();
    let bad: [&[Desc]; 6] = [
        &[Desc::writable(HOLE, 2048)],
        &[Desc::writable(HOLE - 10, 2048)],
        &[Desc::writable(MEMORY_END - 1, 2)],
        &[Desc::writable(0x20_0000, 0)],
        &[Desc::readable(0x20_0000, 2048)],
        &[Desc::indirect(HOLE, 160)],
    ];
    for chain in bad {
        guest.driver.queues[RX].add(chain);
    }
    guest.supply(64, 2048);
    guest.wire.send(&frame(1000, 3)).unwrap();
    guest.settle();
    let used = guest.driver.queues[RX].take_used();
    assert!(used[..6].iter().all(|(_, len)| *len == 0), "{used:?}");
    assert_eq!(used[6..], [(6, 1000)]);
}

#[test]
fn receive_buffers_of_one_byte_harm_nobody() {
    let mut guest = Guest::new();
    guest.supply(QUEUE_SIZE.into(), 1);
    guest.wire.send(&frame(1000, 3)).unwrap();
    guest.settle();
    assert_eq!(
        guest.driver.queues[RX].take_used().len(),
        usize::from(QUEUE_SIZE)
    );
    guest.supply(64, 2048);
    guest.wire.send(&frame(1000, 3)).unwrap();
    guest.settle();
    assert_eq!(guest.driver.queues[RX].take_used(), [(0, 1000)]);
}

#[test]
fn wire_gone_loop_does_not_spin() {
    let mut guest = Guest::new();
    let (_, other) = UnixDatagram::pair().unwrap();
    guest.wire = other;
    guest.settle();
    let used = guest.send(&frame(100, 1));
    assert_eq!(used.len(), 1);
    assert_eq!(guest.counter("tx_errors"), 1);
    assert_eq!(guest.net.stop().len(), 2);
}

#[test]
fn rate_limit_each_direction_takes_its_time() {
    let limit = RateLimit {
        bytes_per_second: 0,
        ops_per_second: 20,
    };
    let mut guest = Guest::limited(Some(limit), !0);
    guest.supply(128, 2048);
    let start = Instant::now();
    let (mut rx, mut tx, mut sent) = (0, 0, 0);
    while rx < 25 || tx < 25 {
        if sent < 25 && guest.wire.send(&frame(100, 1)).is_ok() {
            let address = guest.driver.alloc_with(&frame(100, 1));
            guest.driver.queues[TX].add(&[Desc::readable(address, 100)]);
            guest.driver.queues[TX].kick();
            sent += 1;
        }
        guest.driver.turn(&mut guest.net);
        while guest.wire().is_some() {}
        rx += guest.driver.queues[RX].take_used().len();
        tx += guest.driver.queues[TX].take_used().len();
    }
    // 20 from the full bucket, then one each 50 ms.
    let took = start.elapsed().as_millis();
    assert!(took >= 200, "{took} ms");
}

#[test]
fn pause_and_resume_buffers_taken_ahead_are_used() {
    let mut guest = Guest::new();
    let start = guest.supply(64, 2048);
    guest.wire.send(&frame(100, 1)).unwrap();
    guest.settle();
    assert_eq!(guest.driver.queues[RX].take_used(), [(0, 100)]);

    let queues = guest.net.stop();
    guest.wire.send(&frame(200, 2)).unwrap();
    let features = guest.net.features();
    guest
        .net
        .activate(guest.driver.reactivation(queues, features))
        .unwrap();
    guest.settle();

    // 63 buffers are room enough for any frame.
    assert_eq!(guest.driver.queues[RX].take_used(), [(1, 200)]);
    assert_eq!(guest.driver.read(start + 2048, 200), received(200, 2, 1));
}

#[test]
fn restore_other_mtu_or_garbage_is_refused() {
    let (net, _wire) = device(None);
    let state = net.save();
    let (tap, _other) = UnixDatagram::pair().unwrap();
    let args = |mtu| NetArgs {
        tap: tap.try_clone().unwrap().into(),
        mac: MAC,
        mtu,
        rate_limit: None,
    };
    let refusal = Net::restore(args(9000), &state).err().unwrap().to_string();
    assert!(
        refusal.contains("1500") && refusal.contains("9000"),
        "{refusal}"
    );
    assert!(Net::restore(args(MTU), &serde_json::json!(1)).is_err());
    // A socket isn't a tap.
    assert!(matches!(
        Net::restore(args(MTU), &state),
        Err(RestoreError::Build { .. })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the sizes of frames and buffers, what arrives is what was sent.
    #[test]
    fn frames_any_sizes_arrive_in_order(
        buffer in 100..4000u64,
        lens in proptest::collection::vec(MIN_FRAME..20_000usize, 1..12),
    ) {
        let mut guest = Guest::new();
        let mut posted = Vec::new();
        let mut bytes = Vec::new();
        let mut frames = Vec::new();
        for (seed, len) in lens.iter().enumerate() {
            guest.wire.send(&frame(*len, seed as u8)).unwrap();
            let mut waited = 0;
            while frames.len() <= seed {
                let free = usize::from(QUEUE_SIZE) - posted.len();
                let address = guest.driver.alloc(buffer);
                if free > 0 {
                    let head = guest.driver.queues[RX].add(&[Desc::writable(address, buffer as u32)]);
                    posted.push((u32::from(head), address));
                    guest.driver.queues[RX].kick();
                }
                guest.settle();
                for (head, used) in guest.driver.queues[RX].take_used() {
                    let (expected, address) = posted.remove(0);
                    prop_assert_eq!(head, expected);
                    bytes.extend(guest.driver.read(address, used as usize));
                }
                if bytes.len() >= *len {
                    frames.push(std::mem::take(&mut bytes));
                }
                waited += 1;
                prop_assert!(waited <= 2 * usize::from(QUEUE_SIZE));
            }
            let chains = (*len as u64).div_ceil(buffer) as u16;
            prop_assert!(frames[seed] == received(*len, seed as u8, chains));
        }
    }

    #[test]
    fn chains_any_device_survives(
        chains in proptest::collection::vec((0..2usize, 0x20_0000..MEMORY_END + 8192, 0..70_000u32, any::<bool>()), 1..40),
    ) {
        let mut guest = Guest::new();
        for (queue, address, len, writable) in chains {
            let desc = if writable { Desc::writable(address, len) } else { Desc::readable(address, len) };
            guest.driver.queues[queue].add(&[desc]);
            guest.driver.queues[queue].kick();
            let _ = guest.wire.send(&frame(500, 1));
            guest.settle();
            while guest.wire().is_some() {}
        }
        guest.send(&frame(100, 1));
        prop_assert_eq!(guest.wire().unwrap(), frame(100, 1));
    }
}
