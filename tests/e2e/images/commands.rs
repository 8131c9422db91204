//! The commands themselves: listing, inspecting, removing, documentation.

use casemate_tests::{Host, Running};
use serde_json::Value;

#[test]
fn images_are_listed_as_a_table_as_json_and_by_a_template() {
    let host = Host::with_images();
    let table = host.casemate(["images"]);
    table
        .succeeds()
        .mentions("REPOSITORY")
        .mentions("TAG")
        .mentions(" ID ")
        .mentions("busybox");

    let json = host
        .casemate(["images", "--format", "json"])
        .succeeds()
        .text();
    assert!(!json.trim().is_empty());
    for line in json.lines() {
        serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{error} in {line}"));
    }

    let names = host
        .casemate(["images", "--format", "{{.Repository}}:{{.Tag}}"])
        .succeeds()
        .text();
    let mut names: Vec<&str> = names.lines().collect();
    names.sort_unstable();
    assert_eq!(names.len(), 3, "{names:?}");
    assert!(names[0].ends_with("busybox:latest"), "{names:?}");
}

#[test]
fn list_on_a_store_without_images_is_empty() {
    let host = Host::new();
    host.casemate(["images", "-q"]).succeeds().prints("");
}

#[test]
fn inspect_tells_an_images_configuration() {
    let host = Host::with_images();
    let text = host.casemate(["inspect", "configured"]).succeeds().text();
    let document: Value = serde_json::from_str(&text).unwrap();
    let text = document.to_string();
    for part in [
        "alice",
        "/home/alice",
        "FROM_IMAGE=one",
        "org.example.answer",
        "amd64",
    ] {
        assert!(text.contains(part), "no {part} in {text}");
    }
    host.casemate(["inspect", "nosuch"])
        .fails()
        .complains_of("nosuch");
}

#[test]
fn image_removed_is_gone_and_shared_layers_stay() {
    let host = Host::with_images();
    host.casemate(["rmi", "busybox"]).succeeds();
    host.casemate(["rmi", "busybox"])
        .fails()
        .complains_of("busybox");
    let names = host
        .casemate(["images", "--format", "{{.Repository}}"])
        .succeeds()
        .text();
    assert!(
        !names.contains("busybox") && names.contains("configured"),
        "{names}"
    );
}

#[test]
fn template_that_is_wrong_is_refused_by_name() {
    let host = Host::with_images();
    host.casemate(["images", "--format", "{{.NoSuchField}}"])
        .fails()
        .complains_of("NoSuchField");
    host.casemate(["images", "--format", "{{.Repository"])
        .fails();
}

#[test]
fn version_and_help_come_without_a_kvm_host() {
    let host = Host::new();
    host.casemate(["version"])
        .succeeds()
        .mentions(env!("CARGO_PKG_VERSION"));
    host.casemate(["--help"])
        .succeeds()
        .mentions("run")
        .mentions("pull");
    host.casemate(["no-such-command"])
        .fails()
        .complains_of("no-such-command");
}

#[test]
fn listing_into_a_closed_pipe_is_no_panic() {
    let host = Host::with_images();
    let mut command = host.command(["images"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let out = command.stdout(writer).output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(!stderr.contains("panicked"), "{stderr}");
}

#[test]
fn unprivileged_user_has_a_store_of_its_own() {
    let host = Host::with_images().of_user(61_234);
    host.casemate(["images"]).succeeds().mentions("busybox");
    let out = Running::start(host.command(["rmi", "busybox"])).ends();
    out.succeeds();
}
