//! A layer's archive: what becomes an EROFS blob can be read, merged, and turned back into the same archive.
#![no_main]

use casemate_image::fuzz;
use libfuzzer_sys::fuzz_target;

const BLOCK: usize = 512;

/// Puts each header's checksum right: no input gets past it by chance.
fn seal(archive: &mut [u8]) {
    let mut at = 0;
    while let Some(header) = archive.get_mut(at..at + BLOCK) {
        if header.iter().any(|&byte| byte != 0) {
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        let digits = header[124..136]
            .iter()
            .filter(|byte| (b'0'..=b'7').contains(byte));
        let size = digits.fold(0usize, |size, digit| {
            (size << 3 | usize::from(digit - b'0')) & 0xffff
        });
        at += BLOCK + size.next_multiple_of(BLOCK);
    }
}

fuzz_target!(|bytes: &[u8]| {
    fuzz::tar_to_erofs(bytes);
    let mut archive = bytes.to_vec();
    seal(&mut archive);
    fuzz::tar_reader(&archive);
    fuzz::tar_to_erofs(&archive);
});
