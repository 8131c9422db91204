//! The thread that works a disk's queue: its system calls may wait for the host's disk.
//!
//! The thread starts with the device and sleeps until the driver is ready. It
//! needs epoll_wait, epoll_ctl, preadv2, pwritev2, fdatasync, fallocate, write
//! (interrupts), futex, and close and munmap when the device goes away.

use super::backing::Backing;
use super::limiter::Limiter;
use super::request::Disk;
use crate::virtio::ring::{Chain, Ring};
use crate::virtio::{ActiveQueue, Interrupt};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Requests between two looks at the commands: a pause waits for at most so many.
const REQUESTS_PER_TURN: usize = 64;
/// Requests between two interrupts: fewer make the guest wait, more cost it interrupts.
const REQUESTS_PER_INTERRUPT: usize = 8;
/// The thread's stack: nothing here recurses or holds large arrays.
const STACK: usize = 128 << 10;

/// What the device wants of its worker.
pub(super) enum Command {
    /// Work this queue.
    Start(Work),
    /// Finish the current request and give the queue back.
    Stop(Sender<Option<ActiveQueue>>),
    /// Use other files; the old ones come back, flushed.
    Swap(Backing, Sender<io::Result<Backing>>),
    /// Make durable what was written.
    Flush(Sender<io::Result<()>>),
}

/// An active queue and all it needs.
pub(super) struct Work {
    pub(super) ring: Ring,
    pub(super) chain: Chain,
    pub(super) interrupt: Arc<dyn Interrupt>,
}

/// The device's end.
#[derive(Debug)]
pub(super) struct Worker {
    /// `None` only while dropping.
    commands: Option<Sender<Command>>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread, which calls `on_start` first.
    pub(super) fn spawn(
        disk: Disk,
        limiter: Option<Limiter>,
        on_start: Option<Box<dyn FnOnce() + Send>>,
    ) -> io::Result<Self> {
        let (commands, receiver) = channel();
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let epoll = Epoll::new()?;
        watch(&epoll, ControlOperation::Add, &wake)?;
        let mut thread = Thread {
            disk,
            limiter,
            work: None,
            epoll,
            commands: receiver,
            _wake: Arc::clone(&wake),
        };
        let handle = std::thread::Builder::new()
            .name("blk".into())
            .stack_size(STACK)
            .spawn(move || {
                if let Some(on_start) = on_start {
                    on_start();
                }
                thread.run();
            })?;
        Ok(Worker {
            commands: Some(commands),
            wake,
            thread: Some(handle),
        })
    }

    /// Sends a command; an error if the thread is gone.
    pub(super) fn send(&self, command: Command) -> io::Result<()> {
        let sent = self
            .commands
            .as_ref()
            .is_some_and(|commands| commands.send(command).is_ok());
        self.wake.write(1)?;
        if sent { Ok(()) } else { Err(gone()) }
    }

    /// Sends a command and waits for its answer.
    pub(super) fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> io::Result<T> {
        let (answer, receiver) = channel();
        self.send(command(answer))?;
        receiver.recv().map_err(|_| gone())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.commands = None;
        let _ = self.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn gone() -> io::Error {
    io::Error::other("the disk's worker thread is gone")
}

/// Watches an eventfd for new writes only: its counter never needs a read.
fn watch(epoll: &Epoll, operation: ControlOperation, event: &EventFd) -> io::Result<()> {
    epoll.ctl(
        operation,
        event.as_raw_fd(),
        EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0),
    )
}

struct Thread {
    disk: Disk,
    limiter: Option<Limiter>,
    work: Option<Work>,
    epoll: Epoll,
    commands: Receiver<Command>,
    /// Stays open as long as it is watched.
    _wake: Arc<EventFd>,
}

impl Thread {
    fn run(&mut self) {
        loop {
            loop {
                match self.commands.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            let pause = match &mut self.work {
                Some(work) => turn(&mut self.disk, self.limiter.as_mut(), work),
                None => None,
            };
            let timeout = match pause {
                Some(Duration::ZERO) => continue,
                // Rounded up: waking early would only ask the limiter again.
                Some(pause) => i32::try_from(pause.as_millis()).unwrap_or(i32::MAX - 1) + 1,
                None => -1,
            };
            // An interrupted wait is a turn with nothing to do.
            let _ = self.epoll.wait(timeout, &mut [EpollEvent::default(); 2]);
        }
    }

    fn obey(&mut self, command: Command) {
        // An answer that nobody waits for any more is dropped.
        match command {
            Command::Start(work) => {
                // Can only fail for lack of kernel memory: then the driver's requests time out.
                if watch(&self.epoll, ControlOperation::Add, work.ring.kick()).is_ok() {
                    self.work = Some(work);
                }
            }
            Command::Stop(answer) => {
                let queue = self.work.take().map(|work| {
                    let _ = watch(&self.epoll, ControlOperation::Delete, work.ring.kick());
                    work.ring.into_inner()
                });
                let _ = answer.send(queue);
            }
            Command::Swap(backing, answer) => {
                let result = self.disk.backing.flush();
                let _ = answer
                    .send(result.map(|()| std::mem::replace(&mut self.disk.backing, backing)));
            }
            Command::Flush(answer) => {
                let _ = answer.send(self.disk.backing.flush());
            }
        }
    }
}

/// Works the queue for a while; `None` when it is empty, else how long to wait before the next turn.
pub(super) fn turn(
    disk: &mut Disk,
    mut limiter: Option<&mut Limiter>,
    work: &mut Work,
) -> Option<Duration> {
    let Work {
        ring,
        chain,
        interrupt,
    } = work;
    ring.disarm();
    for count in 1..=REQUESTS_PER_TURN {
        if let Some(Err(wait)) = limiter
            .as_mut()
            .map(|limiter| limiter.check(Instant::now()))
        {
            ring.notify(interrupt.as_ref());
            return Some(wait);
        }
        if !ring.pop_even_outside(chain) {
            ring.notify(interrupt.as_ref());
            disk.counters.malformed_chains.set(ring.malformed());
            return ring.rearm().then_some(Duration::ZERO);
        }
        let (to_disk, to_guest) = (chain.readable.len(), chain.writable.len());
        let written = disk.execute(chain);
        if let Some(limiter) = limiter.as_mut() {
            limiter.pay(to_disk, to_guest);
        }
        ring.push(chain.head, written);
        if count % REQUESTS_PER_INTERRUPT == 0 {
            ring.notify(interrupt.as_ref());
        }
    }
    ring.notify(interrupt.as_ref());
    Some(Duration::ZERO)
}
