//! `/init` of the guest.

use anyhow::Context as _;
use casemate_agent::{Host, end_guest, log, log_panics, monotonic_ns, serve};
use casemate_protocol::{CONTROL_PORT, HOST_CID, power};

fn main() {
    let main_ns = monotonic_ns();
    log_panics();
    match run(main_ns) {
        Ok(()) => end_guest(power::OFF),
        // No orderly end: the VMM then passes on the guest's log, and with it the reason.
        Err(error) => {
            log(2, &format!("{error:#}"));
            end_guest(power::RESET);
        }
    }
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
