//! virtio-rng: random bytes of the host's kernel.

use super::counters::counters;
use super::ring::{Chain, Ring};
use super::saved::{self, RestoreError};
use super::{Activation, ActiveQueue, Device, Interrupt, Readiness, Watcher};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// Entries of the queue: Linux asks for one buffer at a time.
const QUEUE_SIZE: u16 = 8;
/// Bytes given for one request, however large its buffer: a seed is 32 bytes, and
/// the driver asks again. It keeps the time in getrandom to some microseconds.
const MAX_BYTES: usize = 1024;
/// Requests handled before other devices get their turn.
const REQUESTS_PER_TURN: usize = 8;

counters! {
    /// What the device did.
    pub struct RngCounters {
        /// Random bytes given.
        bytes,
        /// Descriptor chains that couldn't be walked.
        malformed_chains,
    }
}

/// A virtio-rng device.
#[derive(Default)]
pub struct Rng {
    counters: RngCounters,
    active: Option<Active>,
}

struct Active {
    ring: Ring,
    chain: Chain,
    interrupt: Arc<dyn Interrupt>,
    watcher: Box<dyn Watcher>,
}

/// There is nothing to remember: randomness must not repeat.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RngState {}

impl Rng {
    /// Builds the device.
    pub fn new() -> Self {
        Self::default()
    }

    /// Builds the device anew.
    pub fn restore(state: &serde_json::Value) -> Result<Self, RestoreError> {
        let RngState {} = saved::parse("rng", state)?;
        Ok(Self::new())
    }

    /// What the device did so far, by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.list()
    }
}

impl Device for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
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
        let [ring] = Ring::all(&memory, queues, features)?;
        ring.watch(watcher.as_ref(), 0)?;
        self.active = Some(Active {
            ring,
            chain: Chain::new(&memory),
            interrupt,
            watcher,
        });
        Ok(())
    }

    fn handle(&mut self, _token: u64, _readiness: Readiness) {
        let Some(Active {
            ring,
            chain,
            interrupt,
            watcher: _,
        }) = &mut self.active
        else {
            return;
        };
        ring.acknowledge();
        let mut more = true;
        for _ in 0..REQUESTS_PER_TURN {
            if !ring.pop(chain) {
                more = ring.rearm();
                break;
            }
            // The kernel's generator doesn't fail once it is seeded; should it, the guest gets 0 bytes.
            let filled = chain.writable.fill_random(MAX_BYTES).unwrap_or(0);
            ring.push(chain.head, filled as u32);
            self.counters.bytes.add(filled as u64);
        }
        if more {
            ring.kick_self();
        }
        ring.notify(interrupt.as_ref());
        self.counters.malformed_chains.set(ring.malformed());
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        let Some(Active {
            ring,
            chain: _,
            interrupt: _,
            watcher,
        }) = self.active.take()
        else {
            return Vec::new();
        };
        if ring.usable() {
            // Fails only if it was never added.
            let _ = watcher.remove(ring.kick().as_raw_fd());
        }
        vec![ring.into_inner()]
    }

    fn save(&self) -> serde_json::Value {
        let Rng {
            counters: _,
            active: _,
        } = self;
        saved::value(&RngState {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Desc, Driver, HOLE, SEAM};

    fn device() -> (Rng, Driver) {
        let mut rng = Rng::new();
        let driver = Driver::new(&rng);
        driver.activate(&mut rng);
        (rng, driver)
    }

    #[test]
    fn request_writable_buffer_is_filled() {
        let (mut rng, mut driver) = device();
        let address = driver.alloc(64);

        let head = driver.queues[0].add(&[Desc::writable(address, 64)]);
        driver.queues[0].kick();
        driver.settle(&mut rng);

        assert_eq!(driver.queues[0].take_used(), [(u32::from(head), 64)]);
        assert_ne!(driver.read(address, 64), [0; 64]);
        assert_eq!(driver.interrupt.used_count(), 1);
    }

    #[test]
    fn request_across_regions_is_filled_on_both_sides() {
        let (mut rng, mut driver) = device();

        driver.queues[0].add(&[Desc::writable(SEAM - 32, 64)]);
        driver.queues[0].kick();
        driver.settle(&mut rng);

        assert_eq!(driver.queues[0].take_used(), [(0, 64)]);
        assert_ne!(driver.read(SEAM - 32, 32), [0; 32]);
        assert_ne!(driver.read(SEAM, 32), [0; 32]);
    }

    #[test]
    fn request_larger_than_bound_is_cut() {
        let (mut rng, mut driver) = device();

        driver.queues[0].add(&[Desc::writable(SEAM - (1 << 20), 1 << 20)]);
        driver.queues[0].kick();
        driver.settle(&mut rng);

        assert_eq!(driver.queues[0].take_used(), [(0, MAX_BYTES as u32)]);
    }

    #[test]
    fn request_readable_or_outside_memory_comes_back_empty() {
        let (mut rng, mut driver) = device();

        let chains = [
            vec![Desc::readable(0x10_0000, 64)],
            vec![Desc::writable(HOLE, 64)],
            vec![Desc::writable(HOLE - 32, 64)],
            vec![Desc::writable(u64::MAX - 8, 64)],
            vec![Desc::writable(0x10_0000, 0)],
            vec![Desc::writable(0x10_0000, 8), Desc::readable(0x10_0000, 8)],
        ];
        for chain in &chains {
            driver.queues[0].add(chain);
            driver.queues[0].kick();
            driver.settle(&mut rng);
            let used = driver.queues[0].take_used();
            assert!(matches!(used[..], [(_, 0)]), "{chain:?}: {used:?}");
        }
        assert_eq!(rng.counters.bytes.get(), 0);
    }

    #[test]
    fn ring_more_requests_than_one_turn_all_answered() {
        let (mut rng, mut driver) = device();
        for round in 0..10 {
            for _ in 0..QUEUE_SIZE {
                driver.queues[0].add(&[Desc::writable(0x10_0000, 16)]);
            }
            driver.queues[0].kick();
            driver.settle(&mut rng);
            assert_eq!(
                driver.queues[0].take_used().len(),
                usize::from(QUEUE_SIZE),
                "round {round}"
            );
        }
    }

    #[test]
    fn stop_and_activate_again_pending_request_is_answered() {
        let (mut rng, mut driver) = device();
        let queues = rng.stop();
        driver.queues[0].add(&[Desc::writable(0x10_0000, 16)]);
        driver.settle(&mut rng);
        assert_eq!(driver.queues[0].take_used(), []);

        let mut restored = Rng::restore(&rng.save()).unwrap();
        let features = restored.features();
        restored
            .activate(driver.reactivation(queues, features))
            .unwrap();
        driver.settle(&mut restored);

        assert_eq!(driver.queues[0].take_used(), [(0, 16)]);
    }

    #[test]
    fn queue_never_enabled_device_stays_quiet() {
        let mut rng = Rng::new();
        let mut driver = Driver::new(&rng);
        driver.queues[0].disabled = true;
        driver.activate(&mut rng);
        driver.queues[0].add(&[Desc::writable(0x10_0000, 16)]);
        driver.queues[0].kick();
        driver.settle(&mut rng);
        assert_eq!(driver.queues[0].take_used(), []);
        assert_eq!(rng.stop().len(), 1);
    }
}
