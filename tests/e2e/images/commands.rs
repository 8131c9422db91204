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
        .mentions("IMAGE ID")
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
fn table_shows_the_fields_of_a_template_below_their_names() {
    let host = Host::with_images();
    let table = host
        .casemate([
            "images",
            "--format",
            "table {{.Repository}}\t{{.Size}}",
            "busybox",
        ])
        .succeeds()
        .text();
    let lines: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines.len(), 2, "{table}");
    assert_eq!(lines[0], ["REPOSITORY", "SIZE"]);
    assert_eq!(lines[1][0], "busybox");
    let spelled = host
        .casemate(["images", "--format", "table"])
        .succeeds()
        .text();
    assert_eq!(spelled, host.casemate(["images"]).succeeds().text());
    // Each way of naming one image shows the same one.
    let by = |arguments: &[&str]| host.casemate(arguments).succeeds().word();
    let id = by(&["images", "--no-trunc", "-q", "busybox"]);
    assert!(id.starts_with("sha256:") && id.len() == 71, "{id}");
    assert_eq!(by(&["images", "-q", "busybox:latest"]), id[7..19]);
    assert_eq!(by(&["inspect", "--format", "{{.Id}}", &id[7..19]]), id);
    let digests = by(&["images", "--digests", "--format", "{{.Digest}}", "busybox"]);
    assert!(digests.starts_with("sha256:"), "{digests}");
}

#[test]
fn inspect_and_version_take_templates_json_and_tables() {
    let host = Host::with_images();
    let inspect = |format: &str| {
        host.casemate(["inspect", "--format", format, "configured"])
            .succeeds()
            .text()
    };
    assert_eq!(
        inspect("{{.Architecture}}/{{.Os}} {{.Config.User}}"),
        "amd64/linux alice\n"
    );
    assert_eq!(
        inspect("{{json .Config.Cmd}} {{len .RootFS.Layers}}"),
        "[\"cmd\"] 1\n"
    );
    assert_eq!(
        inspect("{{upper .Config.User}} {{index .Config.Entrypoint 1}}"),
        "ALICE entry\n"
    );
    let document: Value = serde_json::from_str(&inspect("json")).unwrap();
    assert_eq!(
        document["Config"]["WorkingDir"], "/home/alice",
        "{document}"
    );
    host.casemate(["inspect", "--format", "{{.No.Such}}", "configured"])
        .fails()
        .complains_of("No");
    // What was found is shown all the same.
    host.casemate(["inspect", "--format", "{{.Os}}", "nosuch", "configured"])
        .fails()
        .prints("linux\n")
        .complains_of("nosuch");

    let version = env!("CARGO_PKG_VERSION");
    host.casemate(["version", "--format", "{{.Version}}"])
        .succeeds()
        .prints(&format!("{version}\n"));
    let text = host
        .casemate(["version", "--format", "json"])
        .succeeds()
        .text();
    let document: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(document["Version"], version, "{document}");
    host.casemate(["version", "--format", "table"])
        .succeeds()
        .mentions("VERSION")
        .mentions(version);
}

#[test]
fn tag_gives_an_image_a_further_name_and_rmi_takes_names_one_by_one() {
    let host = Host::with_images();
    host.casemate(["tag", "busybox", "example.org/team/box:v1"])
        .succeeds();
    host.casemate(["inspect", "example.org/team/box:v1"])
        .succeeds();
    let id = host.casemate(["images", "-q", "busybox"]).succeeds().word();
    host.casemate(["rmi", &id])
        .fails()
        .complains_of("example.org/team/box:v1")
        .complains_of("--force");
    host.casemate(["rmi", "busybox"])
        .succeeds()
        .prints("Untagged: docker.io/library/busybox:latest\n");
    host.casemate(["inspect", "example.org/team/box:v1"])
        .succeeds();
    host.casemate(["rmi", "example.org/team/box:v1"])
        .succeeds()
        .mentions("Deleted: sha256:");
    host.casemate(["tag", "busybox", "again"])
        .fails()
        .complains_of("busybox");
    host.casemate(["tag", "museum", "NOT A NAME"])
        .fails()
        .complains_of("NOT A NAME");
}

#[test]
fn prune_removes_the_nameless_or_all_and_asks_first() {
    let host = Host::with_images();
    // Nobody is there to answer.
    host.casemate(["prune"]).fails().complains_of("--force");
    host.casemate(["prune", "--force"])
        .succeeds()
        .mentions("Total reclaimed space: 0");
    assert_eq!(
        host.casemate(["images", "-q"])
            .succeeds()
            .text()
            .lines()
            .count(),
        3
    );
    host.casemate(["prune", "--all", "--force"])
        .succeeds()
        .mentions("Deleted: sha256:")
        .mentions("Total reclaimed space: ");
    host.casemate(["images", "-q"]).succeeds().prints("");
    for directory in ["layers", "rootfs", "blobs/sha256"] {
        let left = std::fs::read_dir(host.data().join(directory))
            .unwrap()
            .count();
        assert_eq!(left, 0, "files in {directory}");
    }
}

#[test]
fn completions_and_man_pages_are_made() {
    let host = Host::new();
    for shell in ["bash", "zsh", "fish"] {
        host.casemate(["completion", shell])
            .succeeds()
            .mentions("casemate")
            .mentions("kernel-log");
    }
    let dir = host.dir().join("man");
    std::fs::create_dir(&dir).unwrap();
    host.casemate(["man", &dir.to_string_lossy()]).succeeds();
    let page = std::fs::read_to_string(dir.join("casemate-run.1")).unwrap();
    assert!(page.contains("kernel\\-log"), "{page}");
}

#[test]
fn check_on_this_machine_agrees_with_its_exit_code() {
    let host = Host::new();
    let out = host.casemate(["check", "--format", "json"]);
    let document: Value = serde_json::from_str(&out.text()).unwrap();
    assert_eq!(document["Ok"] == true, out.code() == 0, "{document}");
    for check in document["Checks"].as_array().unwrap() {
        let (well, mend) = (check["Ok"] == true, check["Mend"].as_str().unwrap());
        assert_eq!(well, check["Result"] == "ok", "{check}");
        assert_eq!(well, mend.is_empty(), "{check}");
        assert!(well || check["Check"] == "KVM", "{check}");
    }
    host.casemate(["check", "--quiet"])
        .ends_with(out.code())
        .prints("");
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
