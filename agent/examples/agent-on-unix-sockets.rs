//! The agent without a VM: ports of the host are Unix sockets in the directory given. For tests.

use casemate_agent::{Host, log_panics, monotonic_ns, serve};
use casemate_protocol::CONTROL_PORT;

fn main() -> anyhow::Result<()> {
    let main_ns = monotonic_ns();
    log_panics();
    let dir = std::env::args_os()
        .nth(1)
        .ok_or_else(|| anyhow::anyhow!("usage: agent-on-unix-sockets DIRECTORY"))?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async {
            let host = Host::Unix(dir.into());
            let control = host.connect(CONTROL_PORT).await?;
            serve(host, control, main_ns).await
        })
}
