//! Calls of the agent: each bounded in time, and over as soon as the VMM is gone.

use super::link::Guarded;
use super::vm::{Ended, printable, wait_end};
use casemate_protocol::agent as proto;
use casemate_protocol::agent_ttrpc::AgentClient;
use std::future::Future;
use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;
use tokio::sync::watch;
use ttrpc::context::Context;
use ttrpc::proto::Code;

/// What an error text of the agent may take.
const MAX_TEXT: usize = 4096;
/// Everything that only moves bits around in the guest; a loaded host gets the benefit of the doubt.
const QUICK: Duration = Duration::from_secs(30);
/// Copying into a fresh volume what the image has there.
pub const FILL: Duration = Duration::from_secs(15 * 60);
/// Unmounting writes back what is dirty.
const SHUTDOWN: Duration = Duration::from_secs(60);

/// Why a call failed.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum CallError {
    /// The guest is gone.
    #[error("the guest ended: {0}")]
    Ended(Ended),
    /// It didn't answer.
    #[error("the guest did not answer {call} within {limit:?}")]
    Timeout {
        /// Which call.
        call: &'static str,
        /// How long we waited.
        limit: Duration,
    },
    /// It said no.
    #[error("{message}")]
    Refused {
        /// The agent's code.
        code: Code,
        /// The agent's text, made printable.
        message: String,
    },
    /// The connection broke, or the agent broke its rules.
    #[error("the connection to the guest's agent failed at {call}: {message}")]
    Connection {
        /// Which call.
        call: &'static str,
        /// What happened.
        message: String,
    },
}

/// The agent of one sandbox.
#[derive(Clone)]
pub(super) struct Agent {
    client: AgentClient,
    ended: watch::Receiver<Option<Ended>>,
}

impl Agent {
    /// Wraps our end of the control connection; nothing is sent yet.
    pub(super) fn new(
        stream: StdUnixStream,
        ended: watch::Receiver<Option<Ended>>,
    ) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let stream = tokio::net::UnixStream::from_std(stream)?;
        let socket = ttrpc::r#async::transport::Socket::new(Guarded::new(stream));
        let client = ttrpc::r#async::Client::new(socket);
        Ok(Self {
            client: AgentClient::new(client),
            ended,
        })
    }

    async fn call<T>(
        &self,
        call: &'static str,
        limit: Option<Duration>,
        answer: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, CallError> {
        let mut ended = self.ended.clone();
        let timeout = async {
            match limit {
                Some(limit) => tokio::time::sleep(limit).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            answer = answer => match answer {
                Ok(value) => Ok(value),
                Err(ttrpc::Error::RpcStatus(status)) => Err(CallError::Refused {
                    code: status.code.enum_value_or(Code::UNKNOWN),
                    message: printable(&status.message, MAX_TEXT),
                }),
                Err(other) => Err(self.broken(call, other).await),
            },
            end = wait_end(&mut ended) => Err(CallError::Ended(end)),
            () = timeout => Err(CallError::Timeout { call, limit: limit.unwrap_or_default() }),
        }
    }

    /// A connection breaks when the guest dies: then its end says more.
    async fn broken(&self, call: &'static str, error: ttrpc::Error) -> CallError {
        const DEATH_FOLLOWS: Duration = Duration::from_secs(5);
        let mut ended = self.ended.clone();
        match tokio::time::timeout(DEATH_FOLLOWS, wait_end(&mut ended)).await {
            Ok(end) => CallError::Ended(end),
            Err(_) => CallError::Connection {
                call,
                message: printable(&error.to_string(), MAX_TEXT),
            },
        }
    }

    /// The first call; `limit` covers the guest's whole boot.
    pub(super) async fn hello(
        &self,
        request: &proto::HelloRequest,
        limit: Duration,
    ) -> Result<proto::HelloResponse, CallError> {
        let answer = self.client.hello(Context::default(), request);
        self.call("Hello", Some(limit), answer).await
    }

    /// Calls `CreateContainer`.
    pub(super) async fn create_container(
        &self,
        request: &proto::CreateContainerRequest,
    ) -> Result<proto::CreateContainerResponse, CallError> {
        let fills = request.mounts.iter().any(|m| !m.copy_up.is_empty());
        let limit = if fills { FILL } else { QUICK };
        let answer = self.client.create_container(Context::default(), request);
        self.call("CreateContainer", Some(limit), answer).await
    }

    /// Ends the containers and syncs the disks.
    pub(super) async fn shutdown(&self) -> Result<(), CallError> {
        let empty = proto::Empty::new();
        let answer = self.client.shutdown(Context::default(), &empty);
        self.call("Shutdown", Some(SHUTDOWN), answer)
            .await
            .map(|_| ())
    }

    /// Waits, for ever, for a process to end.
    pub(super) async fn wait(
        &self,
        request: &proto::ProcessRequest,
    ) -> Result<proto::WaitResponse, CallError> {
        let answer = self.client.wait(Context::default(), request);
        self.call("Wait", None, answer).await
    }
}

/// The calls that differ in nothing but their types.
macro_rules! quick_calls {
    ($($name:ident, $call:literal, $request:ident -> $response:ident;)*) => {
        impl Agent {
            $(
                #[doc = concat!("Calls `", $call, "`.")]
                pub(super) async fn $name(
                    &self,
                    request: &proto::$request,
                ) -> Result<proto::$response, CallError> {
                    let answer = self.client.$name(Context::default(), request);
                    self.call($call, Some(QUICK), answer).await
                }
            )*
        }
    };
}

quick_calls! {
    online_cpus, "OnlineCpus", OnlineCpusRequest -> Empty;
    set_network, "SetNetwork", NetworkRequest -> Empty;
    start_container, "StartContainer", StartContainerRequest -> StartContainerResponse;
    delete_container, "DeleteContainer", ContainerRequest -> Empty;
    exec, "Exec", ExecRequest -> ExecResponse;
    kill, "Kill", KillRequest -> Empty;
    resize_pty, "ResizePty", ResizePtyRequest -> Empty;
    list_pids, "ListPids", ContainerRequest -> ListPidsResponse;
    pause, "Pause", ContainerRequest -> Empty;
    resume, "Resume", ContainerRequest -> Empty;
    update, "Update", UpdateRequest -> Empty;
    forward, "Forward", ForwardRequest -> Empty;
    stats, "Stats", ContainerRequest -> StatsResponse;
}
