//! Virtio: one device trait, one transport (MMIO), a device per file.
//!
//! The transport (`mmio`) owns registers, feature negotiation, status, queue
//! addresses and the interrupt; a device sees only active queues.

pub mod balloon;
pub mod blk;
pub mod buffers;
pub mod counters;
pub mod fs;
pub mod mmio;
pub mod net;
pub mod ring;
pub mod rng;
pub mod saved;
pub mod supply;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
pub mod vsock;

use std::os::fd::RawFd;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// A virtqueue that the driver has set up, with the eventfd that KVM signals on a kick (ioeventfd).
#[derive(Debug)]
pub struct ActiveQueue {
    /// Ring addresses, size and positions; every access is checked against guest memory.
    pub queue: Queue,
    /// Readable when the driver has kicked.
    pub kick: EventFd,
}

/// Raises a device's interrupt: sets the ISR bit and signals the irqfd.
pub trait Interrupt: Send + Sync {
    /// A used buffer was added to some queue (ISR bit 0).
    fn used(&self);
    /// The configuration space changed (ISR bit 1).
    fn config_changed(&self);
}

/// What a device gets at DRIVER_OK.
pub struct Activation {
    /// The guest's memory (cheap to clone).
    pub memory: GuestMemoryMmap,
    /// One for each of [`Device::queue_sizes`]; a queue the driver left disabled has `queue.ready() == false`.
    pub queues: Vec<ActiveQueue>,
    /// Features that driver and device agreed on.
    pub features: u64,
    /// The device's interrupt line.
    pub interrupt: std::sync::Arc<dyn Interrupt>,
    /// Where to watch descriptors; events come back through [`Device::handle`].
    pub watcher: Box<dyn Watcher>,
}

/// Readiness of a descriptor (EPOLLIN, EPOLLOUT, EPOLLHUP bits).
pub type Readiness = u32;

/// Registers a device's descriptors with the event loop that owns the device.
pub trait Watcher: Send {
    /// Watches `fd` (level-triggered); `handle(token, …)` follows.
    fn add(&self, fd: RawFd, interest: Readiness, token: u64) -> std::io::Result<()>;
    /// Changes the interest in `fd`.
    fn modify(&self, fd: RawFd, interest: Readiness, token: u64) -> std::io::Result<()>;
    /// Stops watching; call it before closing `fd`.
    fn remove(&self, fd: RawFd) -> std::io::Result<()>;
}

/// One virtio device behind the transport.
///
/// The transport calls everything under one lock per device: config accesses
/// come from vCPU threads, [`Device::handle`] from the event loop.
pub trait Device: Send {
    /// Device id (virtio 1.2, section 5).
    fn id(&self) -> u32;

    /// Offered feature bits; the transport adds VIRTIO_F_VERSION_1.
    fn features(&self) -> u64;

    /// Maximum size of each queue, a power of two each.
    fn queue_sizes(&self) -> &[u16];

    /// Reads configuration space; bytes past its end read as 0.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes configuration space; what isn't writable is ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver set DRIVER_OK: start work. An error marks the device DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> std::io::Result<()>;

    /// A watched descriptor is ready. Work per call is bounded, so that devices share a loop fairly.
    fn handle(&mut self, token: u64, readiness: Readiness);

    /// Stops all work, completes or returns what is in flight, unwatches every descriptor and
    /// gives the queues back: pause, reset and save share this. Empty if never activated.
    fn stop(&mut self) -> Vec<ActiveQueue>;

    /// What the device itself must remember (not queues or features), as one serde value.
    fn save(&self) -> serde_json::Value;
}
