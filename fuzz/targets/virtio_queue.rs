//! A ring of any content: walking, filling and handing back what comes off it.
#![no_main]

use casemate_fuzz::guest::Play;
use casemate_vmm::virtio::buffers::Buffers;
use casemate_vmm::virtio::ring::{Chain, Ring};
use casemate_vmm::virtio::supply::Supply;
use casemate_vmm::virtio::testing::Driver;
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

fn use_up(buffers: &mut Buffers) {
    let len = buffers.len();
    let mut scratch = vec![0; len.min(10_000)];
    assert_eq!(buffers.read_slice(&mut scratch), scratch.len());
    buffers.write_zeros(100);
    buffers.skip(len / 2);
    let _ = buffers.read::<16>();
    let _ = buffers.write(&[1; 9]);
    if let Some(last) = buffers.split_last_byte() {
        last.write(1);
    }
    assert!(buffers.len() <= len);
}

fuzz_target!(|input: (bool, u8, Play)| {
    let (event_idx, reserve, play) = input;
    let mut driver = Driver::with_queues(&[32, 8]);
    play.lay(&mut driver);
    let activation = driver.activation(0);
    let memory = Arc::new(activation.memory);
    let mut queues = activation
        .queues
        .into_iter()
        .map(|queue| Ring::new(&memory, queue, event_idx));
    let (Some(mut ring), Some(supplied)) = (queues.next(), queues.next()) else {
        return;
    };

    let mut chain = Chain::new(&memory);
    // Bounded: a ring that overlaps a buffer can feed itself.
    for turn in 0..100 {
        if !ring.pop_even_outside(&mut chain) {
            break;
        }
        use_up(&mut chain.readable);
        use_up(&mut chain.writable);
        ring.push(chain.head, turn);
        ring.notify(driver.interrupt.as_ref());
    }
    ring.rearm();

    let mut supply = Supply::new(&memory, supplied, reserve.into());
    let room = supply.prepare(100_000);
    let filled = supply
        .fill(room, |target| target.fill_random(room))
        .expect("the kernel's random data");
    assert_eq!(filled, room);
    let mut left = filled;
    while let Some(done) = supply.finish(left.min(1000), |_, front| {
        front.write(&vec![0; reserve.into()]);
    }) {
        left -= done;
    }
    supply.into_inner();
});
