//! Disks against the mock driver, honest and hostile.

use super::*;
use crate::config::RateLimit;
use crate::virtio::testing::{Desc, Driver, HOLE, MEMORY_END, SEAM};
use proptest::prelude::*;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::channel;
use std::time::Instant;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;
/// What a status byte holds before the device writes it.
const UNWRITTEN: u8 = 0xee;

fn file(content: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

/// Bytes that differ at each position of a disk.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed)
        .collect()
}

fn args(files: Vec<File>, read_only: bool) -> BlockArgs {
    BlockArgs {
        id: "disk-1".into(),
        files,
        read_only,
        volatile: false,
        limits: None,
        on_thread_start: None,
    }
}

struct Guest {
    block: Block,
    driver: Driver,
}

impl Guest {
    fn new(args: BlockArgs) -> Self {
        let mut block = Block::new(args).unwrap();
        let driver = Driver::new(&block);
        driver.activate(&mut block);
        Guest { block, driver }
    }

    fn writable(files: Vec<File>) -> Self {
        Self::new(args(files, false))
    }

    fn header(&mut self, kind: u32, sector: u64) -> Desc {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        Desc::readable(self.driver.alloc_with(&header), 16)
    }

    fn status(&mut self) -> Desc {
        Desc::writable(self.driver.alloc_with(&[UNWRITTEN]), 1)
    }

    /// Offers a chain and waits for it; returns the used length.
    fn submit(&mut self, chain: &[Desc]) -> u32 {
        let head = self.driver.queues[0].add(chain);
        self.driver.queues[0].kick();
        let used = self.driver.queues[0].wait_used(1);
        assert_eq!(used[0].0, u32::from(head));
        used[0].1
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[Desc]) -> (u8, u32) {
        let status = self.status();
        let mut chain = vec![self.header(kind, sector)];
        chain.extend(data);
        chain.push(status);
        let len = self.submit(&chain);
        (self.driver.read(status.addr, 1)[0], len)
    }

    fn read(&mut self, sector: u64, len: usize) -> Result<Vec<u8>, u8> {
        let address = self.driver.alloc_with(&vec![0xaa; len]);
        match self.request(
            VIRTIO_BLK_T_IN,
            sector,
            &[Desc::writable(address, len as u32)],
        ) {
            (OK, used) => {
                assert_eq!(used as usize, len + 1);
                Ok(self.driver.read(address, len))
            }
            (code, used) => {
                assert_eq!(used, 1);
                Err(code)
            }
        }
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        let address = self.driver.alloc_with(data);
        self.request(
            VIRTIO_BLK_T_OUT,
            sector,
            &[Desc::readable(address, data.len() as u32)],
        )
        .0
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, count, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(count.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        let address = self.driver.alloc_with(&bytes);
        self.request(kind, 0, &[Desc::readable(address, bytes.len() as u32)])
            .0
    }

    fn counter(&self, name: &str) -> u64 {
        self.block
            .counters()
            .iter()
            .find(|(n, _)| *n == name)
            .unwrap()
            .1
    }
}

fn capacity(block: &Block) -> u64 {
    let mut bytes = [0; 8];
    block.read_config(0, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn segments_unaligned_lengths_are_padded_and_read_across() {
    let (first, second, third) = (pattern(5000, 1), pattern(4096, 2), pattern(1, 3));
    let mut disk = first.clone();
    disk.resize(8192, 0);
    disk.extend(&second);
    disk.extend(&third);
    disk.resize(16384, 0);

    let mut guest = Guest::new(args(
        vec![file(&first), file(&[]), file(&second), file(&third)],
        true,
    ));

    assert_eq!(capacity(&guest.block), 32);
    assert_eq!(guest.read(0, 16384).unwrap(), disk);
    assert_eq!(guest.read(15, 1024).unwrap(), disk[7680..8704]);
    assert_eq!(guest.read(31, 512).unwrap(), disk[15872..]);
    assert_eq!(guest.counter("read_bytes"), 16384 + 1024 + 512);
}

#[test]
fn read_scattered_buffers_across_regions_fills_them_in_order() {
    let content = pattern(8192, 7);
    let mut guest = Guest::writable(vec![file(&content)]);
    let small = guest.driver.alloc(3);
    let data = [
        Desc::writable(small, 3),
        Desc::writable(SEAM - 2000, 4000),
        Desc::writable(0x20_0000, 0),
        Desc::writable(0x20_0001, 4189),
    ];

    let (status, used) = guest.request(VIRTIO_BLK_T_IN, 0, &data);

    assert_eq!((status, used), (OK, 8193));
    let mut seen = guest.driver.read(small, 3);
    seen.extend(guest.driver.read(SEAM - 2000, 4000));
    seen.extend(guest.driver.read(0x20_0001, 4189));
    assert_eq!(seen, content);
}

#[test]
fn write_then_flush_reaches_every_segment() {
    let files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
    files.iter().for_each(|file| file.set_len(8192).unwrap());
    let mut guest = Guest::writable(files.iter().map(|file| file.try_clone().unwrap()).collect());
    let data = pattern(4096, 9);

    assert_eq!(guest.write(12, &data), OK);
    assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));

    let mut seen = vec![0; 4096];
    files[0].read_exact_at(&mut seen[..2048], 6144).unwrap();
    files[1].read_exact_at(&mut seen[2048..], 0).unwrap();
    assert_eq!(seen, data);
    assert_eq!(guest.read(12, 4096).unwrap(), data);
    assert_eq!(guest.counter("flush_ops"), 1);
    assert_eq!(guest.counter("write_bytes"), 4096);
}

#[test]
fn write_into_padding_grows_file_to_padded_end_only() {
    let content = file(&pattern(5000, 1));
    let mut guest = Guest::writable(vec![content.try_clone().unwrap(), file(&pattern(4096, 2))]);

    assert_eq!(guest.write(15, &[7; 1024]), OK);

    assert_eq!(content.metadata().unwrap().len(), 8192);
    assert_eq!(guest.read(15, 1024).unwrap(), [7; 1024]);
    assert_eq!(guest.read(10, 512).unwrap(), [0; 512]);
}

#[test]
fn request_past_end_or_overflowing_is_an_error() {
    let mut guest = Guest::writable(vec![file(&pattern(8192, 1))]);
    for sector in [
        16,
        15,
        u64::MAX,
        u64::MAX / 512,
        u64::MAX / 512 + 1,
        1 << 55,
    ] {
        assert_eq!(guest.read(sector, 1024), Err(IOERR), "read at {sector}");
        assert_eq!(guest.write(sector, &[0; 1024]), IOERR, "write at {sector}");
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(
                guest.ranges(kind, &[(sector, 2, 0)]),
                IOERR,
                "{kind} at {sector}"
            );
        }
    }
    assert_eq!(guest.read(0, 8192).unwrap(), pattern(8192, 1));
}

#[test]
fn request_of_part_of_a_sector_is_an_error() {
    let mut guest = Guest::writable(vec![file(&pattern(8192, 1))]);
    assert_eq!(guest.read(0, 511), Err(IOERR));
    assert_eq!(guest.write(0, &[0; 513]), IOERR);
}

#[test]
fn read_file_cut_short_behind_us_is_an_error() {
    let content = file(&pattern(8192, 1));
    let mut guest = Guest::new(args(vec![content.try_clone().unwrap()], true));
    content.set_len(4096).unwrap();
    assert_eq!(guest.read(8, 4096), Err(IOERR));
    assert_eq!(guest.read(0, 4096).unwrap(), pattern(8192, 1)[..4096]);
}

#[test]
fn read_only_disk_every_change_is_refused() {
    let content = pattern(8192, 1);
    let mut guest = Guest::new(args(vec![file(&content)], true));

    assert_eq!(guest.write(0, &[0; 512]), IOERR);
    assert_eq!(guest.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]), IOERR);
    assert_eq!(guest.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 1)]), IOERR);

    assert_eq!(guest.read(0, 8192).unwrap(), content);
    let offered = |bit: u32| guest.block.features() & 1 << bit != 0;
    assert!(offered(VIRTIO_BLK_F_RO));
    assert!(
        !offered(VIRTIO_BLK_F_DISCARD)
            && !offered(VIRTIO_BLK_F_WRITE_ZEROES)
            && !offered(VIRTIO_BLK_F_FLUSH)
    );
}

#[test]
fn discard_and_write_zeroes_ranges_read_as_zeros() {
    let mut expected = pattern(32768, 1);
    let content = file(&expected);
    let mut guest = Guest::writable(vec![content.try_clone().unwrap()]);

    assert_eq!(
        guest.ranges(VIRTIO_BLK_T_DISCARD, &[(8, 8, 0), (32, 8, 0)]),
        OK
    );
    assert_eq!(
        guest.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(17, 2, 0), (48, 8, 1)]),
        OK
    );

    for range in [4096..8192, 16384..20480, 8704..9728, 24576..28672] {
        expected[range].fill(0);
    }
    assert_eq!(guest.read(0, 32768).unwrap(), expected);
    assert_eq!(content.metadata().unwrap().len(), 32768);
    assert_eq!(guest.counter("discard_bytes"), (8 + 8 + 2 + 8) * 512);
}

#[test]
fn discard_malformed_ranges_are_errors() {
    let mut guest = Guest::writable(vec![file(&pattern(32768, 1))]);
    let too_many = vec![(0, 1, 0); MAX_RANGES as usize + 1];
    assert_eq!(guest.ranges(VIRTIO_BLK_T_DISCARD, &too_many), IOERR);
    assert_eq!(guest.ranges(VIRTIO_BLK_T_DISCARD, &[]), IOERR);
    assert_eq!(guest.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 1)]), UNSUPP);
    assert_eq!(
        guest.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 2)]),
        UNSUPP
    );
    assert_eq!(
        guest.ranges(VIRTIO_BLK_T_DISCARD, &[(0, u32::MAX, 0)]),
        IOERR
    );
    let short = guest.driver.alloc_with(&[0; 15]);
    assert_eq!(
        guest
            .request(VIRTIO_BLK_T_DISCARD, 0, &[Desc::readable(short, 15)])
            .0,
        IOERR
    );
    assert_eq!(guest.read(0, 32768).unwrap(), pattern(32768, 1));
}

#[test]
fn get_id_returns_serial_cut_to_the_buffer() {
    let mut guest = Guest::new(args(vec![], true));
    let address = guest.driver.alloc(20);
    assert_eq!(
        guest.request(VIRTIO_BLK_T_GET_ID, 0, &[Desc::writable(address, 20)]),
        (OK, 21)
    );
    assert_eq!(
        guest.driver.read(address, 20),
        b"disk-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
    assert_eq!(
        guest.request(VIRTIO_BLK_T_GET_ID, 0, &[Desc::writable(address, 4)]),
        (OK, 5)
    );
}

#[test]
fn request_of_unknown_type_is_unsupported() {
    let mut guest = Guest::writable(vec![file(&[0; 4096])]);
    for kind in [2, 3, 5, 14, 15, 26, u32::MAX] {
        assert_eq!(guest.request(kind, 0, &[]).0, UNSUPP, "{kind}");
    }
}

#[test]
fn chain_malformed_comes_back_and_the_next_request_works() {
    let mut guest = Guest::writable(vec![file(&pattern(8192, 1))]);
    let header = guest.header(VIRTIO_BLK_T_IN, 0);
    let status = guest.status();
    let data = Desc::writable(0x20_0000, 512);
    let chains: &[&[Desc]] = &[
        &[header],
        &[header, Desc::readable(0x20_0000, 1)],
        &[header, data, Desc::readable(status.addr, 1)],
        &[header, Desc::writable(HOLE, 1)],
        &[header, Desc::writable(0x20_0000, 0)],
        &[header, data, Desc::indirect(0x30_0000, 0)],
        &[header, data, Desc::indirect(0x30_0000, 17)],
        &[header, data, Desc::indirect(HOLE, 32)],
    ];
    for chain in chains {
        assert_eq!(guest.submit(chain), 0, "{chain:?}");
    }
    assert_eq!(guest.driver.read(status.addr, 1), [UNWRITTEN]);
    assert_eq!(guest.read(0, 512).unwrap(), pattern(8192, 1)[..512]);
}

#[test]
fn chain_buffer_outside_memory_status_says_error() {
    let mut guest = Guest::writable(vec![file(&[0; 8192])]);
    let header = guest.header(VIRTIO_BLK_T_IN, 0);
    for (addr, len) in [
        (HOLE, 512),
        (HOLE - 256, 512),
        (MEMORY_END, 512),
        (u64::MAX - 100, 512),
        (0, u32::MAX - 17),
    ] {
        let status = guest.status();
        assert_eq!(
            guest.submit(&[header, Desc::writable(addr, len), status]),
            1
        );
        assert_eq!(
            guest.driver.read(status.addr, 1),
            [IOERR],
            "{len} at {addr:#x}"
        );
    }
    let status = guest.status();
    assert_eq!(guest.submit(&[Desc::readable(HOLE, 16), status]), 1);
    assert_eq!(guest.driver.read(status.addr, 1), [IOERR]);
}

#[test]
fn chain_short_header_status_says_error() {
    let mut guest = Guest::writable(vec![file(&[0; 8192])]);
    for len in [0, 1, 15] {
        let status = guest.status();
        guest.submit(&[Desc::readable(0x20_0000, len), status]);
        assert_eq!(guest.driver.read(status.addr, 1), [IOERR]);
    }
    let status = guest.status();
    guest.submit(&[status]);
    assert_eq!(guest.driver.read(status.addr, 1), [IOERR]);
}

#[test]
fn chain_header_and_status_split_over_descriptors_works() {
    let mut guest = Guest::writable(vec![file(&pattern(8192, 1))]);
    let header = guest.header(VIRTIO_BLK_T_IN, 8).addr;
    let data = guest.driver.alloc_with(&[UNWRITTEN; 513]);

    let used = guest.submit(&[
        Desc::readable(header, 3),
        Desc::readable(header + 3, 13),
        Desc::writable(data, 100),
        Desc::writable(data + 100, 413),
    ]);

    assert_eq!(used, 513);
    assert_eq!(guest.driver.read(data, 512), pattern(8192, 1)[4096..4608]);
    assert_eq!(guest.driver.read(data + 512, 1), [OK]);
}

#[test]
fn chain_that_loops_comes_back_unused() {
    let mut guest = Guest::writable(vec![file(&[0; 8192])]);
    let header = guest.header(VIRTIO_BLK_T_IN, 0);
    let queue = &mut guest.driver.queues[0];
    queue.set_desc(0, header.then(1));
    queue.set_desc(1, Desc::writable(0x20_0000, 512).then(1));
    queue.set_desc(2, header.then(2));
    queue.set_desc(3, header.then(QUEUE_SIZE));
    for head in [0, 2, 3] {
        queue.offer(head);
    }
    queue.kick();
    assert_eq!(queue.wait_used(3), [(0, 0), (2, 0), (3, 0)]);
    assert_eq!(guest.read(0, 512).unwrap(), [0; 512]);
}

#[test]
fn chain_indirect_longer_than_the_queue_comes_back_unused() {
    let mut guest = Guest::writable(vec![file(&[0; 8192])]);
    let table = 0x20_0000u64;
    for i in 0..1000u16 {
        guest.driver.write(
            table + 16 * u64::from(i),
            &Desc::writable(0x30_0000, 1).then(i + 1).bytes(),
        );
    }
    guest
        .driver
        .write(table + 16 * 999, &Desc::writable(0x30_0000, 1).bytes());
    assert_eq!(guest.submit(&[Desc::indirect(table, 16_000)]), 0);
    assert_eq!(guest.read(0, 512).unwrap(), [0; 512]);
}

#[test]
fn ring_head_out_of_table_is_skipped() {
    let mut guest = Guest::writable(vec![file(&[1; 8192])]);
    guest.driver.queues[0].offer(QUEUE_SIZE);
    guest.driver.queues[0].offer(u16::MAX);
    assert_eq!(guest.read(0, 512).unwrap(), [1; 512]);
}

#[test]
fn ring_index_jump_queue_goes_dead_until_reset() {
    let mut guest = Guest::writable(vec![file(&[1; 8192])]);
    guest.driver.queues[0].set_avail_idx(QUEUE_SIZE + 1);
    guest.driver.queues[0].kick();
    let queues = guest.block.stop();
    assert_eq!(queues.len(), 1);
    assert_eq!(guest.driver.queues[0].take_used(), []);

    let mut driver = Driver::new(&guest.block);
    driver.activate(&mut guest.block);
    std::mem::swap(&mut guest.driver, &mut driver);
    assert_eq!(guest.read(0, 512).unwrap(), [1; 512]);
}

#[test]
fn ring_outside_memory_device_stays_quiet() {
    for which in 0..3 {
        let mut block = Block::new(args(vec![file(&[1; 8192])], false)).unwrap();
        let mut driver = Driver::new(&block);
        let address = [HOLE, HOLE - 16, !0xfff][which];
        match which {
            0 => driver.queues[0].desc = address,
            1 => driver.queues[0].used = address,
            _ => driver.queues[0].avail = address,
        }
        driver.activate(&mut block);
        driver.queues[0].kick();
        assert_eq!(block.stop().len(), 1);
    }
}

#[test]
fn thread_start_hook_runs_on_the_worker_thread() {
    let (sender, receiver) = channel();
    let hook = Box::new(move || sender.send(std::thread::current().id()).unwrap());
    let _guest = Guest::new(BlockArgs {
        on_thread_start: Some(hook),
        ..args(vec![], true)
    });
    assert_ne!(receiver.recv().unwrap(), std::thread::current().id());
}

#[test]
fn swap_while_active_guest_sees_new_content_and_capacity() {
    let old = file(&[1; 8192]);
    let mut guest = Guest::writable(vec![old.try_clone().unwrap()]);
    assert_eq!(guest.write(0, &[3; 512]), OK);

    guest
        .block
        .swap(vec![file(&[2; 4096]), file(&[2; 8000])])
        .unwrap();

    assert_eq!(guest.driver.interrupt.config_count(), 1);
    assert_eq!(capacity(&guest.block), 24);
    assert_eq!(guest.read(0, 4096).unwrap(), [2; 4096]);
    let mut seen = [0; 512];
    old.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, [3; 512]);
}

#[test]
fn swap_placeholder_before_activation_guest_is_told_at_activation() {
    let mut block = Block::new(args(vec![], true)).unwrap();
    assert_eq!(capacity(&block), 0);
    block.swap(vec![file(&[2; 4096])]).unwrap();
    let driver = Driver::new(&block);
    driver.activate(&mut block);
    assert_eq!(driver.interrupt.config_count(), 1);
    assert_eq!(capacity(&block), 8);
}

#[test]
fn stop_then_activate_again_requests_go_on() {
    let mut guest = Guest::writable(vec![file(&pattern(8192, 1))]);
    assert!(guest.read(0, 512).is_ok());
    for _ in 0..3 {
        let queues = guest.block.stop();
        assert!(
            guest.block.stop().is_empty(),
            "a stopped device has no queues"
        );
        let status = guest.status();
        let header = guest.header(VIRTIO_BLK_T_IN, 0);
        guest.driver.queues[0].add(&[header, Desc::writable(0x20_0000, 512), status]);
        guest.driver.queues[0].kick();
        let activation = guest.driver.reactivation(queues, guest.block.features());
        guest.block.activate(activation).unwrap();
        assert_eq!(guest.driver.queues[0].wait_used(1)[0].1, 513);
    }
}

#[test]
fn restore_other_size_goes_on_and_tells_the_guest() {
    let mut guest = Guest::writable(vec![file(&[1; 8192])]);
    let state = guest.block.save();
    let queues = guest.block.stop();

    let mut restored = Block::restore(args(vec![file(&[2; 4096])], false), &state).unwrap();
    let features = restored.features();
    restored
        .activate(guest.driver.reactivation(queues, features))
        .unwrap();
    guest.block = restored;

    assert_eq!(guest.driver.interrupt.config_count(), 1);
    assert_eq!(guest.read(0, 4096).unwrap(), [2; 4096]);
}

#[test]
fn restore_other_disk_or_garbage_is_refused() {
    let block = Block::new(args(vec![], true)).unwrap();
    let state = block.save();
    let other = BlockArgs {
        id: "disk-2".into(),
        ..args(vec![], true)
    };
    let refusal = Block::restore(other, &state).err().unwrap().to_string();
    assert!(
        refusal.contains("disk-1") && refusal.contains("disk-2"),
        "{refusal}"
    );
    assert!(Block::restore(args(vec![], false), &state).is_err());
    assert!(Block::restore(args(vec![], true), &serde_json::json!({"id": 3})).is_err());
}

#[test]
fn new_id_too_long_is_refused() {
    let refusal = Block::new(BlockArgs {
        id: "x".repeat(21),
        ..args(vec![], true)
    })
    .err()
    .unwrap();
    assert!(refusal.to_string().contains("21"), "{refusal}");
}

fn reads(read: RateLimit) -> DiskLimits {
    DiskLimits {
        read,
        ..DiskLimits::default()
    }
}

#[test]
fn rate_limit_operations_take_their_time() {
    let limit = RateLimit {
        bytes_per_second: 0,
        ops_per_second: 20,
    };
    let mut guest = Guest::new(BlockArgs {
        limits: Some(reads(limit)),
        ..args(vec![file(&[1; 8192])], true)
    });
    let start = Instant::now();
    for _ in 0..26 {
        guest.driver.free_all();
        guest.read(0, 512).unwrap();
    }
    // 20 from the full bucket, then one each 50 ms.
    let took = start.elapsed().as_millis();
    assert!(took >= 250, "{took} ms");
}

#[test]
fn rate_limit_waiting_worker_still_stops_at_once() {
    let limit = RateLimit {
        bytes_per_second: 1,
        ops_per_second: 0,
    };
    let mut guest = Guest::new(BlockArgs {
        limits: Some(reads(limit)),
        ..args(vec![file(&[1; 8192])], true)
    });
    guest.read(0, 4096).unwrap();
    let header = guest.header(VIRTIO_BLK_T_IN, 0);
    let status = guest.status();
    guest.driver.queues[0].add(&[header, status]);
    guest.driver.queues[0].kick();
    let start = Instant::now();
    assert_eq!(guest.block.stop().len(), 1);
    assert!(start.elapsed().as_secs() < 5);
}

/// One operation of the model test.
#[derive(Debug, Clone)]
enum Op {
    Read {
        sector: u64,
        sectors: usize,
    },
    Write {
        sector: u64,
        sectors: usize,
        value: u8,
    },
    Zero {
        sector: u64,
        sectors: u32,
        discard: bool,
    },
    Flush,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0..48u64, 0..24usize).prop_map(|(sector, sectors)| Op::Read { sector, sectors }),
        (0..48u64, 0..24usize, any::<u8>()).prop_map(|(sector, sectors, value)| Op::Write {
            sector,
            sectors,
            value
        }),
        (0..48u64, 0..24u32, any::<bool>()).prop_map(|(sector, sectors, discard)| Op::Zero {
            sector,
            sectors,
            discard
        }),
        Just(Op::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the files' lengths, the disk behaves as one array of bytes.
    #[test]
    fn disk_any_operations_equals_model(
        lengths in proptest::collection::vec(0..9000usize, 0..4),
        ops in proptest::collection::vec(op(), 1..30),
    ) {
        let mut model = Vec::new();
        let mut files = Vec::new();
        for (seed, len) in lengths.iter().enumerate() {
            model.extend(pattern(*len, seed as u8));
            model.resize(model.len().next_multiple_of(4096), 0);
            files.push(file(&pattern(*len, seed as u8)));
        }
        let mut guest = Guest::writable(files);
        for op in ops {
            guest.driver.free_all();
            match op {
                Op::Read { sector, sectors } => {
                    let from = sector as usize * 512;
                    let expected = model.get(from..from + sectors * 512).map(<[u8]>::to_vec).ok_or(IOERR);
                    prop_assert_eq!(guest.read(sector, sectors * 512), expected);
                }
                Op::Write { sector, sectors, value } => {
                    let from = sector as usize * 512;
                    let status = guest.write(sector, &vec![value; sectors * 512]);
                    match model.get_mut(from..from + sectors * 512) {
                        Some(range) => { range.fill(value); prop_assert_eq!(status, OK) }
                        None => prop_assert_eq!(status, IOERR),
                    }
                }
                Op::Zero { sector, sectors, discard } => {
                    let from = sector as usize * 512;
                    let kind = if discard { VIRTIO_BLK_T_DISCARD } else { VIRTIO_BLK_T_WRITE_ZEROES };
                    let status = guest.ranges(kind, &[(sector, sectors, 0)]);
                    match model.get_mut(from..from + sectors as usize * 512) {
                        Some(range) => { range.fill(0); prop_assert_eq!(status, OK) }
                        None => prop_assert_eq!(status, IOERR),
                    }
                }
                Op::Flush => prop_assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1)),
            }
        }
    }

    /// Any descriptors at all: the worker survives and serves the next honest request.
    #[test]
    fn chain_any_descriptors_device_survives(
        descs in proptest::collection::vec((0..MEMORY_END + 4096, 0..70_000u32, 0..8u16, 0..QUEUE_SIZE + 2), 1..8),
        heads in proptest::collection::vec(0..QUEUE_SIZE + 2, 1..8),
        kind in 0..16u32,
    ) {
        let mut guest = Guest::writable(vec![file(&[1; 8192])]);
        let header = guest.header(kind, 0).addr;
        for (i, (addr, len, flags, next)) in descs.into_iter().enumerate() {
            // Not over the rings themselves: those have tests of their own.
            let addr = if i == 0 { header } else { addr.max(0x20_0000) };
            guest.driver.queues[0].set_desc(i as u16, Desc { addr, len, flags, next });
        }
        let valid = heads.iter().filter(|head| **head < QUEUE_SIZE).count();
        for head in heads {
            guest.driver.queues[0].offer(head);
        }
        guest.driver.queues[0].kick();
        guest.driver.queues[0].wait_used(valid);
        prop_assert!(guest.read(0, 512).is_ok() );
    }
}
