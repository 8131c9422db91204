//! Images that nobody should accept: an error that says why, and nothing left behind.

use std::fs;
use std::path::Path;
use std::time::Duration;

use casemate_tests::{Host, Running, paths};

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
        ("absolute", "/escaped"),
        ("symlinked-out", "way-out/escaped"),
        ("symlinked-to-root", "way-out/escaped"),
        ("link-to-nothing", "no/such/file"),
    ] {
        let host = Host::new();
        load(&host, name).fails().complains_of(path);
        host.casemate(["images", "-q"]).succeeds().prints("");
        for place in ["/", "/etc"]
            .map(Path::new)
            .into_iter()
            .chain([host.dir(), &host.data()])
        {
            assert!(
                !place.join("escaped").exists(),
                "{name} wrote into {}",
                place.display()
            );
        }
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
fn whiteout_of_what_was_never_there_is_without_effect() {
    let host = Host::new();
    load(&host, "whiteouts-of-nothing").succeeds();
    host.casemate(["inspect", "whiteouts-of-nothing"])
        .succeeds();
}

#[test]
fn absolute_paths_when_allowed_are_taken_and_stay_inside() {
    let host = Host::new().configured("[image.limits]\nallow_absolute_paths = true\n");
    load(&host, "absolute").succeeds();
    assert!(!Path::new("/escaped").exists());
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

/// The most memory that a running command ever had, in bytes, as long as it can be seen.
fn peak_memory(run: &Running) -> u64 {
    let status = format!("/proc/{}/status", run.pid().as_raw_nonzero());
    let mut peak = 0;
    // Gone or a zombie: without memory.
    while let Some(kib) = fs::read_to_string(&status).ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    }) {
        peak = kib << 10;
        std::thread::sleep(Duration::from_millis(5));
    }
    peak
}

#[test]
fn layer_of_a_million_entries_is_taken_in_bounded_memory_and_time() {
    let host = Host::new();
    let archive = paths::fixtures().join("million.tar");
    let run = host.start(["load", "-i", &archive.to_string_lossy()]);
    let peak = peak_memory(&run);
    run.ends().succeeds();
    assert!(peak < 600 << 20, "{} MiB", peak >> 20);
    assert!(peak > 10 << 20, "{peak} bytes is no peak");
    host.casemate(["rmi", "million"]).succeeds();
    assert!(bytes(&host.data()) < 1 << 20);
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
