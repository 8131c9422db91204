//! Images that nobody should accept: an error that says why, and nothing left behind.

use std::fs;
use std::path::Path;

use casemate_tests::{Host, paths};

fn load(host: &Host, name: &str) -> casemate_tests::Finished {
    let archive = paths::fixtures().join(format!("{name}.tar"));
    host.casemate(["load", "-i", &archive.to_string_lossy()])
}

/// Bytes below a directory: what a refused image may not add to.
fn bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    let size = |entry: fs::DirEntry| {
        let meta = entry.metadata().unwrap();
        if meta.is_dir() {
            bytes(&entry.path())
        } else {
            meta.len()
        }
    };
    entries.flatten().map(size).sum()
}

#[test]
fn layer_that_reaches_out_of_its_tree_is_refused_with_the_path() {
    for (name, path) in [
        ("dotdot", "escaped"),
        ("dotdot-inside", "escaped"),
        ("dotdot-link", "shadow"),
        ("link-to-nothing", "no/such/file"),
    ] {
        let host = Host::new();
        load(&host, name).fails().complains_of(path);
        host.casemate(["images", "-q"]).succeeds().prints("");
        assert!(!host.dir().join("escaped").exists() && !host.data().join("escaped").exists());
        host.is_clean();
    }
}

#[test]
fn whiteout_of_nothing_is_refused_or_without_effect() {
    for name in ["whiteout-root", "whiteout-parent"] {
        let host = Host::new();
        let out = load(&host, name);
        if out.code() != 0 {
            out.fails().complains_of(".wh.");
        }
        host.is_clean();
    }
}

#[test]
fn layer_that_ends_early_or_is_something_else_is_refused() {
    for name in ["truncated", "not-a-tar", "wrong-diff-id"] {
        let host = Host::new();
        load(&host, name).fails().complains_of("sha256:");
        host.casemate(["images", "-q"]).succeeds().prints("");
        // The other layer of the archive may stay for the next try; the bad one may not.
        assert!(
            bytes(&host.data()) < 8 << 20,
            "{name} left {} bytes",
            bytes(&host.data())
        );
        host.is_clean();
    }
}

#[test]
fn configuration_of_nonsense_is_refused() {
    let host = Host::new();
    load(&host, "config-of-nonsense").fails();
    host.casemate(["images", "-q"]).succeeds().prints("");
}

#[test]
fn zip_bomb_stops_at_the_configured_limit() {
    let host = Host::new().configured("[image.limits]\nlayer_bytes = 100_000_000\n");
    load(&host, "zip-bomb").fails().complains_of("limit");
    assert!(
        bytes(&host.data()) < 8 << 20,
        "{} bytes were left",
        bytes(&host.data())
    );
    host.is_clean();
}

#[test]
fn layer_of_more_entries_than_allowed_is_refused() {
    let host = Host::new().configured("[image.limits]\nlayer_entries = 500\n");
    load(&host, "museum").fails().complains_of("500");
    host.is_clean();
}

#[test]
fn name_with_a_nul_byte_ends_there_or_is_refused() {
    let host = Host::new();
    let out = load(&host, "nul-in-name");
    if out.code() != 0 {
        out.fails();
    }
    host.is_clean();
}
