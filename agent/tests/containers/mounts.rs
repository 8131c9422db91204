//! Mounts, and files that are handed in.

use casemate_protocol::agent;
use serde_json::json;
use ttrpc::Code;

use crate::guest::{Guest, ctx, refusal, shell, spec};

#[tokio::test]
async fn run_mounts_binds_and_files_arrive() {
    let guest = Guest::start().await;
    let mut s = shell(
        "cat /etc/hosts /data/file; touch /etc/hosts || echo ro; touch /data/new && echo rw; grep ' /data ' /proc/self/mountinfo; cat /fresh/file; cat /proc/sys/net/ipv4/ip_forward",
    );
    let mounts = s["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/etc/hosts", "type": "bind", "source": "/run/casemate/m/files/hosts", "options": ["bind", "ro"]}));
    mounts.push(json!({"destination": "/data", "type": "bind", "source": guest.dir.path().join("image/secret"), "options": ["rbind", "nosuid", "rprivate"]}));
    mounts.push(json!({"destination": "/fresh", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]}));
    mounts.push(json!({"destination": "/secret", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]}));
    s["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
    s["process"]["args"][2] = json!(
        s["process"]["args"][2]
            .as_str()
            .unwrap()
            .replace("cat /fresh/file", "cat /secret/file")
    );
    let streams = guest.streams(false);
    let mut request = guest.request("m", &s, &streams);
    request.files.push(agent::File {
        path: "/run/casemate/m/files/hosts".into(),
        content: b"127.0.0.1 me\n".into(),
        ..Default::default()
    });
    let output = guest.run_as_requested(&request, streams).await;
    assert!(
        output
            .stdout
            .starts_with("127.0.0.1 me\nfrom the image\nro\nrw\n"),
        "{}{}",
        output.stdout,
        output.stderr
    );
    assert!(
        output.stdout.contains("nosuid") && output.stdout.ends_with("from the image\n1\n"),
        "{}",
        output.stdout
    );
    guest.delete("m").await;
}

#[tokio::test]
async fn create_mount_outside_its_directory_is_refused() {
    let guest = Guest::start().await;
    for target in ["/etc", "/run/casemate/other/x", "/run/casemate/x/../other"] {
        let streams = guest.streams(false);
        let mut request = guest.request("x", &spec(&["true"]), &streams);
        request.mounts[1].target = target.into();
        assert_eq!(
            refusal(guest.client.create_container(ctx(), &request).await).0,
            Code::INVALID_ARGUMENT,
            "{target}"
        );
    }
    let streams = guest.streams(false);
    let mut request = guest.request("x", &spec(&["true"]), &streams);
    request.rootfs = "/".into();
    assert_eq!(
        refusal(guest.client.create_container(ctx(), &request).await).0,
        Code::INVALID_ARGUMENT
    );
}

#[tokio::test]
async fn run_symlinks_of_the_image_stay_inside() {
    let guest = Guest::start().await;
    let image = guest.dir.path().join("image");
    std::os::unix::fs::symlink("/../../../../../tmp/escape", image.join("link")).unwrap();
    let mut s = shell("ls /tmp/escape && cat /tmp/escape/file");
    s["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/link", "type": "tmpfs", "source": "tmpfs", "options": []}));
    s["mounts"].as_array_mut().unwrap().push(json!({"destination": "/tmp/escape", "type": "bind", "source": image.join("secret"), "options": ["bind"]}));
    std::fs::create_dir_all(image.join("tmp/escape")).unwrap();
    let output = guest.run_with("x", &s, b"").await.unwrap();
    assert_eq!(output.stdout, "file\nfrom the image\n");
    assert!(!std::path::Path::new("/tmp/escape").exists());
    // /proc behind a symlink would leave masked paths without effect.
    std::fs::remove_dir(image.join("proc")).unwrap();
    std::os::unix::fs::symlink("/tmp", image.join("proc")).unwrap();
    let (_, text) = refusal(guest.create("y", &spec(&["true"])).await);
    assert!(text.contains("symlink"), "{text}");
}
