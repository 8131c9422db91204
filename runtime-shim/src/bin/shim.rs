//! `containerd-shim-casemate-v2`: looks after one sandbox.

use anyhow::{Context, bail};
use casemate::shim::{Engine, Serve, ServeShare, run, serve_share};
use casemate::{containerd, fds, network, rpc};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("--share") => {
            let Err(error) =
                parse_share(std::env::args_os().skip(1)).and_then(|share| serve_share(&share));
            eprintln!("{error:#}");
            return ExitCode::FAILURE;
        }
        Some("--hold-network") => {
            return match hold_network(std::env::args().skip(2)) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("{error:#}");
                    ExitCode::FAILURE
                }
            };
        }
        Some("--serve") => {}
        _ => {
            return match containerd::main(std::env::args().skip(1)) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("containerd-shim-casemate-v2: {error:#}");
                    ExitCode::FAILURE
                }
            };
        }
    }
    match parse(std::env::args().skip(1)).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            rpc::complain(format_args!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// `--serve --dir DIR --listen-fd N --lock-fd N [--lifeline-fd N] [--console-fd N] [--hold-fd N] [--discard] [--unattended POLICY] [--log BYTES:FILES]
/// [--engine NAMESPACE EVENTS] [--config FILE]`
fn parse(mut args: impl Iterator<Item = String>) -> anyhow::Result<Serve> {
    let (mut dir, mut listener, mut lock) = (None, None, None);
    let (mut lifeline, mut console, mut discard, mut engine) = (None, None, false, None);
    let (mut unattended, mut log, mut config, mut held) = (None, None, None, Vec::new());
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--serve" => {}
            "--dir" => dir = Some(PathBuf::from(value()?)),
            "--listen-fd" => listener = Some(descriptor(&arg, &value()?)?),
            "--lock-fd" => lock = Some(descriptor(&arg, &value()?)?),
            "--lifeline-fd" => lifeline = Some(descriptor(&arg, &value()?)?),
            "--console-fd" => console = Some(descriptor(&arg, &value()?)?),
            "--hold-fd" => held.push(descriptor(&arg, &value()?)?),
            "--config" => config = Some(PathBuf::from(value()?)),
            "--discard" => discard = true,
            "--unattended" => unattended = Some(value()?.parse()?),
            "--engine" => {
                let namespace = value()?;
                let events = value()?;
                engine = Some(Engine { namespace, events });
            }
            "--log" => log = Some(value()?.parse()?),
            other => bail!("unknown argument {other:?}"),
        }
    }
    Ok(Serve {
        dir: dir.context("--dir is missing")?,
        listener: listener.context("--listen-fd is missing")?,
        lock: lock.context("--lock-fd is missing")?,
        lifeline,
        console,
        discard,
        unattended,
        log,
        engine,
        config,
        held,
    })
}

/// `--share PATH --place DIR --virtiofsd PATH --listen-fd N [--read-only] [--read-only-base]`
fn parse_share(mut args: impl Iterator<Item = OsString>) -> anyhow::Result<ServeShare> {
    let (mut source, mut place, mut virtiofsd) = (None, None, None);
    let (mut listener, mut read_only, mut read_only_base) = (None, false, false);
    while let Some(arg) = args.next() {
        let arg = arg.to_string_lossy().into_owned();
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--share" => source = Some(PathBuf::from(value()?)),
            "--place" => place = Some(PathBuf::from(value()?)),
            "--virtiofsd" => virtiofsd = Some(PathBuf::from(value()?)),
            "--listen-fd" => listener = Some(descriptor(&arg, &value()?.to_string_lossy())?),
            "--read-only" => read_only = true,
            "--read-only-base" => read_only_base = true,
            other => bail!("unknown argument {other:?}"),
        }
    }
    Ok(ServeShare {
        virtiofsd: virtiofsd.context("--virtiofsd is missing")?,
        source: source.context("--share is missing")?,
        place: place.context("--place is missing")?,
        listener: listener.context("--listen-fd is missing")?,
        read_only,
        read_only_base,
    })
}

/// `--hold-network CONTROL STREAM GATE MAC [POLICY]`: the process that holds a user's network, by the numbers of three
/// descriptors.
fn hold_network(mut args: impl Iterator<Item = String>) -> anyhow::Result<()> {
    let mut next = || {
        let number = args.next().context("a descriptor's number is missing")?;
        descriptor("--hold-network", &number)
    };
    let (control, stream, gate) = (next()?, next()?, next()?);
    let guest = args.next().context("the guest's MAC address is missing")?;
    let guest = guest.parse().map_err(anyhow::Error::msg)?;
    let policy = args.next().map(|text| serde_json::from_str(&text));
    network::user::hold([control, stream, gate], guest, policy.transpose()?)
}

fn descriptor(name: &str, text: &str) -> anyhow::Result<OwnedFd> {
    let number = text
        .parse()
        .with_context(|| format!("{name}: {text:?} is not a descriptor's number"))?;
    fds::inherit(number).with_context(|| format!("{name}: descriptor {number} is not open"))
}
