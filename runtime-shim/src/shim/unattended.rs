//! A container that nobody attends: when it ends the shim gives back what it ran on, and starts it again if it is to.

use super::recorder::Recorder;
use super::service::Service;
use crate::rpc;
use std::time::{Duration, Instant};

/// Returns once the container has ended for good.
pub(super) async fn look_after(service: &Service, recorder: &Recorder) {
    loop {
        let again = recorder.ended().await;
        service.end_of_container().await;
        let Some(wait) = again else { return };
        if !is_wanted_after(recorder, wait).await {
            return;
        }
        match service.start_again(|| !recorder.is_ending()).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                recorder.failed(&rpc::parts(&error).1);
                return;
            }
        }
    }
}

/// Waits; `false` if the container is to end meanwhile.
async fn is_wanted_after(recorder: &Recorder, wait: Duration) -> bool {
    /// How soon a `stop` is noticed.
    const STEP: Duration = Duration::from_millis(100);
    let until = Instant::now() + wait;
    while !recorder.is_ending() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        tokio::time::sleep(left.min(STEP)).await;
    }
    false
}
