//! The main thread once the guest runs: devices, the shim's requests, the end.

use crate::config::{Confinement, VmConfig};
use crate::confine::seccomp::{self, ThreadKind};
use crate::control::{Answer, Command, CpuLimit, Message, Phase, Request};
use crate::control_socket::{ControlSocket, Received};
use crate::ending::Outcome;
use crate::exit_code;
use crate::guest_log;
use crate::phases::Phases;
use crate::poller::{Event, Source};
use crate::throttle::Throttle;
use crate::vcpu::{ExitClass, Vcpu};
use crate::vm::{Error, Vm, io_error};
use rustix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

const IN: u32 = libc::EPOLLIN as u32;

/// A VM with its event loop.
pub struct EventLoop {
    vm: Vm,
    control: Option<ControlSocket>,
    /// Not paused. A throttle may keep the vCPUs waiting all the same.
    running: bool,
    throttle: Option<Throttle>,
    /// How often the throttle made the vCPUs wait.
    throttled: u64,
}

impl EventLoop {
    /// Watches everything that isn't a device's.
    pub fn new(vm: Vm, control: Option<ControlSocket>, signals: OwnedFd) -> Result<Self, Error> {
        let watch = |fd, source| vm.poller.watch(fd, IN, source, 0);
        watch(vm.shared.ending.as_raw_fd(), Source::Ended).map_err(io_error("epoll"))?;
        watch(signals.as_raw_fd(), Source::Terminate).map_err(io_error("epoll"))?;
        if let Some(control) = &control {
            watch(control.as_raw_fd(), Source::Control).map_err(io_error("epoll"))?;
        }
        std::mem::forget(signals); // open for as long as the process lives
        Ok(Self {
            vm,
            control,
            running: false,
            throttle: None,
            throttled: 0,
        })
    }

    /// Runs the guest until it ends.
    pub fn run(mut self, config: &VmConfig, phases: &mut Phases) -> Outcome {
        // Behind its filter each vCPU waits at the gate; this thread's comes last.
        self.vm.shared.gate.wait_for(self.vm.vcpus.len());
        if let Some(outcome) = self.vm.shared.ending.outcome().cloned() {
            return self.finish(outcome);
        }
        if config.confinement != Confinement::Off
            && let Err(error) = seccomp::install(ThreadKind::EventLoop)
        {
            return self.finish(Outcome::new(exit_code::START_FAILED, error.to_string()));
        }
        phases.reached(Phase::FirstRun);
        self.vm.shared.gate.open();
        self.running = true;
        // Told only now, while the guest boots already.
        if let Some(control) = &self.control {
            phases.take().for_each(|message| control.send(&message));
        }
        let outcome = self.serve();
        self.finish(outcome)
    }

    fn serve(&mut self) -> Outcome {
        let mut events = Vec::new();
        loop {
            let patience = self.until_next_look();
            if let Err(error) = self.vm.poller.wait(&mut events, patience) {
                let reason = format!("epoll: {error}");
                return Outcome::new(exit_code::VMM_FAILED, reason);
            }
            for event in events.drain(..) {
                if let Some(outcome) = self.handle(event) {
                    return outcome;
                }
            }
            self.look_at_usage();
        }
    }

    fn handle(&mut self, event: Event) -> Option<Outcome> {
        match event.source {
            Source::Device(index) => {
                self.vm.devices.handle(index, event.token, event.readiness);
                if let (Some(at_ns), Some(control)) =
                    (self.vm.devices.take_connected_at(), &self.control)
                {
                    let phase = Phase::AgentConnected;
                    control.send(&Message::Phase { phase, at_ns });
                }
                None
            }
            Source::Ended => self.vm.shared.ending.outcome().cloned(),
            Source::Terminate => Some(stopped("a signal asked for the end")),
            Source::Control => self.handle_control(),
        }
    }

    fn handle_control(&mut self) -> Option<Outcome> {
        let received = match &self.control {
            Some(control) => control.receive(),
            None => return None,
        };
        let (id, result) = match received {
            Ok(Received::Nothing) => return None,
            Ok(Received::Closed) => return Some(stopped("the shim is gone")),
            Err(error) => return Some(stopped(&format!("control socket: {error}"))),
            Ok(Received::Malformed { id, reason }) => (id, Err(reason)),
            Ok(Received::Request(request, descriptors)) => {
                let stop = request.command == Command::Stop;
                let (id, result) = (request.id, self.execute(request, descriptors));
                if stop {
                    self.reply(id, result);
                    return Some(stopped("the shim asked for the end"));
                }
                (id, result)
            }
        };
        self.reply(id, result);
        None
    }

    fn reply(&self, id: u64, result: Result<Answer, String>) {
        if let Some(control) = &self.control {
            control.send(&Message::Reply { id, result });
        }
    }

    fn execute(&mut self, request: Request, descriptors: Vec<OwnedFd>) -> Result<Answer, String> {
        match request.command {
            Command::Pause => self.pause()?,
            Command::Resume => self.resume(),
            Command::Statistics => return Ok(Answer::Statistics(self.statistics())),
            Command::SwapDisk { disk } => {
                let files = descriptors.into_iter().map(File::from).collect();
                self.vm.devices.swap_disk(&disk, files)?;
            }
            Command::VsockListen { port } => {
                let [socket] = <[OwnedFd; 1]>::try_from(descriptors)
                    .map_err(|d| format!("vsock-listen takes one descriptor, got {}", d.len()))?;
                self.vm.devices.listen(port, socket)?;
            }
            Command::Balloon { mib } => self.vm.devices.set_balloon(mib)?,
            Command::LimitCpu { limit } => self.limit_cpu(limit)?,
            Command::Stop => {} // the caller ends the loop
        }
        Ok(Answer::Done)
    }

    /// Stops vCPUs, then devices. Idempotent.
    fn pause(&mut self) -> Result<(), String> {
        if self.running {
            self.stop_vcpus()?;
            self.vm.devices.pause();
        }
        Ok(())
    }

    /// When it can't stop all of them, it lets them run on.
    fn stop_vcpus(&mut self) -> Result<(), String> {
        let Vm { vcpus, shared, .. } = &self.vm;
        let kick = || vcpus.iter().for_each(Vcpu::kick);
        shared.gate.close(kick).map_err(|stuck| {
            if !self.is_throttled() {
                shared.gate.open();
            }
            stuck.to_string()
        })?;
        self.running = false;
        Ok(())
    }

    /// Starts devices, then vCPUs. Idempotent.
    fn resume(&mut self) {
        if !self.running {
            self.vm.devices.resume();
            self.running = true;
            if let Some(throttle) = &mut self.throttle {
                throttle.look(Instant::now(), process_time());
            }
            if !self.is_throttled() {
                self.vm.shared.gate.open();
            }
        }
    }

    /// From now on, with a whole quota.
    fn limit_cpu(&mut self, limit: Option<CpuLimit>) -> Result<(), String> {
        let vcpus = self.vm.vcpus.len();
        let limit = limit.map(CpuLimit::validate).transpose()?;
        self.throttle = limit.map(|l| Throttle::new(l, vcpus, Instant::now(), process_time()));
        if self.running {
            self.vm.shared.gate.open();
        }
        Ok(())
    }

    fn is_throttled(&self) -> bool {
        self.throttle.as_ref().is_some_and(Throttle::is_used_up)
    }

    /// `None` while nothing has to be looked at: a VM that is paused uses nothing.
    fn until_next_look(&self) -> Option<Duration> {
        let throttle = self.throttle.as_ref().filter(|_| self.running)?;
        Some(
            throttle
                .next_look()
                .saturating_duration_since(Instant::now()),
        )
    }

    /// Lets the vCPUs wait, or go on, by what the process has used.
    fn look_at_usage(&mut self) {
        let Some(throttle) = self.throttle.as_mut().filter(|_| self.running) else {
            return;
        };
        let now = Instant::now();
        if now < throttle.next_look() {
            return;
        }
        let waited = throttle.is_used_up();
        throttle.look(now, process_time());
        let Vm { vcpus, shared, .. } = &self.vm;
        match (waited, throttle.is_used_up()) {
            (false, true) => {
                self.throttled += 1;
                shared.gate.shut(|| vcpus.iter().for_each(Vcpu::kick));
            }
            (true, false) => shared.gate.open(),
            _ => {}
        }
    }

    fn statistics(&self) -> BTreeMap<String, u64> {
        let mut counters = BTreeMap::new();
        let vcpus = &self.vm.vcpus;
        for (class, name) in ExitClass::ALL {
            let sum = vcpus.iter().map(|vcpu| vcpu.exits().of(class)).sum();
            counters.insert(format!("vcpu.exits.{name}"), sum);
        }
        counters.insert("vcpu.exits".into(), counters.values().sum());
        counters.insert("cpu.throttled".into(), self.throttled);
        let used = process_time().as_micros() as u64;
        counters.insert("cpu.used_us".into(), used);
        self.vm.devices.counters(&mut counters);
        counters
    }

    /// Stops devices so that nothing is lost, and tells the shim how it ended.
    fn finish(mut self, mut outcome: Outcome) -> Outcome {
        // With a vCPU that doesn't stop, disks stay as a power cut leaves them.
        let losses = match self.stop_vcpus() {
            Ok(()) => self.vm.devices.finish(),
            Err(stuck) => vec![stuck],
        };
        for loss in &losses {
            eprintln!("casemate-vmm: {loss}");
        }
        // Whatever the end: a guest that was stopped may have been silent for a reason.
        let guest_log = guest_log::tail(&self.vm.memory);
        if outcome.code == exit_code::KVM_FAILED {
            outcome.reason += "; `casemate check` tells whether this host runs normal guests";
        }
        if outcome.code == exit_code::RESET {
            if guest_log::has_panic(&guest_log) {
                outcome = Outcome::new(exit_code::PANIC, "the guest's kernel panicked");
            } else if !guest_log::has_farewell(&guest_log) {
                outcome.reason += " and did not say why";
            }
        }
        if let Some(control) = &self.control {
            control.send(&Message::Ended {
                code: outcome.code,
                reason: outcome.reason.clone(),
                guest_log,
            });
        }
        outcome
    }
}

/// What all threads of this process have used of the host's processors, their guests' part included.
fn process_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn stopped(reason: &str) -> Outcome {
    Outcome::new(exit_code::STOPPED, reason)
}

/// SIGTERM and SIGINT as a descriptor; every thread that starts later has them blocked.
#[allow(unsafe_code)] // reason: signalfd has no safe wrapper
pub fn termination_signals() -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    let signals = [libc::SIGTERM, libc::SIGINT];
    for signal in signals {
        vmm_sys_util::signal::block_signal(signal).map_err(|e| io::Error::other(e.to_string()))?;
    }
    let set = vmm_sys_util::signal::create_sigset(&signals)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    // SAFETY: the set is initialised; -1 asks for a new descriptor, which we own.
    match unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: it was opened just now.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}
