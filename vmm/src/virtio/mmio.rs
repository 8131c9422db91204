//! The MMIO transport (virtio 1.2, section 4.2): registers, feature
//! negotiation, device status, queue addresses and the interrupt.
//!
//! Every access comes from the guest. Whatever it writes, in whatever order,
//! this never panics and never gives a device a queue outside of guest memory.

use super::{Activation, ActiveQueue, Device, Interrupt, Watcher};
use crate::bus::BusDevice;
use crate::sync::lock;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Offset of the register that ioeventfd watches.
pub const QUEUE_NOTIFY: u64 = 0x050;
/// Offset of the device's own configuration.
const CONFIG: u64 = 0x100;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"CSMT");
/// No shared memory region: its length reads as all ones.
const NO_REGION: u32 = u32::MAX;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;

const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;

const ISR_USED: u32 = 1;
const ISR_CONFIG: u32 = 2;

/// A device's interrupt: the ISR register and the irqfd behind it.
#[derive(Debug)]
pub struct Line {
    irqfd: EventFd,
    isr: AtomicU32,
    generation: AtomicU32,
}

impl Line {
    /// A line that is low.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            irqfd: EventFd::new(EFD_NONBLOCK)?,
            isr: AtomicU32::new(0),
            generation: AtomicU32::new(0),
        })
    }

    /// The descriptor to give to KVM.
    pub fn irqfd(&self) -> &EventFd {
        &self.irqfd
    }

    fn raise(&self, bit: u32) {
        self.isr.fetch_or(bit, Ordering::SeqCst);
        let _ = self.irqfd.write(1); // full counter: an interrupt is pending anyway
    }
}

impl Interrupt for Line {
    fn used(&self) {
        self.raise(ISR_USED);
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(ISR_CONFIG);
    }
}

/// What the driver has told about one queue, and how far it got.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueSetup {
    size: u16,
    ready: bool,
    desc: u64,
    avail: u64,
    used: u64,
    next_avail: u16,
    next_used: u16,
}

/// The transport's saved state with its device's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Device id, to catch a state of another machine.
    pub id: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    status: u32,
    isr: u32,
    generation: u32,
    queues: Vec<QueueSetup>,
    active: bool,
    /// The device's own state.
    pub device: serde_json::Value,
}

/// What a transport is made of.
pub struct Args {
    /// The device behind the registers.
    pub device: Arc<Mutex<dyn Device>>,
    /// Guest memory.
    pub memory: GuestMemoryMmap,
    /// Makes the device's view of the event loop, one per activation.
    pub watcher: Box<dyn Fn() -> Box<dyn Watcher> + Send>,
}

/// One device's registers on the MMIO bus.
pub struct Transport {
    line: Arc<Line>,
    registers: Mutex<Registers>,
}

struct Registers {
    args: Args,
    line: Arc<Line>,
    /// Features the device offers, with the transport's own.
    offered: u64,
    max_sizes: Vec<u16>,
    /// `None` while the device has it.
    kicks: Vec<Option<EventFd>>,
    queues: Vec<QueueSetup>,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    status: u32,
    /// The driver set DRIVER_OK and the device took it.
    active: bool,
    /// Active, but stopped by [`Transport::pause`].
    paused: bool,
}

/// A saved state that fits no such device.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Another kind of device or number of queues.
    #[error(
        "saved state is of virtio device {found} with {queues} queues, this one is device {expected} with {own}"
    )]
    Mismatch {
        /// Saved id.
        found: u32,
        /// Saved queues.
        queues: usize,
        /// This device's id.
        expected: u32,
        /// This device's queues.
        own: usize,
    },
    /// No eventfd could be had.
    #[error("event descriptors")]
    Io(#[from] io::Error),
}

impl Transport {
    /// A device after power-on.
    pub fn new(args: Args) -> io::Result<Self> {
        let (offered, max_sizes) = {
            let device = lock(&args.device);
            (
                device.features() | F_VERSION_1,
                device.queue_sizes().to_vec(),
            )
        };
        let kicks = max_sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Some))
            .collect::<io::Result<Vec<_>>>()?;
        let line = Arc::new(Line::new()?);
        let registers = Registers {
            args,
            line: line.clone(),
            offered,
            queues: max_sizes.iter().map(|&size| fresh(size)).collect(),
            max_sizes,
            kicks,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            status: 0,
            active: false,
            paused: false,
        };
        Ok(Self {
            line,
            registers: Mutex::new(registers),
        })
    }

    /// A device as it was saved, paused: [`Transport::resume`] activates it.
    pub fn restore(args: Args, state: &State) -> Result<Self, RestoreError> {
        let State {
            id,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            status,
            isr,
            generation,
            queues,
            active,
            device: _, // the device's own constructor took it
        } = state;
        let expected = lock(&args.device).id();
        let transport = Self::new(args)?;
        {
            let mut registers = lock(&transport.registers);
            if *id != expected || queues.len() != registers.queues.len() {
                return Err(RestoreError::Mismatch {
                    found: *id,
                    queues: queues.len(),
                    expected,
                    own: registers.queues.len(),
                });
            }
            registers.device_features_sel = *device_features_sel;
            registers.driver_features_sel = *driver_features_sel;
            registers.driver_features = *driver_features;
            registers.queue_sel = *queue_sel;
            registers.status = *status;
            registers.queues.clone_from(queues);
            registers.active = *active;
            registers.paused = true;
        }
        transport.line.isr.store(*isr, Ordering::SeqCst);
        transport
            .line
            .generation
            .store(*generation, Ordering::SeqCst);
        Ok(transport)
    }

    /// The interrupt line, to be wired to KVM.
    pub fn line(&self) -> &Arc<Line> {
        &self.line
    }

    /// Hands out each queue's kick with its number, to be wired to KVM before the guest runs.
    pub fn for_each_kick<E>(
        &self,
        mut wire: impl FnMut(u32, &EventFd) -> Result<(), E>,
    ) -> Result<(), E> {
        let registers = lock(&self.registers);
        let mut kicks = registers.kicks.iter().flatten().zip(0..);
        kicks.try_for_each(|(kick, index)| wire(index, kick))
    }

    /// Stops the device; the registers go on answering. Idempotent.
    pub fn pause(&self) {
        let mut registers = lock(&self.registers);
        if !registers.paused {
            registers.stop_device();
            registers.paused = true;
        }
    }

    /// Undoes [`Self::pause`]. Idempotent.
    pub fn resume(&self) {
        let mut registers = lock(&self.registers);
        if !std::mem::take(&mut registers.paused) || !registers.active {
            return;
        }
        // A kick or an interrupt may have been on its way when the state was saved.
        for kick in registers.kicks.iter().flatten() {
            let _ = kick.write(1);
        }
        registers.activate();
        if self.line.isr.load(Ordering::SeqCst) != 0 {
            let _ = self.line.irqfd.write(1);
        }
    }

    /// The state of a paused device.
    pub fn save(&self) -> State {
        let registers = lock(&self.registers);
        assert!(registers.paused, "save follows pause");
        let device = lock(&registers.args.device);
        State {
            id: device.id(),
            device_features_sel: registers.device_features_sel,
            driver_features_sel: registers.driver_features_sel,
            driver_features: registers.driver_features,
            queue_sel: registers.queue_sel,
            status: registers.status,
            isr: self.line.isr.load(Ordering::SeqCst),
            generation: self.line.generation.load(Ordering::SeqCst),
            queues: registers.queues.clone(),
            active: registers.active,
            device: device.save(),
        }
    }
}

impl BusDevice for Transport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            let registers = lock(&self.registers);
            lock(&registers.args.device).read_config(offset, data);
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = self.read_register(offset).to_le_bytes();
        } // the registers are 32 bits wide: any other access reads as 0
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = lock(&self.registers);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            lock(&registers.args.device).write_config(offset, data);
        } else if let Ok(&word) = <&[u8; 4]>::try_from(data) {
            registers.write(offset, u32::from_le_bytes(word));
        }
    }
}

impl Transport {
    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            // The interrupt handler's register needs no lock.
            0x060 => return self.line.isr.load(Ordering::SeqCst),
            0x0fc => return self.line.generation.load(Ordering::SeqCst),
            _ => {}
        }
        let registers = lock(&self.registers);
        let queue = registers.queues.get(registers.queue_sel as usize);
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => lock(&registers.args.device).id(),
            0x00c => VENDOR,
            0x010 => half(registers.offered, registers.device_features_sel),
            0x034 => queue.map_or(0, |_| {
                u32::from(registers.max_sizes[registers.queue_sel as usize])
            }),
            0x044 => queue.map_or(0, |queue| u32::from(queue.ready)),
            0x070 => registers.status,
            0x0b0..0x0c0 => NO_REGION,
            _ => 0,
        }
    }
}

impl Registers {
    fn write(&mut self, offset: u64, value: u32) {
        match offset {
            0x014 => self.device_features_sel = value,
            0x020 => self.set_driver_features(value),
            0x024 => self.driver_features_sel = value,
            0x030 => self.queue_sel = value,
            0x038 => self.set_up_queue(|queue| queue.size = value.try_into().unwrap_or(0)),
            0x044 => self.set_up_queue(|queue| queue.ready = value == 1),
            0x064 => {
                self.line.isr.fetch_and(!value, Ordering::SeqCst);
            }
            0x070 => self.set_status(value),
            0x080 => self.set_up_queue(|queue| set_half(&mut queue.desc, 0, value)),
            0x084 => self.set_up_queue(|queue| set_half(&mut queue.desc, 1, value)),
            0x090 => self.set_up_queue(|queue| set_half(&mut queue.avail, 0, value)),
            0x094 => self.set_up_queue(|queue| set_half(&mut queue.avail, 1, value)),
            0x0a0 => self.set_up_queue(|queue| set_half(&mut queue.used, 0, value)),
            0x0a4 => self.set_up_queue(|queue| set_half(&mut queue.used, 1, value)),
            // QUEUE_NOTIFY comes here only with a number that no ioeventfd matches: no such queue.
            _ => {}
        }
    }

    /// Features may change between DRIVER and FEATURES_OK only.
    fn set_driver_features(&mut self, value: u32) {
        if self.status & DRIVER != 0 && self.status & FEATURES_OK == 0 {
            set_half(&mut self.driver_features, self.driver_features_sel, value);
        }
    }

    /// Queues are set up between FEATURES_OK and DRIVER_OK only.
    fn set_up_queue(&mut self, change: impl FnOnce(&mut QueueSetup)) {
        if self.status & (FEATURES_OK | DRIVER_OK | FAILED) != FEATURES_OK {
            return;
        }
        if let Some(queue) = self.queues.get_mut(self.queue_sel as usize) {
            change(queue);
        }
    }

    /// The driver's steps, in the order that the specification gives; 0 is a reset.
    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let added = value & !self.status;
        if added & FAILED != 0 {
            self.stop_device();
            self.active = false;
            self.status |= FAILED;
            return;
        }
        if added & ACKNOWLEDGE != 0 {
            self.status |= ACKNOWLEDGE;
        }
        if added & DRIVER != 0 && self.status & ACKNOWLEDGE != 0 {
            self.status |= DRIVER;
        }
        let agreed =
            self.driver_features & !self.offered == 0 && self.driver_features & F_VERSION_1 != 0;
        if added & FEATURES_OK != 0 && self.status & DRIVER != 0 && agreed {
            self.status |= FEATURES_OK;
        }
        if added & DRIVER_OK != 0 && self.status & (FEATURES_OK | FAILED) == FEATURES_OK {
            self.status |= DRIVER_OK;
            self.active = true;
            self.activate();
        }
    }

    /// Back to power-on.
    fn reset(&mut self) {
        self.stop_device();
        self.active = false;
        self.status = 0;
        self.driver_features = 0;
        self.driver_features_sel = 0;
        self.device_features_sel = 0;
        self.queue_sel = 0;
        self.queues = self.max_sizes.iter().map(|&size| fresh(size)).collect();
        self.line.isr.store(0, Ordering::SeqCst);
        for kick in self.kicks.iter().flatten() {
            let _ = kick.read(); // a kick of the old life
        }
    }

    /// Gives the device its queues. What can't be run needs a reset.
    fn activate(&mut self) {
        if self.paused {
            return;
        }
        let result = self.active_queues().and_then(|queues| {
            lock(&self.args.device).activate(Activation {
                memory: self.args.memory.clone(),
                queues,
                features: self.driver_features,
                interrupt: self.line.clone(),
                watcher: (self.args.watcher)(),
            })
        });
        if result.is_err() {
            self.take_back();
            self.active = false;
            self.status |= NEEDS_RESET;
            self.line.config_changed();
        }
    }

    fn active_queues(&mut self) -> io::Result<Vec<ActiveQueue>> {
        let event_idx = self.driver_features & F_EVENT_IDX != 0;
        let setups = self.queues.iter().zip(&self.max_sizes);
        let queues = setups
            .map(|(setup, &max_size)| setup.build(max_size, event_idx, &self.args.memory))
            .collect::<io::Result<Vec<_>>>()?;
        // All queues are good: now the kicks move. One that a failed device lost can't come back.
        if self.kicks.iter().any(Option::is_none) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let kicks = self.kicks.iter_mut().filter_map(Option::take);
        let pairs = queues.into_iter().zip(kicks);
        Ok(pairs
            .map(|(queue, kick)| ActiveQueue { queue, kick })
            .collect())
    }

    /// Takes the queues back from an active device and remembers how far they got.
    fn stop_device(&mut self) {
        if !self.active || self.paused {
            return;
        }
        self.take_back();
    }

    fn take_back(&mut self) {
        let stopped = lock(&self.args.device).stop();
        let slots = self.queues.iter_mut().zip(&mut self.kicks);
        for ((setup, kick), active) in slots.zip(stopped) {
            setup.next_avail = active.queue.next_avail();
            setup.next_used = active.queue.next_used();
            *kick = Some(active.kick);
        }
    }
}

impl QueueSetup {
    /// A queue of this setup; one that isn't ready is left unset.
    fn build(&self, max_size: u16, event_idx: bool, memory: &GuestMemoryMmap) -> io::Result<Queue> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        if !self.ready {
            return Queue::new(max_size).map_err(invalid);
        }
        let queue = Queue::try_from(QueueState {
            max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: true,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
        })
        .map_err(invalid)?;
        if queue.is_valid(memory) {
            Ok(queue)
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }
}

fn fresh(max_size: u16) -> QueueSetup {
    QueueSetup {
        size: max_size,
        ..Default::default()
    }
}

/// 32 bits of a 64-bit field; a third half reads as 0.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(field: &mut u64, select: u32, value: u32) {
    match select {
        0 => *field = *field & !0xffff_ffff | u64::from(value),
        1 => *field = *field & 0xffff_ffff | u64::from(value) << 32,
        _ => {}
    }
}

#[cfg(test)]
mod tests;
