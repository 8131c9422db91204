//! Runs the agent's tools on a container's files and processes, whether it runs or not.

use super::attend::Fifos;
use super::client::{Client, ProcessId, Shim};
use super::create::{self, Made};
use super::exec::{self, StreamsDir};
use super::{start, streams};
use crate::rpc;
use crate::settings::Settings;
use crate::state::{Container, StateRoot};
use anyhow::{Context, bail};
use casemate_protocol::tool::{TYPE_URL, Tool};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// What a tool says on standard error is an error's text, and no longer.
const MAX_ERROR: u64 = 64 << 10;
/// 128 + SIGPIPE: whoever read its output had enough.
const READER_GONE: u32 = 128 + libc::SIGPIPE as u32;

/// A container that tools can be run in.
pub(super) struct Workshop {
    pub(super) container: Container,
    client: Client,
    /// Of a guest that was booted for this.
    own: Option<(Shim, Made)>,
}

/// What a tool is fed with, on a thread of its own.
pub(super) type Feed = Box<dyn FnOnce(File) -> anyhow::Result<()> + Send>;

impl Workshop {
    /// Opens a container. One that doesn't run is created in a guest, not started.
    pub(super) async fn open(
        settings: &Settings,
        root: &StateRoot,
        name: &str,
    ) -> anyhow::Result<Self> {
        let container = root.find(name)?;
        if container.status.state.is_alive() {
            let client = Client::connect(&container.dir)?;
            return Ok(Self {
                container,
                client,
                own: None,
            });
        }
        let made = start::again(settings, root, container.clone())?;
        let shim = Shim::start(settings, &made.dir, &start::options(&made, true, None))?;
        let request = start::request(settings, &made, Fifos::default())?;
        if let Err(error) = shim.create(&request).await {
            let _ = shim.end().await;
            bail!("{}", rpc::parts(&error).1);
        }
        let client = Client::connect(&container.dir)?;
        Ok(Self {
            container,
            client,
            own: Some((shim, made)),
        })
    }

    /// Ends what was booted.
    pub(super) async fn close(self) -> anyhow::Result<()> {
        match self.own {
            Some((shim, _made)) => shim.end().await,
            None => Ok(()),
        }
    }

    /// Freezes the container if it runs; tells whether it has to be thawed.
    pub(super) async fn pause(&self) -> anyhow::Result<bool> {
        if self.own.is_some() || self.container.status.paused {
            return Ok(false);
        }
        let paused = self.client.pause(&self.container.meta.id).await;
        paused.map_err(|error| anyhow::anyhow!(rpc::parts(&error).1))?;
        Ok(true)
    }

    /// Lets it go on.
    pub(super) async fn resume(&self) -> anyhow::Result<()> {
        let resumed = self.client.resume(&self.container.meta.id).await;
        resumed.map_err(|error| anyhow::anyhow!(rpc::parts(&error).1))
    }

    /// The paths in the container that are there to be mounted on.
    pub(super) fn mount_points(&self) -> anyhow::Result<Vec<PathBuf>> {
        let spec = exec::spec_of(&self.container)?;
        let mounts = spec["mounts"].as_array().into_iter().flatten();
        let targets = mounts.filter_map(|mount| mount["destination"].as_str());
        Ok(targets.map(|t| t.trim_matches('/').into()).collect())
    }

    /// Runs a tool: `feed` writes its input, `take` reads its output, both on threads of their own.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        tool: &Tool,
        feed: Option<Feed>,
        take: impl FnOnce(File) -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let id = create::new_id()?;
        let process = ProcessId {
            container: &self.container.meta.id,
            exec: &id,
        };
        let dir = StreamsDir::new(&self.container.dir, &id)?;
        let fifos = Fifos::for_tool(dir.path(), feed.is_some())?;
        let output = streams::open_output(Path::new(&fifos.stdout))?;
        let errors = streams::open_output(Path::new(&fifos.stderr))?;
        // Held open until the shim has it: without a reader nobody could open it for writing.
        let keeper = match fifos.stdin.as_str() {
            "" => None,
            path => Some(open(path, OFlags::RDWR)?),
        };
        let request = exec::request(&fifos, false, TYPE_URL, serde_json::to_vec(tool)?);
        let stdin = fifos.stdin;
        let told = |error: ttrpc::Error| anyhow::anyhow!(rpc::parts(&error).1);
        self.client.exec(process, request).await.map_err(told)?;
        self.client.start(process).await.map_err(told)?;

        let feeding = async {
            let Some(feed) = feed else { return Ok(()) };
            let input = open(&stdin, OFlags::WRONLY)?;
            drop(keeper);
            let fed = tokio::task::spawn_blocking(move || feed(input)).await;
            // One that ended without reading everything has said why.
            let _ = self.client.close_stdin(process).await;
            fed.context("the thread that feeds a tool ended")?
        };
        let taking = blocking(output, take);
        let complaining = blocking(errors, |file| {
            let mut text = Vec::new();
            file.take(MAX_ERROR).read_to_end(&mut text)?;
            Ok(String::from_utf8_lossy(&text).trim().to_owned())
        });
        let waiting = self.client.wait(process);
        let (fed, taken, complaint, exit) = tokio::join!(feeding, taking, complaining, waiting);
        let _ = self.client.delete(process).await;
        let (complaint, exit) = (complaint?, exit.map_err(told)?);
        match exit {
            0 => {
                if !complaint.is_empty() {
                    eprintln!("casemate: warning: {complaint}");
                }
                fed?;
                taken
            }
            // We had enough of it, or our own end failed first.
            _ if complaint.is_empty() || exit == READER_GONE => {
                let taken = taken?;
                if exit == READER_GONE {
                    return Ok(taken);
                }
                fed?;
                bail!("the agent's tool ended with {exit} in the container, without saying why")
            }
            _ => bail!("{complaint}"),
        }
    }

    /// Runs a tool whose output is small.
    pub(super) async fn ask(&self, tool: &Tool, limit: u64) -> anyhow::Result<Vec<u8>> {
        let take = move |file: File| {
            let mut answer = Vec::new();
            file.take(limit + 1).read_to_end(&mut answer)?;
            if answer.len() as u64 > limit {
                bail!("the container's answer is longer than {limit} bytes");
            }
            Ok(answer)
        };
        self.call(tool, None, take).await
    }
}

fn open(path: &str, flags: OFlags) -> anyhow::Result<File> {
    let fd = rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("can't open the FIFO {path}"))?;
    Ok(fd.into())
}

/// Reads a FIFO, which the shim has opened by now, on a thread.
async fn blocking<T: Send + 'static>(
    fifo: std::os::fd::OwnedFd,
    read: impl FnOnce(File) -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    rustix::io::ioctl_fionbio(&fifo, false)?;
    let work = tokio::task::spawn_blocking(move || read(fifo.into()));
    work.await.context("the thread that reads a tool ended")?
}
