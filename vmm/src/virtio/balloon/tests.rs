//! The balloon against the mock driver.

use super::*;
use crate::virtio::testing::{Desc, Driver, HOLE, MEMORY_END, SEAM};
use proptest::prelude::*;

const MIB: u32 = 10;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 3;

struct Guest {
    balloon: Balloon,
    driver: Driver,
}

impl Guest {
    fn new() -> Self {
        let mut balloon = Balloon::new(MIB);
        let driver = Driver::new(&balloon);
        driver.activate(&mut balloon);
        Guest { balloon, driver }
    }

    fn submit(&mut self, queue: usize, chain: &[Desc]) -> usize {
        self.driver.queues[queue].add(chain);
        self.driver.queues[queue].kick();
        self.driver.settle(&mut self.balloon);
        self.driver.queues[queue].take_used().len()
    }

    fn inflate(&mut self, pfns: &[u32]) {
        let bytes: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
        let address = self.driver.alloc_with(&bytes);
        assert_eq!(
            self.submit(INFLATE, &[Desc::readable(address, bytes.len() as u32)]),
            1
        );
    }

    fn counter(&self, name: &str) -> Option<u64> {
        self.balloon
            .counters()
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(_, value)| *value)
    }
}

fn config(balloon: &Balloon) -> [u32; 2] {
    [0, 4].map(|offset| {
        let mut bytes = [0; 4];
        balloon.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    })
}

#[test]
fn inflate_pages_lose_their_content_and_neighbours_keep_theirs() {
    let mut guest = Guest::new();
    guest.driver.write(0x20_0000, &[7; 5 * 4096]);

    guest.inflate(&[0x203, 0x201, 0x202, 0x202]);

    assert_eq!(guest.driver.read(0x20_0000, 4096), [7; 4096]);
    assert_eq!(guest.driver.read(0x20_1000, 3 * 4096), [0; 3 * 4096]);
    assert_eq!(guest.driver.read(0x20_4000, 4096), [7; 4096]);
    assert_eq!(guest.counter("inflated_bytes"), Some(3 * 4096));
}

#[test]
fn inflate_pages_outside_memory_are_ignored() {
    let mut guest = Guest::new();
    guest.driver.write(HOLE - 4096, &[7; 4096]);
    guest.inflate(&[
        (HOLE >> 12) as u32,
        (MEMORY_END >> 12) as u32,
        u32::MAX,
        0xff_ffff,
    ]);
    assert_eq!(guest.counter("inflated_bytes"), Some(0));
    assert_eq!(guest.counter("outside_memory"), Some(4));
    assert_eq!(guest.driver.read(HOLE - 4096, 4096), [7; 4096]);
}

#[test]
fn inflate_across_regions_both_sides_are_dropped() {
    let mut guest = Guest::new();
    guest.driver.write(SEAM - 4096, &[7; 8192]);
    guest.inflate(&[(SEAM >> 12) as u32 - 1, (SEAM >> 12) as u32]);
    assert_eq!(guest.driver.read(SEAM - 4096, 8192), [0; 8192]);
}

#[test]
fn inflate_odd_or_huge_list_is_cut_to_whole_and_bounded_numbers() {
    let mut guest = Guest::new();
    guest.driver.write(0x20_0000, &[7; 4096]);
    let address = guest.driver.alloc_with(&[0x00, 0x02, 0x00, 0x00, 0x01]);
    assert_eq!(guest.submit(INFLATE, &[Desc::readable(address, 5)]), 1);
    assert_eq!(guest.counter("inflated_bytes"), Some(4096));

    let far: Vec<u32> = (0..MAX_PFNS as u32 + 100)
        .map(|i| 0x10_0000 + 2 * i)
        .collect();
    guest.inflate(&far);
    assert_eq!(guest.counter("outside_memory"), Some(MAX_PFNS as u64));
}

#[test]
fn deflate_is_acknowledged() {
    let mut guest = Guest::new();
    let address = guest.driver.alloc_with(&[0; 8]);
    assert_eq!(guest.submit(DEFLATE, &[Desc::readable(address, 8)]), 1);
    assert_eq!(guest.counter("deflated_bytes"), Some(8192));
}

#[test]
fn report_whole_pages_are_dropped_others_left_alone() {
    let mut guest = Guest::new();
    guest.driver.write(0x20_0000, &[7; 6 * 4096]);
    let chain = [
        Desc::writable(0x20_0000, 8192),
        Desc::writable(0x20_2100, 4096),
        Desc::writable(0x20_4000, 100),
    ];
    assert_eq!(guest.submit(REPORTING, &chain), 1);
    assert_eq!(guest.driver.read(0x20_0000, 8192), [0; 8192]);
    assert_eq!(guest.driver.read(0x20_2000, 4 * 4096), [7; 4 * 4096]);
    assert_eq!(guest.counter("reported_bytes"), Some(8192));

    assert_eq!(guest.submit(REPORTING, &[Desc::writable(HOLE, 4096)]), 1);
    assert_eq!(
        guest.submit(REPORTING, &[Desc::readable(0x20_4000, 4096)]),
        1
    );
    assert_eq!(guest.counter("reported_bytes"), Some(8192));
    assert_eq!(guest.driver.read(0x20_4000, 4096), [7; 4096]);
}

#[test]
fn set_target_guest_is_told_and_answers() {
    let mut guest = Guest::new();
    guest.balloon.set_target(4).unwrap();
    assert_eq!(config(&guest.balloon), [1024, 0]);
    assert_eq!(guest.driver.interrupt.config_count(), 1);
    guest.balloon.write_config(4, &1000u32.to_le_bytes());
    guest.balloon.write_config(0, &5u32.to_le_bytes());
    guest.balloon.write_config(4, &[1]);
    guest.balloon.write_config(u64::MAX, &[1; 4]);
    assert_eq!(config(&guest.balloon), [1024, 1000]);
    assert_eq!(guest.counter("actual_bytes"), Some(1000 * 4096));
}

#[test]
fn set_target_all_memory_is_refused() {
    let mut balloon = Balloon::new(MIB);
    let refusal = balloon.set_target(MIB).unwrap_err().to_string();
    assert!(refusal.contains("10 MiB"), "{refusal}");
    assert!(balloon.set_target(u32::MAX).is_err());
}

#[test]
fn stats_buffer_is_held_until_asked_for() {
    let mut guest = Guest::new();
    let mut bytes = Vec::new();
    for (tag, value) in [(4u16, 1000u64), (5, 2000), (99, 1), (10, 3)] {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(value.to_le_bytes());
    }
    bytes.push(4);
    let address = guest.driver.alloc_with(&bytes);
    let chain = [Desc::readable(address, bytes.len() as u32)];

    assert_eq!(guest.submit(STATS, &chain), 0);
    assert_eq!(guest.counter("guest_free"), Some(1000));
    assert_eq!(guest.counter("guest_total"), Some(2000));
    assert_eq!(guest.counter("guest_oom_kills"), Some(3));
    assert_eq!(guest.counter("guest_caches"), None);

    guest.balloon.request_stats();
    guest.balloon.request_stats();
    assert_eq!(guest.driver.queues[STATS].take_used().len(), 1);

    // Two at once: the older goes back.
    assert_eq!(guest.submit(STATS, &chain), 0);
    assert_eq!(guest.submit(STATS, &chain), 1);
}

#[test]
fn features_without_stats_reporting_is_the_third_queue() {
    let mut balloon = Balloon::new(MIB);
    let mut driver = Driver::new(&balloon);
    balloon
        .activate(driver.activation(1 << F_REPORTING))
        .unwrap();
    driver.write(0x20_0000, &[7; 4096]);
    driver.queues[2].add(&[Desc::writable(0x20_0000, 4096)]);
    driver.queues[2].kick();
    driver.settle(&mut balloon);
    assert_eq!(driver.queues[2].take_used().len(), 1);
    assert_eq!(driver.read(0x20_0000, 4096), [0; 4096]);
    assert_eq!(balloon.stop().len(), 4);
}

#[test]
fn restore_held_stats_buffer_and_target_are_kept() {
    let mut guest = Guest::new();
    let address = guest.driver.alloc_with(&[0; 10]);
    guest.submit(STATS, &[Desc::readable(address, 10)]);
    guest.balloon.set_target(3).unwrap();
    guest.balloon.write_config(4, &700u32.to_le_bytes());
    let state = guest.balloon.save();
    let queues = guest.balloon.stop();

    guest.balloon = Balloon::restore(MIB, &state).unwrap();
    let features = guest.balloon.features();
    guest
        .balloon
        .activate(guest.driver.reactivation(queues, features))
        .unwrap();
    guest.driver.settle(&mut guest.balloon);

    assert_eq!(config(&guest.balloon), [768, 700]);
    guest.balloon.request_stats();
    assert_eq!(guest.driver.queues[STATS].take_used().len(), 1);
    assert!(Balloon::restore(MIB + 1, &state).is_err());
    assert!(Balloon::restore(MIB, &serde_json::json!([])).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Exactly the pages named are dropped.
    #[test]
    fn inflate_any_pages_drops_exactly_those(pfns in proptest::collection::vec(0x200..0xb00u32, 0..64)) {
        let mut guest = Guest::new();
        let in_memory = |pfn: u32| u64::from(pfn) << 12 < HOLE || (0x800..0xa00).contains(&pfn);
        for pfn in (0x200..0xa00).filter(|pfn| in_memory(*pfn)) {
            guest.driver.write(u64::from(pfn) << 12, &[1]);
        }
        guest.inflate(&pfns);
        for pfn in (0x200..0xa00).filter(|pfn| in_memory(*pfn)) {
            let kept = guest.driver.read(u64::from(pfn) << 12, 1) == [1];
            // A run that touches the hole is ignored as a whole.
            let near_hole = !in_memory(pfn + 1) || pfns.iter().any(|other| !in_memory(*other));
            prop_assert!(kept != pfns.contains(&pfn) || near_hole, "{:#x}", pfn);
        }
    }

    #[test]
    fn chains_any_device_survives(
        chains in proptest::collection::vec((0..4usize, 0x20_0000..MEMORY_END + 8192, 0..20_000u32, any::<bool>()), 1..30),
    ) {
        let mut guest = Guest::new();
        for (queue, address, len, writable) in chains {
            let desc = if writable { Desc::writable(address, len) } else { Desc::readable(address, len) };
            guest.submit(queue, &[desc]);
        }
        guest.driver.write(0x20_0000, &[7; 4096]);
        guest.inflate(&[0x200]);
        prop_assert_eq!(guest.driver.read(0x20_0000, 4096), vec![0; 4096]);
    }
}
