//! virtio-rng under any driver.
#![no_main]

use casemate_fuzz::guest::Play;
use casemate_vmm::virtio::rng::Rng;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|play: Play| play.run(&mut Rng::new(), |_, _, _| {}));
