//! The agent's service: requests to containers.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use casemate_protocol::agent::{self, Empty};
use casemate_protocol::agent_ttrpc::{self, Agent};
use tokio::sync::Notify;
use ttrpc::r#async::TtrpcContext;
use ttrpc::r#async::transport::Listener;

use crate::boot;
use crate::conn::{Conn, Host};
use crate::container::{Container, check_id};
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::reaper::Reaper;
use crate::sys;
use crate::{forward, names, network};

/// Most containers of a sandbox; a pod has a handful.
const MAX_CONTAINERS: usize = 1024;

/// How long the host may take to end the guest itself after a shutdown.
const LINGER: std::time::Duration = std::time::Duration::from_secs(2);

/// The service.
struct Service {
    host: Host,
    reaper: Reaper,
    main_ns: u64,
    serving_ns: u64,
    /// `None`: the id is taken by a creation under way.
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
    shut_down: Arc<Notify>,
}

/// Serves `control` until the host closes it or asks for the end. `main_ns` is when the agent began.
pub async fn serve(host: Host, control: Conn, main_ns: u64) -> anyhow::Result<()> {
    let shut_down = Arc::new(Notify::new());
    let (control, closed) = Control::new(control);
    let service = Service {
        host,
        reaper: Reaper::start()?,
        main_ns,
        serving_ns: sys::monotonic_ns(),
        containers: Mutex::default(),
        shut_down: shut_down.clone(),
    };
    let connections = futures::stream::once(std::future::ready(Ok(control)));
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(Listener::new(connections))
        .register_service(agent_ttrpc::create_agent(Arc::new(service)));
    server.start().await?;
    tokio::select! {
        _ = closed => {}
        // The answer is on its way; the host usually ends the guest before this.
        () = async { shut_down.notified().await; tokio::time::sleep(LINGER).await } => {}
    }
    Ok(())
}

impl Service {
    fn table(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Container>>>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds a container; `missing` is the kind of error if there is none.
    fn find(&self, id: &str, missing: Kind) -> Result<Arc<Container>> {
        let found = self.table().get(id).cloned().flatten();
        found.ok_or_else(|| Error::new(missing, format!("there is no container {id:?}")))
    }

    async fn create(&self, request: &agent::CreateContainerRequest) -> Result<Arc<Container>> {
        check_id(&request.id)?;
        {
            let mut table = self.table();
            if table.contains_key(&request.id) {
                return Err(Error::new(
                    Kind::Exists,
                    format!("container {:?} exists already", request.id),
                ));
            }
            if table.len() >= MAX_CONTAINERS {
                return Err(Error::invalid(format!(
                    "there are {MAX_CONTAINERS} containers already"
                )));
            }
            table.insert(request.id.clone(), None);
        }
        let created = match boot::prepare() {
            Ok(()) => Container::create(&self.host, &self.reaper, request)
                .await
                .map(Arc::new),
            Err(error) => Err(error),
        };
        match &created {
            Ok(container) => self
                .table()
                .insert(request.id.clone(), Some(container.clone())),
            Err(_) => self.table().remove(&request.id),
        };
        created
    }
}

fn signal(number: u32) -> Result<i32> {
    match number {
        1..=64 => Ok(number as i32),
        _ => Err(Error::invalid(format!(
            "signal {number} is not within 1 and 64"
        ))),
    }
}

/// Bytes of memory that nothing uses.
fn free_memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.freeram as u64 * u64::from(info.mem_unit.max(1))
}

#[async_trait]
impl Agent for Service {
    async fn hello(
        &self,
        _: &TtrpcContext,
        request: agent::HelloRequest,
    ) -> ttrpc::Result<agent::HelloResponse> {
        boot::synchronize(request.realtime_ns, &request.entropy)?;
        // While the host digests the answer, the guest gets ready for a container; the answer goes first.
        tokio::spawn(async {
            tokio::task::yield_now().await;
            tokio::task::yield_now().await;
            boot::prepare()
        });
        Ok(agent::HelloResponse {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            kernel_release: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            main_ns: self.main_ns,
            serving_ns: self.serving_ns,
            free_bytes: free_memory(),
            ..Default::default()
        })
    }

    async fn online_cpus(
        &self,
        _: &TtrpcContext,
        request: agent::OnlineCpusRequest,
    ) -> ttrpc::Result<Empty> {
        boot::online_cpus(request.vcpus)?;
        Ok(Empty::new())
    }

    async fn set_network(
        &self,
        _: &TtrpcContext,
        request: agent::NetworkRequest,
    ) -> ttrpc::Result<Empty> {
        network::set(&request)?;
        if request.names_port != 0 {
            // The loopback interface comes up with the rest.
            boot::prepare()?;
            names::serve(&self.host, request.names_port).await?;
        }
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: agent::CreateContainerRequest,
    ) -> ttrpc::Result<agent::CreateContainerResponse> {
        let container = self.create(&request).await?;
        Ok(agent::CreateContainerResponse {
            pid: container.first().pid(),
            ..Default::default()
        })
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: agent::StartContainerRequest,
    ) -> ttrpc::Result<agent::StartContainerResponse> {
        let exec_ns = self.find(&request.id, Kind::State)?.first().start().await?;
        Ok(agent::StartContainerResponse {
            exec_ns,
            ..Default::default()
        })
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.find(&request.id, Kind::NotFound)?;
        container.destroy().await?;
        self.table().remove(&request.id);
        Ok(Empty::new())
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: agent::ExecRequest,
    ) -> ttrpc::Result<agent::ExecResponse> {
        let container = self.find(&request.id, Kind::State)?;
        let pid = container.exec(&self.host, &self.reaper, &request).await?;
        Ok(agent::ExecResponse {
            pid,
            ..Default::default()
        })
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: agent::ProcessRequest,
    ) -> ttrpc::Result<agent::WaitResponse> {
        let container = self.find(&request.id, Kind::NotFound)?;
        let end = container.process(&request.exec_id)?.ended().await?;
        if !request.exec_id.is_empty() {
            container.forget(&request.exec_id);
        }
        Ok(agent::WaitResponse {
            exit_status: end.exit.status,
            exited_at_ns: end.exit.at.as_nanos() as i64,
            oom_killed: end.oom_killed,
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: agent::KillRequest) -> ttrpc::Result<Empty> {
        let signal = signal(request.signal)?;
        let container = self.find(&request.id, Kind::NotFound)?;
        match request.all {
            true => container.kill_all(signal)?,
            false => container.process(&request.exec_id)?.kill(signal)?,
        }
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: agent::ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.find(&request.id, Kind::NotFound)?;
        container
            .process(&request.exec_id)?
            .resize(request.rows, request.cols)?;
        Ok(Empty::new())
    }

    async fn list_pids(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::ListPidsResponse> {
        let pids = self.find(&request.id, Kind::NotFound)?.pids()?;
        Ok(agent::ListPidsResponse {
            pids,
            ..Default::default()
        })
    }

    async fn pause(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.find(&request.id, Kind::NotFound)?.freeze(true).await?;
        Ok(Empty::new())
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.find(&request.id, Kind::NotFound)?
            .freeze(false)
            .await?;
        Ok(Empty::new())
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: agent::UpdateRequest,
    ) -> ttrpc::Result<Empty> {
        self.find(&request.id, Kind::NotFound)?
            .update(&request.resources_json)?;
        Ok(Empty::new())
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::StatsResponse> {
        let s = self.find(&request.id, Kind::NotFound)?.stats();
        Ok(agent::StatsResponse {
            cpu_usage_us: s.cpu_usage_us,
            cpu_user_us: s.cpu_user_us,
            cpu_system_us: s.cpu_system_us,
            cpu_throttled_us: s.cpu_throttled_us,
            cpu_nr_periods: s.cpu_nr_periods,
            cpu_nr_throttled: s.cpu_nr_throttled,
            memory_current: s.memory_current,
            memory_limit: s.memory_limit,
            memory_inactive_file: s.memory_inactive_file,
            memory_swap_current: s.memory_swap_current,
            pids_current: s.pids_current,
            pids_limit: s.pids_limit,
            io_read_bytes: s.io_read_bytes,
            io_write_bytes: s.io_write_bytes,
            oom_kills: s.oom_kills,
            ..Default::default()
        })
    }

    async fn forward(
        &self,
        _: &TtrpcContext,
        request: agent::ForwardRequest,
    ) -> ttrpc::Result<Empty> {
        forward::forward(&self.host, request.port, request.stream_port).await?;
        Ok(Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        let containers: Vec<_> = self
            .table()
            .drain()
            .filter_map(|(_, container)| container)
            .collect();
        for container in containers {
            // One that resists must not keep the others' data from the disk.
            if let Err(error) = container.destroy().await {
                boot::log(4, &format!("shutdown: {error}"));
            }
        }
        rustix::fs::sync();
        self.shut_down.notify_one();
        Ok(Empty::new())
    }
}
