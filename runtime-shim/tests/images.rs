//! The `casemate` program and its image store: what an image says stays text, and `save` destroys nothing.
#![cfg(feature = "cli")]

use casemate_image::Digest;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};

const EVIL: &str = "\x1b]0;x\x07\u{9b}\u{202e}\nnext";
const SHOWN: &str = r"\u001b]0;x\u0007\u009b\u202e\u000anext";

fn casemate(data: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_casemate"))
        .args(arguments)
        .env("CASEMATE_DATA", data.join("data"))
        .env("CASEMATE_STATE", data.join("state"))
        .env("HOME", data)
        .env_remove("XDG_CONFIG_HOME")
        .output()
        .unwrap()
}

/// What it printed; it must have ended well.
#[track_caller]
fn printed(data: &Path, arguments: &[&str]) -> String {
    let output = casemate(data, arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// Loads an image `app:1` of one empty layer whose configuration holds escapes.
fn loaded() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let blobs = dir.path().join("layout/blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8], kind: &str| {
        let digest = Digest::of(bytes);
        std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": bytes.len()})
    };
    let layer = put(&[0; 1024], "layer.v1.tar");
    let config = json!({
        "architecture": "amd64", "os": "linux", "created": EVIL,
        "config": {"Labels": {"evil": EVIL}, "Entrypoint": [EVIL]},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    });
    let config = put(config.to_string().as_bytes(), "config.v1+json");
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": [layer]});
    let mut entry = put(manifest.to_string().as_bytes(), "manifest.v1+json");
    entry["annotations"] = json!({"io.containerd.image.name": "docker.io/library/app:1"});
    let index = json!({"schemaVersion": 2, "manifests": [entry]});
    std::fs::write(dir.path().join("layout/index.json"), index.to_string()).unwrap();
    let layout = dir.path().join("layout");
    printed(dir.path(), &["load", "-q", "-i", layout.to_str().unwrap()]);
    dir
}

#[test]
fn images_and_inspect_of_a_hostile_image_print_no_escapes() {
    let dir = loaded();
    for (arguments, part) in [
        (vec!["images", "--format", "{{.CreatedAt}}"], SHOWN),
        (
            vec!["images", "--format", "table {{.ID}}\\t{{.CreatedAt}}"],
            SHOWN,
        ),
        (vec!["inspect", "--format", "{{.Created}}", "app:1"], SHOWN),
        (
            vec![
                "inspect",
                "--format",
                "{{index .Config.Labels \"evil\"}}",
                "app:1",
            ],
            SHOWN,
        ),
        (
            vec!["inspect", "--format", "{{.Config.Entrypoint}}", "app:1"],
            SHOWN,
        ),
        (vec!["inspect", "app:1"], r"\u009b"),
        (vec!["images", "--format", "json"], r"\u009b"),
        (vec!["images"], "app"),
    ] {
        let text = printed(dir.path(), &arguments);
        assert!(text.contains(part), "{arguments:?}: {text:?}");
        let unfit = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(!text.contains(unfit), "{arguments:?}: {text:?}");
    }
    let inspected: Value =
        serde_json::from_str(&printed(dir.path(), &["inspect", "app:1"])).unwrap();
    assert_eq!(inspected[0]["Created"], EVIL, "JSON keeps its meaning");
}

#[test]
fn save_that_fails_leaves_the_old_file_alone() {
    let dir = loaded();
    let out = dir.path().join("out.tar");
    let file = out.to_str().unwrap();
    let save = |name: &str| {
        casemate(dir.path(), &["save", "-o", file, name])
            .status
            .success()
    };
    std::fs::write(&out, "old").unwrap();
    assert!(!save("unknown"));
    // The layer's bytes go missing half-way: the archive has begun.
    let layers = dir.path().join("data/layers");
    let away = dir.path().join("away");
    std::fs::rename(&layers, &away).unwrap();
    std::fs::create_dir(&layers).unwrap();
    assert!(!save("app:1"));
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "old");
    std::fs::remove_dir(&layers).unwrap();
    std::fs::rename(&away, &layers).unwrap();
    assert!(save("app:1"));
    assert!(std::fs::metadata(&out).unwrap().len() > 4096);
    let names = std::fs::read_dir(dir.path()).unwrap();
    let left: Vec<_> = names.map(|e| e.unwrap().file_name()).collect();
    assert!(
        !left.iter().any(|n| n.to_string_lossy().contains("partial")),
        "{left:?}"
    );
}

#[test]
fn save_through_a_link_keeps_link_and_mode() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = loaded();
    let (real, link) = (dir.path().join("real.tar"), dir.path().join("link.tar"));
    std::fs::write(&real, "old").unwrap();
    std::fs::set_permissions(&real, std::fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    printed(dir.path(), &["save", "-o", link.to_str().unwrap(), "app:1"]);
    assert!(link.symlink_metadata().unwrap().is_symlink());
    let metadata = real.metadata().unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o640);
    assert!(metadata.len() > 4096);
}

#[test]
fn save_into_a_device_or_a_fifo_writes_straight_and_unlinks_nothing() {
    let dir = loaded();
    let pipe = dir.path().join("pipe");
    let path = pipe.to_str().unwrap();
    assert!(
        Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    // Refused before the FIFO is opened: nobody reads it yet.
    assert!(
        !casemate(dir.path(), &["save", "-o", path, "unknown"])
            .status
            .success()
    );
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || std::fs::read(pipe).unwrap()
    });
    printed(dir.path(), &["save", "-o", path, "app:1"]);
    assert!(reader.join().unwrap().len() > 4096);
    assert!(pipe.exists());
    // A device of our own would need root; the null device must survive a success and a failure.
    printed(dir.path(), &["save", "-o", "/dev/null", "app:1"]);
    assert!(
        !casemate(dir.path(), &["save", "-o", "/dev/null", "unknown"])
            .status
            .success()
    );
    assert!(Path::new("/dev/null").exists());
}
