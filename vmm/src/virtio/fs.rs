//! virtio-fs: the queues are worked by another process (virtiofsd), told of them over a vhost-user socket.
//!
//! The device negotiates, hands over guest memory, rings and kicks, and passes the backend's interrupts on. It sees no
//! request of FUSE. A backend that dies leaves requests without an answer: whoever started it must end the VM.
//! System calls: sendmsg, recvmsg, epoll_ctl, and read and write of eventfds.

use super::counters::counters;
use super::saved::{self, RestoreError};
use super::{Activation, ActiveQueue, Device, Interrupt, Readiness, Watcher};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The queue for what must not wait (FORGET, INTERRUPT), and that for requests: one is what virtiofsd works on at a time.
const QUEUE_SIZES: [u16; 2] = [128, 1024];
/// Bytes of the tag in configuration space, padded with NULs.
const TAG_SIZE: usize = 36;
/// Offered if the backend has them; the transport adds VIRTIO_F_VERSION_1.
const FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// Each request of ours gets an answer, so that an error is noticed where it happens.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::REPLY_ACK;

/// The backend's socket; a queue's interrupts have its number.
const TOKEN_SOCKET: u64 = QUEUE_SIZES.len() as u64;

counters! {
    /// What the device did.
    pub struct FsCounters {
        /// Interrupts passed on.
        interrupts,
        /// Times that the backend was found gone.
        backend_gone,
    }
}

/// What a virtio-fs device is built from.
#[derive(Debug)]
pub struct FsArgs {
    /// The name by which the guest mounts it.
    pub tag: String,
    /// Connected to a vhost-user backend.
    pub socket: UnixStream,
}

/// A virtio-fs device.
pub struct Fs {
    tag: String,
    backend: Frontend,
    /// All that the backend can do.
    offered: u64,
    /// Signalled by the backend, one for each queue.
    calls: Vec<EventFd>,
    counters: FsCounters,
    active: Option<Active>,
    /// The guest has files open, or had.
    used: bool,
}

struct Active {
    memory: GuestMemoryMmap,
    queues: Vec<ActiveQueue>,
    interrupt: Arc<dyn Interrupt>,
    watcher: Box<dyn Watcher>,
    /// The backend is there, and watched.
    connected: bool,
}

/// What the device remembers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FsState {
    tag: String,
    used: bool,
}

fn failed(what: &'static str) -> impl FnOnce(vhost::Error) -> io::Error {
    move |error| io::Error::other(format!("virtio-fs backend, {what}: {error}"))
}

impl Fs {
    /// Builds the device and greets the backend.
    pub fn new(args: FsArgs) -> io::Result<Self> {
        let FsArgs { tag, socket } = args;
        let mut backend = Frontend::from_stream(socket, QUEUE_SIZES.len() as u64);
        backend.set_owner().map_err(failed("owner"))?;
        let offered = backend.get_features().map_err(failed("features"))?;
        let wanted = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | 1 << VIRTIO_F_VERSION_1;
        if offered & wanted != wanted {
            let text = format!("virtio-fs backend: it offers {offered:#x} and needs {wanted:#x}");
            return Err(io::Error::other(text));
        }
        let protocol = backend
            .get_protocol_features()
            .map_err(failed("protocol features"))?;
        backend
            .set_protocol_features(protocol & PROTOCOL_FEATURES)
            .map_err(failed("protocol features"))?;
        backend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let calls = QUEUE_SIZES.map(|_| EventFd::new(EFD_NONBLOCK));
        Ok(Self {
            tag,
            backend,
            offered,
            calls: calls.into_iter().collect::<io::Result<_>>()?,
            counters: FsCounters::default(),
            active: None,
            used: false,
        })
    }

    /// Builds the device from a saved one that no guest had used: what one has open is in the backend and can't be saved.
    pub fn restore(args: FsArgs, state: &serde_json::Value) -> Result<Self, RestoreError> {
        let FsState { tag, used } = saved::parse("fs", state)?;
        saved::require_same("fs", "tag", &tag, &args.tag)?;
        saved::require_same("fs", "use by the guest", &used, &false)?;
        Fs::new(args).map_err(|source| RestoreError::Build {
            device: "fs",
            source,
        })
    }

    /// The name by which the guest mounts it.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// What the device did so far, by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.list()
    }

    /// Tells the backend where memory and rings are.
    fn hand_over(&mut self, active: &Active, features: u64) -> io::Result<()> {
        let own = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | 1 << VIRTIO_F_VERSION_1;
        self.backend
            .set_features(features & self.offered | own)
            .map_err(failed("features"))?;
        let regions = active
            .memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect::<Result<Vec<_>, _>>()
            .map_err(failed("memory"))?;
        self.backend
            .set_mem_table(&regions)
            .map_err(failed("memory"))?;
        for (index, active_queue) in active.queues.iter().enumerate() {
            let queue = &active_queue.queue;
            if !queue.ready() {
                continue;
            }
            let place = rings(&active.memory, queue)?;
            let backend = &mut self.backend;
            let size = queue.size();
            backend
                .set_vring_num(index, size)
                .map_err(failed("size of a queue"))?;
            backend
                .set_vring_addr(index, &place)
                .map_err(failed("place of a queue"))?;
            backend
                .set_vring_base(index, queue.next_avail())
                .map_err(failed("position of a queue"))?;
            backend
                .set_vring_call(index, &self.calls[index])
                .map_err(failed("interrupt of a queue"))?;
            backend
                .set_vring_kick(index, &active_queue.kick)
                .map_err(failed("kick of a queue"))?;
            backend
                .set_vring_enable(index, true)
                .map_err(failed("start of a queue"))?;
        }
        Ok(())
    }

    /// What is watched, with its tokens.
    fn watched(&self) -> impl Iterator<Item = (RawFd, u64)> {
        let calls = self.calls.iter().map(AsRawFd::as_raw_fd);
        calls
            .chain([self.backend.as_raw_fd()])
            .zip(0..=TOKEN_SOCKET)
    }

    /// Takes the rings back from the backend: it is done with all that it began.
    fn take_back(&self, memory: &GuestMemoryMmap, queues: &mut [ActiveQueue]) -> io::Result<()> {
        for (index, active) in queues.iter_mut().enumerate() {
            let queue = &mut active.queue;
            if !queue.ready() {
                continue;
            }
            let base = self
                .backend
                .get_vring_base(index)
                .map_err(failed("end of a queue"))?;
            queue.set_next_avail(base as u16);
            if let Ok(used) = queue.used_idx(memory, Ordering::Acquire) {
                queue.set_next_used(used.0);
            }
        }
        Ok(())
    }
}

/// A queue's rings as addresses of ours, which the backend knows by the table of memory.
fn rings(memory: &GuestMemoryMmap, queue: &virtio_queue::Queue) -> io::Result<VringConfigData> {
    let place = |address: u64| {
        let address = memory.get_host_address(GuestAddress(address));
        address
            .map(|pointer| pointer as u64)
            .map_err(io::Error::other)
    };
    Ok(VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: place(queue.desc_table())?,
        used_ring_addr: place(queue.used_ring())?,
        avail_ring_addr: place(queue.avail_ring())?,
        log_addr: None,
    })
}

impl Device for Fs {
    fn id(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        self.offered & FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; TAG_SIZE + 4];
        let length = self.tag.len().min(TAG_SIZE);
        space[..length].copy_from_slice(&self.tag.as_bytes()[..length]);
        // num_request_queues
        space[TAG_SIZE..].copy_from_slice(&(QUEUE_SIZES.len() as u32 - 1).to_le_bytes());
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
        let active = Active {
            memory,
            queues,
            interrupt,
            watcher,
            connected: true,
        };
        self.hand_over(&active, features)?;
        for (fd, token) in self.watched() {
            active
                .watcher
                .add(fd, EventSet::IN.bits() as Readiness, token)?;
        }
        self.used = true;
        self.active = Some(active);
        Ok(())
    }

    fn handle(&mut self, token: u64, _readiness: Readiness) {
        let Some(active) = &mut self.active else {
            return;
        };
        if token == TOKEN_SOCKET {
            // It says nothing unasked: readable means that it is gone.
            if std::mem::take(&mut active.connected) {
                let _ = active.watcher.remove(self.backend.as_raw_fd());
                self.counters.backend_gone.add(1);
            }
        } else if let Some(call) = self.calls.get(token as usize) {
            // Empty if another event was on its way.
            if call.read().is_ok() {
                self.counters.interrupts.add(1);
                active.interrupt.used();
            }
        }
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        let Some(active) = self.active.take() else {
            return Vec::new();
        };
        let Active {
            memory,
            mut queues,
            interrupt,
            watcher,
            connected,
        } = active;
        for (fd, token) in self.watched() {
            if connected || token != TOKEN_SOCKET {
                // Fails only if it was never added.
                let _ = watcher.remove(fd);
            }
        }
        if connected && let Err(error) = self.take_back(&memory, &mut queues) {
            self.counters.backend_gone.add(1);
            eprintln!("casemate-vmm: share {}: {error}", self.tag);
        }
        // What the backend signalled last must not be lost with the watching.
        let mut pending = false;
        for call in &self.calls {
            pending |= call.read().is_ok();
        }
        if pending {
            interrupt.used();
        }
        queues
    }

    fn save(&self) -> serde_json::Value {
        let Fs {
            tag,
            backend: _,
            offered: _,
            calls: _,
            counters: _,
            active: _,
            used,
        } = self;
        saved::value(&FsState {
            tag: tag.clone(),
            used: *used,
        })
    }
}

#[cfg(test)]
mod tests;
