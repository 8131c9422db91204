//! Exit codes, streams and terminals.

use std::time::Duration;

use casemate_protocol::agent;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use ttrpc::Code;

use crate::guest::{Guest, changed, ctx, refusal, shell, spec};

#[tokio::test]
async fn run_true_and_every_exit_code_come_back() {
    let guest = Guest::start().await;
    let hello = guest
        .client
        .hello(ctx(), &agent::HelloRequest::default())
        .await
        .unwrap();
    assert!(hello.serving_ns >= hello.main_ns && !hello.kernel_release.is_empty());
    assert_eq!(guest.run(&["/bin/true"]).await.status, 0);
    for code in 0..=255 {
        let output = guest.run(&["sh", "-c", &format!("exit {code}")]).await;
        assert_eq!(output.status, code);
    }
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
    let mut collected = guest
        .started(
            "big",
            &shell("dd if=/dev/zero bs=1M count=24 2>/dev/null | tr '\\0' x; printf end; exit 3"),
        )
        .await;
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
        let (code, message) = refusal(guest.create("x", &spec(&[command])).await);
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
    let answer = guest.run_with("x", &spec(&["/etc/notes"]), b"").await;
    assert_eq!(refusal(answer).0, Code::PERMISSION_DENIED);
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
    let mut collected = guest.started("t", &s).await;
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
    let mut collected = guest.started("t", &s).await;
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
