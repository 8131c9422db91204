//! An EROFS image that something else than our writer made, or damaged.
#![no_main]

use casemate_image::fuzz;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    fuzz::erofs_reader(bytes);
    // Past the superblock's checksum as well.
    fuzz::erofs_reader(&fuzz::sealed_erofs(bytes));
});
