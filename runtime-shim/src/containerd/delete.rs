//! `delete`: gives back what a shim that died has left.

use super::args::Args;
use super::events::timestamp;
use super::state;
use crate::rpc::KILLED;
use crate::settings::Settings;
use crate::state::now_ns;
use anyhow::Context;
use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message;

/// Does it; what is to be printed: a `DeleteResponse`.
pub(super) fn delete(args: &Args) -> anyhow::Result<Vec<u8>> {
    let settings = Settings::load()?;
    // A container that joined a sandbox has nothing of its own on the host.
    state(&settings, args)?.remove_sandbox(&args.id)?;
    let answer = DeleteResponse {
        exit_status: KILLED,
        exited_at: Some(timestamp(now_ns())).into(),
        ..Default::default()
    };
    answer.write_to_bytes().context("can't write the answer")
}
