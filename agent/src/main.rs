//! `/init` of the guest.

use anyhow::Context as _;
use casemate_agent::{Host, log, log_panics, monotonic_ns, power_off, serve};
use casemate_protocol::{CONTROL_PORT, HOST_CID};

fn main() {
    let main_ns = monotonic_ns();
    log_panics();
    if let Err(error) = run(main_ns) {
        log(2, &format!("{error:#}"));
    }
    power_off();
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
