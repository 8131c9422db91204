//! `casemate run`: a container in the foreground.

use super::args::{PullWhen, RunArgs, TimingFormat};
use super::attend::{self, Attached, Fifos, Signals};
use super::client::{ProcessId, Shim, ShimOptions};
use super::kernel_log::KernelLog;
use super::{containers, env, images, initcalls, spec, terminal, timing};
use crate::journal::Taken;
use crate::plan::{self, Host};
use crate::rpc;
use crate::scratch;
use crate::settings::Settings;
use crate::size;
use crate::state::{Meta, SandboxDir, Status, now_ns};
use anyhow::{Context, bail};
use casemate_image::{Image, RootfsDisk};
use containerd_shim_protos::api;
use serde_json::Value;
use std::path::Path;
use ttrpc::proto::Code;

/// Docker's: the engine itself failed.
const FAILED: u8 = 125;
/// Docker's: the command can't be invoked.
const NOT_EXECUTABLE: u8 = 126;
/// Docker's: the command isn't there.
const NOT_FOUND: u8 = 127;

/// A failed run: what to print and the exit code.
#[derive(Debug)]
pub(super) struct Failure {
    /// For standard error.
    pub(super) error: anyhow::Error,
    /// For the shell.
    pub(super) code: u8,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self {
            error: error.into(),
            code: FAILED,
        }
    }
}

/// What must be given back, whatever happens.
#[derive(Default)]
struct Held {
    shim: Option<Shim>,
    dir: Option<SandboxDir>,
    raw: Option<terminal::Raw>,
    kernel_log: Option<KernelLog>,
    /// The image's files stay while the container runs.
    rootfs: Option<RootfsDisk>,
}

/// Runs the container and gives its exit code.
pub(super) async fn run(settings: &Settings, args: &RunArgs, begun: u64) -> Result<u8, Failure> {
    let mut signals = Signals::new()?;
    let mut held = Held::default();
    let started = tokio::select! {
        started = start(settings, args, begun, &mut held) => started,
        number = signals.terminating() => {
            give_back(held, true).await?;
            return Ok(128 + number);
        }
    };
    let (id, streams) = match started {
        Ok(running) => running,
        Err(failure) => {
            // The first error is the one to tell.
            let _ = give_back(held, true).await;
            return Err(failure);
        }
    };
    let ended = match &held.shim {
        Some(shim) => {
            let init = ProcessId::first_of(&id);
            attend::attend(shim.client(), init, streams, &mut signals).await
        }
        None => Err(anyhow::anyhow!("there is no shim")),
    };
    // Before anything is printed.
    held.raw = None;
    let Status {
        error, oom_killed, ..
    } = held.dir.as_ref().map(|d| d.status()).unwrap_or_default();
    let given_back = give_back(held, args.rm).await;
    if !error.is_empty() {
        return Err(anyhow::anyhow!("the container's guest failed: {error}").into());
    }
    if oom_killed {
        eprintln!("casemate: the container was killed for lack of memory; --memory gives it more");
    }
    let code = ended?;
    given_back?;
    Ok(code)
}

/// Ends the sandbox and, if `remove`, leaves nothing behind, even if a part of that fails.
async fn give_back(held: Held, remove: bool) -> anyhow::Result<()> {
    drop(held.raw);
    let ended = match held.shim {
        Some(shim) => shim.end().await,
        None => Ok(()),
    };
    let logged = held.kernel_log.map_or(Ok(()), KernelLog::finish);
    let removed = match held.dir {
        Some(dir) if remove => dir.remove(),
        _ => Ok(()),
    };
    ended.and(logged)?;
    Ok(removed?)
}

/// Everything up to the workload's start.
async fn start(
    settings: &Settings,
    args: &RunArgs,
    begun: u64,
    held: &mut Held,
) -> Result<(String, Attached), Failure> {
    check_names(args)?;
    terminal::check(&args.process)?;
    let wants_initcalls = args.timing == Some(TimingFormat::Initcalls);
    if wants_initcalls && args.kernel_log.is_some() {
        let clash = "--timing=initcalls reads the kernel's log itself; leave out --kernel-log";
        return Err(anyhow::anyhow!(clash).into());
    }
    let resources = checked_resources(settings, args)?;
    let storage = storage_size(settings, args)?;
    let given_env = env::of(&args.process)?;
    let labels = labels(args)?;
    let root = containers::state(settings)?;

    let wanted = args.platform.as_deref();
    let pull: PullWhen = args.pull;
    let (store, image) = images::for_run(settings, &args.image, pull, wanted).await?;
    let rootfs = store.rootfs(&image)?;

    let id = new_id()?;
    let bundle = root.path_of(&id);
    let given = spec::Given {
        id: &id,
        bundle: &bundle,
        env: given_env,
        console: terminal::size(),
    };
    let spec = spec::build(args, &image.config, &resources, &given)?;
    let hostname = spec::hostname(args, &given).to_owned();
    let meta = meta(args, &image, &id, &spec, labels);

    let dir = held.dir.insert(root.create(&meta)?);
    write_bundle(dir.path(), &spec, &hostname)?;
    let mounts = rootfs_mounts(settings, args, dir, &id, &rootfs, storage)?;
    held.rootfs = Some(rootfs);
    let fifos = Fifos::make(dir.path(), &args.process)?;
    let initcalls_log = dir.path().join("kernel.log");
    let console = match &args.kernel_log {
        None if wants_initcalls => Some(&initcalls_log),
        other => other.as_ref(),
    };
    let console = match console {
        Some(path) => {
            let (log, end) = KernelLog::start(path)?;
            held.kernel_log = Some(log);
            Some(end)
        }
        None => None,
    };
    let options = ShimOptions {
        discard: args.rm,
        console: console.as_ref(),
    };
    let shim = held.shim.insert(Shim::start(settings, dir, &options)?);
    drop(console);

    let mut streams = Attached::open(&fifos)?;
    held.raw = terminal::Raw::enter(&args.process)?;
    let request = api::CreateTaskRequest {
        id: id.clone(),
        bundle: dir.path().display().to_string(),
        rootfs: mounts,
        terminal: args.process.tty,
        stdin: fifos.stdin,
        stdout: fifos.stdout,
        stderr: fifos.stderr,
        ..Default::default()
    };
    shim.create(&request).await.map_err(not_started)?;
    streams.shim_is_there();
    let init = ProcessId::first_of(&id);
    shim.client().start(init).await.map_err(not_started)?;
    if let Some(format) = args.timing {
        let path = dir.path().join(crate::shim::timing::FILE_NAME);
        let bytes = std::fs::read(&path).context("the shim told no times")?;
        let timing = serde_json::from_slice(&bytes).context("the shim's times can't be read")?;
        eprint!("{}", timing::render(format, begun, &timing));
        if wants_initcalls {
            let report = initcalls::report(&initcalls_log, &settings.kernel).await?;
            eprint!("\n{report}");
        }
    }
    Ok((id, streams))
}

/// A name becomes part of paths.
fn check_names(args: &RunArgs) -> anyhow::Result<()> {
    let plain = |text: &str, more: &[u8]| {
        text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || more.contains(&b))
    };
    if let Some(name) = &args.name
        && !(plain(name, b"_.-") && (2..=128).contains(&name.len()))
    {
        bail!(
            "--name: {name:?} is not a container name; it takes 2 to 128 of [a-zA-Z0-9_.-], a letter or digit first"
        );
    }
    if let Some(name) = &args.hostname
        && !(plain(name, b".-") && name.len() <= 63)
    {
        bail!("--hostname: {name:?} is not a host name of at most 63 characters");
    }
    Ok(())
}

/// The limits, checked against this host before anything is fetched.
fn checked_resources(settings: &Settings, args: &RunArgs) -> anyhow::Result<Value> {
    let resources = spec::resources(args.cpus.as_deref(), args.memory.as_deref())?;
    let defaults = plan::Defaults {
        memory: settings.memory,
        cpus: settings.cpus,
    };
    plan::sizes(&spec::only_resources(&resources)?, Host::here(), defaults)?;
    Ok(resources)
}

fn storage_size(settings: &Settings, args: &RunArgs) -> anyhow::Result<u64> {
    let size = match &args.storage_size {
        Some(text) => size::parse(text).context("--storage-size")?,
        None => settings.storage_size,
    };
    scratch::checked_size(size).context("--storage-size")
}

fn labels(args: &RunArgs) -> anyhow::Result<Vec<(String, String)>> {
    args.labels
        .iter()
        .map(|label| {
            let (name, value) = label.split_once('=').unwrap_or((label, ""));
            if name.is_empty() {
                bail!("--label: {label:?} has no name");
            }
            Ok((name.to_owned(), value.to_owned()))
        })
        .collect()
}

/// A container's or process's id.
pub(super) fn new_id() -> anyhow::Result<String> {
    let mut bytes = [0u8; 32];
    let flags = rustix::rand::GetRandomFlags::empty();
    rustix::rand::getrandom(&mut bytes, flags).context("no random numbers")?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

fn meta(
    args: &RunArgs,
    image: &Image,
    id: &str,
    spec: &Value,
    labels: Vec<(String, String)>,
) -> Meta {
    let of_image = image.config.config().as_ref();
    let image_labels = of_image.and_then(|c| c.labels().clone());
    let command = spec["process"]["args"].as_array().cloned();
    Meta {
        id: id.to_owned(),
        name: args.name.clone().unwrap_or_else(|| id[..12].to_owned()),
        image: args.image.clone(),
        image_id: image.id.to_string(),
        command: command
            .unwrap_or_default()
            .iter()
            .filter_map(|a| a.as_str().map(str::to_owned))
            .collect(),
        created: now_ns(),
        auto_remove: args.rm,
        stop_signal: of_image.and_then(|c| c.stop_signal().clone()),
        labels: image_labels
            .unwrap_or_default()
            .into_iter()
            .chain(labels)
            .collect(),
    }
}

fn write_bundle(dir: &Path, spec: &Value, hostname: &str) -> anyhow::Result<()> {
    let hosts = format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.0.1\t{hostname}\n"
    );
    let resolv = std::fs::read("/etc/resolv.conf").unwrap_or_default();
    let config = serde_json::to_vec(spec)?;
    let hostname = format!("{hostname}\n");
    let files: [(&str, &[u8]); 4] = [
        ("config.json", &config),
        ("hosts", hosts.as_bytes()),
        ("hostname", hostname.as_bytes()),
        ("resolv.conf", &resolv),
    ];
    for (name, bytes) in files {
        let path = dir.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("can't write {}", path.display()))?;
    }
    Ok(())
}

fn mount(kind: &str, source: &str, options: Vec<String>) -> api::Mount {
    api::Mount {
        type_: kind.to_owned(),
        source: source.to_owned(),
        options,
        ..Default::default()
    }
}

/// The image's disk, something to write on, and the overlay of both.
fn rootfs_mounts(
    settings: &Settings,
    args: &RunArgs,
    dir: &SandboxDir,
    id: &str,
    rootfs: &RootfsDisk,
    storage: u64,
) -> anyhow::Result<Vec<api::Mount>> {
    let path = |p: &Path| -> anyhow::Result<String> {
        let text = p.to_str();
        Ok(text
            .with_context(|| format!("{} is not UTF-8", p.display()))?
            .to_owned())
    };
    let mut options = vec!["ro".to_owned()];
    for layer in &rootfs.layers {
        options.push(format!("device={}", path(layer)?));
    }
    let lower = mount("erofs", &path(&rootfs.metadata)?, options);
    let upper = if args.read_only {
        // Mount points that the image lacks still have to be made somewhere.
        mount("tmpfs", "tmpfs", vec!["mode=755".to_owned()])
    } else {
        let scratch_dir = scratch::dir_of(&settings.data_dir, &settings.state_dir);
        let file = scratch_dir.join(format!("{id}.img"));
        dir.journal()
            .record(&Taken::File { path: file.clone() })
            .context("can't write the sandbox's journal")?;
        scratch::create(&settings.data_dir, storage, &file)?;
        mount("ext4", &path(&file)?, vec!["rw".to_owned()])
    };
    let overlay = [
        "lowerdir={{ mount 0 }}",
        "upperdir={{ mount 1 }}/upper",
        "workdir={{ mount 1 }}/work",
    ];
    let overlay = mount("overlay", "overlay", overlay.map(str::to_owned).to_vec());
    Ok(vec![lower, upper, overlay])
}

/// Docker's exit codes for a process that didn't start.
pub(super) fn not_started(error: ttrpc::Error) -> Failure {
    let (code, message) = rpc::parts(&error);
    Failure {
        error: anyhow::anyhow!(message),
        code: match code {
            Code::NOT_FOUND => NOT_FOUND,
            Code::PERMISSION_DENIED => NOT_EXECUTABLE,
            _ => FAILED,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_names_of_bad_names_is_refused() {
        for name in ["a", "../x", ".hidden", "a/b", "-x"] {
            assert!(
                check_names(&RunArgs::of(&format!("--name={name} i"))).is_err(),
                "{name}"
            );
        }
        check_names(&RunArgs::of("--name web-1.a_b i")).unwrap();
        assert!(check_names(&RunArgs::of("--hostname a/b i")).is_err());
    }

    #[test]
    fn not_started_gives_dockers_codes() {
        let code = |c| not_started(rpc::status(c, "x")).code;
        assert_eq!(code(Code::NOT_FOUND), 127);
        assert_eq!(code(Code::PERMISSION_DENIED), 126);
        assert_eq!(code(Code::INTERNAL), 125);
    }

    #[test]
    fn new_id_is_64_hex_digits() {
        let id = new_id().unwrap();
        assert_eq!(id.len(), 64);
        assert!(id.bytes().all(|b| b.is_ascii_hexdigit()));
    }
}
