//! A virtqueue as a device uses it: pop a chain, use it, hand it back.
//!
//! All that a hostile driver can get wrong in a ring ends here: a chain that
//! loops, leaves guest memory or mixes its directions is handed back at once
//! with length 0, and a ring whose own memory or indices are broken is left
//! alone until the driver resets the device.

use super::buffers::Buffers;
use super::{ActiveQueue, Interrupt, Watcher};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

/// A descriptor chain: what the device reads, then what it writes.
#[derive(Debug)]
pub struct Chain {
    /// Index that [`Ring::push`] gives back.
    pub head: u16,
    /// Device-readable buffers.
    pub readable: Buffers,
    /// Device-writable buffers, after the readable ones.
    pub writable: Buffers,
    /// Some buffer lies outside guest memory, and is missing above.
    pub outside: bool,
}

impl Chain {
    /// An empty chain to [`Ring::pop`] into; its allocations are reused.
    pub fn new(memory: &Arc<GuestMemoryMmap>) -> Self {
        Chain {
            head: 0,
            readable: Buffers::new(memory),
            writable: Buffers::new(memory),
            outside: false,
        }
    }

    /// Walks `chain`; false if it is malformed.
    fn load(&mut self, chain: DescriptorChain<&GuestMemoryMmap>, max_descriptors: u16) -> bool {
        self.head = chain.head_index();
        self.readable.clear();
        self.writable.clear();
        self.outside = false;
        let mut last: Option<Descriptor> = None;
        for (index, descriptor) in chain.enumerate() {
            if index >= usize::from(max_descriptors) {
                return false;
            }
            last = Some(descriptor);
            let direction = if descriptor.is_write_only() {
                &mut self.writable
            } else if self.writable.is_empty() {
                &mut self.readable
            } else {
                return false;
            };
            self.outside |= !direction.push(descriptor.addr(), descriptor.len() as usize);
        }
        // The walk also ends where a chain loops, leaves the table or the memory
        // that the table lies in: then its last descriptor still names another.
        last.is_some_and(|descriptor| !descriptor.has_next())
    }
}

/// A virtqueue of an active device.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<GuestMemoryMmap>,
    active: ActiveQueue,
    /// The ring's own memory or indices make no sense.
    broken: bool,
    /// Chains handed back unused because they were malformed.
    malformed: u64,
    /// Something was pushed since the last [`Ring::notify`].
    pushed: bool,
}

impl Ring {
    /// Takes the queue into use.
    pub fn new(memory: &Arc<GuestMemoryMmap>, mut active: ActiveQueue, event_idx: bool) -> Self {
        let usable = active.queue.ready() && active.queue.is_valid(memory.as_ref());
        active.queue.set_event_idx(event_idx);
        Ring {
            memory: Arc::clone(memory),
            active,
            broken: !usable,
            malformed: 0,
            pushed: false,
        }
    }

    /// Takes the queues of a device that has `N` of them into use.
    pub fn all<const N: usize>(
        memory: &Arc<GuestMemoryMmap>,
        queues: Vec<ActiveQueue>,
        features: u64,
    ) -> io::Result<[Self; N]> {
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queues: [ActiveQueue; N] = queues
            .try_into()
            .map_err(|_| io::Error::other(format!("the device takes exactly {N} queues")))?;
        Ok(queues.map(|queue| Self::new(memory, queue, event_idx)))
    }

    /// Whether anything can come from this ring.
    pub fn usable(&self) -> bool {
        !self.broken
    }

    /// Has the driver's kicks watched, if anything can come from this ring.
    pub fn watch(&self, watcher: &dyn Watcher, token: u64) -> io::Result<()> {
        if self.usable() {
            watcher.add(self.kick().as_raw_fd(), libc::EPOLLIN as u32, token)?;
            // Work may have come while nobody watched.
            self.kick_self();
        }
        Ok(())
    }

    /// The driver's kicks.
    pub fn kick(&self) -> &vmm_sys_util::eventfd::EventFd {
        &self.active.kick
    }

    /// Takes the next chain that is well formed; malformed ones before it are handed back unused.
    pub fn pop(&mut self, chain: &mut Chain) -> bool {
        while self.pop_even_outside(chain) {
            if !chain.outside {
                return true;
            }
            self.malformed += 1;
            self.push(chain.head, 0);
        }
        false
    }

    /// The same, but buffers may lie outside memory: for devices that answer with a status.
    pub fn pop_even_outside(&mut self, chain: &mut Chain) -> bool {
        // Every turn takes a head off the ring, which holds at most its size of them;
        // the bound is for a driver that feeds malformed chains while we look.
        for _ in 0..=self.active.queue.size() {
            if self.broken {
                return false;
            }
            let max_descriptors = self.active.queue.size();
            let Ok(mut available) = self.active.queue.iter(self.memory.as_ref()) else {
                self.broken = true;
                return false;
            };
            let Some(descriptors) = available.next() else {
                return false;
            };
            if chain.load(descriptors, max_descriptors) {
                return true;
            }
            self.malformed += 1;
            self.push(chain.head, 0);
        }
        false
    }

    /// Puts the last `count` popped chains back, unused, to be popped again.
    pub fn unpop(&mut self, count: u16) {
        let next = self.active.queue.next_avail().wrapping_sub(count);
        self.active.queue.set_next_avail(next);
    }

    /// Hands a chain back to the driver with `len` bytes written to it.
    pub fn push(&mut self, head: u16, len: u32) {
        self.pushed = true;
        // A head outside the table can't be handed back, and the driver that made it up doesn't wait for it.
        if head < self.active.queue.size()
            && self
                .active
                .queue
                .add_used(self.memory.as_ref(), head, len)
                .is_err()
        {
            self.broken = true;
        }
    }

    /// Interrupts the driver if it wants to know of what was pushed.
    pub fn notify(&mut self, interrupt: &dyn Interrupt) {
        if std::mem::take(&mut self.pushed)
            && self
                .active
                .queue
                .needs_notification(self.memory.as_ref())
                .unwrap_or(true)
        {
            interrupt.used();
        }
    }

    /// Asks the driver for a kick when it adds a chain; true if one is there already.
    pub fn rearm(&mut self) -> bool {
        !self.broken
            && self
                .active
                .queue
                .enable_notification(self.memory.as_ref())
                .unwrap_or(false)
    }

    /// Asks the driver not to kick, until [`Ring::rearm`].
    pub fn disarm(&mut self) {
        // Advisory: a driver that kicks anyway costs a wakeup.
        let _ = self.active.queue.disable_notification(self.memory.as_ref());
    }

    /// Makes the kick readable again, for work that was put off.
    pub fn kick_self(&self) {
        // Fails only if the counter is about to overflow, when it is readable anyway.
        let _ = self.active.kick.write(1);
    }

    /// Clears the kick.
    pub fn acknowledge(&self) {
        // Fails only if there was none.
        let _ = self.active.kick.read();
    }

    /// Malformed chains so far.
    pub fn malformed(&self) -> u64 {
        self.malformed
    }

    /// The ring's size.
    pub fn size(&self) -> u16 {
        self.active.queue.size()
    }

    /// Ring positions show no trace of use: the driver has just set it up.
    pub fn fresh(&self) -> bool {
        let queue: &Queue = &self.active.queue;
        queue.next_avail() == 0 && queue.next_used() == 0
    }

    /// Gives the queue back.
    pub fn into_inner(self) -> ActiveQueue {
        self.active
    }
}
