//! The tree in the guest is the tree that umoci unpacks.

use std::collections::BTreeMap;
use std::fs;

use casemate_tests::{Host, paths};

/// What a container gets of its own in place of the image's.
const OURS: [&str; 8] = [
    "proc",
    "sys",
    "dev",
    "etc/hosts",
    "etc/hostname",
    "etc/resolv.conf",
    "run",
    "etc/mtab",
];

#[test]
fn tree_in_the_guest_is_the_tree_that_umoci_unpacks() {
    let host = Host::with_images();
    // One right more than usual: the files that nobody may read are compared as well.
    let args = [
        "--read-only",
        "--cap-add",
        "all",
        "museum",
        "guest-tool",
        "tree",
        "/",
    ];
    let out = host.run(args.into_iter().chain(OURS));
    let inside = by_path(&out.succeeds().text());
    let golden = by_path(&fs::read_to_string(paths::fixtures().join("museum.listing")).unwrap());
    let mut differences = Vec::new();
    for path in inside
        .keys()
        .chain(golden.keys())
        .collect::<std::collections::BTreeSet<_>>()
    {
        let ours = OURS
            .iter()
            .any(|name| path.strip_prefix("./") == Some(name));
        // Mount points in /etc touch nothing but its time; the root's own time is nobody's.
        let only_time = matches!(path.as_str(), "." | "./etc");
        if !ours && !only_time && inside.get(path) != golden.get(path) {
            differences.push(format!(
                "{path}:\n  guest {:?}\n  umoci {:?}",
                inside.get(path),
                golden.get(path)
            ));
        }
    }
    assert!(
        differences.is_empty(),
        "{} differences\n{}",
        differences.len(),
        differences.join("\n")
    );
    assert!(
        golden.len() > 900,
        "the museum has more than {} exhibits",
        golden.len()
    );
}

#[test]
fn tree_behind_a_writable_layer_is_the_same() {
    let host = Host::with_images();
    let list = |options: &[&str]| {
        let args = options.iter().copied().chain([
            "--cap-add",
            "all",
            "museum",
            "guest-tool",
            "tree",
            "/museum",
        ]);
        host.run(args).succeeds().text()
    };
    assert_eq!(list(&["--read-only"]), list(&[]));
}

fn by_path(listing: &str) -> BTreeMap<String, String> {
    let lines = listing.lines().filter_map(|line| {
        // A path's white space is not escaped, its mode is the first octal number after it.
        let at = line.match_indices(' ').map(|(at, _)| at).find(|at| {
            let mode = line[at + 1..].split(' ').next().unwrap_or("");
            mode.len() >= 4
                && mode.bytes().all(|byte| (b'0'..=b'7').contains(&byte))
                && line[at + 1..].contains(':')
        })?;
        Some((line[..at].to_owned(), line[at + 1..].to_owned()))
    });
    lines.collect()
}
