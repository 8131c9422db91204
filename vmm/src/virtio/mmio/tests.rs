//! The transport against a mock device and a hostile driver.

use super::*;
use crate::virtio::Readiness;
use proptest::prelude::*;
use std::os::fd::RawFd;
use vm_memory::GuestAddress;

const QUEUE_SIZE: u16 = 256;
const FEATURE: u64 = 1 << 5;

#[derive(Default)]
struct Mock {
    queues: Vec<ActiveQueue>,
    activations: usize,
    stops: usize,
    fails: bool,
    written: Vec<(u64, Vec<u8>)>,
}

impl Device for Mock {
    fn id(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        FEATURE | F_EVENT_IDX
    }
    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (byte, value) in data.iter_mut().zip(offset..) {
            *byte = value as u8;
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.written.push((offset, data.to_vec()));
    }
    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.activations += 1;
        self.queues = activation.queues;
        if self.fails {
            return Err(io::ErrorKind::Other.into());
        }
        Ok(())
    }
    fn handle(&mut self, _token: u64, _readiness: Readiness) {}
    fn stop(&mut self) -> Vec<ActiveQueue> {
        self.stops += 1;
        std::mem::take(&mut self.queues)
    }
    fn save(&self) -> serde_json::Value {
        serde_json::json!({ "activations": self.activations })
    }
}

struct NoWatcher;

impl Watcher for NoWatcher {
    fn add(&self, _: RawFd, _: Readiness, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn modify(&self, _: RawFd, _: Readiness, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn remove(&self, _: RawFd) -> io::Result<()> {
        Ok(())
    }
}

struct Driver {
    mock: Arc<Mutex<Mock>>,
    transport: Transport,
}

fn args(mock: Arc<Mutex<Mock>>) -> Args {
    Args {
        device: mock,
        memory: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory"),
        watcher: Box::new(|| Box::new(NoWatcher)),
    }
}

impl Driver {
    fn new() -> Self {
        let mock = Arc::new(Mutex::new(Mock::default()));
        let transport = Transport::new(args(mock.clone())).expect("transport");
        Self { mock, transport }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// Up to FEATURES_OK.
    fn negotiate(&self, features: u64) {
        self.write(0x070, ACKNOWLEDGE);
        self.write(0x070, ACKNOWLEDGE | DRIVER);
        self.write(0x024, 0);
        self.write(0x020, features as u32);
        self.write(0x024, 1);
        self.write(0x020, (features >> 32) as u32);
        self.write(0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn set_queue(&self, index: u32, at: u32) {
        self.write(0x030, index);
        self.write(0x038, 128);
        self.write(0x080, at);
        self.write(0x090, at + 0x1000);
        self.write(0x0a0, at + 0x2000);
        self.write(0x044, 1);
    }

    fn driver_ok(&self) {
        let status = self.read(0x070);
        self.write(0x070, status | DRIVER_OK);
    }

    fn bring_up(&self) {
        self.negotiate(F_VERSION_1 | FEATURE);
        self.set_queue(0, 0x1_0000);
        self.set_queue(1, 0x2_0000);
        self.driver_ok();
    }
}

#[test]
fn registers_identify_a_modern_device() {
    let driver = Driver::new();

    assert_eq!(driver.read(0x000), 0x7472_6976);
    assert_eq!(driver.read(0x004), 2);
    assert_eq!(driver.read(0x008), 42);
    assert_eq!(driver.read(0x034), u32::from(QUEUE_SIZE));
    assert_eq!(driver.read(0x0b0), u32::MAX);
}

#[test]
fn features_are_read_in_halves() {
    let driver = Driver::new();

    assert_eq!(driver.read(0x010), (FEATURE | F_EVENT_IDX) as u32);
    driver.write(0x014, 1);
    assert_eq!(driver.read(0x010), 1);
    driver.write(0x014, 2);
    assert_eq!(driver.read(0x010), 0);
}

#[test]
fn driver_ok_after_setup_activates_with_queues() {
    let driver = Driver::new();

    driver.bring_up();

    let mock = lock(&driver.mock);
    assert_eq!(mock.activations, 1);
    assert!(mock.queues.iter().all(|active| active.queue.ready()));
    assert_eq!(mock.queues[1].queue.desc_table(), 0x2_0000);
    assert_eq!(mock.queues[1].queue.size(), 128);
}

#[test]
fn queue_left_out_is_not_ready() {
    let driver = Driver::new();

    driver.negotiate(F_VERSION_1);
    driver.set_queue(0, 0x1_0000);
    driver.driver_ok();

    let ready: Vec<bool> = lock(&driver.mock)
        .queues
        .iter()
        .map(|active| active.queue.ready())
        .collect();
    assert_eq!(ready, [true, false]);
}

#[test]
fn features_not_offered_are_refused() {
    let driver = Driver::new();

    driver.negotiate(F_VERSION_1 | 1 << 40);

    assert_eq!(driver.read(0x070) & FEATURES_OK, 0);
}

#[test]
fn features_without_version_1_are_refused() {
    let driver = Driver::new();

    driver.negotiate(FEATURE);

    assert_eq!(driver.read(0x070) & FEATURES_OK, 0);
}

#[test]
fn features_after_features_ok_are_ignored() {
    let driver = Driver::new();
    driver.negotiate(F_VERSION_1);

    driver.write(0x024, 0);
    driver.write(0x020, u32::MAX);
    driver.set_queue(0, 0x1_0000);
    driver.driver_ok();

    assert_eq!(driver.read(0x070) & (DRIVER_OK | NEEDS_RESET), DRIVER_OK);
}

#[test]
fn driver_ok_without_features_ok_is_ignored() {
    let driver = Driver::new();

    driver.write(0x070, ACKNOWLEDGE | DRIVER | DRIVER_OK);

    assert_eq!(driver.read(0x070), ACKNOWLEDGE | DRIVER);
    assert_eq!(lock(&driver.mock).activations, 0);
}

#[test]
fn driver_ok_twice_activates_once() {
    let driver = Driver::new();
    driver.bring_up();

    driver.driver_ok();

    assert_eq!(lock(&driver.mock).activations, 1);
}

#[test]
fn queue_outside_of_memory_needs_reset() {
    for at in [0xf_f000, 0x10_0000, 0xffff_0000] {
        let driver = Driver::new();
        driver.negotiate(F_VERSION_1);
        driver.set_queue(0, at);

        driver.driver_ok();

        assert_ne!(driver.read(0x070) & NEEDS_RESET, 0, "{at:#x}");
        assert_eq!(driver.read(0x060), ISR_CONFIG);
        assert_eq!(lock(&driver.mock).activations, 0);
    }
}

#[test]
fn queue_of_bad_size_needs_reset() {
    for size in [0, 3, 512, 65536, u32::MAX] {
        let driver = Driver::new();
        driver.negotiate(F_VERSION_1);
        driver.set_queue(0, 0x1_0000);
        driver.write(0x038, size);

        driver.driver_ok();

        assert_ne!(driver.read(0x070) & NEEDS_RESET, 0, "{size}");
    }
}

#[test]
fn failing_device_needs_reset_and_works_after_it() {
    let driver = Driver::new();
    lock(&driver.mock).fails = true;
    driver.bring_up();
    assert_ne!(driver.read(0x070) & NEEDS_RESET, 0);

    lock(&driver.mock).fails = false;
    driver.write(0x070, 0);
    driver.bring_up();

    assert_eq!(driver.read(0x070) & (DRIVER_OK | NEEDS_RESET), DRIVER_OK);
    assert_eq!(lock(&driver.mock).queues.len(), 2);
}

#[test]
fn reset_stops_device_and_forgets_queues() {
    let driver = Driver::new();
    driver.bring_up();

    driver.write(0x070, 0);

    assert_eq!(driver.read(0x070), 0);
    assert_eq!(driver.read(0x044), 0);
    assert_eq!(lock(&driver.mock).stops, 1);
    driver.bring_up();
    assert_eq!(lock(&driver.mock).activations, 2);
}

#[test]
fn queue_setup_while_active_is_ignored() {
    let driver = Driver::new();
    driver.bring_up();

    driver.set_queue(0, 0x5_0000);
    driver.transport.pause();
    driver.transport.resume();

    let mock = lock(&driver.mock);
    assert_eq!(mock.queues[0].queue.desc_table(), 0x1_0000);
}

#[test]
fn interrupt_sets_isr_until_acknowledged() {
    let driver = Driver::new();
    let line = driver.transport.line().clone();

    line.used();
    line.config_changed();

    assert_eq!(driver.read(0x060), ISR_USED | ISR_CONFIG);
    assert_eq!(driver.read(0x0fc), 1);
    driver.write(0x064, ISR_USED);
    assert_eq!(driver.read(0x060), ISR_CONFIG);
    assert_eq!(line.irqfd().read().expect("signalled"), 2);
}

#[test]
fn config_space_passes_offset_and_width() {
    let driver = Driver::new();

    let mut two = [0; 2];
    driver.transport.read(0x106, &mut two);
    driver.transport.write(0x108, &[1, 2, 3]);

    assert_eq!(two, [6, 7]);
    assert_eq!(lock(&driver.mock).written, [(8, vec![1, 2, 3])]);
}

#[test]
fn register_access_of_other_width_does_nothing() {
    let driver = Driver::new();

    let mut byte = [0];
    driver.transport.read(0x000, &mut byte);
    driver.transport.write(0x070, &[1]);
    driver.transport.write(0x070, &[1; 8]);

    assert_eq!(byte, [0]);
    assert_eq!(driver.read(0x070), 0);
}

#[test]
fn notify_of_a_queue_that_is_not_there_does_nothing() {
    let driver = Driver::new();
    driver.bring_up();

    driver.write(0x050, 2);
    driver.write(0x050, u32::MAX);

    let mock = lock(&driver.mock);
    assert!(mock.queues.iter().all(|active| active.kick.read().is_err()));
}

#[test]
fn pause_and_resume_keep_queue_positions() {
    let driver = Driver::new();
    driver.bring_up();
    lock(&driver.mock).queues[0].queue.set_next_avail(7);
    lock(&driver.mock).queues[0].queue.set_next_used(5);

    driver.transport.pause();
    driver.transport.pause();
    assert!(lock(&driver.mock).queues.is_empty());
    driver.transport.resume();
    driver.transport.resume();

    let mock = lock(&driver.mock);
    assert_eq!((mock.activations, mock.stops), (2, 1));
    assert_eq!(mock.queues[0].queue.next_avail(), 7);
    assert_eq!(mock.queues[0].queue.next_used(), 5);
}

#[test]
fn saved_state_restores_to_an_equal_device() {
    let driver = Driver::new();
    driver.bring_up();
    lock(&driver.mock).queues[1].queue.set_next_avail(9);
    driver.transport.line().used();
    driver.transport.pause();
    let saved = driver.transport.save();
    let json = serde_json::to_string(&saved).expect("serializable");

    let mock = Arc::new(Mutex::new(Mock::default()));
    let state = serde_json::from_str(&json).expect("deserializable");
    let restored = Transport::restore(args(mock.clone()), &state).expect("fits");

    let same = State {
        device: saved.device.clone(),
        ..restored.save()
    };
    assert_eq!(same, saved);
    restored.resume();
    assert_eq!(lock(&mock).queues[1].queue.next_avail(), 9);
    // The interrupt that was on its way arrives after the restore.
    assert!(restored.line().irqfd().read().is_ok());
}

#[test]
fn saved_state_of_another_device_is_refused() {
    let driver = Driver::new();
    driver.transport.pause();
    let state = State {
        id: 2,
        ..driver.transport.save()
    };

    let result = Transport::restore(args(driver.mock.clone()), &state);

    assert!(matches!(
        result.err(),
        Some(RestoreError::Mismatch {
            found: 2,
            expected: 42,
            ..
        })
    ));
}

#[derive(Debug, Clone)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Pause,
    Resume,
}

fn access() -> impl Strategy<Value = Access> {
    let offset = prop_oneof![
        4 => (0u64..0x48).prop_map(|word| word * 4),
        1 => 0u64..0x1000,
    ];
    let value = prop_oneof![
        (0u32..256).prop_map(|v| v.to_le_bytes().to_vec()),
        any::<u32>().prop_map(|v| v.to_le_bytes().to_vec()),
        proptest::collection::vec(any::<u8>(), 0..9),
    ];
    prop_oneof![
        1 => (offset.clone(), 0usize..9).prop_map(|(at, len)| Access::Read(at, len)),
        8 => (offset, value).prop_map(|(at, data)| Access::Write(at, data)),
        1 => Just(Access::Pause),
        1 => Just(Access::Resume),
    ]
}

proptest! {
    #[test]
    fn any_sequence_of_accesses_is_survived(
        set_up: bool, sequence in proptest::collection::vec(access(), 0..60)
    ) {
        let driver = Driver::new();
        if set_up {
            driver.bring_up();
        }
        for step in sequence {
            match step {
                Access::Read(at, len) => driver.transport.read(at, &mut vec![0; len]),
                Access::Write(at, data) => driver.transport.write(at, &data),
                Access::Pause => driver.transport.pause(),
                Access::Resume => driver.transport.resume(),
            }
        }
        // Whatever happened, a reset brings a working device back.
        driver.transport.resume();
        driver.write(0x070, 0);
        driver.bring_up();
        prop_assert_eq!(driver.read(0x070) & (DRIVER_OK | NEEDS_RESET), DRIVER_OK);
        prop_assert_eq!(lock(&driver.mock).queues.len(), 2);
    }
}
