//! virtio-blk: a disk of one or more files, worked by a thread of its own.
//!
//! One thread a disk, so that a slow flush of the scratch disk doesn't hold up
//! reads of the image. Data moves between guest memory and the page cache with
//! one system call and no copy of ours.

mod backing;
mod limiter;
mod request;
mod worker;

#[cfg(test)]
mod tests;

use super::counters::counters;
use super::ring::{Chain, Ring};
use super::saved::{self, RestoreError};
use super::{Activation, ActiveQueue, Device, Interrupt, Readiness};
use crate::config::DiskLimits;
use backing::{Backing, SEGMENT_ALIGN};
use limiter::Limiter;
use request::Disk;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::sync::Arc;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use worker::{Command, Work, Worker};

/// Unit of the protocol, whatever the block size.
const SECTOR: u64 = 512;
/// Entries of the queue: 40 requests of one page in flight, or one of half a megabyte
/// in scattered pages. Linux allocates its tags by it while it boots.
const QUEUE_SIZE: u16 = 128;
/// Data descriptors in a request: the queue without header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes in a data descriptor.
const SIZE_MAX: u32 = 64 << 10;
/// Bytes in a request: what the two above allow, so that one request is bounded work.
const MAX_REQUEST_BYTES: usize = SEG_MAX as usize * SIZE_MAX as usize;
/// Ranges in a discard or write-zeroes request.
const MAX_RANGES: u32 = 16;
/// Sectors in each: 1 GiB, since punching a hole takes time by its extents.
const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Bytes of configuration space up to `write_zeroes_may_unmap` and its padding.
const CONFIG_SIZE: usize = 60;

counters! {
    /// What a disk did.
    pub struct BlockCounters {
        /// Read requests that succeeded.
        read_ops,
        /// Bytes they returned.
        read_bytes,
        /// Write requests that succeeded.
        write_ops,
        /// Bytes they wrote.
        write_bytes,
        /// Flushes that succeeded.
        flush_ops,
        /// Ranges discarded or zeroed.
        discard_ops,
        /// Bytes in them.
        discard_bytes,
        /// Requests answered with an error.
        errors,
        /// Requests without room for a status.
        malformed,
        /// Descriptor chains that couldn't be walked.
        malformed_chains,
    }
}

/// What a disk is built from.
pub struct BlockArgs {
    /// The serial that the guest sees, at most 20 bytes.
    pub id: String,
    /// Laid end to end, each padded to 4 KiB; none: a placeholder of no size.
    pub files: Vec<File>,
    /// Writes fail, and the guest knows.
    pub read_only: bool,
    /// A flush makes nothing durable: nobody reads the files after the VM's end.
    pub volatile: bool,
    /// `None`: unlimited.
    pub limits: Option<DiskLimits>,
    /// Runs first on the worker thread: installs its system-call filter.
    pub on_thread_start: Option<Box<dyn FnOnce() + Send>>,
}

/// A virtio-blk device.
pub struct Block {
    id: String,
    read_only: bool,
    volatile: bool,
    /// Bytes.
    capacity: u64,
    worker: Worker,
    counters: Arc<BlockCounters>,
    /// `Some` while active.
    interrupt: Option<Arc<dyn Interrupt>>,
    /// The guest was told another capacity: tell it at activation.
    capacity_changed: bool,
}

/// What a disk remembers. Its files are given anew.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    id: String,
    read_only: bool,
    capacity: u64,
}

impl Block {
    /// Builds the disk and starts its thread.
    pub fn new(args: BlockArgs) -> io::Result<Self> {
        let BlockArgs {
            id,
            files,
            read_only,
            volatile,
            limits,
            on_thread_start,
        } = args;
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        let Some(prefix) = serial.get_mut(..id.len()) else {
            let why = format!(
                "disk id {id:?} has {} bytes, at most {VIRTIO_BLK_ID_BYTES} fit",
                id.len()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        };
        prefix.copy_from_slice(id.as_bytes());
        let backing = Backing::new(files, volatile)?;
        let capacity = backing.capacity();
        let counters = Arc::new(BlockCounters::default());
        let disk = Disk {
            backing,
            read_only,
            serial,
            counters: Arc::clone(&counters),
        };
        let worker = Worker::spawn(disk, limits.map(Limiter::new), on_thread_start)?;
        Ok(Block {
            id,
            read_only,
            volatile,
            capacity,
            worker,
            counters,
            interrupt: None,
            capacity_changed: false,
        })
    }

    /// Builds the disk that `state` describes; other files may have another size, which the guest then learns.
    pub fn restore(args: BlockArgs, state: &serde_json::Value) -> Result<Self, RestoreError> {
        let BlockState {
            id,
            read_only,
            capacity,
        } = saved::parse("blk", state)?;
        saved::require_same("blk", "id", &id, &args.id)?;
        saved::require_same("blk", "read_only", &read_only, &args.read_only)?;
        let mut block = Block::new(args).map_err(|source| RestoreError::Build {
            device: "blk",
            source,
        })?;
        block.capacity_changed = block.capacity != capacity;
        Ok(block)
    }

    /// The serial.
    pub fn disk_id(&self) -> &str {
        &self.id
    }

    /// Replaces the files, flushed first; the guest sees the new capacity.
    pub fn swap(&mut self, files: Vec<File>) -> io::Result<()> {
        let backing = Backing::new(files, self.volatile)?;
        let capacity = backing.capacity();
        self.worker.ask(|answer| Command::Swap(backing, answer))??;
        self.capacity = capacity;
        match &self.interrupt {
            Some(interrupt) => interrupt.config_changed(),
            None => self.capacity_changed = true,
        }
        Ok(())
    }

    /// Makes durable what the guest wrote: for the end of the VM.
    pub fn flush(&self) -> io::Result<()> {
        self.worker.ask(Command::Flush)?
    }

    /// What the disk did so far, by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.list()
    }

    fn config(&self) -> [u8; CONFIG_SIZE] {
        let block_sectors = (SEGMENT_ALIGN / SECTOR) as u32;
        let mut space = [0; CONFIG_SIZE];
        let mut put = |offset: usize, bytes: &[u8]| {
            space[offset..offset + bytes.len()].copy_from_slice(bytes)
        };
        put(0, &(self.capacity / SECTOR).to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Topology: physical block as a power of two of sectors, least and best transfer in sectors.
        put(24, &[block_sectors.trailing_zeros() as u8]);
        put(26, &(block_sectors as u16).to_le_bytes());
        if !self.read_only {
            put(36, &MAX_RANGE_SECTORS.to_le_bytes());
            put(40, &MAX_RANGES.to_le_bytes());
            put(44, &block_sectors.to_le_bytes());
            put(48, &MAX_RANGE_SECTORS.to_le_bytes());
            put(52, &MAX_RANGES.to_le_bytes());
            put(56, &[1]);
        }
        space
    }
}

/// Works a disk's queue on the caller's thread until it is empty, or seems never to be: for fuzz targets.
#[cfg(any(test, feature = "test-utils"))]
pub fn work_inline(files: Vec<File>, read_only: bool, activation: Activation) {
    let backing = Backing::new(files, false).expect("files of some size");
    let mut disk = Disk {
        backing,
        read_only,
        serial: [b'x'; 20],
        counters: Arc::default(),
    };
    let memory = Arc::new(activation.memory);
    for queue in activation.queues {
        let ring = Ring::new(
            &memory,
            queue,
            activation.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0,
        );
        let chain = Chain::new(&memory);
        let mut work = Work {
            ring,
            chain,
            interrupt: Arc::clone(&activation.interrupt),
        };
        // A ring that overlaps a buffer can feed itself.
        let more = |_: &u32| worker::turn(&mut disk, None, &mut work).is_some();
        (0..100).take_while(more).count();
    }
}

impl Device for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_RING_F_EVENT_IDX,
        ];
        let kind: &[u32] = match self.read_only {
            true => &[VIRTIO_BLK_F_RO],
            false => &[
                VIRTIO_BLK_F_FLUSH,
                VIRTIO_BLK_F_DISCARD,
                VIRTIO_BLK_F_WRITE_ZEROES,
            ],
        };
        always
            .iter()
            .chain(kind)
            .fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        saved::read_config(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation {
            memory,
            queues,
            features,
            interrupt,
            watcher: _,
        } = activation;
        let memory = Arc::new(memory);
        let [ring] = Ring::all(&memory, queues, features)?;
        let chain = Chain::new(&memory);
        self.worker.send(Command::Start(Work {
            ring,
            chain,
            interrupt: Arc::clone(&interrupt),
        }))?;
        if std::mem::take(&mut self.capacity_changed) {
            interrupt.config_changed();
        }
        self.interrupt = Some(interrupt);
        Ok(())
    }

    /// Nothing of a disk is watched by the event loop.
    fn handle(&mut self, _token: u64, _readiness: Readiness) {}

    fn stop(&mut self) -> Vec<ActiveQueue> {
        self.interrupt = None;
        // Without its thread the disk has no queue to give back.
        self.worker
            .ask(Command::Stop)
            .ok()
            .flatten()
            .into_iter()
            .collect()
    }

    fn save(&self) -> serde_json::Value {
        let Block {
            id,
            read_only,
            capacity,
            worker: _,
            counters: _,
            interrupt: _,
            capacity_changed: _,
            volatile: _,
        } = self;
        saved::value(&BlockState {
            id: id.clone(),
            read_only: *read_only,
            capacity: *capacity,
        })
    }
}
