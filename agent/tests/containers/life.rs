//! Containers and their processes from the first to the last.

use std::time::Duration;

use casemate_protocol::agent::{self, KillRequest, ProcessRequest};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;
use ttrpc::Code;

use crate::guest::{Guest, ctx, refusal, request, shell, spec};

fn process(script: &str) -> Value {
    json!({"cwd": "/", "args": ["sh", "-c", script], "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}})
}

#[tokio::test]
async fn exec_joins_the_container() {
    let guest = Guest::start().await;
    let _first = guest.sleeping("c").await;
    let script = "hostname; cat; ps | grep -c sleep; grep -E 'CapEff|NoNew' /proc/self/status; cat /proc/self/cgroup; ls /proc/self/fd | wc -l; exit 5";
    let output = guest
        .exec_with("c", "e1", &process(script), "", b"in\n")
        .await;
    assert_eq!(output.status, 5, "{}", output.stderr);
    let has = |text: &str| assert!(output.stdout.contains(text), "{text} in {}", output.stdout);
    has("casemate\nin\n");
    has("CapEff:\t00000000000404e3"); // the container's own
    has("NoNewPrivs:\t1");
    has("0::/\n");
    assert!(output.stdout.ends_with("4\n"), "{}", output.stdout);
    let user = guest
        .exec_with("c", "e2", &process("id -u; id -g"), "web:extra", b"")
        .await;
    assert_eq!(user.stdout, "1000\n1234\n");
    let missing =
        json!({"cwd": "/", "args": ["nosuch"], "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
    assert_eq!(
        refusal(guest.exec("c", "e3", &missing, "").await).0,
        Code::NOT_FOUND
    );
    let terminal = json!({"cwd": "/", "terminal": true, "args": ["sh", "-c", "tty; stty size"], "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
    let output = guest.exec_with("c", "e4", &terminal, "", b"").await;
    assert_eq!(output.stdout, "/dev/pts/0\r\n33 77\r\n");
    guest.delete("c").await;
}

#[tokio::test]
async fn exec_background_child_holding_the_pipe_does_not_hold_wait() {
    let guest = Guest::start().await;
    let _first = guest.sleeping("c").await;
    let output = guest
        .exec_with("c", "e", &process("sleep 999 & printf done"), "", b"")
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
        .started(
            "c",
            &shell("trap 'exit 9' TERM; while :; do sleep 0.1; done"),
        )
        .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let kill = async |id: &str, signal: i32, all| {
        let request = KillRequest {
            id: id.into(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        guest.client.kill(ctx(), &request).await
    };
    let refused = kill("c", 99, false).await;
    assert_eq!(refusal(refused).0, Code::INVALID_ARGUMENT);
    kill("c", libc::SIGTERM, false).await.unwrap();
    assert_eq!(guest.wait("c", "").await.exit_status, 9);
    let refused = kill("c", libc::SIGTERM, false).await;
    assert_eq!(refusal(refused).0, Code::NOT_FOUND);
    guest.delete("c").await;

    let _streams = guest.sleeping("d").await;
    kill("d", libc::SIGKILL, true).await.unwrap();
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
        refusal(guest.client.list_pids(ctx(), &request("c")).await).0,
        Code::NOT_FOUND
    );
    let mounts = std::fs::read_to_string(format!("/proc/{}/mounts", guest.agent_pid())).unwrap();
    assert!(!mounts.contains("/run/casemate/"), "{mounts}");
}

#[tokio::test]
async fn pause_stops_and_resume_continues() {
    let guest = Guest::start().await;
    let mut collected = guest
        .started("c", &shell("while :; do printf .; sleep 0.05; done"))
        .await;
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
async fn requests_with_bad_ids_are_refused() {
    let guest = Guest::start().await;
    for id in ["", "..", "a/b", &"x".repeat(200)] {
        let mut request = guest.request("x", &spec(&["true"]), &guest.streams(false));
        request.id = id.into();
        assert_eq!(
            refusal(guest.client.create_container(ctx(), &request).await).0,
            Code::INVALID_ARGUMENT,
            "{id:?}"
        );
    }
    assert_eq!(
        refusal(
            guest
                .client
                .start_container(ctx(), &agent::StartContainerRequest::default())
                .await
        )
        .0,
        Code::FAILED_PRECONDITION
    );
    let twice = guest.create("twice", &spec(&["true"])).await.unwrap();
    assert_eq!(
        refusal(guest.create("twice", &spec(&["true"])).await).0,
        Code::ALREADY_EXISTS
    );
    drop(twice);
    guest.delete("twice").await;
}

#[tokio::test]
async fn shutdown_ends_containers_and_the_agent() {
    let guest = Guest::start().await;
    let _streams = guest.sleeping("c").await;
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
    let mut streams = guest.sleeping("c").await;
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
