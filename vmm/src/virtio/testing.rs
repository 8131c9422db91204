//! A mock driver: lays rings in guest memory as a guest would, or as no honest guest would.
//!
//! For tests and fuzz targets: it panics where a test is wrong.

use super::{Activation, ActiveQueue, Device, Interrupt, Readiness, Watcher};
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Where two regions touch: a buffer across it is two pieces for the host.
pub const SEAM: u64 = 4 << 20;
/// First address that is no memory; the hole is 2 MiB long.
pub const HOLE: u64 = 6 << 20;
/// Where memory goes on after the hole, up to [`MEMORY_END`].
pub const AFTER_HOLE: u64 = 8 << 20;
/// End of guest memory.
pub const MEMORY_END: u64 = 10 << 20;
/// Rings lie below it, [`Driver::alloc`] starts at it.
const BUFFERS: u64 = 1 << 20;

/// Guest memory of three regions, two of them adjacent.
pub fn memory() -> GuestMemoryMmap {
    let range = |start: u64, end: u64| (GuestAddress(start), (end - start) as usize);
    GuestMemoryMmap::from_ranges(&[
        range(0, SEAM),
        range(SEAM, HOLE),
        range(AFTER_HOLE, MEMORY_END),
    ])
    .unwrap()
}

/// The same regions in memory files, which another process could map.
pub fn shared_memory() -> GuestMemoryMmap {
    let part = |start: u64, end: u64| {
        let file = tempfile_of(end - start);
        let offset = vm_memory::FileOffset::new(file, 0);
        (GuestAddress(start), (end - start) as usize, Some(offset))
    };
    GuestMemoryMmap::from_ranges_with_files([
        part(0, SEAM),
        part(SEAM, HOLE),
        part(AFTER_HOLE, MEMORY_END),
    ])
    .unwrap()
}

fn tempfile_of(size: u64) -> std::fs::File {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file: std::fs::File = rustix::fs::memfd_create("test", flags).unwrap().into();
    file.set_len(size).unwrap();
    file
}

/// Counts what a device raises.
#[derive(Debug, Default)]
pub struct MockInterrupt {
    used: AtomicU64,
    config: AtomicU64,
}

impl MockInterrupt {
    /// Interrupts for used buffers so far.
    pub fn used_count(&self) -> u64 {
        self.used.load(Ordering::SeqCst)
    }

    /// Interrupts for configuration changes so far.
    pub fn config_count(&self) -> u64 {
        self.config.load(Ordering::SeqCst)
    }
}

impl Interrupt for MockInterrupt {
    fn used(&self) {
        self.used.fetch_add(1, Ordering::SeqCst);
    }

    fn config_changed(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }
}

struct MockWatcher(Arc<Epoll>);

impl MockWatcher {
    fn ctl(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        interest: Readiness,
        token: u64,
    ) -> io::Result<()> {
        let events = EventSet::from_bits(interest).expect("interest holds epoll bits only");
        self.0.ctl(operation, fd, EpollEvent::new(events, token))
    }
}

impl Watcher for MockWatcher {
    fn add(&self, fd: RawFd, interest: Readiness, token: u64) -> io::Result<()> {
        self.ctl(ControlOperation::Add, fd, interest, token)
    }

    fn modify(&self, fd: RawFd, interest: Readiness, token: u64) -> io::Result<()> {
        self.ctl(ControlOperation::Modify, fd, interest, token)
    }

    fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.ctl(ControlOperation::Delete, fd, 0, 0)
    }
}

/// One descriptor as it is written to the table.
#[derive(Debug, Clone, Copy)]
pub struct Desc {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// VRING_DESC_F bits.
    pub flags: u16,
    /// Index of the next one, if the flags say so.
    pub next: u16,
}

impl Desc {
    /// A buffer that the device reads.
    pub fn readable(addr: u64, len: u32) -> Self {
        Desc {
            addr,
            len,
            flags: 0,
            next: 0,
        }
    }

    /// A buffer that the device writes.
    pub fn writable(addr: u64, len: u32) -> Self {
        Desc {
            addr,
            len,
            flags: VRING_DESC_F_WRITE as u16,
            next: 0,
        }
    }

    /// A table of descriptors elsewhere.
    pub fn indirect(addr: u64, len: u32) -> Self {
        Desc {
            addr,
            len,
            flags: VRING_DESC_F_INDIRECT as u16,
            next: 0,
        }
    }

    /// The same, followed by descriptor `next`.
    pub fn then(self, next: u16) -> Self {
        Desc {
            flags: self.flags | VRING_DESC_F_NEXT as u16,
            next,
            ..self
        }
    }

    /// As it lies in memory.
    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// The driver's side of one queue.
#[derive(Debug)]
pub struct MockQueue {
    memory: GuestMemoryMmap,
    /// Entries.
    pub size: u16,
    /// Address of the descriptor table.
    pub desc: u64,
    /// Address of the available ring.
    pub avail: u64,
    /// Address of the used ring.
    pub used: u64,
    /// Left out by the driver.
    pub disabled: bool,
    kick: EventFd,
    next_desc: u16,
    avail_idx: u16,
    used_idx: u16,
}

impl MockQueue {
    fn new(memory: &GuestMemoryMmap, index: u64, size: u16) -> Self {
        let base = 0x1000 + index * 0x1_0000;
        let kick = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap();
        MockQueue {
            memory: memory.clone(),
            size,
            desc: base,
            avail: base + 0x8000,
            used: base + 0xc000,
            disabled: false,
            kick,
            next_desc: 0,
            avail_idx: 0,
            used_idx: 0,
        }
    }

    /// Writes descriptor `index` of the table; lost if the table lies outside memory.
    pub fn set_desc(&self, index: u16, desc: Desc) {
        self.poke(self.desc.wrapping_add(16 * u64::from(index)), &desc.bytes());
    }

    /// Puts a head, any number, into the available ring.
    pub fn offer(&mut self, head: u16) {
        let slot = 4 + 2 * u64::from(self.avail_idx % self.size);
        self.poke(self.avail.wrapping_add(slot), &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.set_avail_idx(self.avail_idx);
    }

    /// Claims that the available ring ends at `idx`.
    pub fn set_avail_idx(&self, idx: u16) {
        let address = GuestAddress(self.avail.wrapping_add(2));
        // Outside memory there is nobody to read it.
        let _ = self.memory.store(idx.to_le(), address, Ordering::Release);
    }

    fn poke(&self, address: u64, data: &[u8]) {
        // Outside memory there is nobody to read it.
        let _ = self.memory.write_slice(data, GuestAddress(address));
    }

    fn peek<T: vm_memory::ByteValued>(&self, address: u64) -> Option<T> {
        self.memory.read_obj(GuestAddress(address)).ok()
    }

    /// Offers a chain made of `descs`, in order; returns its head. Used descriptors are taken anew round robin.
    pub fn add(&mut self, descs: &[Desc]) -> u16 {
        let head = self.next_desc;
        for (i, desc) in descs.iter().enumerate() {
            let at = self.next_desc;
            self.next_desc = (at + 1) % self.size;
            let last = i + 1 == descs.len();
            self.set_desc(
                at,
                if last {
                    *desc
                } else {
                    desc.then(self.next_desc)
                },
            );
        }
        self.offer(head);
        head
    }

    /// Tells the device.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// What the device handed back since the last look: head and length.
    pub fn take_used(&mut self) -> Vec<(u32, u32)> {
        let mut out = Vec::new();
        let idx: u16 = self
            .memory
            .load(GuestAddress(self.used.wrapping_add(2)), Ordering::Acquire)
            .unwrap_or(0);
        while self.used_idx != u16::from_le(idx) {
            let slot = self
                .used
                .wrapping_add(4 + 8 * u64::from(self.used_idx % self.size));
            let (Some(id), Some(len)) = (
                self.peek::<u32>(slot),
                self.peek::<u32>(slot.wrapping_add(4)),
            ) else {
                break;
            };
            out.push((u32::from_le(id), u32::from_le(len)));
            self.used_idx = self.used_idx.wrapping_add(1);
        }
        // Ask to be told of the next one, for devices with EVENT_IDX.
        let event = self.avail.wrapping_add(4 + 2 * u64::from(self.size));
        self.poke(event, &self.used_idx.to_le_bytes());
        out
    }

    /// Waits until `count` chains came back: for devices with a thread.
    pub fn wait_used(&mut self, count: usize) -> Vec<(u32, u32)> {
        let end = Instant::now() + Duration::from_secs(10);
        let mut out = Vec::new();
        while out.len() < count {
            assert!(
                Instant::now() < end,
                "{} of {count} chains came back within 10 s",
                out.len()
            );
            out.extend(self.take_used());
            std::thread::sleep(Duration::from_micros(50));
        }
        out
    }

    fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(self.desc as u32), Some((self.desc >> 32) as u32));
        queue.set_avail_ring_address(Some(self.avail as u32), Some((self.avail >> 32) as u32));
        queue.set_used_ring_address(Some(self.used as u32), Some((self.used >> 32) as u32));
        queue.set_ready(!self.disabled);
        queue
    }
}

/// A guest's driver, an event loop and an interrupt line.
pub struct Driver {
    /// Guest memory.
    pub memory: GuestMemoryMmap,
    /// The driver's queues, as many as the device has.
    pub queues: Vec<MockQueue>,
    /// What the device raised.
    pub interrupt: Arc<MockInterrupt>,
    epoll: Arc<Epoll>,
    next_buffer: u64,
}

impl Driver {
    /// A driver with the queues that `device` offers.
    pub fn new(device: &dyn Device) -> Self {
        Self::with_queues(device.queue_sizes())
    }

    /// A driver with queues of these sizes.
    pub fn with_queues(sizes: &[u16]) -> Self {
        Self::build(sizes, memory())
    }

    /// A driver with the queues that `device` offers, in this memory.
    pub fn with_memory(device: &dyn Device, memory: GuestMemoryMmap) -> Self {
        Self::build(device.queue_sizes(), memory)
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    fn build(sizes: &[u16], memory: GuestMemoryMmap) -> Self {
        let queues = sizes
            .iter()
            .zip(0..)
            .map(|(size, index)| MockQueue::new(&memory, index, *size))
            .collect();
        Driver {
            memory,
            queues,
            interrupt: Arc::default(),
            epoll: Arc::new(Epoll::new().unwrap()),
            next_buffer: BUFFERS,
        }
    }

    /// What the transport hands over at DRIVER_OK.
    pub fn activation(&self, features: u64) -> Activation {
        let active = |queue: &MockQueue| ActiveQueue {
            queue: queue.queue(),
            kick: queue.kick.try_clone().unwrap(),
        };
        self.reactivation(self.queues.iter().map(active).collect(), features)
    }

    /// The same with queues that a device gave back.
    pub fn reactivation(&self, queues: Vec<ActiveQueue>, features: u64) -> Activation {
        Activation {
            memory: self.memory.clone(),
            queues,
            features,
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn Interrupt>,
            watcher: Box::new(MockWatcher(Arc::clone(&self.epoll))),
        }
    }

    /// Activates `device` with everything it offers.
    pub fn activate(&self, device: &mut dyn Device) {
        let features = device.features();
        device.activate(self.activation(features)).unwrap();
    }

    /// Lets the device handle what is ready now; false if nothing was.
    pub fn turn(&self, device: &mut dyn Device) -> bool {
        let mut events = [EpollEvent::default(); 64];
        let count = self.epoll.wait(0, &mut events).unwrap();
        for event in &events[..count] {
            device.handle(event.data(), event.events());
        }
        count > 0
    }

    /// Turns until nothing is ready; panics if the device never comes to rest.
    pub fn settle(&self, device: &mut dyn Device) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.turn(device) {
            assert!(
                Instant::now() < end,
                "the device keeps its event loop spinning"
            );
        }
    }

    /// Turns until `done` says so.
    pub fn run_until(&mut self, device: &mut dyn Device, mut done: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !done(self) {
            assert!(Instant::now() < end, "nothing came within 10 s");
            if !self.turn(device) {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// Address of `len` fresh bytes, 16-aligned; no buffer is ever given back.
    pub fn alloc(&mut self, len: u64) -> u64 {
        let address = self.next_buffer;
        self.next_buffer += len.next_multiple_of(16);
        assert!(
            self.next_buffer <= SEAM,
            "the mock driver is out of buffers"
        );
        address
    }

    /// Address of a fresh buffer that holds `data`.
    pub fn alloc_with(&mut self, data: &[u8]) -> u64 {
        let address = self.alloc(data.len() as u64);
        self.write(address, data);
        address
    }

    /// Forgets all buffers.
    pub fn free_all(&mut self) {
        self.next_buffer = BUFFERS;
    }

    /// Writes guest memory.
    pub fn write(&self, address: u64, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(address))
            .unwrap();
    }

    /// Writes guest memory, if all of it is there.
    pub fn try_write(&self, address: u64, data: &[u8]) {
        let _ = self.memory.write_slice(data, GuestAddress(address));
    }

    /// Reads guest memory.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }
}
