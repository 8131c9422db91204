//! virtio-balloon: the guest gives memory back, when asked (inflation) and by itself (free page reporting).
//!
//! Pages given back are dropped from the VMM's mapping; the guest gets zeroed
//! ones when it touches them again. System calls: madvise, and read and write
//! of eventfds.

use super::buffers::{Advice, Buffers};
use super::counters::counters;
use super::ring::{Chain, Ring};
use super::saved::{self, RestoreError};
use super::{Activation, ActiveQueue, Device, Interrupt, Readiness, Watcher};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{GuestAddress, GuestMemoryMmap};

#[cfg(test)]
mod tests;

/// VIRTIO_BALLOON_F_STATS_VQ.
const F_STATS: u32 = 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM: the guest takes pages back rather than kill a process.
const F_DEFLATE_ON_OOM: u32 = 2;
/// VIRTIO_BALLOON_F_REPORTING.
const F_REPORTING: u32 = 5;

/// Entries of the queues; Linux wants 32 for reporting and uses one chain at a time in the others.
const QUEUE_SIZES: [u16; 4] = [8, 8, 2, 32];
/// Bytes of a balloon page, whatever the guest's page size.
const PAGE: u64 = 4096;
/// Pages in one mebibyte.
const PAGES_PER_MIB: u32 = 256;
/// Page numbers looked at in one chain: Linux sends 256. It bounds the madvise calls for one chain.
const MAX_PFNS: usize = 1024;
/// Chains handled before other devices get their turn.
const CHAINS_PER_TURN: usize = 8;
/// Statistics looked at in one chain: Linux has 16.
const MAX_STATS: usize = 32;
/// Bytes of configuration space: target, actual.
const CONFIG_SIZE: usize = 8;

/// Names of the guest's statistics by their tag; sizes are in bytes.
const STAT_NAMES: [&str; 16] = [
    "guest_swap_in",
    "guest_swap_out",
    "guest_major_faults",
    "guest_minor_faults",
    "guest_free",
    "guest_total",
    "guest_available",
    "guest_caches",
    "guest_hugetlb_allocations",
    "guest_hugetlb_failures",
    "guest_oom_kills",
    "guest_allocation_stalls",
    "guest_async_scans",
    "guest_direct_scans",
    "guest_async_reclaims",
    "guest_direct_reclaims",
];

counters! {
    /// What the device did.
    pub struct BalloonCounters {
        /// Bytes dropped because the guest inflated the balloon.
        inflated_bytes,
        /// Bytes the guest took back.
        deflated_bytes,
        /// Bytes dropped because the guest reported them free.
        reported_bytes,
        /// Page numbers and ranges outside memory, ignored.
        outside_memory,
        /// Descriptor chains that couldn't be walked.
        malformed_chains,
    }
}

/// What a queue is for. The driver leaves a queue out when it doesn't want its feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

/// A virtio-balloon device.
pub struct Balloon {
    memory_mib: u32,
    /// Pages the guest should give up.
    target: u32,
    /// Pages the guest says it has given up.
    actual: u32,
    /// The last statistics of the guest, by tag.
    stats: [Option<u64>; STAT_NAMES.len()],
    counters: BalloonCounters,
    active: Option<Active>,
}

struct Active {
    queues: Vec<(Role, Ring)>,
    /// The guest's statistics buffer, held until new ones are wanted.
    stats_buffer: Option<u16>,
    chain: Chain,
    pages: Buffers,
    advice: Advice,
    interrupt: Arc<dyn Interrupt>,
    watcher: Box<dyn Watcher>,
}

/// What the device remembers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BalloonState {
    memory_mib: u32,
    target: u32,
    actual: u32,
}

impl Balloon {
    /// Builds the device for a guest with this much memory.
    pub fn new(memory_mib: u32) -> Self {
        Balloon {
            memory_mib,
            target: 0,
            actual: 0,
            stats: [None; STAT_NAMES.len()],
            counters: BalloonCounters::default(),
            active: None,
        }
    }

    /// Builds the device from a saved one.
    pub fn restore(memory_mib: u32, state: &serde_json::Value) -> Result<Self, RestoreError> {
        let BalloonState {
            memory_mib: saved,
            target,
            actual,
        } = saved::parse("balloon", state)?;
        saved::require_same("balloon", "memory_mib", &saved, &memory_mib)?;
        Ok(Balloon {
            target,
            actual,
            ..Balloon::new(memory_mib)
        })
    }

    /// Asks the guest to give up `mib` MiB in all.
    pub fn set_target(&mut self, mib: u32) -> io::Result<()> {
        if mib >= self.memory_mib {
            let why = format!(
                "a balloon of {mib} MiB leaves nothing of the guest's {} MiB",
                self.memory_mib
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        self.target = mib * PAGES_PER_MIB;
        if let Some(active) = &self.active {
            active.interrupt.config_changed();
        }
        Ok(())
    }

    /// Asks the guest for new statistics; they show in [`Balloon::counters`] when they come.
    pub fn request_stats(&mut self) {
        let Some(active) = &mut self.active else {
            return;
        };
        let Some(head) = active.stats_buffer.take() else {
            return;
        };
        for (role, ring) in &mut active.queues {
            if *role == Role::Stats {
                ring.push(head, 0);
                ring.notify(active.interrupt.as_ref());
            }
        }
    }

    /// What the device did so far and what the guest last told, by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut list = self.counters.list();
        list.push(("target_bytes", u64::from(self.target) * PAGE));
        list.push(("actual_bytes", u64::from(self.actual) * PAGE));
        list.extend(
            STAT_NAMES
                .into_iter()
                .zip(self.stats)
                .filter_map(|(name, value)| Some((name, value?))),
        );
        list
    }

    /// Page numbers of the guest: drops the pages.
    fn inflate(counters: &BalloonCounters, active: &mut Active) {
        let mut pfns = Vec::with_capacity(MAX_PFNS.min(active.chain.readable.len() / 4));
        while pfns.len() < MAX_PFNS
            && let Some(pfn) = active.chain.readable.read::<4>()
        {
            pfns.push(u32::from_le_bytes(pfn));
        }
        // Neighbours are dropped in one call.
        pfns.sort_unstable();
        for run in pfns.chunk_by(|a, b| b.checked_sub(*a).is_some_and(|step| step <= 1)) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else {
                continue;
            };
            let start = u64::from(*first) * PAGE;
            let len = (u64::from(*last) + 1) * PAGE - start;
            active.pages.clear();
            if active.pages.push(GuestAddress(start), len as usize) {
                // A page that can't be dropped stays: the guest doesn't use it either way.
                counters
                    .inflated_bytes
                    .add(active.pages.give_back(active.advice).unwrap_or(0) as u64);
            } else {
                counters.outside_memory.add(1);
            }
        }
    }

    fn read_stats(stats: &mut [Option<u64>; STAT_NAMES.len()], chain: &mut Chain) {
        for _ in 0..MAX_STATS {
            let (Some(tag), Some(value)) = (chain.readable.read::<2>(), chain.readable.read::<8>())
            else {
                break;
            };
            if let Some(stat) = stats.get_mut(usize::from(u16::from_le_bytes(tag))) {
                *stat = Some(u64::from_le_bytes(value));
            }
        }
    }

    /// Works one queue for a while.
    fn work(&mut self, active: &mut Active, index: usize) {
        let Some((role, mut ring)) =
            (index < active.queues.len()).then(|| active.queues.remove(index))
        else {
            return;
        };
        ring.acknowledge();
        let mut more = true;
        for _ in 0..CHAINS_PER_TURN {
            if !ring.pop(&mut active.chain) {
                more = ring.rearm();
                break;
            }
            let head = active.chain.head;
            match role {
                Role::Inflate => Self::inflate(&self.counters, active),
                Role::Deflate => {
                    let pages = active.chain.readable.len().min(4 * MAX_PFNS) as u64 / 4;
                    self.counters.deflated_bytes.add(pages * PAGE);
                }
                Role::Stats => {
                    Self::read_stats(&mut self.stats, &mut active.chain);
                    // One buffer is held; an older one, which no honest driver leaves, goes back.
                    if let Some(older) = active.stats_buffer.replace(head) {
                        ring.push(older, 0);
                    }
                    continue;
                }
                Role::Reporting => {
                    let dropped = active.chain.writable.give_back(active.advice).unwrap_or(0);
                    self.counters.reported_bytes.add(dropped as u64);
                }
            }
            ring.push(head, 0);
        }
        if more {
            ring.kick_self();
        }
        ring.notify(active.interrupt.as_ref());
        active.queues.insert(index, (role, ring));
        let malformed = active.queues.iter().map(|(_, ring)| ring.malformed()).sum();
        self.counters.malformed_chains.set(malformed);
    }
}

impl Device for Balloon {
    fn id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        [
            F_STATS,
            F_DEFLATE_ON_OOM,
            F_REPORTING,
            VIRTIO_RING_F_EVENT_IDX,
        ]
        .iter()
        .fold(0, |set, bit| set | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; CONFIG_SIZE];
        space[..4].copy_from_slice(&self.target.to_le_bytes());
        space[4..].copy_from_slice(&self.actual.to_le_bytes());
        saved::read_config(&space, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Only `actual`, as a whole: that is how drivers write it.
        if let (4, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            self.actual = u32::from_le_bytes(actual);
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation {
            memory,
            queues,
            features,
            interrupt,
            watcher,
        } = activation;
        let has = |bit: u32| features & 1 << bit != 0;
        let roles = [
            (Role::Inflate, true),
            (Role::Deflate, true),
            (Role::Stats, has(F_STATS)),
            (Role::Reporting, has(F_REPORTING)),
        ];
        let memory: Arc<GuestMemoryMmap> = Arc::new(memory);
        // A feature that wasn't agreed on leaves no gap in the numbers of the queues.
        let mut wanted = roles
            .into_iter()
            .filter(|(_, wanted)| *wanted)
            .map(|(role, _)| role);
        let mut active = Active {
            queues: Vec::new(),
            stats_buffer: None,
            chain: Chain::new(&memory),
            pages: Buffers::new(&memory),
            advice: Advice::of(&memory),
            interrupt,
            watcher,
        };
        for (token, queue) in (0..).zip(queues) {
            let ring = Ring::new(&memory, queue, has(VIRTIO_RING_F_EVENT_IDX));
            // Queues beyond the agreed ones are kept to be given back, and never watched.
            let role = wanted.next();
            if role.is_some() {
                ring.watch(active.watcher.as_ref(), token)?;
            }
            active.queues.push((role.unwrap_or(Role::Deflate), ring));
        }
        self.active = Some(active);
        Ok(())
    }

    fn handle(&mut self, token: u64, _readiness: Readiness) {
        if let Some(mut active) = self.active.take() {
            self.work(&mut active, usize::try_from(token).unwrap_or(usize::MAX));
            self.active = Some(active);
        }
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        let Some(active) = self.active.take() else {
            return Vec::new();
        };
        let Active {
            queues,
            stats_buffer,
            chain: _,
            pages: _,
            advice: _,
            interrupt: _,
            watcher,
        } = active;
        let give_back = |(role, mut ring): (Role, Ring)| {
            // Fails only if it was never added.
            let _ = watcher.remove(ring.kick().as_raw_fd());
            if role == Role::Stats && stats_buffer.is_some() {
                ring.unpop(1);
            }
            ring.into_inner()
        };
        queues.into_iter().map(give_back).collect()
    }

    fn save(&self) -> serde_json::Value {
        let Balloon {
            memory_mib,
            target,
            actual,
            stats: _,
            counters: _,
            active: _,
        } = self;
        saved::value(&BalloonState {
            memory_mib: *memory_mib,
            target: *target,
            actual: *actual,
        })
    }
}
