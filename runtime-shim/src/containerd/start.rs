//! `start`: makes a sandbox for the container of the bundle and leaves a shim behind that serves it.

use super::args::Args;
use super::bootstrap::{self, Bootstrap};
use super::{ADDRESS, bundle, state};
use crate::fds;
use crate::files;
use crate::journal::Taken;
use crate::plan::{MAX_SPEC, Role};
use crate::random;
use crate::rpc::is_identifier;
use crate::settings::Settings;
use crate::state::{SandboxDir, StateRoot};
use anyhow::{Context, bail};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The configuration of one sandbox, in its directory, where containerd's has any for its runtime.
const CONFIG: &str = "config.toml";
/// A person's configuration is no larger.
const MAX_CONFIG: u64 = 1 << 20;
/// containerd's FIFO for what a shim has to say, in the bundle.
const LOG: &str = "log";
/// Below the state directory: a socket's path has room for 107 bytes only.
const SOCKETS: &str = "s";

/// What the CRI says of a container; containerd's words and CRI-O's.
#[derive(Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// Does it; what is to be printed: where the shim listens.
pub(super) fn start(args: &Args) -> anyhow::Result<Vec<u8>> {
    let said = bootstrap::read(args)?;
    said.form.answer(&shim_for(args, &said)?)
}

/// The address of the shim that serves the container of the bundle, which is started if need be.
fn shim_for(args: &Args, said: &Bootstrap) -> anyhow::Result<String> {
    let config = Config::of(said)?;
    let settings = match &config {
        Some(config) => Settings::load_with(&config.path, &config.text)?,
        None => Settings::load()?,
    };
    let root = state(&settings, args)?;
    let bundle = bundle()?;
    if let Some(sandbox) = sandbox_of(&bundle)?.filter(|sandbox| *sandbox != args.id) {
        let address = address_of(&root, &sandbox)?;
        leave_address(&bundle, &address)?;
        return Ok(address);
    }
    // What others left is theirs to tell; here it must not be in the way.
    let _ = root.reclaim_dead()?;
    let dir = root.create_unnamed(&args.id)?;
    match serve(&settings, args, &dir, said, config) {
        Ok(address) => {
            leave_address(&bundle, &address)?;
            Ok(address)
        }
        Err(error) => {
            // The first error is the one to tell.
            let _ = dir.remove();
            Err(error)
        }
    }
}

/// What containerd's configuration says for its runtime: `ConfigPath` or `ConfigBody`.
struct Config {
    path: PathBuf,
    text: String,
}

impl Config {
    fn of(said: &Bootstrap) -> anyhow::Result<Option<Self>> {
        let options = &said.options;
        Ok(
            match (options.config_path.as_str(), options.config_body.as_str()) {
                ("", "") => None,
                ("", body) => Some(Self {
                    path: "ConfigBody".into(),
                    text: body.to_owned(),
                }),
                (path, _) => Some(Self {
                    path: path.into(),
                    text: files::read_text(Path::new(path), MAX_CONFIG)
                        .with_context(|| format!("can't read the runtime's ConfigPath {path:?}"))?,
                }),
            },
        )
    }
}

/// The sandbox that the container of a bundle belongs to, if it names one.
fn sandbox_of(bundle: &Path) -> anyhow::Result<Option<String>> {
    let path = bundle.join("config.json");
    let text = match files::read(&path, MAX_SPEC) {
        // A sandbox that is asked for through the Sandbox API may have none.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        text => text.with_context(|| format!("can't read {}", path.display()))?,
    };
    let Annotated { annotations } = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not an OCI runtime spec", path.display()))?;
    Ok(
        match Role::of(|key| annotations.get(key).map(String::as_str)) {
            Role::Member(sandbox) => Some(sandbox),
            Role::Alone | Role::Sandbox => None,
        },
    )
}

/// containerd 1.6 reads it after a restart.
fn leave_address(bundle: &Path, address: &str) -> anyhow::Result<()> {
    files::replace(&bundle.join(ADDRESS), address.as_bytes())
        .context("can't write the shim's address into the bundle")
}

fn address_of(root: &StateRoot, sandbox: &str) -> anyhow::Result<String> {
    if !is_identifier(sandbox) {
        bail!("{sandbox:?} is no sandbox's id");
    }
    let path = root.path_of(sandbox).join(ADDRESS);
    std::fs::read_to_string(&path).with_context(|| format!("the sandbox {sandbox} does not run"))
}

/// A socket's path that nobody guesses or has taken.
fn socket_path(settings: &Settings) -> anyhow::Result<PathBuf> {
    let dir = settings.state_dir.join(SOCKETS);
    std::fs::create_dir_all(&dir).with_context(|| format!("can't make {}", dir.display()))?;
    let number = u64::from_ne_bytes(random::bytes()?);
    Ok(dir.join(format!("{number:016x}")))
}

/// The FIFO that containerd reads. Open for reading, too: so it has a reader even while containerd is away, and a
/// shim that has something to say is never killed for it.
fn log(bundle: &Path) -> anyhow::Result<Stdio> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match rustix::fs::open(bundle.join(LOG), flags, Mode::empty()) {
        Ok(log) => Ok(log.into()),
        Err(Errno::NOENT) => Ok(Stdio::null()),
        Err(error) => Err(error).context("can't open the log in the bundle"),
    }
}

fn serve(
    settings: &Settings,
    args: &Args,
    dir: &SandboxDir,
    said: &Bootstrap,
    config: Option<Config>,
) -> anyhow::Result<String> {
    let socket = socket_path(settings)?;
    let taken = Taken::File {
        path: socket.clone(),
    };
    dir.journal().record(&taken)?;
    let listener = UnixListener::bind(&socket)
        .with_context(|| format!("can't listen at {}", socket.display()))?;
    let address = format!("unix://{}", socket.display());
    std::fs::write(dir.path().join(ADDRESS), &address)?;
    let mut command = Command::new(&settings.shim);
    command
        .args(["--serve", "--discard", "--dir"])
        .arg(dir.path());
    command.args(["--listen-fd", &listener.as_raw_fd().to_string()]);
    command.args(["--lock-fd", &dir.lock_fd().as_raw_fd().to_string()]);
    command.args(["--engine", &args.namespace, &said.events]);
    if let Some(config) = config {
        // As it is now, for as long as the sandbox lives.
        let path = dir.path().join(CONFIG);
        std::fs::write(&path, config.text)
            .with_context(|| format!("can't write {}", path.display()))?;
        command.arg("--config").arg(path);
    }
    command
        // What is for containerd's group of processes isn't for its containers.
        .process_group(0)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log(&bundle()?)?);
    let passed = [listener.as_fd(), dir.lock_fd().as_fd()];
    let child = fds::spawn_with(&mut command, &passed)
        .with_context(|| format!("can't start {}", settings.shim.display()))?;
    dir.journal().record_process("shim", child.id() as i32)?;
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(annotations: &str) -> anyhow::Result<Option<String>> {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(r#"{{"ociVersion":"1.0.2"{annotations}}}"#);
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        sandbox_of(dir.path())
    }

    #[test]
    fn sandbox_is_the_one_that_the_cri_names() {
        assert_eq!(sandbox("").unwrap(), None);
        let pod = r#","annotations":{"io.kubernetes.cri.container-type":"sandbox","io.kubernetes.cri.sandbox-id":"p"}"#;
        assert_eq!(sandbox(pod).unwrap(), None);
        let container = r#","annotations":{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"p"}"#;
        assert_eq!(sandbox(container).unwrap().unwrap(), "p");
        let crio = r#","annotations":{"io.kubernetes.cri-o.ContainerType":"container","io.kubernetes.cri-o.SandboxID":"q"}"#;
        assert_eq!(sandbox(crio).unwrap().unwrap(), "q");
        assert!(sandbox(r#","annotations":7"#).is_err());
    }
}
