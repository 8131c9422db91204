//! A vCPU: its thread, its loop, its kick.
#![allow(unsafe_code)] // reason: one byte of kvm_run is written while another thread is in KVM_RUN

use crate::bus::Bus;
use crate::ending::{Ending, Outcome};
use crate::exit_code;
use crate::gate::Gate;
use crate::sync::lock;
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// The loop and a device's work need little; pages that stay untouched cost nothing.
const STACK: usize = 256 << 10;
/// Where a processor begins after a reset.
const RESET_VECTOR: u64 = 0xfff0;

/// Why a vCPU came out of the guest into this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum ExitClass {
    /// Read of an I/O port.
    PortRead,
    /// Write to an I/O port.
    PortWrite,
    /// Read of a device's register.
    MmioRead,
    /// Write to a device's register.
    MmioWrite,
    /// A signal: pause or statistics.
    Kicked,
    /// Anything else.
    Other,
}

impl ExitClass {
    /// All with their names in statistics.
    pub const ALL: [(Self, &'static str); 6] = [
        (Self::PortRead, "port_read"),
        (Self::PortWrite, "port_write"),
        (Self::MmioRead, "mmio_read"),
        (Self::MmioWrite, "mmio_write"),
        (Self::Kicked, "kicked"),
        (Self::Other, "other"),
    ];
}

/// Exits by class.
#[derive(Debug, Default)]
pub struct Exits([AtomicU64; ExitClass::ALL.len()]);

impl Exits {
    fn count(&self, class: ExitClass) {
        // Only this vCPU's thread writes.
        self.0[class as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Exits of a class so far.
    pub fn of(&self, class: ExitClass) -> u64 {
        self.0[class as usize].load(Ordering::Relaxed)
    }
}

/// What all vCPU threads share.
pub struct Shared {
    /// I/O ports.
    pub ports: Bus,
    /// Memory-mapped registers.
    pub mmio: Bus,
    /// Pause and start.
    pub gate: Gate,
    /// The end.
    pub ending: Arc<Ending>,
}

/// A vCPU and its thread.
pub struct Vcpu {
    fd: Arc<Mutex<VcpuFd>>,
    immediate_exit: *const AtomicU8,
    thread: JoinHandle<()>,
    exits: Arc<Exits>,
}

// SAFETY: the pointer is to an atomic byte in a mapping that `fd` keeps alive.
unsafe impl Send for Vcpu {}

/// Makes the kick signal interrupt KVM_RUN and nothing else.
pub fn install_kick_handler() -> io::Result<()> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), ignore)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

impl Vcpu {
    /// Starts the thread, which runs `prepare` (its seccomp filter) and then waits at the gate.
    pub fn spawn(
        index: u8,
        mut fd: VcpuFd,
        shared: Arc<Shared>,
        prepare: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> io::Result<Self> {
        let byte = &raw mut fd.get_kvm_run().immediate_exit;
        let fd = Arc::new(Mutex::new(fd));
        let exits = Arc::new(Exits::default());
        let (thread_fd, thread_exits) = (fd.clone(), exits.clone());
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK)
            .spawn(move || {
                let ready = prepare().and_then(|()| rehearse(&mut lock(&thread_fd)));
                shared.gate.arrive();
                shared.ending.end(match ready {
                    Ok(()) => run(&thread_fd, &thread_exits, &shared),
                    Err(reason) => Outcome::new(exit_code::START_FAILED, reason),
                });
            })?;
        Ok(Self {
            fd,
            immediate_exit: byte.cast_const().cast(),
            thread,
            exits,
        })
    }

    /// Brings the vCPU out of the guest, or keeps it from going in.
    pub fn kick(&self) {
        // SAFETY: `fd` keeps the mapping alive; KVM only reads this byte, and we write it atomically.
        unsafe { &*self.immediate_exit }.store(1, Ordering::SeqCst);
        let _ = self.thread.kill(SIGRTMIN()); // a thread that is gone needs no kick
    }

    /// Waits for the thread's end, after the guest's.
    pub fn join(self) {
        let _ = self.thread.join();
    }

    /// The vCPU itself; only while the gate is closed, else this waits for an exit.
    pub fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        lock(&self.fd)
    }

    /// Exits so far.
    pub fn exits(&self) -> &Exits {
        &self.exits
    }
}

/// Enters KVM_RUN without running an instruction. The first call starts a kernel thread in
/// this process (KVM's huge-page recovery), which RLIMIT_NPROC forbids later: the call would
/// then fail with EAGAIN for ever.
fn rehearse(fd: &mut VcpuFd) -> Result<(), String> {
    fd.set_kvm_immediate_exit(1);
    match fd.run() {
        Err(error) if error.errno() == libc::EINTR => Ok(()),
        Err(error) => Err(format!("KVM could not run a vCPU: {error}")),
        Ok(exit) => Err(format!("KVM ran a vCPU too early: {exit:?}")),
    }
}

/// Runs the guest until it ends.
fn run(fd: &Mutex<VcpuFd>, exits: &Exits, shared: &Shared) -> Outcome {
    loop {
        shared.gate.enter();
        let outcome = run_until_closed(&mut lock(fd), exits, shared);
        shared.gate.leave();
        if let Some(outcome) = outcome {
            return outcome;
        }
    }
}

/// Lets the vCPU go in once more. A kick that comes between is not lost if the gate is looked at afterwards: it was
/// closed before the kick, and the fence keeps the look behind the write.
fn take_kick_back(fd: &mut VcpuFd) {
    fd.set_kvm_immediate_exit(0);
    fence(Ordering::SeqCst);
}

fn run_until_closed(fd: &mut VcpuFd, exits: &Exits, shared: &Shared) -> Option<Outcome> {
    take_kick_back(fd);
    while !shared.gate.is_closed() {
        let class = match fd.run() {
            Ok(VcpuExit::MmioWrite(address, data)) => {
                shared.mmio.write(address, data);
                ExitClass::MmioWrite
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                shared.mmio.read(address, data);
                ExitClass::MmioRead
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                shared.ports.write(port.into(), data);
                ExitClass::PortWrite
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                shared.ports.read(port.into(), data);
                ExitClass::PortRead
            }
            Ok(VcpuExit::Shutdown) => return Some(triple_fault(fd)),
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                let reason = format!("the guest ended with system event {kind}");
                return Some(Outcome::new(exit_code::RESET, reason));
            }
            Ok(VcpuExit::InternalError) => return Some(internal_error(fd)),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                let reason = format!(
                    "KVM could not enter the guest: hardware reason {reason:#x}, CPU {cpu}"
                );
                return Some(Outcome::new(exit_code::KVM_FAILED, reason));
            }
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
                let reason = format!("KVM has no memory at {gpa:#x}, {size} bytes");
                return Some(Outcome::new(exit_code::KVM_FAILED, reason));
            }
            // Never asked for: no route is level-triggered.
            Ok(VcpuExit::IoapicEoi(_)) => ExitClass::Other,
            Ok(VcpuExit::Intr) => ExitClass::Kicked,
            Ok(exit) => {
                let reason = format!("KVM left the guest for an unknown reason: {exit:?}");
                return Some(Outcome::new(exit_code::KVM_FAILED, reason));
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                take_kick_back(fd); // the gate may be open again
                ExitClass::Kicked
            }
            Err(error) => {
                let reason = format!("KVM could not run the guest: {error}");
                return Some(Outcome::new(exit_code::KVM_FAILED, reason));
            }
        };
        exits.count(class);
        // The power port, or another vCPU, may have ended it all.
        if let Some(outcome) = shared.ending.outcome() {
            return Some(outcome.clone());
        }
    }
    None
}

/// How a Linux with `reboot=t` resets, or a crash so deep that its kernel could say nothing.
fn triple_fault(fd: &mut VcpuFd) -> Outcome {
    // AMD's processors lose their state by it: KVM then shows that of a reset.
    let at = match fd.get_regs() {
        Ok(regs) if regs.rip != RESET_VECTOR => format!(" at instruction {:#x}", regs.rip),
        _ => String::new(),
    };
    let reason = format!("the guest reset itself by a triple fault{at}");
    Outcome::new(exit_code::RESET, reason)
}

fn internal_error(fd: &mut VcpuFd) -> Outcome {
    let run = fd.get_kvm_run();
    // SAFETY: KVM filled this member of the union: the exit reason is KVM_EXIT_INTERNAL_ERROR.
    let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
    let at = fd.get_regs().map_or(0, |regs| regs.rip);
    let reason = format!("KVM gave up at guest instruction {at:#x} (internal error {suberror})");
    Outcome::new(exit_code::KVM_FAILED, reason)
}
