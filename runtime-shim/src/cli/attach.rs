//! `attach`: takes part in a container that is left to itself. Its output comes from its log, so that several can look on.

use super::args::AttachArgs;
use super::attend::{self, Attached, End, Relation, Signals};
use super::client::{Client, ProcessId};
use super::detach_keys::DetachKeys;
use super::follow::Follower;
use super::lifecycle::{self, Running};
use super::run::Failure;
use super::streams::{self, Output, OutputEnd};
use super::{containers, terminal};
use crate::log::{self, Reader, Stream};
use crate::settings::Settings;
use crate::state::{Container, Meta, StateRoot};
use anyhow::{Context, bail};
use std::path::PathBuf;

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
pub(super) struct From {
    log: PathBuf,
    reader: Option<Reader>,
}

impl From {
    /// What is written from now on.
    pub(super) fn now(settings: &Settings, container: &Container) -> anyhow::Result<Self> {
        let Meta { id, name, log, .. } = &container.meta;
        if log.is_none() {
            bail!("the output of container {name} is not logged, so it can't be attached to");
        }
        let log = log::dir_of(&settings.data_dir, &settings.state_dir, id);
        let reader = Reader::open_at_end(&log).context("can't read the log")?;
        Ok(Self { log, reader })
    }
}

/// `casemate attach`
pub(super) async fn attach(settings: &Settings, args: &AttachArgs) -> Result<u8, Failure> {
    let signals = Signals::new()?;
    let keys = args.detach_keys.parse().context("--detach-keys")?;
    let root = containers::state(settings)?;
    let running = Running::find(&root, &args.container)?;
    let from = From::now(settings, &running.container)?;
    root.tell(&running.container.meta, "attach", []);
    let wishes = Wishes {
        input: !args.no_stdin,
        ends_input: false,
        keys,
    };
    follow(&root, running.container, from, wishes, signals).await
}

/// Shows the container's output until it ends or is left to itself again; gives the exit code. It may have ended already.
pub(super) async fn follow(
    root: &StateRoot,
    container: Container,
    from: From,
    wishes: Wishes,
    mut signals: Signals,
) -> Result<u8, Failure> {
    let Meta {
        id,
        name,
        tty,
        interactive,
        ..
    } = &container.meta;
    let output = Follower::new(&container.dir, &from.log, from.reader)?;
    let Ok(client) = Client::connect(&container.dir) else {
        show(output).await?;
        return exit_code(root, id, name);
    };
    let init = ProcessId::first_of(id);
    let typed = wishes.input && *interactive;
    let raw = match typed && *tty {
        true => terminal::Raw::enter()?,
        false => None,
    };
    if let Some((rows, columns)) = terminal::size().filter(|_| *tty) {
        // Output that fits the window is all that is lost without.
        let _ = client.resize(init, rows, columns).await;
    }
    let input = match typed {
        true => {
            let keys = raw.is_some().then_some(wishes.keys);
            Some(streams::copy_input(&container.dir.join("stdin"), keys)?)
        }
        false => None,
    };
    let relation = Relation::LookingOn {
        ends_input: wishes.ends_input,
        // A terminal's keys are input, not signals.
        hands_on_signals: !tty,
    };
    let streams = Attached::new(vec![tokio::spawn(show(output))], input, relation);
    let end = attend::attend(&client, init, streams, &mut signals).await;
    drop(raw);
    match end? {
        End::Exited(code) => Ok(code),
        End::Detached => Ok(0),
        End::Gone => exit_code(root, id, name),
    }
}

/// What a container that ended left.
fn exit_code(root: &StateRoot, id: &str, name: &str) -> Result<u8, Failure> {
    let code = lifecycle::left_exit_code(root, id, name)?;
    Ok(u8::try_from(code).unwrap_or(u8::MAX))
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
