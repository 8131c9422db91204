//! The virtual machine: put together and booted by one recipe, top to bottom.

use crate::arch::current::{self as arch, BootInfo, layout};
use crate::bus::Bus;
use crate::config::{Confinement, Fd, VmConfig};
use crate::confine::seccomp::{self, ThreadKind};
use crate::control::Phase;
use crate::devices::{self, Devices};
use crate::elf;
use crate::ending::Ending;
use crate::fds::{take, take_file};
use crate::gate::Gate;
use crate::guest_log;
use crate::memory::{self, GuestMemory};
use crate::phases::Phases;
use crate::poller::Poller;
use crate::power::Power;
use crate::serial::Serial;
use crate::vcpu::{self, Vcpu, install_kick_handler};
use casemate_protocol::POWER_PORT;
use kvm_ioctls::{Kvm, VmFd};
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::Arc;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const PAGE: u64 = 4096;

/// Why a VM could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The architecture's part failed.
    #[error(transparent)]
    Arch(#[from] arch::Error),
    /// Guest memory could not be had.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The kernel can't be booted.
    #[error(transparent)]
    Kernel(#[from] elf::Error),
    /// The initrd can't be read.
    #[error("initrd: can't be read")]
    Initrd(#[source] io::Error),
    /// The initrd and the kernel don't fit into memory together.
    #[error(
        "initrd of {size} bytes does not fit behind the kernel, which ends at {kernel_end:#x}: give the guest more memory"
    )]
    InitrdTooLarge {
        /// Its size.
        size: u64,
        /// Where the kernel ends.
        kernel_end: u64,
    },
    /// A device could not be had.
    #[error(transparent)]
    Device(#[from] devices::Error),
    /// KVM's version is none that exists.
    #[error("/dev/kvm has API version {0}, 12 is needed")]
    KvmVersion(i32),
    /// A descriptor or thread could not be had.
    #[error("{what}")]
    Io {
        /// For what.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

pub(crate) fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what, source }
}

/// A VM whose vCPUs wait at the closed gate.
pub struct Vm {
    pub(crate) memory: GuestMemory,
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) shared: Arc<vcpu::Shared>,
    pub(crate) devices: Devices,
    pub(crate) poller: Arc<Poller>,
    /// Kept open: memory slots and interrupts live as long as it does.
    pub(crate) _fd: Arc<VmFd>,
}

impl Vm {
    /// Puts the machine together and loads the kernel.
    pub fn boot(config: &VmConfig, phases: &mut Phases) -> Result<Self, Error> {
        let kvm = open_kvm(config.kvm)?;
        let fd = kvm.create_vm().map_err(arch::kvm_error("create a VM"))?;
        let fd = Arc::new(fd);
        let memory = match config.shares.is_empty() {
            true => GuestMemory::allocate(config.memory_mib)?,
            // Who serves a share works on the guest's memory, in a process of its own.
            false => GuestMemory::allocate_shared(config.memory_mib)?,
        };
        memory.register(&fd)?;
        arch::create_irqchip(&fd)?;

        let ending = Arc::new(Ending::new().map_err(io_error("eventfd"))?);
        let poller = Arc::new(Poller::new().map_err(io_error("epoll"))?);
        let mut mmio = Bus::default();
        arch::attach_ioapic(&fd, &ending, devices::lines(config), &mut mmio);
        let mut ports = Bus::default();
        ports.insert(POWER_PORT.into(), 1, Arc::new(Power(ending.clone())));
        let serial_irq = attach_serial(config.console, &fd, &mut ports)?;
        let devices = Devices::attach(config, &fd, &memory, &poller, &mut mmio)?;

        let host_cpuid = arch::host_cpuid(&kvm)?;
        let vcpu_fds = (0..config.vcpus)
            .map(|index| {
                let vcpu = fd
                    .create_vcpu(index.into())
                    .map_err(arch::kvm_error("create a vCPU"))?;
                arch::configure_vcpu(&kvm, &vcpu, &host_cpuid, index, config.vcpus)?;
                Ok(vcpu)
            })
            .collect::<Result<Vec<_>, arch::Error>>()?;
        phases.reached(Phase::KvmReady);

        let kernel = take_file(config.kernel).map_err(io_error("kernel"))?;
        let kernel = elf::load(&memory, &kernel)?;
        let initrd = match config.initrd {
            Some(fd) => Some(load_initrd(&memory, fd, kernel.end)?),
            None => None,
        };
        let boot = BootInfo {
            entry: kernel.entry,
            cmdline: &command_line(config, &memory, &devices),
            initrd,
            vcpus: config.vcpus,
            irqs: &serial_irq
                .into_iter()
                .chain(devices.irqs())
                .collect::<Vec<_>>(),
        };
        arch::prepare_boot(&memory, &vcpu_fds[0], &boot)?;
        phases.reached(Phase::KernelLoaded);

        let shared = Arc::new(vcpu::Shared {
            ports,
            mmio,
            gate: Gate::default(),
            ending,
        });
        install_kick_handler().map_err(io_error("kick signal"))?;
        let confined = config.confinement != Confinement::Off;
        let vcpus = vcpu_fds
            .into_iter()
            .zip(0..)
            .map(|(fd, index)| Vcpu::spawn(index, fd, shared.clone(), filter(confined)))
            .collect::<io::Result<Vec<_>>>()
            .map_err(io_error("vCPU thread"))?;
        Ok(Self {
            memory,
            vcpus,
            shared,
            devices,
            poller,
            _fd: fd,
        })
    }
}

/// What a vCPU thread does before it may run the guest.
fn filter(confined: bool) -> impl FnOnce() -> Result<(), String> + Send + 'static {
    move || match confined {
        true => seccomp::install(ThreadKind::Vcpu).map_err(|error| error.to_string()),
        false => Ok(()),
    }
}

#[allow(unsafe_code)] // reason: kvm-ioctls takes a descriptor by number only
fn open_kvm(fd: Fd) -> Result<Kvm, Error> {
    let fd = take(fd).map_err(io_error("/dev/kvm"))?;
    // SAFETY: the descriptor is open and ours; Kvm closes it.
    let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    match kvm.get_api_version() {
        12 => Ok(kvm),
        other => Err(Error::KvmVersion(other)),
    }
}

/// The serial console, if asked for, with its interrupt line.
fn attach_serial(console: Option<Fd>, vm: &VmFd, ports: &mut Bus) -> Result<Option<u8>, Error> {
    let Some(console) = console else {
        return Ok(None);
    };
    let out = take_file(console).map_err(io_error("console"))?;
    let irqfd = EventFd::new(EFD_NONBLOCK).map_err(io_error("eventfd"))?;
    vm.register_irqfd(&irqfd, layout::SERIAL_IRQ.into())
        .map_err(arch::kvm_error("register the console's irqfd"))?;
    ports.insert(
        layout::SERIAL_PORT,
        layout::SERIAL_PORTS,
        Arc::new(Serial::new(irqfd, out)),
    );
    Ok(Some(layout::SERIAL_IRQ))
}

/// Reads the initrd to the end of low memory, under the guest log.
fn load_initrd(memory: &GuestMemory, fd: Fd, kernel_end: u64) -> Result<(u64, u64), Error> {
    let file = take_file(fd).map_err(Error::Initrd)?;
    let size = file.metadata().map_err(Error::Initrd)?.len();
    let too_large = Error::InitrdTooLarge { size, kernel_end };
    let Some(address) = memory.map().log_start().checked_sub(size) else {
        return Err(too_large);
    };
    let address = address & !(PAGE - 1);
    if address < kernel_end {
        return Err(too_large);
    }
    memory
        .read_file(address, &file, 0, size)
        .map_err(Error::Initrd)?;
    Ok((address, size))
}

/// The kernel's command line; the user's part comes last, so that it wins.
fn command_line(config: &VmConfig, memory: &GuestMemory, devices: &Devices) -> String {
    // A panic resets at once by a triple fault: the VMM tells it apart by the guest log.
    let mut line = String::from("panic=-1 reboot=t");
    line += " dummy.numdummies=0"; // the driver is there for who asks; an interface nobody asked for is not
    line += match config.console {
        Some(_) => " console=ttyS0 loglevel=7 8250.nr_uarts=1",
        None => " loglevel=4 8250.nr_uarts=0",
    };
    if config.vcpus > 1 {
        line += " maxcpus=1"; // the agent brings up the others
    }
    line += &devices.parameters();
    line.push(' ');
    line += &guest_log::parameters(memory);
    if !config.cmdline.is_empty() {
        line.push(' ');
        line += &config.cmdline;
    }
    line
}
