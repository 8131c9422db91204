//! `casemate-vmm`: runs the one microVM that an inherited descriptor describes.

use anyhow::{Context, Result, bail};
use casemate_vmm::control::Phase;
use casemate_vmm::phases::Phases;
use casemate_vmm::{exit_code, probe, probe_confinement, read_config, run};
use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "usage: casemate-vmm --config-fd N | --probe | --probe-confinement | --version";

enum Mode {
    Run { config_fd: i32 },
    Probe,
    ProbeConfinement,
    Version,
}

fn main() -> ExitCode {
    let mut phases = Phases::default();
    phases.reached(Phase::Main);
    let code = match parse(std::env::args().skip(1)) {
        Ok(Mode::Run { config_fd }) => run_vm(config_fd, phases),
        Ok(Mode::Probe) => probe_host(),
        Ok(Mode::ProbeConfinement) => try_confinement(),
        Ok(Mode::Version) => {
            println!("casemate-vmm {}", env!("CARGO_PKG_VERSION"));
            0
        }
        Err(error) => {
            eprintln!("casemate-vmm: {error:#}\n{USAGE}");
            exit_code::USAGE
        }
    };
    ExitCode::from(code)
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Mode> {
    let arguments: Vec<String> = arguments.collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["--config-fd", number] => {
            let config_fd = number
                .parse()
                .with_context(|| format!("--config-fd {number}: not a descriptor's number"))?;
            Ok(Mode::Run { config_fd })
        }
        ["--probe"] => Ok(Mode::Probe),
        ["--probe-confinement"] => Ok(Mode::ProbeConfinement),
        ["--version"] => Ok(Mode::Version),
        _ => bail!("unknown arguments: {}", arguments.join(" ")),
    }
}

/// Says whether KVM runs a normal guest here, and if not, why and what to do.
fn probe_host() -> u8 {
    match probe::check(Path::new(probe::DEVICE)) {
        Ok(()) => {
            println!("KVM runs a normal guest on this host");
            0
        }
        Err(error) => {
            eprintln!("{}", probe::diagnose(&error, &probe::HostFacts::read()));
            1
        }
    }
}

/// Says, if a VMM can't confine itself here, why and what to do.
fn try_confinement() -> u8 {
    match probe_confinement() {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{error}");
            1
        }
    }
}

/// Runs the VM; how it ended goes to standard error, in one line, unless the guest powered off.
fn run_vm(config_fd: i32, phases: Phases) -> u8 {
    let outcome = match read_config(config_fd).context("casemate-vmm") {
        Ok(config) => run(&config, phases),
        Err(error) => {
            eprintln!("{error:#}");
            return exit_code::START_FAILED;
        }
    };
    if outcome.code != exit_code::SHUTDOWN {
        eprintln!("casemate-vmm: {}", outcome.reason);
    }
    outcome.code
}
