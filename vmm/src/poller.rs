//! The event loop's epoll set: who watches what.

use crate::sync::lock;
use crate::virtio::{Readiness, Watcher};
use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Events taken per wait: what comes later waits for the next turn.
const BATCH: usize = 32;

/// Whose descriptor it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A device, by its place on the bus.
    Device(usize),
    /// The shim's control socket.
    Control,
    /// The VM ended by itself.
    Ended,
    /// SIGTERM or SIGINT.
    Terminate,
}

/// A descriptor is ready.
#[derive(Debug, Clone, Copy)]
pub struct Event {
    /// Whose.
    pub source: Source,
    /// The source's own number for it.
    pub token: u64,
    /// EPOLL bits.
    pub readiness: Readiness,
}

/// An epoll set that remembers who registered a descriptor.
pub struct Poller {
    epoll: Epoll,
    /// By descriptor, so that a device's tokens keep all their 64 bits.
    watched: Mutex<HashMap<RawFd, (Source, u64)>>,
}

impl Poller {
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            watched: Mutex::default(),
        })
    }

    /// Watches a descriptor, level-triggered.
    pub fn watch(
        &self,
        fd: RawFd,
        interest: Readiness,
        source: Source,
        token: u64,
    ) -> io::Result<()> {
        let mut watched = lock(&self.watched);
        self.control(ControlOperation::Add, fd, interest)?;
        watched.insert(fd, (source, token));
        Ok(())
    }

    /// A device's view of the set.
    pub fn watcher(self: &Arc<Self>, device: usize) -> Box<dyn Watcher> {
        Box::new(DeviceWatcher {
            poller: self.clone(),
            source: Source::Device(device),
        })
    }

    /// Waits for the next events, at most so long (rounded up to milliseconds), and appends them. One that was
    /// unwatched meanwhile is left out.
    pub fn wait(&self, events: &mut Vec<Event>, patience: Option<Duration>) -> io::Result<()> {
        let mut ready = [EpollEvent::default(); BATCH];
        let timeout = patience.map_or(-1, |time| {
            i32::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
        });
        let count = match self.epoll.wait(timeout, &mut ready) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let watched = lock(&self.watched);
        events.extend(ready[..count].iter().filter_map(|event| {
            let &(source, token) = watched.get(&(event.data() as RawFd))?;
            let readiness = event.events();
            Some(Event {
                source,
                token,
                readiness,
            })
        }));
        Ok(())
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        interest: Readiness,
    ) -> io::Result<()> {
        let set = EventSet::from_bits_truncate(interest);
        self.epoll
            .ctl(operation, fd, EpollEvent::new(set, fd as u64))
    }
}

struct DeviceWatcher {
    poller: Arc<Poller>,
    source: Source,
}

impl Watcher for DeviceWatcher {
    fn add(&self, fd: RawFd, interest: Readiness, token: u64) -> io::Result<()> {
        self.poller.watch(fd, interest, self.source, token)
    }

    fn modify(&self, fd: RawFd, interest: Readiness, token: u64) -> io::Result<()> {
        let mut watched = lock(&self.poller.watched);
        self.poller
            .control(ControlOperation::Modify, fd, interest)?;
        watched.insert(fd, (self.source, token));
        Ok(())
    }

    fn remove(&self, fd: RawFd) -> io::Result<()> {
        lock(&self.poller.watched).remove(&fd);
        self.poller.control(ControlOperation::Delete, fd, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use vmm_sys_util::eventfd::EventFd;

    const IN: Readiness = libc::EPOLLIN as Readiness;

    #[test]
    fn wait_ready_descriptor_names_source_and_token() {
        let poller = Arc::new(Poller::new().expect("epoll"));
        let fd = EventFd::new(0).expect("eventfd");
        poller
            .watcher(3)
            .add(fd.as_raw_fd(), IN, u64::MAX)
            .expect("add");
        fd.write(1).expect("write");

        let mut events = Vec::new();
        poller.wait(&mut events, None).expect("wait");

        assert_eq!(events.len(), 1);
        assert_eq!(
            (events[0].source, events[0].token),
            (Source::Device(3), u64::MAX)
        );
    }

    #[test]
    fn modify_changes_the_token() {
        let poller = Arc::new(Poller::new().expect("epoll"));
        let fd = EventFd::new(0).expect("eventfd");
        fd.write(1).expect("write");
        let watcher = poller.watcher(0);
        watcher.add(fd.as_raw_fd(), 0, 1).expect("add");

        watcher.modify(fd.as_raw_fd(), IN, 2).expect("modify");

        let mut events = Vec::new();
        poller.wait(&mut events, None).expect("wait");
        assert_eq!(events[0].token, 2);
    }

    #[test]
    fn remove_silences_a_ready_descriptor() {
        let poller = Arc::new(Poller::new().expect("epoll"));
        let (quiet, loud) = (
            EventFd::new(0).expect("eventfd"),
            EventFd::new(0).expect("eventfd"),
        );
        let watcher = poller.watcher(0);
        for fd in [&quiet, &loud] {
            watcher
                .add(fd.as_raw_fd(), IN, fd.as_raw_fd() as u64)
                .expect("add");
            fd.write(1).expect("write");
        }

        watcher.remove(quiet.as_raw_fd()).expect("remove");

        let mut events = Vec::new();
        poller.wait(&mut events, None).expect("wait");
        assert_eq!(events.len(), 1);
        assert_eq!(events[0].token, loud.as_raw_fd() as u64);
        assert!(watcher.remove(quiet.as_raw_fd()).is_err());
    }
}
