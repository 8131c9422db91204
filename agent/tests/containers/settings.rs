//! What a container may see and do.

use serde_json::json;
use ttrpc::Code;

use crate::guest::{Guest, changed, ctx, refusal, request, shell, spec};

#[tokio::test]
async fn run_namespaces_are_the_containers_own() {
    let guest = Guest::start().await;
    let script = "hostname; echo pid $$; ps | wc -l; ip -o link show up; cat /proc/self/cgroup; ls /proc/self/fd | wc -l";
    let output = guest.run(&["sh", "-c", script]).await;
    let lines: Vec<_> = output.stdout.lines().collect();
    assert_eq!(lines[0], "casemate", "{}", output.stderr);
    assert_eq!(lines[1], "pid 1");
    assert!(
        lines[3].contains("lo") && lines[3].contains("UP"),
        "{}",
        lines[3]
    );
    assert!(output.stdout.contains("0::/\n"), "{}", output.stdout);
    assert_eq!(
        lines.last().unwrap().trim(),
        "4",
        "0, 1, 2 and the directory itself"
    );
}

#[tokio::test]
async fn run_identity_capabilities_and_privileges_are_applied() {
    let guest = Guest::start().await;
    let mut s = shell(
        "id; grep -E 'Cap|NoNew|Seccomp:|Groups' /proc/self/status; umask; pwd; echo $HOME $A; ls -ldn .",
    );
    s["process"]["user"] = json!({"uid": 1000, "gid": 7, "additionalGids": [8, 9], "umask": 23});
    s["process"]["cwd"] = json!("/made/here");
    let all = json!(["CAP_KILL", "CAP_CHOWN"]);
    s["process"]["capabilities"] = json!({"bounding": all, "permitted": all, "effective": ["CAP_KILL"], "inheritable": all, "ambient": ["CAP_KILL"]});
    let output = guest.run_with("x", &s, b"").await.unwrap();
    let has = |text: &str| {
        assert!(
            output.stdout.contains(text),
            "{text} in {}{}",
            output.stdout,
            output.stderr
        )
    };
    has("uid=1000(web) gid=7 groups=8,9");
    has("CapInh:\t0000000000000021");
    has("CapPrm:\t0000000000000020"); // after execve only the ambient ones remain
    has("CapEff:\t0000000000000020");
    has("CapBnd:\t0000000000000021");
    has("CapAmb:\t0000000000000020");
    has("NoNewPrivs:\t1");
    has("0027");
    has("/made/here");
    has("/home/web b");
}

#[tokio::test]
async fn run_image_user_is_looked_up_in_the_container() {
    let guest = Guest::start().await;
    let streams = guest.streams(false);
    let mut request = guest.request("u", &shell("id; echo $HOME"), &streams);
    request.user = "web".into();
    let output = guest.run_as_requested(&request, streams).await;
    assert_eq!(
        output.stdout,
        "uid=1000(web) gid=1001(web) groups=1234(extra)\n/home/web\n"
    );
    let streams = guest.streams(false);
    let mut request = guest.request("v", &shell("id"), &streams);
    request.user = "ghost".into();
    let (code, text) = refusal(guest.client.create_container(ctx(), &request).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("ghost"));
}

#[tokio::test]
async fn run_seccomp_filter_decides() {
    let guest = Guest::start().await;
    for no_new_privileges in [true, false] {
        let mut s = shell("mkdir /x || echo refused; grep Seccomp: /proc/self/status");
        s["process"]["noNewPrivileges"] = json!(no_new_privileges);
        s["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}]});
        let output = guest.run_with("x", &s, b"").await.unwrap();
        assert!(
            output.stderr.contains("Permission denied"),
            "{}",
            output.stderr
        );
        assert_eq!(output.stdout, "refused\nSeccomp:\t2\n");
    }
}

#[tokio::test]
async fn run_paths_are_masked_and_read_only() {
    let guest = Guest::start().await;
    let s = changed(
        shell(
            "cat /secret/file; ls /secret; touch /etc/new || echo ro; ls -l /etc/notes | head -c 2; cat /etc/notes; touch /tmp/fine && echo ok",
        ),
        "/linux/maskedPaths",
        json!(["/secret", "/etc/notes", "/not/there"]),
    );
    let s = changed(s, "/linux/readonlyPaths", json!(["/etc"]));
    let output = guest.run_with("x", &s, b"").await.unwrap();
    assert_eq!(output.stdout, "ro\ncrok\n", "{}", output.stderr);
    let s = changed(
        shell("touch /tmp/x || echo ro; touch /dev/shm/x && echo ok"),
        "/root",
        json!({"path": "rootfs", "readonly": true}),
    );
    assert_eq!(
        guest.run_with("y", &s, b"").await.unwrap().stdout,
        "ro\nok\n"
    );
}

#[tokio::test]
async fn run_devices_are_made_and_controlled() {
    let guest = Guest::start().await;
    let script = "ls -ln /dev/null /dev/mine | head -c 10; echo x >/dev/null && echo null; (: </dev/kmsg2) || echo refused; readlink /dev/ptmx; readlink /dev/fd; stat -c '%a %u:%g %t:%T' /dev/mine";
    let mut s = shell(script);
    for set in ["bounding", "permitted", "effective"] {
        s["process"]["capabilities"][set]
            .as_array_mut()
            .unwrap()
            .push(json!("CAP_SYSLOG"));
    }
    s["linux"]["devices"] = json!([
        {"path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 420, "uid": 3, "gid": 4},
        {"path": "/dev/kmsg2", "type": "c", "major": 1, "minor": 11}]);
    let output = guest.run_with("x", &s, b"").await.unwrap();
    assert!(
        output
            .stdout
            .contains("null\nrefused\npts/ptmx\n/proc/self/fd\n644 3:4 1:5"),
        "{}{}",
        output.stdout,
        output.stderr
    );
    let allowed = changed(
        s,
        "/linux/resources",
        json!({"devices": [{"allow": false}, {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "r"}]}),
    );
    let output = guest.run_with("y", &allowed, b"").await.unwrap();
    assert!(
        !output.stdout.contains("refused"),
        "{}{}",
        output.stdout,
        output.stderr
    );
}

#[tokio::test]
async fn namespaces_of_another_container_are_joined_by_path() {
    let guest = Guest::start().await;
    let _streams = guest.sleeping("first").await;
    let pid = guest
        .client
        .list_pids(ctx(), &request("first"))
        .await
        .unwrap()
        .pids[0];
    // cgroup.procs shows pids in the reader's namespace; the agent reads, so they are those of its /proc.
    let mut s =
        shell("ps | grep -c 'sleep 1000'; hostname; readlink /proc/self/ns/net /proc/1/ns/net");
    let path = |kind: &str| format!("/proc/{pid}/ns/{kind}");
    s["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "cgroup"}, {"type": "pid", "path": path("pid")}, {"type": "network", "path": path("net")},
        {"type": "uts", "path": path("uts")}, {"type": "ipc", "path": path("ipc")}]);
    s.as_object_mut().unwrap().remove("hostname");
    let output = guest.run_with("second", &s, b"").await.unwrap();
    let lines: Vec<_> = output.stdout.lines().collect();
    assert_ne!(
        lines.first(),
        Some(&"0"),
        "{}{}",
        output.stdout,
        output.stderr
    );
    assert_eq!(lines[1], "casemate");
    s["linux"]["namespaces"][3]["path"] = json!(path("uts"));
    let (_, text) = refusal(guest.create("third", &s).await);
    assert!(text.contains("join namespace"), "{text}");
    guest.delete("first").await;
}

#[tokio::test]
async fn user_namespace_maps_ids() {
    let guest = Guest::start().await;
    let mut s = shell("id -u; cat /proc/self/uid_map; echo x >/dev/null && echo null");
    s["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "user"}));
    s["linux"]["uidMappings"] = json!([{"hostID": 0, "containerID": 0, "size": 1}, {"hostID": 100000, "containerID": 1, "size": 65535}]);
    s["linux"]["gidMappings"] = s["linux"]["uidMappings"].clone();
    let output = guest.run_with("x", &s, b"").await.unwrap();
    assert!(
        output.stdout.starts_with("0\n")
            && output.stdout.contains("100000")
            && output.stdout.ends_with("null\n"),
        "{}{}",
        output.stdout,
        output.stderr
    );
}

#[tokio::test]
async fn limits_of_processes_are_applied() {
    let guest = Guest::start().await;
    let mut s = shell("ulimit -n; ulimit -c; cat /proc/self/oom_score_adj");
    s["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 100}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]);
    s["process"]["oomScoreAdj"] = json!(321);
    assert_eq!(
        guest.run_with("x", &s, b"").await.unwrap().stdout,
        "99\n0\n321\n"
    );
}

#[tokio::test]
async fn create_limit_without_its_controller_is_refused() {
    let guest = Guest::start().await;
    let s = changed(
        spec(&["true"]),
        "/linux/resources",
        json!({"unified": {"nosuch.max": "1"}}),
    );
    let (code, text) = refusal(guest.create("x", &s).await);
    assert_eq!(code, Code::UNIMPLEMENTED);
    assert!(text.contains("nosuch.max"));
}
