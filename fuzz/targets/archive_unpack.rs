//! A tar stream that comes out of a container: nothing is written but below the directory it is unpacked into.
#![no_main]

use casemate_archive::{Ids, unpack};
use libfuzzer_sys::fuzz_target;
use std::ffi::OsStr;

/// Of a tar header (POSIX ustar): where its checksum is.
const CHECKSUM: std::ops::Range<usize> = 148..156;

/// Gives every block the checksum that it would have as a header: guessing it teaches nothing.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    let mut blocks = bytes.to_vec();
    for block in blocks.chunks_exact_mut(512) {
        block[CHECKSUM].fill(b' ');
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        block[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    blocks
}

fuzz_target!(|bytes: &[u8]| {
    for (stream, only) in [
        (bytes.to_vec(), None),
        (sealed(bytes), None),
        (sealed(bytes), Some("as")),
    ] {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
        let into = dir.path().join("into");
        std::fs::create_dir(&into).expect("a directory");
        let _ = unpack(stream.as_slice(), &into, only.map(OsStr::new), Ids::Mine);
        let around = std::fs::read_dir(dir.path()).expect("a listing");
        assert_eq!(around.count(), 1, "something is beside the directory");
        if only.is_some() {
            let inside = std::fs::read_dir(&into).expect("a listing").flatten();
            for entry in inside {
                assert_eq!(entry.file_name(), "as");
            }
        }
    }
});
