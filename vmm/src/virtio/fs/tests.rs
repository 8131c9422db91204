//! The device against a backend that answers as a test wants, and against none.

use super::*;
use crate::virtio::testing::{Driver, shared_memory};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::Mutex;
use std::thread::JoinHandle;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_VRING_ENABLE: u32 = 18;

const NEED_REPLY: u32 = 8;
const REPLY: u32 = 4 | 1;

/// All that the mock offers: ring features, version 1, protocol features.
const OFFERED: u64 = FEATURES | 1 << VIRTIO_F_VERSION_1 | 1 << 30;

/// What a backend was told.
#[derive(Default)]
struct Told {
    /// Requests in order.
    requests: Vec<(u32, Vec<u8>)>,
    kicks: BTreeMap<u8, File>,
    calls: BTreeMap<u8, File>,
    memory: Vec<File>,
}

/// A backend's thread; it ends with the device.
struct Backend {
    told: Arc<Mutex<Told>>,
    thread: JoinHandle<()>,
}

impl Backend {
    /// Answers to `GET_FEATURES` with `offered`; goes away once it has seen `dies_at`.
    fn start(mut socket: UnixStream, offered: u64, dies_at: Option<u32>) -> Self {
        let told: Arc<Mutex<Told>> = Arc::default();
        let shared = told.clone();
        let thread = std::thread::spawn(move || {
            while let Some((request, flags, body)) = receive(&socket, &shared) {
                if dies_at == Some(request) {
                    return;
                }
                let word = |value: u64| value.to_le_bytes().to_vec();
                let answer = match request {
                    GET_FEATURES => Some(word(offered)),
                    GET_PROTOCOL_FEATURES => Some(word(PROTOCOL_FEATURES.bits())),
                    // The queue's number, and a position: three requests were taken.
                    GET_VRING_BASE => Some([&body[..4], &3u32.to_le_bytes()].concat()),
                    _ if flags & NEED_REPLY != 0 => Some(word(0)),
                    _ => None,
                };
                if let Some(answer) = answer {
                    let length = answer.len() as u32;
                    let header = [request, REPLY, length].map(u32::to_le_bytes).concat();
                    // The device may be gone by now.
                    let _ = socket.write_all(&[header, answer].concat());
                }
            }
        });
        Self { told, thread }
    }

    fn requests(&self) -> Vec<u32> {
        let told = self.told.lock().unwrap();
        told.requests.iter().map(|(request, _)| *request).collect()
    }

    fn body_of(&self, wanted: u32) -> Vec<u8> {
        let told = self.told.lock().unwrap();
        let found = told.requests.iter().find(|(request, _)| *request == wanted);
        found.expect("it was told").1.clone()
    }
}

/// The next message: request, flags, body.
fn receive(mut socket: &UnixStream, told: &Mutex<Told>) -> Option<(u32, u32, Vec<u8>)> {
    let mut header = [0; 12];
    let mut files = [0; 8];
    let mut place = [libc::iovec {
        iov_base: header.as_mut_ptr().cast(),
        iov_len: header.len(),
    }];
    #[allow(unsafe_code)] // reason: an iovec is an address
    // SAFETY: the one iovec is a buffer of that length.
    let (length, count) = unsafe { socket.recv_with_fds(&mut place, &mut files) }.ok()?;
    if length != header.len() {
        return None;
    }
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let mut body = vec![0; word(8) as usize];
    socket.read_exact(&mut body).ok()?;
    let mut told = told.lock().unwrap();
    for fd in &files[..count] {
        use std::os::fd::FromRawFd;
        #[allow(unsafe_code)] // reason: a descriptor arrived as a number
        // SAFETY: it was just received and is nobody else's.
        let file = unsafe { File::from_raw_fd(*fd) };
        match word(0) {
            SET_VRING_KICK => drop(told.kicks.insert(body[0], file)),
            SET_VRING_CALL => drop(told.calls.insert(body[0], file)),
            SET_MEM_TABLE => told.memory.push(file),
            _ => {}
        }
    }
    told.requests.push((word(0), body.clone()));
    Some((word(0), word(4), body))
}

fn args(tag: &str, socket: UnixStream) -> FsArgs {
    FsArgs {
        tag: tag.into(),
        socket,
    }
}

fn device_with(offered: u64, dies_at: Option<u32>) -> (io::Result<Fs>, Backend) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let backend = Backend::start(theirs, offered, dies_at);
    (Fs::new(args("share0", ours)), backend)
}

fn device() -> (Fs, Driver, Backend) {
    let (fs, backend) = device_with(OFFERED, None);
    let fs = fs.unwrap();
    let driver = Driver::with_memory(&fs, shared_memory());
    (fs, driver, backend)
}

#[test]
fn configuration_tells_tag_and_number_of_queues() {
    let (fs, _driver, _backend) = device();
    let mut space = [0xff; 64];
    fs.read_config(0, &mut space);
    assert_eq!(&space[..7], b"share0\0");
    assert_eq!(space[36..40], 1u32.to_le_bytes());
    assert!(space[40..].iter().all(|byte| *byte == 0));
    fs.read_config(u64::MAX, &mut space);
    assert_eq!(space, [0; 64]);
}

#[test]
fn activation_hands_memory_rings_and_kicks_over() {
    let (mut fs, driver, backend) = device();

    driver.activate(&mut fs);

    let features = u64::from_le_bytes(backend.body_of(SET_FEATURES).try_into().unwrap());
    assert_eq!(features, OFFERED);
    let requests = backend.requests();
    let position = |wanted| requests.iter().position(|r| *r == wanted).unwrap();
    assert!(position(SET_MEM_TABLE) < position(SET_VRING_BASE));
    assert!(position(SET_VRING_KICK) < position(SET_VRING_ENABLE));
    // A kick of the driver's arrives at the backend without us.
    driver.queues[1].kick();
    let told = backend.told.lock().unwrap();
    assert_eq!(told.memory.len(), driver.memory().num_regions());
    let mut count = [0; 8];
    (&told.kicks[&1]).read_exact(&mut count).unwrap();
    assert_eq!(u64::from_le_bytes(count), 1);
}

#[test]
fn interrupts_of_the_backend_reach_the_guest() {
    let (mut fs, driver, backend) = device();
    driver.activate(&mut fs);
    for queue in [0, 1] {
        (&backend.told.lock().unwrap().calls[&queue])
            .write_all(&1u64.to_ne_bytes())
            .unwrap();
        driver.settle(&mut fs);
    }
    assert_eq!(driver.interrupt.used_count(), 2);
}

#[test]
fn stop_takes_the_rings_back_and_a_second_start_goes_on_there() {
    let (mut fs, driver, backend) = device();
    driver.activate(&mut fs);

    let queues = fs.stop();

    assert_eq!(queues.len(), 2);
    assert!(queues.iter().all(|queue| queue.queue.next_avail() == 3));
    assert!(!driver.turn(&mut fs));
    assert!(fs.stop().is_empty());
    backend.told.lock().unwrap().requests.clear();
    fs.activate(driver.reactivation(queues, FEATURES)).unwrap();
    assert_eq!(backend.body_of(SET_VRING_BASE)[4..], 3u32.to_le_bytes());
}

#[test]
fn activation_without_shared_memory_is_refused() {
    let (fs, _backend) = device_with(OFFERED, None);
    let mut fs = fs.unwrap();
    let driver = Driver::new(&fs);
    let error = fs.activate(driver.activation(FEATURES)).unwrap_err();
    assert!(error.to_string().contains("memory"), "{error}");
    assert!(fs.stop().is_empty());
}

#[test]
fn backend_that_lacks_features_is_refused() {
    for offered in [
        0,
        OFFERED & !(1 << 30),
        OFFERED & !(1 << VIRTIO_F_VERSION_1),
    ] {
        let (fs, _backend) = device_with(offered, None);
        let error = fs.err().unwrap().to_string();
        assert!(error.contains(&format!("{offered:#x}")), "{error}");
    }
}

#[test]
fn backend_that_dies_at_any_request_is_an_error_and_no_hang() {
    for dies_at in [GET_FEATURES, GET_PROTOCOL_FEATURES] {
        assert!(device_with(OFFERED, Some(dies_at)).0.is_err());
    }
    for dies_at in [
        SET_FEATURES,
        SET_MEM_TABLE,
        SET_VRING_KICK,
        SET_VRING_ENABLE,
    ] {
        let (fs, backend) = device_with(OFFERED, Some(dies_at));
        let mut fs = fs.unwrap();
        let driver = Driver::with_memory(&fs, shared_memory());
        assert!(
            fs.activate(driver.activation(FEATURES)).is_err(),
            "{dies_at}"
        );
        backend.thread.join().unwrap();
    }
    let (fs, _backend) = device_with(OFFERED, Some(GET_VRING_BASE));
    let mut fs = fs.unwrap();
    let driver = Driver::with_memory(&fs, shared_memory());
    driver.activate(&mut fs);
    assert_eq!(fs.stop().len(), 2);
}

#[test]
fn backend_that_is_gone_is_watched_no_longer() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let end = theirs.try_clone().unwrap();
    let _backend = Backend::start(theirs, OFFERED, None);
    let mut fs = Fs::new(args("share0", ours)).unwrap();
    let driver = Driver::with_memory(&fs, shared_memory());
    driver.activate(&mut fs);

    end.shutdown(std::net::Shutdown::Both).unwrap();
    driver.settle(&mut fs);

    assert!(fs.counters().contains(&("backend_gone", 1)));
    assert_eq!(fs.stop().len(), 2);
}

#[test]
fn restore_of_a_device_in_use_is_refused() {
    let (mut fs, driver, _backend) = device();
    let fresh = fs.save();
    driver.activate(&mut fs);
    fs.stop();
    let used = fs.save();
    let restored = |tag: &str, state: &serde_json::Value| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let _backend = Backend::start(theirs, OFFERED, None);
        Fs::restore(args(tag, ours), state).map(|fs| fs.save())
    };
    assert_eq!(restored("share0", &fresh).unwrap(), fresh);
    let error = restored("share0", &used).unwrap_err().to_string();
    assert!(error.contains("use by the guest"), "{error}");
    assert!(restored("other", &fresh).is_err());
    assert!(restored("share0", &serde_json::json!({"tag": 1})).is_err());
}

proptest! {
    #[test]
    fn backend_that_sends_anything_is_an_error_and_no_hang(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&bytes).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        prop_assert!(Fs::new(args("share0", ours)).is_err());
    }
}
