//! Standard streams are binary-safe, ordered by their own, and never lose a byte.

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;

use casemate_tests::{Host, fixture::sha256};

#[test]
fn streams_are_kept_apart() {
    let host = Host::with_images();
    let out = host.script("echo out; echo err >&2");
    out.succeeds().prints("out\n");
    assert_eq!(out.stderr_text(), "err\n");
}

#[test]
fn pipe_in_and_out_works() {
    let host = Host::with_images();
    let mut cat = host.start_run(["-i", "busybox", "cat"]);
    cat.says("hi\n");
    cat.ends().succeeds().prints("hi\n");
}

#[test]
fn stdin_not_asked_for_is_empty() {
    let host = Host::with_images();
    let mut cat = host.start_run(["busybox", "cat"]);
    cat.says("not for the workload\n");
    cat.ends().succeeds().prints("");
}

#[test]
fn answer_comes_before_stdin_ends() {
    let host = Host::with_images();
    let mut shell = host.start_run(["-i", "busybox", "sh"]);
    shell.says("echo one\n").prints("one\n");
    shell.says("echo two\n").prints("two\n");
    shell.says("exit 5\n");
    shell.ends().ends_with(5);
}

#[test]
fn workload_that_ends_before_its_input_does_not_hang() {
    let host = Host::with_images();
    let mut head = host.start_run(["-i", "busybox", "head", "-c", "3"]);
    head.says("abc").prints("abc");
    head.says("more that nobody reads");
    head.ends().succeeds().prints("abc");
    host.is_clean();
}

#[test]
fn all_byte_values_pass_unchanged_both_ways() {
    let host = Host::with_images();
    let bytes: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let mut cat = host.start_run(["-i", "busybox", "cat"]);
    cat.says(&bytes);
    let out = cat.ends();
    out.succeeds();
    assert!(
        out.stdout == bytes,
        "{} bytes came back of {}",
        out.stdout.len(),
        bytes.len()
    );
}

#[test]
fn last_bytes_before_the_exit_are_never_lost() {
    let host = Host::with_images();
    for _ in 0..12 {
        host.run(["busybox", "sh", "-c", "printf x; exit 3"])
            .ends_with(3)
            .prints("x");
    }
}

#[test]
fn output_without_a_reader_for_a_while_is_all_there_later() {
    const SIZE: usize = 32 << 20;
    let host = Host::with_images();
    let script = format!("yes 0123456789abcdef | head -c {SIZE}; exit 4");
    let mut command = host.command(["run", "--rm", "busybox", "sh", "-c", &script]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // All buffers on the way fill up; the workload has to wait, and nothing may be dropped.
    std::thread::sleep(Duration::from_secs(4));
    let mut received = Vec::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut received)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(4));
    let expected: Vec<u8> = b"0123456789abcdef\n"
        .iter()
        .copied()
        .cycle()
        .take(SIZE)
        .collect();
    assert_eq!(received.len(), SIZE);
    assert_eq!(sha256(&received), sha256(&expected));
}

#[test]
fn reader_that_goes_away_gives_the_workload_a_broken_pipe() {
    let host = Host::with_images();
    let mut command = host.command(["run", "--rm", "busybox", "yes"]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut first = [0; 4];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    drop(child.stdout.take());
    let ended = (0..600).any(|_| {
        std::thread::sleep(Duration::from_millis(100));
        child.try_wait().unwrap().is_some()
    });
    if !ended {
        child.kill().unwrap();
    }
    assert!(ended, "yes still runs without anybody to read it");
    host.is_clean();
}

#[test]
fn stream_through_two_sandboxes_comes_out_whole() {
    let host = Host::with_images();
    let mut packer = host.command(["run", "--rm", "-i", "busybox", "gzip"]);
    let mut packer = packer
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut unpacker = host.command(["run", "--rm", "-i", "busybox", "gunzip"]);
    unpacker
        .stdin(packer.stdout.take().unwrap())
        .stdout(Stdio::piped());
    let mut unpacker = unpacker.spawn().unwrap();
    let bytes: Vec<u8> = (0..2_000_000_u32)
        .map(|n| (n.wrapping_mul(n) >> 7) as u8)
        .collect();
    let mut stdin = packer.stdin.take().unwrap();
    let sent = bytes.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent));
    let mut received = Vec::new();
    unpacker
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut received)
        .unwrap();
    writer.join().unwrap().unwrap();
    assert!(packer.wait().unwrap().success() && unpacker.wait().unwrap().success());
    assert!(
        received == bytes,
        "{} of {} bytes",
        received.len(),
        bytes.len()
    );
}

#[test]
fn stdin_closed_at_once_is_an_end_not_an_error() {
    let host = Host::with_images();
    let mut command = host.command([
        "run",
        "--rm",
        "-i",
        "busybox",
        "sh",
        "-c",
        "cat; echo ended",
    ]);
    command.stdin(Stdio::null());
    let out = command.output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&out.stdout),
        "ended\n",
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
}
