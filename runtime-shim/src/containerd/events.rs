//! What is told to containerd: events of tasks, in order, forwarded to its ttrpc socket.

use crate::rpc;
use crate::state::now_ns;
use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::EventsClient;
use protobuf::MessageFull;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::mpsc;

/// Events that wait for a containerd that is away; more are dropped, the newest first.
const MAX_WAITING: usize = 2048;
/// One call.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two tries, times the number of tries so far.
const PAUSE: Duration = Duration::from_secs(1);
/// As containerd's own shims.
const MAX_TRIES: u32 = 5;

/// Tells containerd what happens.
#[derive(Debug, Clone)]
pub struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Envelope>,
}

impl Publisher {
    /// Starts to forward to the socket at `address`, from within the event loop. Without an address (CRI-O gives none)
    /// nothing is told.
    pub fn start(namespace: String, address: &str) -> Option<Self> {
        let path = PathBuf::from(address.strip_prefix("unix://").unwrap_or(address));
        if path.as_os_str().is_empty() {
            return None;
        }
        let (queue, waiting) = mpsc::channel(MAX_WAITING);
        tokio::spawn(forward(path, waiting));
        Some(Self { namespace, queue })
    }

    /// Tells one event, under a topic such as `/tasks/exit`.
    pub fn tell<E: MessageFull>(&self, topic: &str, event: &E) {
        let Ok(value) = event.write_to_bytes() else {
            return;
        };
        let event = Any {
            type_url: E::descriptor().full_name().to_owned(),
            value,
            ..Default::default()
        };
        let envelope = Envelope {
            timestamp: Some(timestamp(now_ns())).into(),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: Some(event).into(),
            ..Default::default()
        };
        // Full: containerd has been away for two thousand events, and asks for the state when it comes back.
        let _ = self.queue.try_send(envelope);
    }
}

/// A time as the Task API has it.
pub fn timestamp(at_ns: u64) -> Timestamp {
    Timestamp {
        seconds: (at_ns / 1_000_000_000) as i64,
        nanos: (at_ns % 1_000_000_000) as i32,
        ..Default::default()
    }
}

async fn forward(path: PathBuf, mut waiting: mpsc::Receiver<Envelope>) {
    let mut client = None;
    while let Some(envelope) = waiting.recv().await {
        let request = ForwardRequest {
            envelope: Some(envelope).into(),
            ..Default::default()
        };
        for tries in 1..=MAX_TRIES {
            if client.is_none() {
                let stream = std::os::unix::net::UnixStream::connect(&path);
                client = stream.and_then(rpc::client).ok().map(EventsClient::new);
            }
            if let Some(events) = &client {
                match events.forward(rpc::context(Some(PATIENCE)), &request).await {
                    Ok(_) => break,
                    // containerd doesn't want it: another try would be no better.
                    Err(ttrpc::Error::RpcStatus(_)) => break,
                    Err(_) => client = None,
                }
            }
            tokio::time::sleep(PAUSE * tries).await;
        }
    }
}
