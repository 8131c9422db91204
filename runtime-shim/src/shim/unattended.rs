//! A container that nobody attends: when it ends the shim gives back what it ran on, and starts it again if it is to.

use super::recorder::Recorder;
use super::service::Service;
use crate::restart::Restarts;
use crate::rpc;
use std::time::{Duration, Instant};

/// Returns once the container has ended for good.
pub(super) async fn look_after(service: &Service, recorder: &Recorder, mut restarts: Restarts) {
    loop {
        recorder.ended().await;
        let ran = recorder.ran();
        let Some(exit) = service.end_of_container().await else {
            return;
        };
        if recorder.is_ending() {
            return;
        }
        let Some(wait) = restarts.after(exit.status, ran) else {
            return;
        };
        recorder.restarting();
        if !not_ended_within(recorder, wait).await {
            return;
        }
        if let Err(error) = service.start_again().await {
            recorder.failed(&rpc::parts(&error).1);
            return;
        }
    }
}

/// Waits; `false` if the container is to end meanwhile.
async fn not_ended_within(recorder: &Recorder, wait: Duration) -> bool {
    /// How soon a `stop` is noticed.
    const STEP: Duration = Duration::from_millis(100);
    let until = Instant::now() + wait;
    while let left = until.saturating_duration_since(Instant::now())
        && !left.is_zero()
    {
        if recorder.is_ending() {
            return false;
        }
        tokio::time::sleep(left.min(STEP)).await;
    }
    !recorder.is_ending()
}
