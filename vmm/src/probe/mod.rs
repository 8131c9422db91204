//! Whether this host's KVM runs a normal guest.
//!
//! That `/dev/kvm` opens, or even makes VMs, proves nothing: where the
//! processor's virtualization is missing, some hosts emulate guest kernels and
//! give up at ordinary instructions. So a small guest in long mode uses some
//! that every kernel needs, within bounded time.

mod guest;
mod host;

pub use host::{Diagnosis, HostFacts, Vendor, diagnose};

use crate::arch::current::{self as arch, registers};
use crate::bus::{Bus, BusDevice};
use crate::ending::{Ending, Outcome};
use crate::exit_code;
use crate::gate::Gate;
use crate::memory::{self, GuestMemory};
use crate::vcpu::{Shared, Vcpu, install_kick_handler};
use kvm_ioctls::{Cap, Kvm};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A healthy host takes less than a millisecond, an emulated one some ten.
const PATIENCE: Duration = Duration::from_secs(2);
/// Where KVM's device usually is.
pub const DEVICE: &str = "/dev/kvm";
const API_VERSION: i32 = 12;

/// Why this host can't run a normal guest.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// There is no such device.
    #[error("{0} does not exist")]
    Absent(PathBuf),
    /// The user may not open it.
    #[error("{0} may not be opened by this user")]
    Permission(PathBuf),
    /// It can't be opened for another reason.
    #[error("{device} can't be opened")]
    Open {
        /// The device.
        device: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It opens, but it isn't KVM.
    #[error("{device} has API version {version}, {API_VERSION} is needed")]
    Version {
        /// The device.
        device: PathBuf,
        /// What it says.
        version: i32,
    },
    /// A capability is missing that every guest gets.
    #[error("KVM lacks {0}")]
    Capability(&'static str),
    /// KVM doesn't know how fast the processor's clock is, and would never enter a guest.
    #[error("the host's kernel could not measure its TSC")]
    UnknownTsc,
    /// KVM refused to make the guest.
    #[error("KVM refused the probe guest")]
    Setup(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// KVM gave up inside the guest.
    #[error("KVM can't run a normal guest: {0}")]
    Failed(String),
    /// The guest didn't answer.
    #[error("KVM can't run a normal guest: no answer within {PATIENCE:?}")]
    TimedOut,
}

/// Opens KVM's device and runs the probe guest.
pub fn check(device: &Path) -> Result<(), ProbeError> {
    let file = OpenOptions::new().read(true).write(true).open(device);
    let device = device.to_owned();
    let kvm = kvm_of(match file {
        Ok(file) => file,
        Err(source) => {
            return Err(match source.kind() {
                io::ErrorKind::NotFound => ProbeError::Absent(device),
                io::ErrorKind::PermissionDenied => ProbeError::Permission(device),
                _ if source.raw_os_error() == Some(libc::ENODEV) => ProbeError::Absent(device),
                _ => ProbeError::Open { device, source },
            });
        }
    });
    match kvm.get_api_version() {
        API_VERSION => run(&kvm),
        version => Err(ProbeError::Version { device, version }),
    }
}

/// Runs the probe guest.
fn run(kvm: &Kvm) -> Result<(), ProbeError> {
    for (capability, name) in [
        (Cap::UserMemory, "user memory"),
        (Cap::SplitIrqchip, "local APICs (KVM_CAP_SPLIT_IRQCHIP)"),
        (Cap::Irqfd, "irqfd"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::ImmediateExit, "immediate exit"),
    ] {
        if !kvm.check_extension(capability) {
            return Err(ProbeError::Capability(name));
        }
    }
    let setup = |error: arch::Error| ProbeError::Setup(Box::new(error));
    let vm = kvm
        .create_vm()
        .map_err(arch::kvm_error("create a VM"))
        .map_err(setup)?;
    let memory =
        GuestMemory::allocate(memory::MIN_MIB).map_err(|error| ProbeError::Setup(error.into()))?;
    memory.register(&vm).map_err(setup)?;
    arch::create_irqchip(&vm).map_err(setup)?;
    let fd = vm
        .create_vcpu(0)
        .map_err(arch::kvm_error("create a vCPU"))
        .map_err(setup)?;
    arch::host_cpuid(kvm)
        .and_then(|cpuid| arch::configure_vcpu(kvm, &fd, &cpuid, 0, 1))
        .and_then(|()| guest::load(&memory))
        .and_then(|()| registers::set_long_mode(&fd, guest::ENTRY))
        .map_err(setup)?;
    if fd.get_tsc_khz() == Ok(0) {
        return Err(ProbeError::UnknownTsc);
    }
    let system = |error: io::Error| ProbeError::Setup(error.into());
    install_kick_handler().map_err(system)?;
    let ending = Arc::new(Ending::new().map_err(system)?);
    let mut ports = Bus::default();
    ports.insert(guest::PORT.into(), 1, Arc::new(Answer(ending.clone())));
    let shared = Arc::new(Shared {
        ports,
        mmio: Bus::default(),
        gate: Gate::default(),
        ending,
    });
    let vcpu = Vcpu::spawn(0, fd, shared.clone(), || Ok(())).map_err(system)?;
    shared.gate.open();
    let outcome = wait(&shared.ending);
    if outcome.is_none() {
        let late = Outcome::new(exit_code::VMM_FAILED, "late");
        shared.ending.end(late); // so the thread ends at the kick
        vcpu.kick();
    }
    vcpu.join(); // before the guest's memory goes
    match outcome {
        None => Err(ProbeError::TimedOut),
        Some(outcome) if outcome.code == exit_code::SHUTDOWN => Ok(()),
        Some(outcome) => Err(ProbeError::Failed(outcome.reason)),
    }
}

#[allow(unsafe_code)] // reason: kvm-ioctls takes a descriptor by number only
fn kvm_of(device: File) -> Kvm {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: the descriptor is open and ours; Kvm closes it.
    unsafe { Kvm::from_raw_fd(device.into_raw_fd()) }
}

/// The outcome, if it comes in time.
#[allow(unsafe_code)] // reason: borrows a descriptor by its number
fn wait(ending: &Ending) -> Option<Outcome> {
    // SAFETY: `ending` keeps it open during the call.
    let fd = unsafe { BorrowedFd::borrow_raw(ending.as_raw_fd()) };
    let patience = Timespec {
        tv_sec: PATIENCE.as_secs() as i64,
        tv_nsec: 0,
    };
    let mut interest = [PollFd::new(&fd, PollFlags::IN)];
    while poll(&mut interest, Some(&patience)) == Err(rustix::io::Errno::INTR) {}
    ending.outcome().cloned()
}

/// The port that the guest answers on.
struct Answer(Arc<Ending>);

impl BusDevice for Answer {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _offset: u64, data: &[u8]) {
        self.0.end(match data {
            [guest::PASSED] => Outcome::new(exit_code::SHUTDOWN, "passed"),
            other => {
                let reason = format!("wrong result {other:02x?} in the probe guest");
                Outcome::new(exit_code::KVM_FAILED, reason)
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_of_another_device_names_it_and_its_version() {
        let error = check(Path::new("/dev/null")).expect_err("not KVM");

        assert!(matches!(error, ProbeError::Version { .. }), "{error}");
        assert!(error.to_string().contains("/dev/null"), "{error}");
    }

    #[test]
    fn check_of_a_device_that_is_not_there_names_it() {
        let error = check(Path::new("/dev/no-kvm")).expect_err("not there");

        assert_eq!(error.to_string(), "/dev/no-kvm does not exist");
    }

    #[test]
    fn check_on_any_host_ends_within_its_time() {
        let start = std::time::Instant::now();

        let _ = check(Path::new(DEVICE));

        assert!(start.elapsed() < PATIENCE * 3);
    }
}
