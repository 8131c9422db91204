//! Port-forward into a pod: who connects to a port on the loopback of its network namespace reaches that port of the guest's.

use super::sandbox::Sandbox;
use crate::network::{loopback, netns};
use crate::rpc;
use rustix::net::sockopt::set_socket_linger;
use std::io;
use std::net::TcpListener as StdTcpListener;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Connections of one pod at a time; others wait.
const MAX_CONNECTIONS: usize = 128;

/// Taken back when it is dropped.
#[derive(Debug)]
pub(super) struct Forward {
    _tasks: JoinSet<()>,
}

impl Forward {
    /// Begins to, for the pod in the namespace at `netns`; what fails is told, and nothing else is the worse for it.
    pub(super) fn start(netns: PathBuf, sandbox: Weak<Sandbox>) -> Self {
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            if let Err(error) = serve(netns, sandbox).await {
                rpc::complain(format_args!("no port can be forwarded to the pod: {error}"));
            }
        });
        Self { _tasks: tasks }
    }
}

async fn serve(netns: PathBuf, sandbox: Weak<Sandbox>) -> io::Result<()> {
    let listen = move || netns::enter(&netns, loopback::listen);
    let listeners = tokio::task::spawn_blocking(listen).await??;
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut families = JoinSet::new();
    for listener in listeners {
        let listener = nonblocking(listener)?;
        families.spawn(accept(listener, room.clone(), sandbox.clone()));
    }
    while families.join_next().await.is_some() {}
    Ok(())
}

fn nonblocking(listener: StdTcpListener) -> io::Result<TcpListener> {
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

async fn accept(listener: TcpListener, room: Arc<Semaphore>, sandbox: Weak<Sandbox>) {
    /// Out of descriptors: others will be closed.
    const LATER: Duration = Duration::from_millis(100);
    // They end with it.
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = room.clone().acquire_owned().await else {
            return;
        };
        let Ok((connection, _)) = listener.accept().await else {
            tokio::time::sleep(LATER).await;
            continue;
        };
        while connections.try_join_next().is_some() {}
        let Some(sandbox) = sandbox.upgrade() else {
            return;
        };
        connections.spawn(async move {
            connect(connection, &sandbox).await;
            drop(place);
        });
    }
}

async fn connect(mut connection: TcpStream, sandbox: &Sandbox) {
    let reached = async {
        let port = loopback::meant_port(&connection).ok()?;
        sandbox.connect(port).await.ok()
    };
    match reached.await {
        // Either side may end it at any time.
        Some(mut guest) => drop(tokio::io::copy_bidirectional(&mut connection, &mut guest).await),
        // As from a port where nobody listens.
        None => drop(set_socket_linger(&connection, Some(Duration::ZERO))),
    }
}
