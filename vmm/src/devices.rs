//! The virtio devices of a VM and their places on the bus.

use crate::arch::current::layout;
use crate::bus::Bus;
use crate::config::VmConfig;
use crate::memory::GuestMemory;
use crate::poller::Poller;
use crate::sync::lock;
use crate::virtio::Device;
use crate::virtio::mmio::{Args, QUEUE_NOTIFY, Transport};
use kvm_ioctls::{IoEventAddress, VmFd};
use std::io;
use std::sync::{Arc, Mutex};

/// Why a device could not be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused an irqfd or an ioeventfd.
    #[error("device {index}: KVM: {what}")]
    Wire {
        /// Its place.
        index: usize,
        /// What was refused.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The device itself could not be made.
    #[error("device {name}")]
    Make {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One device with its transport.
struct Slot {
    device: Arc<Mutex<dyn Device>>,
    transport: Arc<Transport>,
}

/// All devices, in the order of their addresses and interrupt lines.
#[derive(Default)]
pub struct Devices {
    slots: Vec<Slot>,
}

impl Devices {
    /// Makes what the configuration asks for: disks, networks, vsock, rng, balloon.
    pub fn attach(
        config: &VmConfig,
        vm: &VmFd,
        memory: &GuestMemory,
        poller: &Arc<Poller>,
        mmio: &mut Bus,
    ) -> Result<Self, Error> {
        let mut place = Place {
            vm,
            memory,
            poller,
            mmio,
        };
        let devices = Self::default();
        let _ = (config, &mut place);
        Ok(devices)
    }

    /// Interrupt lines in use.
    pub fn irqs(&self) -> impl Iterator<Item = u8> {
        (layout::FIRST_VIRTIO_IRQ..).take(self.slots.len())
    }

    /// Kernel parameters that announce the devices.
    pub fn parameters(&self) -> String {
        (0..self.slots.len())
            .map(|index| {
                let (address, irq) = (address(index), irq(index));
                format!(" virtio_mmio.device=4K@{address:#x}:{irq}")
            })
            .collect()
    }

    /// A watched descriptor of a device is ready.
    pub fn handle(&self, index: usize, token: u64, readiness: u32) {
        if let Some(slot) = self.slots.get(index) {
            lock(&slot.device).handle(token, readiness);
        }
    }

    /// Stops all work; everything in flight is completed.
    pub fn pause(&self) {
        self.slots.iter().for_each(|slot| slot.transport.pause());
    }

    /// Undoes [`Self::pause`].
    pub fn resume(&self) {
        self.slots.iter().for_each(|slot| slot.transport.resume());
    }
}

/// Where a device goes next.
struct Place<'a> {
    vm: &'a VmFd,
    memory: &'a GuestMemory,
    poller: &'a Arc<Poller>,
    mmio: &'a mut Bus,
}

impl Place<'_> {
    /// Puts a device at the next address with the next interrupt line.
    fn attach(
        &mut self,
        devices: &mut Devices,
        device: Arc<Mutex<dyn Device>>,
    ) -> Result<(), Error> {
        let index = devices.slots.len();
        let poller = self.poller.clone();
        let args = Args {
            device: device.clone(),
            memory: self.memory.mmap().clone(),
            watcher: Box::new(move || poller.watcher(index)),
        };
        let transport = Arc::new(Transport::new(args).map_err(|source| Error::Make {
            name: index.to_string(),
            source,
        })?);
        self.wire(index, &transport)?;
        self.mmio
            .insert(address(index), layout::VIRTIO_MMIO_SIZE, transport.clone());
        devices.slots.push(Slot { device, transport });
        Ok(())
    }

    fn wire(&self, index: usize, transport: &Transport) -> Result<(), Error> {
        let refused = |what| {
            move |source| Error::Wire {
                index,
                what,
                source,
            }
        };
        self.vm
            .register_irqfd(transport.line().irqfd(), irq(index).into())
            .map_err(refused("irqfd"))?;
        let notify = IoEventAddress::Mmio(address(index) + QUEUE_NOTIFY);
        transport.for_each_kick(|queue, kick| {
            self.vm
                .register_ioevent(kick, &notify, queue)
                .map_err(refused("ioeventfd"))
        })
    }
}

fn address(index: usize) -> u64 {
    layout::VIRTIO_MMIO + index as u64 * layout::VIRTIO_MMIO_SIZE
}

fn irq(index: usize) -> u8 {
    layout::FIRST_VIRTIO_IRQ + index as u8 // VmConfig::validate bounds the devices
}
