//! `/init` of the guest; `/init pause` in a container of it.

use anyhow::Context as _;
use casemate_agent::{Host, end_guest, log, log_panics, monotonic_ns, pause, serve};
use casemate_protocol::{CONTROL_PORT, HOST_CID, PAUSE, power};
use std::process::ExitCode;

fn main() -> ExitCode {
    let main_ns = monotonic_ns();
    if std::env::args_os().nth(1).is_some_and(|what| what == PAUSE) {
        return ExitCode::from(u8::from(pause().is_err()));
    }
    log_panics();
    match run(main_ns) {
        Ok(()) => end_guest(power::OFF),
        // No orderly end: the VMM then passes on the guest's log, and with it the reason.
        Err(error) => {
            log(2, &format!("{error:#}"));
            end_guest(power::RESET);
        }
    }
    ExitCode::FAILURE // not a guest after all
}

fn run(main_ns: u64) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
        let host = Host::Vsock(HOST_CID);
        let control = host
            .connect(CONTROL_PORT)
            .await
            .context("connect to the host's control port over vsock")?;
        serve(host, control, main_ns).await
    })
}
