//! Follows a container's log while it grows.

use crate::fds;
use crate::log::{Entry, Reader};
use crate::state;
use anyhow::Context;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Whoever writes the log may die without a word: then nothing in the directory changes any more.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A reader that waits for what is yet to be written.
pub(super) struct Follower {
    container: PathBuf,
    log: PathBuf,
    reader: Option<Reader>,
    changes: AsyncFd<OwnedFd>,
}

impl Follower {
    /// Follows the log in `log` of the container in `container`, from where `reader` is; `None`: from a beginning that is yet to come.
    pub(super) fn new(
        container: &Path,
        log: &Path,
        reader: Option<Reader>,
    ) -> anyhow::Result<Self> {
        let watch = || {
            let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
            let events = WatchFlags::MODIFY
                | WatchFlags::CREATE
                | WatchFlags::MOVED_TO
                | WatchFlags::DELETE_SELF
                | WatchFlags::MOVE_SELF;
            inotify::add_watch(&fd, log, events)?;
            inotify::add_watch(&fd, container, events)?;
            fds::watched(fd, Interest::READABLE)
        };
        Ok(Self {
            container: container.to_owned(),
            log: log.to_owned(),
            reader,
            changes: watch().with_context(|| format!("can't watch {}", log.display()))?,
        })
    }

    /// The next entry, once there is one; `None` once the container has ended and all was read.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Entry>> {
        loop {
            if let Some(entry) = self.read()? {
                return Ok(Some(entry));
            }
            if !state::is_looked_after(&self.container) {
                // What was written before the end is there by now.
                return self.read();
            }
            let _ = tokio::time::timeout(LOOK_AGAIN, self.changed()).await;
        }
    }

    fn read(&mut self) -> anyhow::Result<Option<Entry>> {
        if self.reader.is_none() {
            self.reader = Reader::open(&self.log).context("can't read the log")?;
        }
        match &mut self.reader {
            Some(reader) => reader.read().context("can't read the log"),
            None => Ok(None),
        }
    }

    /// Returns once something in the directories changed.
    async fn changed(&self) -> std::io::Result<()> {
        // Which file it was doesn't matter.
        let mut events = [0; 4096];
        let read = self.changes.async_io(Interest::READABLE, |fd| {
            Ok(rustix::io::read(fd, &mut events[..])?)
        });
        read.await.map(|_| ())
    }
}
