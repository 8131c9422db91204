//! The life of a VMM process: confined, booted, served until the guest ends.

use crate::config::{self, Confinement, Fd, VmConfig};
use crate::confine::{self, ConfineError, Plan};
use crate::control::{Message, Phase};
use crate::control_socket::ControlSocket;
use crate::ending::{Outcome, chain};
use crate::event_loop::{EventLoop, termination_signals};
use crate::exit_code;
use crate::fds::{take, take_file};
use crate::phases::Phases;
use crate::vm::{self, Vm, io_error};
use std::os::fd::OwnedFd;

/// Descriptors that a VM opens besides those of its configuration: KVM's, epoll, signals.
const OWN_DESCRIPTORS: u32 = 16;
/// Per device: its interrupt, its queues' kicks, a timer or two.
const DESCRIPTORS_PER_DEVICE: u32 = 12;
/// Two disks, vsock, entropy, a balloon.
const PROBED_DEVICES: usize = 5;
/// What one control packet may bring, twice: a swap holds the old and the new files.
const PASSED_DESCRIPTORS: u32 = 2 * 253;

/// Reads the configuration from an inherited descriptor.
pub fn read_config(fd: Fd) -> Result<VmConfig, config::Error> {
    VmConfig::read(take_file(fd).map_err(config::Error::Read)?)
}

/// Runs the VM to its end, whatever that is.
pub fn run(config: &VmConfig, mut phases: Phases) -> Outcome {
    let confined = enter_confinement(
        config.confinement,
        &config.descriptors(),
        config.vcpus,
        config.devices(),
    );
    if let Err(error) = confined {
        // Its text tells the cause already, before the advice.
        return Outcome::new(exit_code::START_FAILED, error.to_string());
    }
    phases.reached(Phase::Confined);
    let control = match config.control.map(take).transpose() {
        Ok(socket) => socket.map(ControlSocket::new),
        Err(error) => {
            let reason = format!("control socket: {error}");
            return Outcome::new(exit_code::START_FAILED, reason);
        }
    };
    match start(config, &mut phases) {
        Ok((vm, signals)) => match EventLoop::new(vm, control, signals) {
            Ok(event_loop) => event_loop.run(config, &mut phases),
            Err(error) => Outcome::new(exit_code::START_FAILED, chain(&error)),
        },
        Err(error) => {
            let outcome = Outcome::new(exit_code::START_FAILED, chain(&error));
            if let Some(control) = control {
                phases.take().for_each(|message| control.send(&message));
                control.send(&Message::Ended {
                    code: outcome.code,
                    reason: outcome.reason.clone(),
                    guest_log: String::new(),
                });
            }
            outcome
        }
    }
}

fn start(config: &VmConfig, phases: &mut Phases) -> Result<(Vm, OwnedFd), vm::Error> {
    let signals = termination_signals().map_err(io_error("signals"))?;
    let vm = Vm::boot(config, phases)?;
    Ok((vm, signals))
}

/// Confines the process for good, as if for a small VM: does this host let a VMM do so?
pub fn probe_confinement() -> Result<(), ConfineError> {
    enter_confinement(Confinement::Full, &[], 1, PROBED_DEVICES)
}

fn enter_confinement(
    level: Confinement,
    keep_fds: &[Fd],
    vcpus: u8,
    devices: usize,
) -> Result<(), ConfineError> {
    let plan = Plan {
        level,
        keep_fds,
        max_open_files: keep_fds.len() as u32
            + OWN_DESCRIPTORS
            + u32::from(vcpus)
            + DESCRIPTORS_PER_DEVICE * devices as u32
            + PASSED_DESCRIPTORS,
    };
    confine::enter(&plan).map(drop)
}
