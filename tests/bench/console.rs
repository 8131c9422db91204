//! Nothing lost on the way out: gigabytes past a slow reader, and many short lives.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use sha2::{Digest, Sha256};

use crate::figures::Figure;
use crate::inside::{Installed, emit};

/// Bytes of one stream.
const SIZE: u64 = 1 << 30;
/// After so many bytes the reader rests.
const REST_EVERY: u64 = 16 << 20;
const REST: Duration = Duration::from_millis(20);
/// Short runs under way.
const AT_A_TIME: usize = 2;

/// Streams of a gigabyte and lives of a moment; how many bytes did not come out, and how many lives came out wrong.
pub(crate) fn figure(at: &Installed, scratch: &Path, gigabytes: usize, lives: usize) -> Result<()> {
    // The store may lie on a file system that is shared with another machine: containers' disks need one of this host's.
    let data = scratch.join("data");
    let mut copy = Command::new("cp");
    copy.arg("-a").arg(&at.data).arg(&data);
    ensure!(copy.status()?.success(), "can't copy the store");
    let at = &at.with_data(data);

    let mut expected = Sha256::new();
    casemate_tests::stream::write(SIZE, &mut HashWriter(&mut expected))?;
    let expected = expected.finalize();
    let mut lost = Vec::new();
    for _ in 0..gigabytes {
        let begun = Instant::now();
        let (received, hash) = stream(at)?;
        // Bytes that came, but other ones or in another order, are at least one.
        let wrong = received == SIZE && hash != expected.as_slice();
        lost.push(SIZE.abs_diff(received) as f64 + f64::from(u8::from(wrong)));
        eprintln!(
            "console: {received} bytes in {:.0} s",
            begun.elapsed().as_secs_f64()
        );
    }
    let wrong = wrong_lives(at, lives)?;
    let mut figure = Figure::plain("console_lost_bytes", "bytes", lost);
    figure.details = [
        ("short_runs".to_owned(), lives as f64),
        ("short_runs_wrong".to_owned(), wrong as f64),
    ]
    .into();
    emit(&figure)
}

/// How many of so many containers that say `x` and end with 3 came out as anything else; some run at a time.
fn wrong_lives(at: &Installed, lives: usize) -> Result<usize> {
    let (begun, wrong) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let live = || -> Result<()> {
        loop {
            let life = begun.fetch_add(1, Ordering::Relaxed);
            if life >= lives {
                return Ok(());
            }
            let out = at
                .casemate(&["run", "--rm", "busybox", "sh", "-c", "printf x; exit 3"])
                .output()?;
            if out.stdout != b"x" || out.status.code() != Some(3) {
                let words = String::from_utf8_lossy(&out.stderr);
                eprintln!("console: wrong: {:?} {:?} {words}", out.status, out.stdout);
                wrong.fetch_add(1, Ordering::Relaxed);
            }
            if life % 50 == 0 {
                eprintln!("console: short run {life} of {lives}");
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_A_TIME).map(|_| scope.spawn(live)).collect();
        for worker in workers {
            worker.join().map_err(|_| anyhow!("a worker panicked"))??;
        }
        Ok(wrong.load(Ordering::Relaxed))
    })
}

/// Reads a container's stream, resting again and again, so that every buffer on the way fills up: its length and hash.
fn stream(at: &Installed) -> Result<(u64, Vec<u8>)> {
    let size = SIZE.to_string();
    let mut command = at.casemate(&["run", "--rm", "busybox", "guest-tool", "stream", &size]);
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let mut stdout = child.stdout.take().context("stdout is piped")?;
    let (mut received, mut hash, mut buffer) = (0_u64, Sha256::new(), vec![0; 256 << 10]);
    let mut rest_at = 0;
    loop {
        let read = stdout.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        received += read as u64;
        hash.update(&buffer[..read]);
        if received >= rest_at {
            std::thread::sleep(REST);
            rest_at = received + REST_EVERY;
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "the stream's container: {status}");
    Ok((received, hash.finalize().to_vec()))
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
