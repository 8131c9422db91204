//! Containers as the shim asks for them, against the real agent.

mod guest;

use std::time::Duration;

use casemate_protocol::agent::{self, ContainerRequest, KillRequest, ProcessRequest};
use guest::{Guest, code, ctx, shell, spec};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use ttrpc::Code;

fn request(id: &str) -> ContainerRequest {
    ContainerRequest {
        id: id.into(),
        ..Default::default()
    }
}

fn changed(mut spec: Value, pointer: &str, value: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    spec.pointer_mut(parent).unwrap()[key] = value;
    spec
}

#[tokio::test]
async fn run_true_and_exit_codes_come_back() {
    let guest = Guest::start().await;
    let hello = guest
        .client
        .hello(ctx(), &agent::HelloRequest::default())
        .await
        .unwrap();
    assert!(hello.serving_ns >= hello.main_ns && !hello.kernel_release.is_empty());
    assert_eq!(guest.run(&["/bin/true"]).await.status, 0);
    assert_eq!(guest.run(&["sh", "-c", "exit 42"]).await.status, 42);
    assert_eq!(
        guest
            .run(&["sh", "-c", "kill -TERM 0; sleep 5"])
            .await
            .status,
        0,
        "PID 1 ignores TERM from inside"
    );
    // The agent must stay a single thread: it forks as if it were.
    let status = std::fs::read_to_string(format!("/proc/{}/status", guest.agent_pid())).unwrap();
    assert!(status.contains("Threads:\t1\n"), "{status}");
}

#[tokio::test]
async fn run_streams_are_kept_apart_and_binary_safe() {
    let guest = Guest::start().await;
    let output = guest
        .run(&["sh", "-c", "printf 'out\\0\\377'; printf err >&2"])
        .await;
    assert_eq!(
        (output.stdout.len(), output.stderr.as_str()),
        ("out\0\u{fffd}".len(), "err")
    );
    let echoed = guest
        .run_with("cat", &spec(&["cat"]), b"a\0b\n")
        .await
        .unwrap();
    assert_eq!((echoed.status, echoed.stdout.as_str()), (0, "a\0b\n"));
}

#[tokio::test]
async fn run_large_output_with_slow_reader_loses_nothing() {
    let guest = Guest::start().await;
    let streams = guest
        .create(
            "big",
            &shell("dd if=/dev/zero bs=1M count=24 2>/dev/null | tr '\\0' x; printf end; exit 3"),
        )
        .await
        .unwrap();
    let mut collected = streams.accept().await;
    guest.start_container("big").await;
    let mut stdout = collected.stdout.take().unwrap();
    let (mut total, mut last, mut buffer) = (0_usize, Vec::new(), vec![0; 64 << 10]);
    loop {
        let count = stdout.read(&mut buffer).await.unwrap();
        if count == 0 {
            break;
        }
        total += count;
        last.extend_from_slice(&buffer[..count]);
        last.drain(..last.len().saturating_sub(4));
        if total < 4 << 20 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    assert_eq!((total, last.as_slice()), ((24 << 20) + 3, &b"xend"[..]));
    assert_eq!(guest.wait("big", "").await.exit_status, 3);
    guest.delete("big").await;
}

#[tokio::test]
async fn run_short_outputs_in_a_row_lose_nothing() {
    let guest = Guest::start().await;
    for _ in 0..30 {
        let output = guest.run(&["sh", "-c", "printf x; exit 3"]).await;
        assert_eq!((output.status, output.stdout.as_str()), (3, "x"));
    }
}

#[tokio::test]
async fn create_missing_or_unusable_executable_is_told_apart() {
    let guest = Guest::start().await;
    for (command, want, text) in [
        (
            "nosuch",
            Code::NOT_FOUND,
            "executable file not found in $PATH",
        ),
        ("/no/such", Code::NOT_FOUND, "no such file or directory"),
        ("/etc/notes", Code::PERMISSION_DENIED, "permission denied"),
        ("/etc", Code::PERMISSION_DENIED, "is a directory"),
    ] {
        let (code, message) = code(
            guest
                .create("x", &spec(&[command]))
                .await
                .map(drop)
                .unwrap_err(),
        );
        assert_eq!(code, want, "{command}: {message}");
        assert!(message.contains(text), "{command}: {message}");
    }
    // The id is free again, and nothing is left.
    assert_eq!(
        guest
            .run_with("x", &spec(&["true"]), b"")
            .await
            .unwrap()
            .status,
        0
    );
    assert!(!std::path::Path::new("/sys/fs/cgroup/unified/casemate-x").exists());
}

#[tokio::test]
async fn start_script_without_interpreter_is_denied() {
    let guest = Guest::start().await;
    let notes = guest.dir.path().join("image/etc/notes");
    std::fs::set_permissions(&notes, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let error = guest
        .run_with("x", &spec(&["/etc/notes"]), b"")
        .await
        .map(|o| o.status)
        .unwrap_err();
    assert_eq!(code(error).0, Code::PERMISSION_DENIED);
}

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
    guest
        .client
        .create_container(ctx(), &request)
        .await
        .unwrap();
    let collected = streams.accept().await;
    guest.start_container("u").await;
    let output = collected.finish(&guest, "u", "", b"").await;
    assert_eq!(
        output.stdout,
        "uid=1000(web) gid=1001(web) groups=1234(extra)\n/home/web\n"
    );
    let streams = guest.streams(false);
    let mut request = guest.request("v", &shell("id"), &streams);
    request.user = "ghost".into();
    let (code, text) = code(
        guest
            .client
            .create_container(ctx(), &request)
            .await
            .unwrap_err(),
    );
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
    guest
        .client
        .create_container(ctx(), &request)
        .await
        .unwrap();
    let collected = streams.accept().await;
    guest.start_container("m").await;
    let output = collected.finish(&guest, "m", "", b"").await;
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
            code(
                guest
                    .client
                    .create_container(ctx(), &request)
                    .await
                    .unwrap_err()
            )
            .0,
            Code::INVALID_ARGUMENT,
            "{target}"
        );
    }
    let streams = guest.streams(false);
    let mut request = guest.request("x", &spec(&["true"]), &streams);
    request.rootfs = "/".into();
    assert_eq!(
        code(
            guest
                .client
                .create_container(ctx(), &request)
                .await
                .unwrap_err()
        )
        .0,
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
    let (_, text) = code(
        guest
            .create("y", &spec(&["true"]))
            .await
            .map(drop)
            .unwrap_err(),
    );
    assert!(text.contains("symlink"), "{text}");
}

#[tokio::test]
async fn run_terminal_is_the_controlling_one_with_its_size() {
    let guest = Guest::start().await;
    let s = changed(
        shell(
            "tty; stty size; ls -l /dev/console | head -c 1; echo; read x; stty size; echo got $x",
        ),
        "/process/terminal",
        json!(true),
    );
    let mut collected = guest.create("t", &s).await.unwrap().accept().await;
    guest.start_container("t").await;
    let stdout = collected.stdout.as_mut().unwrap();
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).contains("c\r\n") {
        stdout.read_buf(&mut text).await.unwrap();
    }
    let resize = agent::ResizePtyRequest {
        id: "t".into(),
        rows: 10,
        cols: 20,
        ..Default::default()
    };
    guest.client.resize_pty(ctx(), &resize).await.unwrap();
    collected
        .stdin
        .as_mut()
        .unwrap()
        .write_all(b"word\n")
        .await
        .unwrap();
    stdout.read_to_end(&mut text).await.unwrap();
    assert_eq!(
        String::from_utf8_lossy(&text),
        "/dev/pts/0\r\n33 77\r\nc\r\nword\r\n10 20\r\ngot word\r\n"
    );
    assert_eq!(guest.wait("t", "").await.exit_status, 0);
    guest.delete("t").await;
}

#[tokio::test]
async fn run_terminal_ctrl_c_interrupts() {
    let guest = Guest::start().await;
    let s = changed(
        shell("trap 'echo caught; exit 7' INT; echo on; while :; do sleep 0.1; done"),
        "/process/terminal",
        json!(true),
    );
    let mut collected = guest.create("t", &s).await.unwrap().accept().await;
    guest.start_container("t").await;
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).contains("on\r\n") {
        collected
            .stdout
            .as_mut()
            .unwrap()
            .read_buf(&mut text)
            .await
            .unwrap();
    }
    collected
        .stdin
        .as_mut()
        .unwrap()
        .write_all(&[3])
        .await
        .unwrap();
    assert_eq!(guest.wait("t", "").await.exit_status, 7);
}

fn process(script: &str) -> Value {
    json!({"cwd": "/", "args": ["sh", "-c", script], "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}})
}

#[tokio::test]
async fn exec_joins_the_container() {
    let guest = Guest::start().await;
    let streams = guest.create("c", &spec(&["sleep", "1000"])).await.unwrap();
    let _first = streams.accept().await;
    guest.start_container("c").await;
    let script = "hostname; cat; ps | grep -c sleep; grep -E 'CapEff|NoNew' /proc/self/status; cat /proc/self/cgroup; ls /proc/self/fd | wc -l; exit 5";
    let output = guest
        .exec("c", "e1", &process(script), "")
        .await
        .unwrap()
        .finish(&guest, "c", "e1", b"in\n")
        .await;
    assert_eq!(output.status, 5, "{}", output.stderr);
    let has = |text: &str| assert!(output.stdout.contains(text), "{text} in {}", output.stdout);
    has("casemate\nin\n");
    has("CapEff:\t00000000000404e3"); // the container's own
    has("NoNewPrivs:\t1");
    has("0::/\n");
    assert!(output.stdout.ends_with("4\n"), "{}", output.stdout);
    let user = guest
        .exec("c", "e2", &process("id -u; id -g"), "web:extra")
        .await
        .unwrap()
        .finish(&guest, "c", "e2", b"")
        .await;
    assert_eq!(user.stdout, "1000\n1234\n");
    let missing =
        json!({"cwd": "/", "args": ["nosuch"], "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
    assert_eq!(
        code(
            guest
                .exec("c", "e3", &missing, "")
                .await
                .map(drop)
                .unwrap_err()
        )
        .0,
        Code::NOT_FOUND
    );
    let terminal = json!({"cwd": "/", "terminal": true, "args": ["sh", "-c", "tty; stty size"], "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
    let output = guest
        .exec("c", "e4", &terminal, "")
        .await
        .unwrap()
        .finish(&guest, "c", "e4", b"")
        .await;
    assert_eq!(output.stdout, "/dev/pts/0\r\n33 77\r\n");
    guest.delete("c").await;
}

#[tokio::test]
async fn exec_background_child_holding_the_pipe_does_not_hold_wait() {
    let guest = Guest::start().await;
    let _first = guest
        .create("c", &spec(&["sleep", "1000"]))
        .await
        .unwrap()
        .accept()
        .await;
    guest.start_container("c").await;
    let output = guest
        .exec("c", "e", &process("sleep 999 & printf done"), "")
        .await
        .unwrap()
        .finish(&guest, "c", "e", b"")
        .await;
    assert_eq!(output.stdout, "done");
    let pids = guest
        .client
        .list_pids(ctx(), &request("c"))
        .await
        .unwrap()
        .pids;
    assert_eq!(pids.len(), 2, "{pids:?}");
    guest.delete("c").await;
}

#[tokio::test]
async fn kill_signals_reach_one_or_all() {
    let guest = Guest::start().await;
    let _streams = guest
        .create(
            "c",
            &shell("trap 'exit 9' TERM; while :; do sleep 0.1; done"),
        )
        .await
        .unwrap()
        .accept()
        .await;
    guest.start_container("c").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let kill = |signal, all| KillRequest {
        id: "c".into(),
        signal,
        all,
        ..Default::default()
    };
    assert_eq!(
        code(
            guest
                .client
                .kill(ctx(), &kill(99, false))
                .await
                .unwrap_err()
        )
        .0,
        Code::INVALID_ARGUMENT
    );
    guest.client.kill(ctx(), &kill(15, false)).await.unwrap();
    assert_eq!(guest.wait("c", "").await.exit_status, 9);
    assert_eq!(
        code(
            guest
                .client
                .kill(ctx(), &kill(15, false))
                .await
                .unwrap_err()
        )
        .0,
        Code::NOT_FOUND
    );
    guest.delete("c").await;

    let _streams = guest
        .create("d", &spec(&["sleep", "1000"]))
        .await
        .unwrap()
        .accept()
        .await;
    guest.start_container("d").await;
    guest
        .client
        .kill(
            ctx(),
            &KillRequest {
                id: "d".into(),
                signal: 9,
                all: true,
                ..Default::default()
            },
        )
        .await
        .unwrap();
    assert_eq!(guest.wait("d", "").await.exit_status, 137);
}

#[tokio::test]
async fn delete_created_but_never_started_leaves_nothing() {
    let guest = Guest::start().await;
    let _streams = guest.create("c", &spec(&["true"])).await.unwrap();
    let waiting = guest.client.clone();
    let wait = tokio::spawn(async move {
        waiting
            .wait(
                ctx(),
                &ProcessRequest {
                    id: "c".into(),
                    ..Default::default()
                },
            )
            .await
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    guest.delete("c").await;
    assert_eq!(wait.await.unwrap().unwrap().exit_status, 137);
    assert_eq!(
        code(
            guest
                .client
                .list_pids(ctx(), &request("c"))
                .await
                .unwrap_err()
        )
        .0,
        Code::NOT_FOUND
    );
    let mounts = std::fs::read_to_string(format!("/proc/{}/mounts", guest.agent_pid())).unwrap();
    assert!(!mounts.contains("/run/casemate/"), "{mounts}");
}

#[tokio::test]
async fn pause_stops_and_resume_continues() {
    let guest = Guest::start().await;
    let mut collected = guest
        .create("c", &shell("while :; do printf .; sleep 0.05; done"))
        .await
        .unwrap()
        .accept()
        .await;
    guest.start_container("c").await;
    let stdout = collected.stdout.as_mut().unwrap();
    let mut buffer = [0; 1];
    stdout.read_exact(&mut buffer).await.unwrap();
    guest.client.pause(ctx(), &request("c")).await.unwrap();
    let mut rest = [0; 4096];
    while let Ok(count) =
        tokio::time::timeout(Duration::from_millis(300), stdout.read(&mut rest)).await
    {
        assert!(count.unwrap() > 0); // sent before the pause
    }
    guest.client.resume(ctx(), &request("c")).await.unwrap();
    stdout.read_exact(&mut buffer).await.unwrap();
    guest.delete("c").await;
}

#[tokio::test]
async fn orphans_are_reaped_when_the_pid_namespace_is_shared() {
    let guest = Guest::start().await;
    let mut s = shell("(sleep 0.2 &) ; (sleep 0.3 &); sleep 0.6");
    s["linux"]["namespaces"] =
        json!([{"type": "mount"}, {"type": "uts"}, {"type": "ipc"}, {"type": "network"}]);
    assert_eq!(guest.run_with("x", &s, b"").await.unwrap().status, 0);
    let children =
        std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", guest.agent_pid())).unwrap();
    assert_eq!(children.trim(), "");
}

#[tokio::test]
async fn namespaces_of_another_container_are_joined_by_path() {
    let guest = Guest::start().await;
    let streams = guest
        .create("first", &spec(&["sleep", "1000"]))
        .await
        .unwrap();
    let _streams = streams.accept().await;
    guest.start_container("first").await;
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
    let (_, text) = code(guest.create("third", &s).await.map(drop).unwrap_err());
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
    let (code, text) = code(guest.create("x", &s).await.map(drop).unwrap_err());
    assert_eq!(code, Code::UNIMPLEMENTED);
    assert!(text.contains("nosuch.max"));
}

#[tokio::test]
async fn requests_with_bad_ids_are_refused() {
    let guest = Guest::start().await;
    for id in ["", "..", "a/b", &"x".repeat(200)] {
        let mut request = guest.request("x", &spec(&["true"]), &guest.streams(false));
        request.id = id.into();
        assert_eq!(
            code(
                guest
                    .client
                    .create_container(ctx(), &request)
                    .await
                    .unwrap_err()
            )
            .0,
            Code::INVALID_ARGUMENT,
            "{id:?}"
        );
    }
    assert_eq!(
        code(
            guest
                .client
                .start_container(ctx(), &agent::StartContainerRequest::default())
                .await
                .unwrap_err()
        )
        .0,
        Code::FAILED_PRECONDITION
    );
    let twice = guest.create("twice", &spec(&["true"])).await.unwrap();
    assert_eq!(
        code(
            guest
                .create("twice", &spec(&["true"]))
                .await
                .map(drop)
                .unwrap_err()
        )
        .0,
        Code::ALREADY_EXISTS
    );
    drop(twice);
    guest.delete("twice").await;
}

#[tokio::test]
async fn shutdown_ends_containers_and_the_agent() {
    let guest = Guest::start().await;
    let _streams = guest
        .create("c", &spec(&["sleep", "1000"]))
        .await
        .unwrap()
        .accept()
        .await;
    guest.start_container("c").await;
    let pid = guest.agent_pid();
    guest
        .client
        .shutdown(ctx(), &agent::Empty::new())
        .await
        .unwrap();
    until_gone(&pid).await;
}

#[tokio::test]
async fn loss_of_the_control_connection_ends_the_agent() {
    let guest = Guest::start().await;
    let mut streams = guest
        .create("c", &spec(&["sleep", "1000"]))
        .await
        .unwrap()
        .accept()
        .await;
    guest.start_container("c").await;
    let pid = guest.agent_pid();
    guest.cut_control();
    until_gone(&pid).await;
    let mut rest = Vec::new();
    let end = streams.stdout.as_mut().unwrap().read_to_end(&mut rest);
    tokio::time::timeout(Duration::from_secs(20), end)
        .await
        .unwrap()
        .unwrap();
}

async fn until_gone(pid: &str) {
    for _ in 0..200 {
        if !std::path::Path::new(&format!("/proc/{pid}")).exists() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the agent outlives its connection");
}
