//! Where things are.

use std::path::{Path, PathBuf};

/// The repository's root.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests crate lies in the repository")
        .to_path_buf()
}

/// The installed or staged tree under test: `CASEMATE_PREFIX`, else `build/` in the repository.
pub fn prefix() -> PathBuf {
    std::env::var_os("CASEMATE_PREFIX").map_or_else(|| repository().join("build"), PathBuf::from)
}

/// The CLI under test.
pub fn casemate() -> PathBuf {
    prefix().join("bin/casemate")
}

/// What `casemate-fixtures` wrote: `CASEMATE_FIXTURES`, else `target/fixtures` in the repository.
pub fn fixtures() -> PathBuf {
    std::env::var_os("CASEMATE_FIXTURES")
        .map_or_else(|| repository().join("target/fixtures"), PathBuf::from)
}

/// Where stores and state of the tests live; on the KVM host a file system that can hold sparse disks.
pub fn scratch() -> PathBuf {
    std::env::var_os("CASEMATE_SCRATCH").map_or_else(std::env::temp_dir, PathBuf::from)
}
