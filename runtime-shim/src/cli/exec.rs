//! `casemate exec`: one more process in a running container.

use super::args::ExecArgs;
use super::attend::{self, Attached, Fifos, Signals};
use super::client::{Client, ProcessId};
use super::lifecycle::Running;
use super::run::{self, Failure};
use super::{caps, containers, create, env, spec, terminal};
use crate::rpc::KILLED;
use crate::settings::Settings;
use crate::state::{Container, StateRoot};
use anyhow::{Context, bail};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The type of the Task API's process specs.
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// The FIFOs of one added process; they go with it.
pub(super) struct StreamsDir(PathBuf);

impl StreamsDir {
    /// For a process with this id.
    pub(super) fn new(container_dir: &Path, id: &str) -> anyhow::Result<Self> {
        let dir = container_dir.join(format!("exec-{}", &id[..12]));
        std::fs::create_dir(&dir).with_context(|| format!("can't make {}", dir.display()))?;
        Ok(Self(dir))
    }

    /// Its path.
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for StreamsDir {
    fn drop(&mut self) {
        // What stays here goes with the sandbox.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs the command and gives its exit code.
pub(super) async fn exec(settings: &Settings, args: &ExecArgs) -> Result<u8, Failure> {
    let mut signals = Signals::new()?;
    terminal::check(&args.process)?;
    let root = containers::state(settings)?;
    let Running { container, client } = Running::find(&root, &args.container)?;
    let process = process(&container, args)?;

    let id = create::new_id()?;
    let exec_id = ProcessId {
        container: &container.meta.id,
        exec: &id,
    };
    let process = serde_json::to_vec(&process)?;
    if args.detach {
        let request = request(&Fifos::default(), false, PROCESS_TYPE, process);
        let added = client.exec(exec_id, request).await;
        added.map_err(run::not_started)?;
        client.start(exec_id).await.map_err(run::not_started)?;
        root.tell(&container.meta, "exec_start", [("execID", id.clone())]);
        return Ok(0);
    }
    let dir = StreamsDir::new(&container.dir, &id)?;
    let fifos = Fifos::make(dir.path(), &args.process)?;
    let mut streams = Attached::open(&fifos)?;
    let raw = terminal::Raw::enter_for(&args.process)?;
    let request = request(&fifos, args.process.tty, PROCESS_TYPE, process);
    client
        .exec(exec_id, request)
        .await
        .map_err(run::not_started)?;
    client.start(exec_id).await.map_err(run::not_started)?;
    streams.shim_is_there();
    let exec = [("execID", id.clone())];
    root.tell(&container.meta, "exec_start", exec);
    let ended = attend::attend(&client, exec_id, streams, &mut signals).await;
    drop(raw);
    // A container that ends with the process has forgotten it already.
    let _ = client.delete(exec_id).await;
    let code = ended?.code();
    let exec = [("execID", id.clone()), ("exitCode", code.to_string())];
    root.tell(&container.meta, "exec_die", exec);
    match u32::from(code) == KILLED {
        true => why_killed(&root, &container, &client).await.map(|()| code),
        false => Ok(code),
    }
}

/// A process that was killed with its whole container can't say why, but the container can.
async fn why_killed(
    root: &StateRoot,
    container: &Container,
    client: &Client,
) -> Result<(), Failure> {
    /// The container's end is told right after that of its processes.
    const FOLLOWS: Duration = Duration::from_secs(5);
    let id = &container.meta.id;
    let ended = client.wait(ProcessId::first_of(id));
    let _ = tokio::time::timeout(FOLLOWS, ended).await;
    match root.find(id) {
        Ok(now) if !now.status.error.is_empty() => {
            let error = anyhow::anyhow!("container {} ended: {}", now.meta.name, now.status.error);
            Err(Failure {
                error,
                code: KILLED as u8,
            })
        }
        _ => Ok(()),
    }
}

/// The request that adds a process.
pub(super) fn request(
    fifos: &Fifos,
    terminal: bool,
    type_url: &str,
    value: Vec<u8>,
) -> api::ExecProcessRequest {
    let spec = Any {
        type_url: type_url.to_owned(),
        value,
        ..Default::default()
    };
    api::ExecProcessRequest {
        terminal,
        stdin: fifos.stdin.clone(),
        stdout: fifos.stdout.clone(),
        stderr: fifos.stderr.clone(),
        spec: Some(spec).into(),
        ..Default::default()
    }
}

/// What a container was made from.
pub(super) fn spec_of(container: &Container) -> anyhow::Result<Value> {
    let path = container.dir.join("config.json");
    let text = std::fs::read(&path).with_context(|| format!("can't read {}", path.display()))?;
    serde_json::from_slice(&text)
        .with_context(|| format!("{} is not an OCI runtime spec", path.display()))
}

/// The container's own process, changed as asked.
fn process(container: &Container, args: &ExecArgs) -> anyhow::Result<Value> {
    let spec = spec_of(container)?;
    let of_container = &spec["process"];
    let strings = |value: &Value| -> Vec<String> {
        let items = value.as_array().into_iter().flatten();
        items.filter_map(|v| Some(v.as_str()?.to_owned())).collect()
    };
    let mut variables = strings(&of_container["env"]);
    if args.process.tty {
        env::set(&mut variables, "TERM=xterm".to_owned());
    }
    let given = env::of(&args.process)?;
    env::set_all(&mut variables, given);
    let workdir = match &args.process.workdir {
        Some(dir) if !dir.starts_with('/') => {
            bail!("the working directory {dir:?} is not an absolute path")
        }
        Some(dir) => dir.clone(),
        None => of_container["cwd"].as_str().unwrap_or("/").to_owned(),
    };
    let of_image = spec["annotations"][crate::plan::USER_ANNOTATION].as_str();
    let user = args
        .process
        .user
        .as_deref()
        .or(of_image)
        .unwrap_or_default();
    let bounding = strings(&of_container["capabilities"]["bounding"]);
    let capabilities = match args.privileged {
        true => caps::resolve(&["ALL".to_owned()], &[])?,
        false => bounding.iter().map(String::as_str).collect(),
    };
    let mut process = json!({
        "terminal": args.process.tty,
        // The guest looks the name up, and sets the numbers.
        "user": {"uid": 0, "gid": 0, "username": user},
        "args": args.command,
        "env": variables,
        "cwd": workdir,
        "capabilities": spec::capabilities(&capabilities, user),
    });
    if let (true, Some((rows, columns))) = (args.process.tty, terminal::size()) {
        process["consoleSize"] = json!({"height": rows, "width": columns});
    }
    Ok(process)
}
