//! `casemate exec`: one more process in a running container.

use super::args::ExecArgs;
use super::attend::{self, Attached, Fifos, Signals};
use super::client::ProcessId;
use super::lifecycle::Running;
use super::run::{self, Failure};
use super::{caps, containers, create, env, spec, terminal};
use crate::settings::Settings;
use crate::state::Container;
use anyhow::{Context, bail};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde_json::{Value, json};
use std::path::PathBuf;

/// The type of the Task API's process specs.
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// The FIFOs of one added process; they go with it.
struct StreamsDir(PathBuf);

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
    let dir = StreamsDir(container.dir.join(format!("exec-{}", &id[..12])));
    std::fs::create_dir(&dir.0).with_context(|| format!("can't make {}", dir.0.display()))?;
    let fifos = Fifos::make(&dir.0, &args.process)?;
    let mut streams = Attached::open(&fifos)?;
    let raw = terminal::Raw::enter_for(&args.process)?;
    let request = api::ExecProcessRequest {
        terminal: args.process.tty,
        stdin: fifos.stdin,
        stdout: fifos.stdout,
        stderr: fifos.stderr,
        spec: Some(Any {
            type_url: PROCESS_TYPE.to_owned(),
            value: serde_json::to_vec(&process)?,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    client
        .exec(exec_id, request)
        .await
        .map_err(run::not_started)?;
    client.start(exec_id).await.map_err(run::not_started)?;
    streams.shim_is_there();
    let ended = attend::attend(&client, exec_id, streams, &mut signals).await;
    drop(raw);
    // A container that ends with the process has forgotten it already.
    let _ = client.delete(exec_id).await;
    Ok(ended?.code())
}

/// The container's own process, changed as asked.
fn process(container: &Container, args: &ExecArgs) -> anyhow::Result<Value> {
    let path = container.dir.join("config.json");
    let text = std::fs::read(&path).with_context(|| format!("can't read {}", path.display()))?;
    let spec: Value = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not an OCI runtime spec", path.display()))?;
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
