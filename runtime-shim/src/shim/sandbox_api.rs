//! containerd's Sandbox API (`containerd/runtime/sandbox/v1/sandbox.proto`), which 2.x calls with `sandboxer = "shim"`.
//!
//! A pod is then made before any container of it, and without an image for a first one: the agent's own program is the first
//! process, in the guest's own root, and holds the namespaces that the others join.

use super::process::Life;
use super::service::{Service, check_id};
use crate::containerd::events::timestamp;
use crate::plan::GUEST_ROOT;
use crate::rpc::{SIGKILL, SIGTERM, chain, status};
use crate::state::now_ns;
use async_trait::async_trait;
use casemate_protocol::{INIT, PAUSE, cri};
use containerd_shim_protos::api;
use containerd_shim_protos::sandbox_api as sandbox;
use containerd_shim_protos::sandbox_async::Sandbox;
use containerd_shim_protos::types::platform::Platform;
use protobuf::Message;
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use ttrpc::r#async::TtrpcContext;
use ttrpc::proto::Code;

type Reply<T> = ttrpc::Result<T>;

/// The bundle of the first process, in the sandbox's directory.
const BUNDLE: &str = "pause";
/// Of nobody: it needs nothing.
const USER: u32 = 65_535;
/// What containerd calls the states of a sandbox.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";
/// How long the first process has to end when nobody says.
const STOPS: Duration = Duration::from_secs(10);
/// The CRI's word for the node's own namespace.
const NODE: i32 = 2;

/// The service, beside that of the tasks.
pub(super) struct SandboxApi {
    service: Arc<Service>,
    made: Mutex<Option<Made>>,
}

/// A sandbox that was made, and perhaps started.
#[derive(Clone)]
struct Made {
    id: String,
    spec: Value,
    created_ns: u64,
}

impl SandboxApi {
    pub(super) fn new(service: Arc<Service>) -> Self {
        Self {
            service,
            made: Mutex::default(),
        }
    }

    fn made(&self) -> std::sync::MutexGuard<'_, Option<Made>> {
        // A poisoned lock holds what it held: always usable.
        self.made.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn find(&self, id: &str) -> Reply<Made> {
        match &*self.made() {
            Some(made) if made.id == id => Ok(made.clone()),
            _ => Err(status(
                Code::NOT_FOUND,
                format!("sandbox {id:?} does not exist"),
            )),
        }
    }
}

/// What the first process is, in the terms of the runtime specification.
fn spec(request: &sandbox::CreateSandboxRequest) -> Reply<Value> {
    let config = match request.options.as_ref() {
        Some(any) => cri::PodSandboxConfig::parse_from_bytes(&any.value).map_err(|e| {
            let text = format!("the pod's configuration ({}): {e}", any.type_url);
            status(Code::INVALID_ARGUMENT, text)
        })?,
        None => cri::PodSandboxConfig::default(),
    };
    let linux = config.linux.clone().unwrap_or_default();
    let modes = linux
        .security_context
        .namespace_options
        .clone()
        .unwrap_or_default();
    // Of processes there is more than one idea: those of the guest are not the host's.
    for (name, mode) in [("network", modes.network), ("IPC", modes.ipc)] {
        if mode == NODE {
            let text = format!("the host's {name} namespace can't be had in a VM");
            return Err(status(Code::INVALID_ARGUMENT, text));
        }
    }
    let mut annotations: Map<String, Value> = request
        .annotations
        .iter()
        .map(|(key, value)| (key.clone(), json!(value)))
        .collect();
    annotations.insert("io.kubernetes.cri.container-type".into(), json!("sandbox"));
    annotations.insert(
        "io.kubernetes.cri.sandbox-id".into(),
        json!(request.sandbox_id),
    );
    let (resources, overhead) = (
        linux.resources.clone().unwrap_or_default(),
        linux.overhead.clone().unwrap_or_default(),
    );
    // What the guest itself takes is ours to know; the overhead is for what the pod's author adds to a limit.
    let memory = match resources.memory_limit_in_bytes {
        limit if limit > 0 => limit.saturating_add(overhead.memory_limit_in_bytes),
        none => none,
    };
    for (name, value) in [
        ("memory", memory),
        ("cpu-quota", resources.cpu_quota),
        ("cpu-period", resources.cpu_period),
        ("cpu-shares", resources.cpu_shares),
    ] {
        if value > 0 {
            let key = format!("io.kubernetes.cri.sandbox-{name}");
            annotations.entry(key).or_insert(json!(value.to_string()));
        }
    }
    let mut namespaces = vec![
        json!({"type": "mount"}),
        json!({"type": "pid"}),
        json!({"type": "ipc"}),
        json!({"type": "uts"}),
    ];
    namespaces.push(match request.netns_path.as_str() {
        // A network of its own, and nothing in it.
        "" => json!({"type": "network"}),
        path => json!({"type": "network", "path": path}),
    });
    let sysctls: Map<String, Value> = linux
        .sysctls
        .iter()
        .map(|(key, value)| (key.clone(), json!(value)))
        .collect();
    Ok(json!({
        "ociVersion": "1.1.0",
        "hostname": config.hostname,
        "process": {
            "args": [INIT, PAUSE],
            "cwd": "/",
            "user": {"uid": USER, "gid": USER},
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            // For the devices that every container has.
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=64k"]},
        ],
        "annotations": annotations,
        "linux": {"namespaces": namespaces, "sysctl": sysctls},
    }))
}

fn internal(error: impl std::error::Error + 'static) -> ttrpc::Error {
    status(Code::INTERNAL, chain(&error))
}

#[async_trait]
impl Sandbox for SandboxApi {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: sandbox::CreateSandboxRequest,
    ) -> Reply<sandbox::CreateSandboxResponse> {
        check_id(&request.sandbox_id)?;
        let spec = spec(&request)?;
        let mut made = self.made();
        if let Some(other) = &*made {
            let text = format!("this shim has the sandbox {:?} already", other.id);
            return Err(status(Code::ALREADY_EXISTS, text));
        }
        *made = Some(Made {
            id: request.sandbox_id,
            spec,
            created_ns: now_ns(),
        });
        Ok(Default::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: sandbox::StartSandboxRequest,
    ) -> Reply<sandbox::StartSandboxResponse> {
        let made = self.find(&request.sandbox_id)?;
        let bundle: PathBuf = self.service.dir.join(BUNDLE);
        let write = || {
            std::fs::create_dir_all(&bundle)?;
            std::fs::write(bundle.join("config.json"), made.spec.to_string())
        };
        write().map_err(internal)?;
        let create = api::CreateTaskRequest {
            id: made.id.clone(),
            bundle: bundle.display().to_string(),
            rootfs: vec![api::Mount {
                type_: GUEST_ROOT.to_owned(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let pid = self.service.start_first(create).await?;
        Ok(sandbox::StartSandboxResponse {
            pid,
            created_at: Some(timestamp(made.created_ns)).into(),
            ..Default::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        _: sandbox::PlatformRequest,
    ) -> Reply<sandbox::PlatformResponse> {
        let platform = Platform {
            os: "linux".to_owned(),
            architecture: "amd64".to_owned(),
            ..Default::default()
        };
        Ok(sandbox::PlatformResponse {
            platform: Some(platform).into(),
            ..Default::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: sandbox::StopSandboxRequest,
    ) -> Reply<sandbox::StopSandboxResponse> {
        let made = self.find(&request.sandbox_id)?;
        // One that ended, or never was started, is as it should be.
        let Ok(first) = self.service.container(&made.id) else {
            return Ok(Default::default());
        };
        let patience = match request.timeout_secs {
            0 => STOPS,
            seconds => Duration::from_secs(seconds.into()),
        };
        let _ = first.kill("", SIGTERM, false).await;
        if tokio::time::timeout(patience, first.init.exited())
            .await
            .is_err()
        {
            first.kill("", SIGKILL, true).await.map_err(internal)?;
        }
        self.service.abandon().await;
        Ok(Default::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: sandbox::WaitSandboxRequest,
    ) -> Reply<sandbox::WaitSandboxResponse> {
        let made = self.find(&request.sandbox_id)?;
        let first = self.service.container(&made.id)?;
        let exit = first.init.exited().await;
        Ok(sandbox::WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at_ns)).into(),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: sandbox::SandboxStatusRequest,
    ) -> Reply<sandbox::SandboxStatusResponse> {
        let made = self.find(&request.sandbox_id)?;
        let mut answer = sandbox::SandboxStatusResponse {
            sandbox_id: made.id.clone(),
            state: NOT_READY.to_owned(),
            created_at: Some(timestamp(made.created_ns)).into(),
            ..Default::default()
        };
        if let Ok(first) = self.service.container(&made.id) {
            answer.pid = first.sandbox.vm().pid();
            match first.init.life() {
                Life::Running => answer.state = READY.to_owned(),
                Life::Exited(exit) => answer.exited_at = Some(timestamp(exit.at_ns)).into(),
                Life::Created => {}
            }
        }
        Ok(answer)
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: sandbox::PingRequest,
    ) -> Reply<sandbox::PingResponse> {
        self.find(&request.sandbox_id)?;
        Ok(Default::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: sandbox::ShutdownSandboxRequest,
    ) -> Reply<sandbox::ShutdownSandboxResponse> {
        self.find(&request.sandbox_id)?;
        self.service.abandon().await;
        self.service.leave.send_replace(true);
        Ok(Default::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: sandbox::SandboxMetricsRequest,
    ) -> Reply<sandbox::SandboxMetricsResponse> {
        let made = self.find(&request.sandbox_id)?;
        let mut answer = sandbox::SandboxMetricsResponse::new();
        let metrics = answer.metrics.mut_or_insert_default();
        metrics.timestamp = Some(timestamp(now_ns())).into();
        metrics.data = Some(self.service.metrics(&made.id).await?).into();
        metrics.id = made.id;
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{self, Defaults, Found, Host, RootfsMount};
    use oci_spec::runtime::Spec;
    use protobuf::well_known_types::any::Any;
    use std::path::Path;

    fn request(config: &cri::PodSandboxConfig) -> sandbox::CreateSandboxRequest {
        let options = Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: config.write_to_bytes().unwrap(),
            ..Default::default()
        };
        sandbox::CreateSandboxRequest {
            sandbox_id: "pod".into(),
            netns_path: "/run/netns/pod".into(),
            options: Some(options).into(),
            ..Default::default()
        }
    }

    #[test]
    fn pod_of_a_configuration_can_be_planned() {
        let mut config = cri::PodSandboxConfig {
            hostname: "web".into(),
            ..Default::default()
        };
        let linux = config.linux.mut_or_insert_default();
        linux
            .resources
            .mut_or_insert_default()
            .memory_limit_in_bytes = 256 << 20;
        linux.overhead.mut_or_insert_default().memory_limit_in_bytes = 64 << 20;
        linux
            .sysctls
            .insert("net.ipv4.ip_forward".into(), "1".into());
        let spec = spec(&request(&config)).unwrap();
        assert_eq!(spec["hostname"], "web");
        assert_eq!(spec["linux"]["sysctl"]["net.ipv4.ip_forward"], "1");
        let spec: Spec = serde_json::from_value(spec).unwrap();
        let root = RootfsMount {
            kind: GUEST_ROOT.into(),
            source: String::new(),
            options: Vec::new(),
        };
        let host = Host {
            memory: 4 << 30,
            cpus: 2,
        };
        let defaults = Defaults {
            memory: 512 << 20,
            cpus: 1,
        };
        let look = |_: &Path| Found::Nothing;
        let plan =
            plan::plan("pod", Path::new("/b"), &spec, &[root], host, defaults, look).unwrap();
        assert_eq!(plan.netns.as_deref(), Some(Path::new("/run/netns/pod")));
        assert!(plan.pod.is_some() && plan.disks.is_empty());
        assert_eq!(u64::from(plan.memory_mib), plan::guest_mib(320 << 20));
        let root = plan
            .inside
            .mounts
            .iter()
            .find(|m| m.type_ == "bind")
            .unwrap();
        assert_eq!(
            (root.source.as_str(), &root.target),
            ("/", &plan.inside.rootfs)
        );
    }

    #[test]
    fn namespaces_of_the_host_and_broken_configurations_are_refused() {
        for kind in ["network", "ipc"] {
            let mut config = cri::PodSandboxConfig::new();
            let linux = config.linux.mut_or_insert_default();
            let security = linux.security_context.mut_or_insert_default();
            let modes = security.namespace_options.mut_or_insert_default();
            match kind {
                "network" => modes.network = NODE,
                _ => modes.ipc = NODE,
            }
            let error = spec(&request(&config)).unwrap_err().to_string();
            assert!(error.to_lowercase().contains(kind), "{error}");
        }
        let mut broken = request(&cri::PodSandboxConfig::new());
        broken.options.mut_or_insert_default().value = vec![0xff; 9];
        assert!(spec(&broken).is_err());
    }
}
