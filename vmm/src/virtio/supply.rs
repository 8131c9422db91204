//! Buffers that the driver supplies for data to come, taken off the ring ahead of need.
//!
//! One read of a socket or tap then fills many chains, and a chain that a short
//! read leaves unused is kept for the next one instead of being walked again.

use super::buffers::Buffers;
use super::ring::{Chain, Ring};
use super::{ActiveQueue, Interrupt};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;

/// A receive queue with the chains taken from it.
#[derive(Debug)]
pub struct Supply {
    memory: Arc<GuestMemoryMmap>,
    ring: Ring,
    /// Bytes at the front of each chain that a read leaves free.
    reserve: usize,
    /// Taken, not filled yet.
    taken: VecDeque<Chain>,
    /// Bytes that the taken chains have room for, without their reserves.
    room: usize,
    /// Chains handed back, for their allocations.
    spare: Vec<Chain>,
    /// Target of a read: the taken chains in one list.
    target: Buffers,
}

impl Supply {
    /// Takes the ring into use.
    pub fn new(memory: &Arc<GuestMemoryMmap>, ring: Ring, reserve: usize) -> Self {
        Supply {
            memory: Arc::clone(memory),
            ring,
            reserve,
            taken: VecDeque::new(),
            room: 0,
            spare: Vec::new(),
            target: Buffers::new(memory),
        }
    }

    /// The ring itself.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Takes chains until they have room for `bytes`; returns the room there is.
    ///
    /// A chain without any room beyond its reserve is handed back unused.
    pub fn prepare(&mut self, bytes: usize) -> usize {
        while self.room < bytes && self.taken.len() < usize::from(self.ring.size()) {
            let mut chain = self.spare.pop().unwrap_or_else(|| Chain::new(&self.memory));
            if !self.ring.pop(&mut chain) {
                self.spare.push(chain);
                break;
            }
            match chain.writable.len().checked_sub(self.reserve) {
                Some(room) if room > 0 => {
                    self.room += room;
                    self.taken.push_back(chain);
                }
                _ => {
                    self.ring.push(chain.head, 0);
                    self.spare.push(chain);
                }
            }
        }
        self.room
    }

    /// Room in the oldest taken chain.
    pub fn first_room(&self) -> usize {
        self.taken
            .front()
            .map_or(0, |chain| chain.writable.len() - self.reserve)
    }

    /// How many of the taken chains `len` bytes fill.
    pub fn chains_for(&self, mut len: usize) -> usize {
        let full = |chain: &&Chain| {
            let before = len;
            len = len.saturating_sub(chain.writable.len() - self.reserve);
            before > 0
        };
        self.taken.iter().take_while(full).count()
    }

    /// The driver can't supply more than is taken.
    pub fn all_taken(&self) -> bool {
        self.taken.len() == usize::from(self.ring.size())
    }

    /// Reads up to `count` bytes into the taken chains, leaving their reserves free.
    pub fn fill(
        &mut self,
        count: usize,
        read: impl FnOnce(&mut Buffers) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.target.clear();
        for chain in &self.taken {
            if self.target.len() >= count {
                break;
            }
            self.target.append(&chain.writable, self.reserve);
        }
        read(&mut self.target)
    }

    /// Hands the oldest chain back with `header` in front and `len` filled bytes
    /// behind the reserve, at most what it has room for; returns how many of `len` it holds.
    ///
    /// `None` if no chain is taken.
    pub fn finish(
        &mut self,
        len: usize,
        header: impl FnOnce(usize, &mut Buffers),
    ) -> Option<usize> {
        let mut chain = self.taken.pop_front()?;
        let room = chain.writable.len() - self.reserve;
        self.room -= room;
        let len = len.min(room);
        header(len, &mut chain.writable);
        // Bounded by the chain's length, which fits 32 bits.
        self.ring.push(chain.head, (self.reserve + len) as u32);
        self.spare.push(chain);
        Some(len)
    }

    /// Interrupts the driver if it wants to know.
    pub fn notify(&mut self, interrupt: &dyn Interrupt) {
        self.ring.notify(interrupt);
    }

    /// Asks for a kick at the next chain; true if one is there already.
    pub fn rearm(&mut self) -> bool {
        self.ring.rearm()
    }

    /// Puts the chains back and gives the queue back.
    pub fn into_inner(mut self) -> ActiveQueue {
        // No more than the ring's size, which is a u16.
        self.ring.unpop(self.taken.len() as u16);
        self.ring.into_inner()
    }
}
