//! virtio-net on a tap: frames go between guest memory and the tap with one system call each.
//!
//! When the guest has no buffers, or its rate is used up, the tap isn't polled:
//! its queue fills, and the host's network stack drops or slows down, as with any
//! other slow receiver. System calls: readv, writev, epoll_ctl, ioctl
//! (TUNSETOFFLOAD), timerfd_settime, and read and write of eventfds.

mod tap;

#[cfg(test)]
mod tests;

use super::counters::counters;
use super::ring::{Chain, Ring};
use super::saved::{self, RestoreError};
use super::supply::Supply;
use super::{Activation, ActiveQueue, Device, Interrupt, Readiness, Watcher};
use crate::config::RateLimit;
use crate::rate_limit::RateLimiter;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tap::{Tap, VNET_HEADER};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::timerfd::TimerFd;

/// Entries of each queue: with Linux' 1.5 KiB buffers room for six 64 KiB frames.
const QUEUE_SIZE: u16 = 256;
/// Ethernet header with a VLAN tag.
const ETHERNET: usize = 18;
/// Largest frame with its offload header: one that the other side still has to segment.
const MAX_FRAME: usize = VNET_HEADER + ETHERNET + 65535;
/// Smallest frame that the host's stack takes.
const MIN_FRAME: usize = VNET_HEADER + 14;
/// Frames in each direction before other devices get their turn.
const FRAMES_PER_TURN: usize = 64;
/// Where `num_buffers` lies in the offload header.
const NUM_BUFFERS: usize = 10;
/// Bytes of configuration space: MAC, status, queue pairs, MTU.
const CONFIG_SIZE: usize = 12;

const TOKEN_RX: u64 = 0;
const TOKEN_TX: u64 = 1;
const TOKEN_TAP: u64 = 2;
const TOKEN_TIMER: u64 = 3;

counters! {
    /// What the device did.
    pub struct NetCounters {
        /// Frames to the guest.
        rx_frames,
        /// Their bytes, without offload headers.
        rx_bytes,
        /// Frames from the guest.
        tx_frames,
        /// Their bytes, without offload headers.
        tx_bytes,
        /// Frames of the guest that the host refused or that make no sense.
        tx_errors,
        /// Times that the guest had no buffers for a frame.
        rx_starved,
        /// Descriptor chains that couldn't be walked.
        malformed_chains,
    }
}

/// What a network device is built from.
#[derive(Debug)]
pub struct NetArgs {
    /// A tap opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR.
    pub tap: OwnedFd,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// MTU offered to the guest.
    pub mtu: u16,
    /// Limits of each direction; `None`: unlimited.
    pub rate_limit: Option<RateLimit>,
}

/// A virtio-net device.
pub struct Net {
    tap: Tap,
    mac: [u8; 6],
    mtu: u16,
    rx_limit: Option<RateLimiter>,
    tx_limit: Option<RateLimiter>,
    /// `Some` if there is a limit.
    timer: Option<RateTimer>,
    counters: NetCounters,
    active: Option<Active>,
}

struct Active {
    rx: Supply,
    tx: Ring,
    chain: Chain,
    /// Frames may span chains.
    mergeable: bool,
    /// Room that any frame fits into.
    max_frame: usize,
    /// What keeps the tap from being read.
    rx_pause: Pause,
    /// What keeps the transmit queue from being worked.
    tx_pause: Pause,
    /// What the tap is watched for; `None` once it is gone.
    watched: Option<Readiness>,
    /// What the driver agreed to, until the tap knows it.
    untold_features: Option<u64>,
    interrupt: Arc<dyn Interrupt>,
    watcher: Box<dyn Watcher>,
}

/// Why a direction waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    No,
    /// For the other side: the guest's buffers, or room in the tap.
    Other,
    /// For the rate limit.
    Rate,
}

/// What the device remembers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetState {
    mac: [u8; 6],
    mtu: u16,
}

impl Net {
    /// Builds the device and sets the tap up.
    pub fn new(args: NetArgs) -> io::Result<Self> {
        Self::build(args, Tap::new)
    }

    /// Builds the device on a packet socket instead of a tap.
    #[cfg(any(test, feature = "test-utils"))]
    pub fn on_socket(args: NetArgs) -> io::Result<Self> {
        Self::build(args, Tap::mock)
    }

    fn build(args: NetArgs, open: fn(OwnedFd) -> io::Result<Tap>) -> io::Result<Self> {
        let NetArgs {
            tap,
            mac,
            mtu,
            rate_limit,
        } = args;
        let limiter = rate_limit.map(|limit| RateLimiter::new(limit, Instant::now()));
        let timer = limiter.as_ref().map(|_| RateTimer::new()).transpose()?;
        Ok(Net {
            tap: open(tap)?,
            mac,
            mtu,
            rx_limit: limiter.clone(),
            tx_limit: limiter,
            timer,
            counters: NetCounters::default(),
            active: None,
        })
    }

    /// Builds the device from a saved one, on another tap; the MAC may be another too, which a guest sees
    /// only if it looks again.
    pub fn restore(args: NetArgs, state: &serde_json::Value) -> Result<Self, RestoreError> {
        let NetState { mac: _, mtu } = saved::parse("net", state)?;
        saved::require_same("net", "mtu", &mtu, &args.mtu)?;
        Net::new(args).map_err(|source| RestoreError::Build {
            device: "net",
            source,
        })
    }

    /// What the device did so far, by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.list()
    }

    /// Reads frames from the tap into the guest's buffers.
    fn receive(&mut self, active: &mut Active) {
        active.rx_pause = Pause::No;
        for _ in 0..FRAMES_PER_TURN {
            if !may_pass(&mut self.rx_limit, &mut self.timer) {
                active.rx_pause = Pause::Rate;
                break;
            }
            let Some(room) = active.room() else {
                self.counters.rx_starved.add(1);
                active.rx_pause = Pause::Other;
                break;
            };
            let tap = &self.tap;
            let Ok(len) = active
                .rx
                .fill(room, |target| target.read_from(tap.as_fd(), room))
            else {
                // Nothing there; or the tap is gone, which the event loop tells.
                break;
            };
            if len < VNET_HEADER {
                break;
            }
            active.deliver(len);
            if let Some(limit) = &mut self.rx_limit {
                limit.pay(len as u64);
            }
            self.counters.rx_frames.add(1);
            self.counters.rx_bytes.add((len - VNET_HEADER) as u64);
        }
        active.rx.notify(active.interrupt.as_ref());
    }

    /// Writes the guest's frames to the tap.
    fn transmit(&mut self, active: &mut Active) {
        active.tx_pause = Pause::No;
        let mut more = true;
        for _ in 0..FRAMES_PER_TURN {
            if !may_pass(&mut self.tx_limit, &mut self.timer) {
                active.tx_pause = Pause::Rate;
                more = false;
                break;
            }
            if !active.tx.pop(&mut active.chain) {
                more = active.tx.rearm();
                break;
            }
            let len = active.chain.readable.len();
            let sent = if (MIN_FRAME..=MAX_FRAME).contains(&len) {
                active.chain.readable.write_to(self.tap.as_fd(), len)
            } else {
                Err(io::ErrorKind::InvalidInput.into())
            };
            match sent {
                Ok(_) => {
                    self.counters.tx_frames.add(1);
                    self.counters.tx_bytes.add((len - VNET_HEADER) as u64);
                    if let Some(limit) = &mut self.tx_limit {
                        limit.pay(len as u64);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    active.tx.unpop(1);
                    active.tx_pause = Pause::Other;
                    more = false;
                    break;
                }
                // As on any wire, a frame that can't be sent is lost.
                Err(_) => self.counters.tx_errors.add(1),
            }
            active.tx.push(active.chain.head, 0);
        }
        if more {
            active.tx.kick_self();
        }
        active.tx.notify(active.interrupt.as_ref());
    }
}

impl Active {
    /// Room for the next frame; `None` if the guest must supply buffers first, and its kick will come.
    fn room(&mut self) -> Option<usize> {
        let room = self
            .rx
            .prepare(if self.mergeable { self.max_frame } else { 1 });
        // A frame that doesn't fit would be cut: wait, unless no more can come.
        if self.mergeable && (room >= self.max_frame || self.rx.all_taken()) {
            return Some(self.max_frame);
        }
        if !self.mergeable && room > 0 {
            return Some(self.rx.first_room().min(MAX_FRAME));
        }
        if self.rx.rearm() {
            self.rx.ring().kick_self();
        }
        None
    }

    /// Hands a frame of `len` bytes, offload header included, to the guest.
    fn deliver(&mut self, len: usize) {
        // At most the ring's size.
        let chains = self.rx.chains_for(len) as u16;
        let mut left = len;
        let mut first = true;
        while left > 0 {
            let filled = self.rx.finish(left, |_, front| {
                if std::mem::take(&mut first) {
                    front.skip(NUM_BUFFERS);
                    front.write(&chains.to_le_bytes());
                }
            });
            // The frame was read into taken chains: there is one for each byte.
            let Some(filled) = filled else { break };
            left -= filled;
        }
    }

    /// Watches the tap for what can be handled, and nothing else: the loop is level-triggered.
    fn watch(&mut self, tap: &Tap) -> io::Result<()> {
        let Some(watched) = self.watched else {
            return Ok(());
        };
        let read = if self.rx_pause == Pause::No {
            libc::EPOLLIN
        } else {
            0
        };
        let write = if self.tx_pause == Pause::Other {
            libc::EPOLLOUT
        } else {
            0
        };
        let wanted = (read | write) as Readiness;
        if wanted != watched {
            self.watcher
                .modify(tap.as_fd().as_raw_fd(), wanted, TOKEN_TAP)?;
            self.watched = Some(wanted);
        }
        Ok(())
    }

    fn unwatch_tap(&mut self, tap: &Tap) {
        if self.watched.take().is_some() {
            // Fails only if it isn't watched.
            let _ = self.watcher.remove(tap.as_fd().as_raw_fd());
        }
    }
}

/// Wakes whichever direction waits for its rate first; the other then just looks again.
struct RateTimer {
    fd: TimerFd,
    /// When it goes off, if it is armed.
    due: Option<Instant>,
}

impl RateTimer {
    fn new() -> io::Result<Self> {
        let fd = TimerFd::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        Ok(RateTimer { fd, due: None })
    }

    fn arm(&mut self, now: Instant, wait: Duration) {
        let due = now + wait;
        if self.due.is_none_or(|earlier| due < earlier) {
            self.due = Some(due);
            // Fails only on a bad time. A zero would disarm it.
            let _ = self.fd.reset(wait.max(Duration::from_micros(1)), None);
        }
    }

    /// Makes it unreadable, like a read but never waiting.
    fn clear(&mut self) {
        self.due = None;
        let _ = self.fd.clear();
    }
}

/// Whether `limit` lets a frame pass now; if not, `timer` tells when to look again.
fn may_pass(limit: &mut Option<RateLimiter>, timer: &mut Option<RateTimer>) -> bool {
    let (Some(limit), Some(timer)) = (limit, timer) else {
        return true;
    };
    let now = Instant::now();
    limit
        .check(now)
        .map_err(|wait| timer.arm(now, wait))
        .is_ok()
}

impl Device for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
            VIRTIO_RING_F_EVENT_IDX,
        ];
        let uso: &[u32] = match self.tap.uso {
            true => &[
                VIRTIO_NET_F_GUEST_USO4,
                VIRTIO_NET_F_GUEST_USO6,
                VIRTIO_NET_F_HOST_USO,
            ],
            false => &[],
        };
        always
            .iter()
            .chain(uso)
            .fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; CONFIG_SIZE];
        space[..6].copy_from_slice(&self.mac);
        space[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        space[8..10].copy_from_slice(&1u16.to_le_bytes());
        space[10..].copy_from_slice(&self.mtu.to_le_bytes());
        saved::read_config(&space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation {
            memory,
            queues,
            features,
            interrupt,
            watcher,
        } = activation;
        let memory = Arc::new(memory);
        let has = |bit: u32| features & 1 << bit != 0;
        let [rx, tx] = Ring::all(&memory, queues, features)?;
        for (ring, token) in [(&rx, TOKEN_RX), (&tx, TOKEN_TX)] {
            ring.watch(watcher.as_ref(), token)?;
        }
        if let Some(timer) = &self.timer {
            watcher.add(timer.fd.as_raw_fd(), libc::EPOLLIN as u32, TOKEN_TIMER)?;
        }
        watcher.add(
            self.tap.as_fd().as_raw_fd(),
            libc::EPOLLIN as u32,
            TOKEN_TAP,
        )?;
        let large = [
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_USO4,
            VIRTIO_NET_F_GUEST_USO6,
        ];
        let max_frame = match large.into_iter().any(has) {
            true => MAX_FRAME,
            false => VNET_HEADER + ETHERNET + usize::from(self.mtu),
        };
        self.active = Some(Active {
            rx: Supply::new(&memory, rx, 0),
            tx,
            chain: Chain::new(&memory),
            mergeable: has(VIRTIO_NET_F_MRG_RXBUF),
            max_frame,
            rx_pause: Pause::No,
            tx_pause: Pause::No,
            watched: Some(libc::EPOLLIN as Readiness),
            untold_features: Some(features),
            interrupt,
            watcher,
        });
        Ok(())
    }

    fn handle(&mut self, token: u64, readiness: Readiness) {
        let Some(mut active) = self.active.take() else {
            return;
        };
        // Before the first frame, but not in the vCPU's thread, which makes no such calls.
        if let Some(features) = active.untold_features.take()
            && self.tap.set_features(features).is_err()
        {
            // The tap took all of them when it was set up: it must be gone.
            active.unwatch_tap(&self.tap);
        }
        match token {
            TOKEN_RX => {
                active.rx.ring().acknowledge();
                if active.rx_pause == Pause::Other {
                    self.receive(&mut active);
                }
            }
            TOKEN_TX => {
                active.tx.acknowledge();
                if active.tx_pause == Pause::No {
                    self.transmit(&mut active);
                }
            }
            TOKEN_TAP => {
                if readiness & (libc::EPOLLERR | libc::EPOLLHUP) as u32 != 0 {
                    // The interface was deleted: would be reported for ever.
                    active.unwatch_tap(&self.tap);
                }
                if readiness & libc::EPOLLIN as u32 != 0 && active.rx_pause == Pause::No {
                    self.receive(&mut active);
                }
                if readiness & libc::EPOLLOUT as u32 != 0 && active.tx_pause == Pause::Other {
                    self.transmit(&mut active);
                }
            }
            _ => {
                if let Some(timer) = &mut self.timer {
                    timer.clear();
                }
                if active.rx_pause == Pause::Rate {
                    self.receive(&mut active);
                }
                if active.tx_pause == Pause::Rate {
                    self.transmit(&mut active);
                }
            }
        }
        if active.watch(&self.tap).is_err() {
            // Only lack of kernel memory comes here: the link goes quiet.
            active.unwatch_tap(&self.tap);
        }
        self.counters
            .malformed_chains
            .set(active.rx.ring().malformed() + active.tx.malformed());
        self.active = Some(active);
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        let Some(mut active) = self.active.take() else {
            return Vec::new();
        };
        active.unwatch_tap(&self.tap);
        let Active {
            rx, tx, watcher, ..
        } = active;
        // Each fails only if it was never added.
        if let Some(timer) = &self.timer {
            let _ = watcher.remove(timer.fd.as_raw_fd());
        }
        for ring in [rx.ring(), &tx] {
            let _ = watcher.remove(ring.kick().as_raw_fd());
        }
        vec![rx.into_inner(), tx.into_inner()]
    }

    fn save(&self) -> serde_json::Value {
        let Net {
            tap: _,
            mac,
            mtu,
            rx_limit: _,
            tx_limit: _,
            timer: _,
            counters: _,
            active: _,
        } = self;
        saved::value(&NetState {
            mac: *mac,
            mtu: *mtu,
        })
    }
}
