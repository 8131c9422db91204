//! The virtio devices of a VM and their places on the bus.

use crate::arch::current::layout;
use crate::bus::Bus;
use crate::config::{Confinement, DiskConfig, NetConfig, ShareConfig, VmConfig, VsockConfig};
use crate::confine::seccomp::{self, ThreadKind};
use crate::fds::{take, take_file};
use crate::memory::GuestMemory;
use crate::phases::monotonic_ns;
use crate::poller::Poller;
use crate::sync::lock;
use crate::virtio::Device;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::{Block, BlockArgs};
use crate::virtio::fs::{Fs, FsArgs};
use crate::virtio::mmio::{Args, QUEUE_NOTIFY, Transport};
use crate::virtio::net::{Net, NetArgs};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use kvm_ioctls::{IoEventAddress, VmFd};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Longest that the VM's end waits for readers of what the guest has sent.
const DRAIN: Duration = Duration::from_secs(5);

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
    disks: Vec<Arc<Mutex<Block>>>,
    nets: Vec<Arc<Mutex<Net>>>,
    shares: Vec<Arc<Mutex<Fs>>>,
    vsock: Option<Arc<Mutex<Vsock>>>,
    rng: Option<Arc<Mutex<Rng>>>,
    balloon: Option<Arc<Mutex<Balloon>>>,
    /// CLOCK_MONOTONIC of the guest's first vsock connection in ns; 0: none yet, or told already.
    connected_at: Arc<AtomicU64>,
}

impl Devices {
    /// Makes what the configuration asks for: disks, networks, shares, vsock, rng, balloon.
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
        let mut devices = Self::default();
        for disk in &config.disks {
            let block = shared(make(&disk.id, open_disk(disk, config.confinement))?);
            place.attach(&mut devices, block.clone())?;
            devices.disks.push(block);
        }
        for (net, index) in config.nets.iter().zip(0..) {
            let net = shared(make(&format!("eth{index}"), open_net(net))?);
            place.attach(&mut devices, net.clone())?;
            devices.nets.push(net);
        }
        for share in &config.shares {
            let fs = shared(make(&share.tag, open_share(share))?);
            place.attach(&mut devices, fs.clone())?;
            devices.shares.push(fs);
        }
        if let Some(vsock) = &config.vsock {
            let connected_at = devices.connected_at.clone();
            let vsock = shared(make("vsock", open_vsock(vsock, connected_at))?);
            place.attach(&mut devices, vsock.clone())?;
            devices.vsock = Some(vsock);
        }
        let rng = shared(Rng::new());
        place.attach(&mut devices, rng.clone())?;
        devices.rng = Some(rng);
        if config.balloon {
            let balloon = shared(Balloon::new(config.memory_mib));
            place.attach(&mut devices, balloon.clone())?;
            devices.balloon = Some(balloon);
        }
        Ok(devices)
    }

    /// Replaces a disk's files; the guest sees the new capacity.
    pub fn swap_disk(&self, id: &str, files: Vec<File>) -> Result<(), String> {
        let disk = self.disks.iter().find(|disk| lock(disk).disk_id() == id);
        let disk = disk.ok_or_else(|| format!("no disk {id:?}"))?;
        lock(disk).swap(files).map_err(|error| error.to_string())
    }

    /// Accepts one more connection from the guest.
    pub fn listen(&self, port: u32, socket: OwnedFd) -> Result<(), String> {
        let vsock = self.vsock.as_ref().ok_or("no vsock device")?;
        let listening = lock(vsock).listen(port, UnixStream::from(socket));
        listening.map_err(|error| error.to_string())
    }

    /// Asks the guest to give up so much memory.
    pub fn set_balloon(&self, mib: u32) -> Result<(), String> {
        let balloon = self.balloon.as_ref().ok_or("no balloon device")?;
        let set = lock(balloon).set_target(mib);
        set.map_err(|error| error.to_string())
    }

    /// When the guest first connected, said once.
    pub fn take_connected_at(&self) -> Option<u64> {
        match self.connected_at.load(Ordering::Relaxed) {
            0 | TOLD => None,
            at => {
                self.connected_at.store(TOLD, Ordering::Relaxed);
                Some(at)
            }
        }
    }

    /// What the devices did so far, as `device.name`.
    pub fn counters(&self, into: &mut BTreeMap<String, u64>) {
        let mut add = |device: &str, counters: Vec<(&'static str, u64)>| {
            into.extend(
                counters
                    .into_iter()
                    .map(|(name, n)| (format!("{device}.{name}"), n)),
            );
        };
        for disk in &self.disks {
            let disk = lock(disk);
            add(&format!("blk.{}", disk.disk_id()), disk.counters());
        }
        for (net, index) in self.nets.iter().zip(0..) {
            add(&format!("net.eth{index}"), lock(net).counters());
        }
        for share in &self.shares {
            let share = lock(share);
            add(&format!("fs.{}", share.tag()), share.counters());
        }
        if let Some(vsock) = &self.vsock {
            add("vsock", lock(vsock).counters());
        }
        if let Some(rng) = &self.rng {
            add("rng", lock(rng).counters());
        }
        if let Some(balloon) = &self.balloon {
            let mut balloon = lock(balloon);
            add("balloon", balloon.counters());
            balloon.request_stats(); // they are there at the next question
        }
    }

    /// Interrupt lines in use.
    pub fn irqs(&self) -> impl Iterator<Item = u8> {
        (0..self.slots.len()).map(irq)
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

    /// The end, vCPUs stopped: what the guest has sent or written reaches its destination.
    /// Returns what could not be done, for a person.
    pub fn finish(&self) -> Vec<String> {
        let mut losses = Vec::new();
        if let Some(vsock) = &self.vsock {
            match lock(vsock).drain(DRAIN) {
                0 => {}
                lost => losses.push(format!("{lost} bytes from the guest were not read in time")),
            }
        }
        self.pause();
        for disk in &self.disks {
            let disk = lock(disk);
            if let Err(error) = disk.flush() {
                losses.push(format!("disk {}: not flushed: {error}", disk.disk_id()));
            }
        }
        losses
    }

    /// Undoes [`Self::pause`].
    pub fn resume(&self) {
        self.slots.iter().for_each(|slot| slot.transport.resume());
    }
}

/// In `Devices::connected_at`: the shim knows.
const TOLD: u64 = u64::MAX;

fn shared<T>(device: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(device))
}

fn make<T>(name: &str, made: io::Result<T>) -> Result<T, Error> {
    made.map_err(|source| Error::Make {
        name: name.into(),
        source,
    })
}

fn open_disk(disk: &DiskConfig, confinement: Confinement) -> io::Result<Block> {
    let files = disk.segments.iter().map(|&fd| take_file(fd));
    let filter = || {
        if let Err(error) = seccomp::install(ThreadKind::BlockWorker) {
            eprintln!("casemate-vmm: disk thread: {error}");
            std::process::abort(); // it must not serve the guest unfiltered
        }
    };
    Block::new(BlockArgs {
        id: disk.id.clone(),
        files: files.collect::<io::Result<_>>()?,
        read_only: disk.read_only,
        volatile: disk.volatile,
        limits: disk.limits,
        on_thread_start: match confinement {
            Confinement::Off => None,
            Confinement::Full => Some(Box::new(filter)),
        },
    })
}

fn open_net(net: &NetConfig) -> io::Result<Net> {
    Net::new(NetArgs {
        tap: take(net.tap)?,
        mac: net.mac,
        mtu: net.mtu,
        rate_limit: net.rate_limit,
    })
}

fn open_share(share: &ShareConfig) -> io::Result<Fs> {
    Fs::new(FsArgs {
        tag: share.tag.clone(),
        socket: UnixStream::from(take(share.socket)?),
    })
}

fn open_vsock(config: &VsockConfig, connected_at: Arc<AtomicU64>) -> io::Result<Vsock> {
    let note_first = move |_port| {
        let _ =
            connected_at.compare_exchange(0, monotonic_ns(), Ordering::Relaxed, Ordering::Relaxed);
    };
    let mut vsock = Vsock::new(config.cid, Some(Box::new(note_first)));
    for port in &config.ports {
        vsock.listen(port.port, UnixStream::from(take(port.fd)?))?;
    }
    Ok(vsock)
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

/// Interrupt lines from 0 up to the last in use: each one more costs the guest a dozen VM exits.
pub fn lines(config: &VmConfig) -> usize {
    let console = config.console.map(|_| layout::SERIAL_IRQ);
    let last = config.devices().checked_sub(1).map(irq).max(console);
    usize::from(last.unwrap_or_default()) + 1
}

fn address(index: usize) -> u64 {
    layout::VIRTIO_MMIO + index as u64 * layout::VIRTIO_MMIO_SIZE
}

/// The lines from the first on, but for the serial console's.
fn irq(index: usize) -> u8 {
    let irq = layout::FIRST_VIRTIO_IRQ + index as u8; // VmConfig::validate bounds the devices
    irq + u8::from(irq >= layout::SERIAL_IRQ)
}
