//! `attach`: takes part in a container that is left to itself. Its output comes from its log, so that several can look on.

use super::args::AttachArgs;
use super::attend::{self, Attached, Signals};
use super::client::ProcessId;
use super::detach_keys::DetachKeys;
use super::follow::Follower;
use super::lifecycle::Running;
use super::run::Failure;
use super::streams::{self, Output, OutputEnd};
use super::{containers, terminal};
use crate::log::{Reader, Stream};
use crate::settings::Settings;
use crate::state::Container;
use anyhow::{Context, bail};

/// How to take part.
pub(super) struct Wishes {
    /// Our standard input is the container's.
    pub(super) input: bool,
    /// Its standard input ends with ours.
    pub(super) ends_input: bool,
    /// These keys leave the container to itself again.
    pub(super) keys: DetachKeys,
}

/// From where on the output is shown.
pub(super) struct From(Option<Reader>);

impl From {
    /// What is written from now on.
    pub(super) fn now(container: &Container) -> anyhow::Result<Self> {
        if container.meta.log.is_none() {
            bail!(
                "the output of container {} is not logged, so it can't be attached to",
                container.meta.name
            );
        }
        let reader = Reader::open_at_end(&container.dir).context("can't read the log")?;
        Ok(Self(reader))
    }
}

/// `casemate attach`
pub(super) async fn attach(settings: &Settings, args: &AttachArgs) -> Result<u8, Failure> {
    let signals = Signals::new()?;
    let keys = args.detach_keys.parse().context("--detach-keys")?;
    let root = containers::state(settings)?;
    let running = Running::find(&root, &args.container)?;
    let from = From::now(&running.container)?;
    let wishes = Wishes {
        input: !args.no_stdin,
        ends_input: false,
        keys,
    };
    follow(running, from, wishes, signals).await
}

/// Shows the container's output until it ends or is left to itself again; gives the exit code.
pub(super) async fn follow(
    running: Running,
    from: From,
    wishes: Wishes,
    mut signals: Signals,
) -> Result<u8, Failure> {
    let Running { container, client } = running;
    let init = ProcessId::first_of(&container.meta.id);
    let raw = match wishes.input && container.meta.tty {
        true => terminal::Raw::enter()?,
        false => None,
    };
    if let Some((rows, columns)) = terminal::size().filter(|_| container.meta.tty) {
        // Output that fits the window is all that is lost without.
        let _ = client.resize(init, rows, columns).await;
    }
    let input = match wishes.input && container.meta.interactive {
        true => {
            let keys = raw.is_some().then_some(wishes.keys);
            Some(streams::copy_input(&container.dir.join("stdin"), keys)?)
        }
        false => None,
    };
    let follower = Follower::new(&container.dir, from.0)?;
    let streams = Attached::looking_on(tokio::spawn(show(follower)), input, wishes.ends_input);
    let end = attend::attend(&client, init, streams, &mut signals).await;
    drop(raw);
    Ok(end?.code())
}

async fn show(mut follower: Follower) -> anyhow::Result<OutputEnd> {
    while let Some(entry) = follower.next().await? {
        let output = match entry.stream {
            Stream::Stdout => Output::Stdout,
            Stream::Stderr => Output::Stderr,
        };
        if output.write(&entry.content)? == OutputEnd::ReaderGone {
            return Ok(OutputEnd::ReaderGone);
        }
    }
    Ok(OutputEnd::Complete)
}
