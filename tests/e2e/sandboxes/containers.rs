//! Containers and their images beside each other: listed, inspected, kept, removed.

use casemate_tests::{Host, Running};
use serde_json::Value;

fn sleeper(host: &Host, name: &str) -> Running {
    let mut run = host.start_run([
        "--name",
        name,
        "--label",
        "tier=gold",
        "busybox",
        "sh",
        "-c",
        "echo up; read line < /bin/guest-tool; exec sleep 100000",
    ]);
    run.prints("up");
    run
}

#[test]
fn running_container_is_listed_and_inspected() {
    let host = Host::with_images();
    let _run = sleeper(&host, "keep");
    host.casemate(["ps"])
        .succeeds()
        .mentions("CONTAINER ID")
        .mentions("busybox")
        .mentions("keep")
        .mentions("Up ");
    host.casemate(["ps", "--format", "{{.Names}} {{.State}} {{.Labels}}"])
        .succeeds()
        .prints("keep running tier=gold\n");
    let line = host.casemate(["ps", "--format", "json"]).succeeds().text();
    let row: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(row["Image"], "busybox", "{row}");

    let template =
        "{{.State.Status}} {{.State.Running}} {{.Config.Image}} {{index .Args 0}} {{len .Args}}";
    host.casemate(["inspect", "--format", template, "keep"])
        .succeeds()
        .prints("running true busybox -c 2\n");
    let text = host
        .casemate(["inspect", "--type", "container", "keep"])
        .succeeds()
        .text();
    let document: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        document[0]["Config"]["Labels"]["tier"], "gold",
        "{document}"
    );
    let pid = document[0]["State"]["Pid"].as_u64().unwrap();
    assert!(pid > 1, "{document}");
    host.casemate(["inspect", "--type", "image", "keep"])
        .fails()
        .complains_of("keep");
}

#[test]
fn container_without_rm_stays_until_it_is_removed() {
    let host = Host::with_images();
    host.casemate(["run", "--name", "stays", "busybox", "sh", "-c", "exit 4"])
        .ends_with(4);
    host.casemate(["ps", "-q"]).succeeds().prints("");
    host.casemate(["ps", "-a"])
        .succeeds()
        .mentions("stays")
        .mentions("Exited (4)");
    host.casemate(["inspect", "--format", "{{.State.ExitCode}}", "stays"])
        .succeeds()
        .prints("4\n");
    host.run(["--name", "stays", "busybox", "true"])
        .ends_with(125)
        .complains_of("stays");
    host.casemate(["rm", "stays"]).succeeds().prints("stays\n");
    host.casemate(["rm", "stays"]).fails().complains_of("stays");
    host.is_clean();
}

#[test]
fn running_container_is_removed_by_force_only() {
    let host = Host::with_images();
    let run = sleeper(&host, "victim");
    host.casemate(["rm", "victim"])
        .fails()
        .complains_of("running")
        .complains_of("--force");
    host.casemate(["rm", "--force", "victim"]).succeeds();
    assert_ne!(run.ends().code(), 0);
    host.is_clean();
}

#[test]
fn image_in_use_survives_rmi_and_prune() {
    let host = Host::with_images();
    let mut run = host.start_run(["-i", "busybox", "sh"]);
    run.says("echo up\n").prints("up");

    host.casemate(["rmi", "busybox"])
        .fails()
        .complains_of("busybox")
        .complains_of("was made from it");
    host.casemate(["prune", "--all", "--force"])
        .succeeds()
        .mentions("Deleted: sha256:");
    // An image of the same layers counts as in use, one of others does not.
    let left = host
        .casemate(["images", "--format", "{{.Repository}}"])
        .succeeds()
        .text();
    let mut left: Vec<&str> = left.lines().collect();
    left.sort_unstable();
    assert_eq!(left, ["busybox", "configured"]);
    host.casemate(["rmi", "--force", "configured"]).succeeds();

    // By force its name goes; what the container still reads stays until it has ended.
    host.casemate(["rmi", "--force", "busybox"]).succeeds();
    host.casemate(["prune", "--all", "--force"]).succeeds();
    run.says("sha256sum /bin/guest-tool /bin/busybox | wc -l; awk 'BEGIN { print \"still reading\" }'\nexit 6\n")
        .prints("still reading");
    run.ends().ends_with(6).mentions("2\n");
    host.casemate(["prune", "--all", "--force"]).succeeds();
    let layers = std::fs::read_dir(host.data().join("layers"));
    let left: Vec<_> = layers
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .collect();
    assert!(left.is_empty(), "{left:?}");
    host.is_clean();
}
