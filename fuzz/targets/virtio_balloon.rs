//! virtio-balloon under any driver.
#![no_main]

use casemate_fuzz::guest::Play;
use casemate_vmm::virtio::balloon::Balloon;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|play: Play| {
    play.run(&mut Balloon::new(10), |balloon, what, number| {
        match what % 2 {
            0 => balloon.request_stats(),
            _ => {
                let _ = balloon.set_target(number % 16);
            }
        }
    });
});
