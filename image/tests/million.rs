//! A layer of a million entries: bounded memory, and a valid image. In a program of its own, so that memory can be measured.

use std::io::{BufRead, Read};
use std::process::Command;

use casemate_image::{Error, Limits, fuzz};

/// An archive made while it is read: so many empty files, a thousand in each directory.
struct Entries {
    next: u32,
    count: u32,
    block: Vec<u8>,
    used: usize,
}

impl Entries {
    fn new(count: u32) -> Self {
        Self {
            next: 0,
            count,
            block: Vec::new(),
            used: 0,
        }
    }
}

impl Read for Entries {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for Entries {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        if self.used == self.block.len() && self.next < self.count {
            let mut header = tar::Header::new_ustar();
            header.set_path(format!(
                "directory-{}/file-number-{}",
                self.next / 1000,
                self.next
            ))?;
            header.set_mode(0o644);
            header.set_mtime(1_500_000_000 + u64::from(self.next % 7));
            header.set_size(0);
            header.set_cksum();
            self.block = header.as_bytes().to_vec();
            self.used = 0;
            self.next += 1;
        }
        Ok(&self.block[self.used..])
    }

    fn consume(&mut self, count: usize) {
        self.used += count;
    }
}

/// The most memory this process ever had, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * 1024
}

#[test]
fn layer_of_a_million_entries_fits_in_bounded_memory() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let before = peak();
    let start = std::time::Instant::now();

    let entries =
        fuzz::convert_layer(Entries::new(1_000_000), file.as_file(), &Limits::default()).unwrap();

    let used = peak() - before;
    eprintln!(
        "a million entries: {} MiB, {:?}",
        used >> 20,
        start.elapsed()
    );
    assert_eq!(entries, 1_000_000);
    assert!(used < 400 << 20, "{} MiB", used >> 20);
    // What an independent reader finds, where there is one.
    if let Ok(output) = Command::new("dump.erofs")
        .arg("-s")
        .arg(file.path())
        .output()
    {
        let text = String::from_utf8_lossy(&output.stdout);
        // Files, directories and the root.
        assert!(text.contains("1001001"), "{text}");
    }
}

#[test]
fn layer_of_too_many_entries_is_refused() {
    let file = tempfile::tempfile().unwrap();
    let limits = Limits {
        layer_entries: 10_000,
        ..Limits::default()
    };
    let error = fuzz::convert_layer(Entries::new(1_000_000), &file, &limits).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Limit {
                limit: 10_000,
                key: "layer_entries",
                ..
            }
        ),
        "{error:?}"
    );
}
