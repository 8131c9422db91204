//! virtio-blk under any driver, on its requests' own thread of execution: no worker.
#![no_main]

use casemate_fuzz::guest::Play;
use casemate_vmm::virtio::blk::work_inline;
use casemate_vmm::virtio::testing::Driver;
use libfuzzer_sys::fuzz_target;
use std::fs::File;
use std::os::fd::FromRawFd;

fn memory_file(len: u64) -> File {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: just opened, nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).expect("a file in memory");
    file
}

fuzz_target!(|input: (bool, Play)| {
    let (read_only, play) = input;
    let mut driver = Driver::with_queues(&[128]);
    play.lay(&mut driver);
    let files = vec![memory_file(5000), memory_file(8192), memory_file(1)];
    work_inline(files, read_only, driver.activation(1 << 29));
});
