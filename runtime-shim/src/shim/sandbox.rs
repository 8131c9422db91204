//! A sandbox: its guest, and what it has of the host for as long as that runs. Its containers share it.

use super::agent::Agent;
use super::bounds::{self, Bounds};
use super::container::{Container, ContainerError};
use super::forward::Forward;
use super::launch::{FirstStreams, Guest, Launch, LaunchError};
use super::network::{self, Attaching, Kept};
use super::places::Places;
use super::process::{Exit, Life};
use super::stdio;
use super::vm::Vm;
use crate::containerd;
use crate::fds;
use crate::journal::Journal;
use crate::plan::{self, Limits, Plan};
use crate::rpc::{KILLED, SIGKILL};
use casemate_protocol::agent as proto;
use oci_spec::runtime::{LinuxNamespace, LinuxResources};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// What holds a sandbox's processes, and to what.
struct Held {
    bounds: Bounds,
    limits: Limits,
}

/// A sandbox.
pub(super) struct Sandbox {
    /// Its first container's id.
    id: String,
    pub(super) guest: Guest,
    /// Where it stands what is to be given back.
    journal: Journal,
    has_network: bool,
    /// What holds its processes.
    bounds: tokio::sync::Mutex<Held>,
    /// What it has of the host for as long as it runs.
    kept: Mutex<Kept>,
    /// Why it was ended by us.
    ended_for: Mutex<Option<&'static str>>,
    /// Port-forward, where it is a pod's.
    forward: Mutex<Option<Forward>>,
    /// If further containers can join.
    pub(super) pod: Option<Pod>,
}

/// What the containers of a pod share.
pub(super) struct Pod {
    pub(super) places: Arc<Places>,
    /// The namespaces of the first container, as its spec has them.
    pub(super) namespaces: Vec<LinuxNamespace>,
    /// The first container's first process, in the guest.
    pub(super) guest_pid: OnceLock<u32>,
    members: Mutex<Vec<Weak<Container>>>,
}

/// A sandbox that came up.
pub(super) struct Booted {
    pub(super) sandbox: Arc<Sandbox>,
    /// Of the first container.
    pub(super) stdio: proto::Stdio,
    /// Its addresses, where it has a network.
    pub(super) ips: Vec<IpAddr>,
}

/// A poisoned lock holds what it held: always usable.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Sandbox {
    /// Boots it for its first container, whose bundle this is.
    pub(super) async fn boot(
        id: &str,
        bundle: &Path,
        plan: &Plan,
        first: FirstStreams,
        launch: &Launch<'_>,
    ) -> Result<Booted, ContainerError> {
        let bounds = Bounds::new(id, &plan.limits, launch.journal).map_err(LaunchError::Bounds)?;
        let netns = plan.netns.as_ref();
        let network = netns.map(|netns| Attaching::begin(id, bundle, netns, &bounds, launch));
        let mut network = network.transpose()?;
        let started = Guest::start(plan, first, network.as_mut(), &bounds, launch).await;
        let (guest, stdio) = started?;
        let mut kept = Kept::default();
        let ready = async {
            let mut ips = Vec::new();
            if let Some(network) = network {
                let told = network.ready().await?;
                guest.agent.set_network(&told.request).await?;
                ips = told.ips;
                kept = told.kept;
            }
            let mut pod = None;
            if let (Some(places), Some(namespaces)) = (guest.places().await?, &plan.pod) {
                let places = Arc::new(places);
                let put = places.put(plan::FIRST_PLACE, &plan.inside.placed).await;
                if let Err(error) = put {
                    places.close();
                    return Err(error.into());
                }
                pod = Some(Pod {
                    places,
                    namespaces: namespaces.clone(),
                    guest_pid: OnceLock::new(),
                    members: Mutex::default(),
                });
            }
            Ok((ips, pod))
        };
        let (ips, pod) = match ready.await {
            Ok(ready) => ready,
            Err(error) => {
                guest.stop(true).await;
                return Err(error);
            }
        };
        let sandbox = Arc::new(Self {
            id: id.to_owned(),
            guest,
            journal: launch.journal.clone(),
            has_network: plan.netns.is_some(),
            bounds: tokio::sync::Mutex::new(Held {
                bounds,
                limits: plan.limits.clone(),
            }),
            kept: Mutex::new(kept),
            ended_for: Mutex::default(),
            forward: Mutex::default(),
            pod,
        });
        sandbox.end_with_network();
        if let (Some(_), Some(netns)) = (&sandbox.pod, netns) {
            let forward = Forward::start(netns.clone(), Arc::downgrade(&sandbox));
            *locked(&sandbox.forward) = Some(forward);
        }
        Ok(Booted {
            sandbox,
            stdio,
            ips,
        })
    }

    /// Its first container's id.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn vm(&self) -> &Vm {
        &self.guest.vm
    }

    pub(super) fn agent(&self) -> &Agent {
        &self.guest.agent
    }

    /// Ends the sandbox when a process does that its network needs: better than one that reaches nobody.
    fn end_with_network(self: &Arc<Self>) {
        let end = match &locked(&self.kept).passt {
            Some(passt) => passt.end(),
            None => return,
        };
        let watched = end.and_then(|end| fds::watched(end, Interest::READABLE));
        let sandbox = Arc::downgrade(self);
        tokio::spawn(async move {
            if let Ok(watched) = watched {
                let _ = watched.readable().await;
            }
            if let Some(sandbox) = sandbox.upgrade() {
                *locked(&sandbox.ended_for) = Some("its network's process (passt) ended");
                sandbox.vm().kill();
            }
        });
    }

    /// Why it was ended by us, if it was.
    pub(super) fn ended_for(&self) -> Option<&'static str> {
        *locked(&self.ended_for)
    }

    /// The engine's namespace that it is in.
    pub(super) fn namespace(&self) -> String {
        containerd::namespace_of(&self.journal)
    }

    /// A stream to the server at a port of the guest's loopback.
    pub(super) async fn connect(&self, port: u16) -> Result<UnixStream, ContainerError> {
        let (ours, theirs) = stdio::socket_pair()?;
        let request = proto::ForwardRequest {
            port: port.into(),
            stream_port: self.guest.offer(&theirs).await?,
            ..Default::default()
        };
        self.agent().forward(&request).await?;
        Ok(ours)
    }

    /// Keeps it to other limits on the host.
    pub(super) async fn limit(&self, change: &LinuxResources) -> Result<(), ContainerError> {
        let mut held = self.bounds.lock().await;
        let mut limits = held.limits.clone();
        limits.add(change)?;
        // The VM is as large as it was booted.
        limits.memory = held.limits.memory;
        let changed = held
            .bounds
            .change(&self.id, &limits, self.vm(), &self.journal);
        changed.await.map_err(LaunchError::Bounds)?;
        held.limits = limits;
        Ok(())
    }

    /// Another container joined.
    pub(super) fn joined(&self, container: &Arc<Container>) {
        if let Some(pod) = &self.pod {
            let mut members = locked(&pod.members);
            members.retain(|member| member.strong_count() > 0);
            members.push(Arc::downgrade(container));
        }
    }

    /// The first container ended: a pod goes with it.
    pub(super) async fn end_members(&self) {
        let Some(pod) = &self.pod else { return };
        let members: Vec<_> = locked(&pod.members)
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        for member in members {
            let life = member.init.life();
            if !matches!(life, Life::Exited(_)) {
                let _ = member.kill("", SIGKILL, true).await;
            }
            if life == Life::Created {
                member.init.set_exited(Exit::now(KILLED));
            }
        }
    }

    /// Ends it; what was written in it is kept unless `discard`.
    pub(super) async fn end(&self, discard: bool) {
        locked(&self.forward).take();
        self.guest.stop(discard).await;
        if let Some(pod) = &self.pod {
            pod.places.close();
        }
        if self.bounds.lock().await.bounds.has_group() {
            bounds::release(&self.journal);
        }
        if self.has_network {
            network::release(&self.journal).await;
            *locked(&self.kept) = Kept::default();
        }
    }
}
