//! A container's log: what it wrote to its standard streams, with the time.
//!
//! The format is that of the CRI (`kubelet`'s `/var/log/pods`): a line for each line
//! that was written, `TIME STREAM TAG CONTENT`. The tag `F` says that a newline
//! followed the content, `P` that it went on. So every byte comes back as it was, and a prompt
//! without a newline shows at once.
//!
//! The file is `container.log`. When it would outgrow its limit it becomes
//! `container.log.1`, the one before `.2`, up to the number of files that are kept.

use crate::scratch;
use crate::times;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, BufRead, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where the log of a container is: with the data, as what a container writes must not fill the host's memory.
pub fn dir_of(data_dir: &Path, state_dir: &Path, id: &str) -> PathBuf {
    scratch::dir_of(data_dir, state_dir).join(format!("{id}.log"))
}

/// Name of the newest file.
pub const FILE_NAME: &str = "container.log";
/// Longer content is split: a reader needs a bound, and the CRI's own is 16 KiB.
const MAX_CONTENT: usize = 16 << 10;
/// Time, stream and tag take less.
const MAX_LINE: usize = MAX_CONTENT + 64;

/// Bounds of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of one file.
    pub size: u64,
    /// Files in all.
    pub files: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            size: 10 << 20,
            files: 3,
        }
    }
}

impl FromStr for Limits {
    type Err = std::num::ParseIntError;

    /// `BYTES:FILES`, as the shim is told.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (size, files) = text.split_once(':').unwrap_or((text, "1"));
        Ok(Self {
            size: size.parse()?,
            files: files.parse()?,
        })
    }
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.size, self.files)
    }
}

/// Where a piece of output was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// One line of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Nanoseconds since the epoch.
    pub at_ns: u64,
    /// Where it was written to.
    pub stream: Stream,
    /// What was written, with its newline if it had one.
    pub content: Vec<u8>,
}

impl Entry {
    /// Reads a line of the format above, without its own newline; `None` for anything else.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let mut parts = line.splitn(4, |b| *b == b' ');
        let mut next = || parts.next();
        let (time, stream, tag, content) = (next()?, next()?, next()?, next()?);
        let mut content = content.to_vec();
        match tag {
            b"F" => content.push(b'\n'),
            b"P" => {}
            _ => return None,
        }
        Some(Self {
            at_ns: times::parse(std::str::from_utf8(time).ok()?)?,
            stream: match stream {
                b"stdout" => Stream::Stdout,
                b"stderr" => Stream::Stderr,
                _ => return None,
            },
            content,
        })
    }
}

/// Appends the lines of `bytes` to `out`, in the format above.
fn format(out: &mut Vec<u8>, at_ns: u64, stream: Stream, bytes: &[u8]) {
    let time = times::rfc3339(at_ns);
    let mut line = |tag: u8, content: &[u8]| {
        out.extend_from_slice(time.as_bytes());
        out.push(b' ');
        out.extend_from_slice(stream.name().as_bytes());
        out.extend_from_slice(&[b' ', tag, b' ']);
        out.extend_from_slice(content);
        out.push(b'\n');
    };
    for piece in bytes.split_inclusive(|b| *b == b'\n') {
        let (content, ended) = match piece.split_last() {
            Some((b'\n', content)) => (content, true),
            _ => (piece, false),
        };
        let mut rest = content;
        while rest.len() > MAX_CONTENT {
            let (now, later) = rest.split_at(MAX_CONTENT);
            line(b'P', now);
            rest = later;
        }
        line(if ended { b'F' } else { b'P' }, rest);
    }
}

/// The writing end: one for each container.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    limits: Limits,
    file: File,
    size: u64,
    buffer: Vec<u8>,
}

impl Writer {
    /// Opens the log in a directory, or makes it there.
    pub fn open(dir: &Path, limits: Limits) -> io::Result<Self> {
        let path = dir.join(FILE_NAME);
        let file = open_for_appending(&path)?;
        let size = file.metadata()?.len();
        Ok(Self {
            path,
            limits,
            file,
            size,
            buffer: Vec::new(),
        })
    }

    /// Writes down what was written to a stream.
    pub fn append(&mut self, at_ns: u64, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        self.buffer.clear();
        format(&mut self.buffer, at_ns, stream, bytes);
        let buffer = std::mem::take(&mut self.buffer);
        let written = self.write_lines(&buffer);
        self.buffer = buffer;
        written
    }

    /// Writes whole lines, each file of them within the limit.
    fn write_lines(&mut self, mut lines: &[u8]) -> io::Result<()> {
        while !lines.is_empty() {
            let room = self.limits.size.saturating_sub(self.size);
            let fitting = match usize::try_from(room) {
                Ok(room) if room < lines.len() => {
                    let end = lines[..room].iter().rposition(|b| *b == b'\n');
                    end.map_or(0, |end| end + 1)
                }
                _ => lines.len(),
            };
            let now = match fitting {
                0 if self.size > 0 => {
                    self.rotate()?;
                    continue;
                }
                // A single line beyond the limit has a file of its own.
                0 => lines
                    .iter()
                    .position(|b| *b == b'\n')
                    .map_or(lines.len(), |end| end + 1),
                fitting => fitting,
            };
            if let Err(error) = self.file.write_all(&lines[..now]) {
                // Half a line would be taken for the beginning of the next one.
                let _ = self.file.set_len(self.size);
                return Err(error);
            }
            self.size += now as u64;
            lines = &lines[now..];
        }
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let older = self.limits.files.max(1) - 1;
        for n in (0..older).rev() {
            match std::fs::rename(rotated(&self.path, n), rotated(&self.path, n + 1)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        if older == 0 {
            std::fs::remove_file(&self.path)?;
        }
        self.file = open_for_appending(&self.path)?;
        self.size = 0;
        Ok(())
    }
}

fn open_for_appending(path: &Path) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    Ok(rustix::fs::open(path, flags | OFlags::NOFOLLOW, mode)?.into())
}

/// The `n`th file back; 0 is the newest.
fn rotated(path: &Path, n: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    if n > 0 {
        name.push(format!(".{n}"));
    }
    name.into()
}

/// The reading end: every entry once, from the oldest on, across rotations.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    /// Files that came after the current one, the next of them last.
    newer: Vec<File>,
    current: io::BufReader<File>,
    /// The beginning of a line whose end isn't there yet.
    begun: Vec<u8>,
}

impl Reader {
    /// Opens the log in a directory; `None` if there is none.
    pub fn open(dir: &Path) -> io::Result<Option<Self>> {
        let path = dir.join(FILE_NAME);
        let mut files = younger_than(&path, None)?;
        let Some(oldest) = files.pop() else {
            return Ok(None);
        };
        Ok(Some(Self {
            path,
            newer: files,
            current: io::BufReader::new(oldest),
            begun: Vec::new(),
        }))
    }

    /// Opens the log where it ends now; `None` if there is none.
    pub fn open_at_end(dir: &Path) -> io::Result<Option<Self>> {
        let path = dir.join(FILE_NAME);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        file.seek(io::SeekFrom::End(0))?;
        Ok(Some(Self {
            path,
            newer: Vec::new(),
            current: io::BufReader::new(file),
            begun: Vec::new(),
        }))
    }

    /// The next entry; `None` when there is none yet. Lines that are none of ours are passed over.
    pub fn read(&mut self) -> io::Result<Option<Entry>> {
        loop {
            if self.line()? {
                let entry = Entry::parse(&self.begun);
                self.begun.clear();
                if entry.is_some() {
                    return Ok(entry);
                }
            } else if let Some(file) = self.newer.pop() {
                self.current = io::BufReader::new(file);
                self.begun.clear();
            } else if !self.find_newer()? {
                return Ok(None);
            }
            // A newer file was found: what came before the rotation is read first.
        }
    }

    /// Reads on to a line's end; whether it got there.
    fn line(&mut self) -> io::Result<bool> {
        loop {
            let available = self.current.fill_buf()?;
            if available.is_empty() {
                return Ok(false);
            }
            let end = available.iter().position(|b| *b == b'\n');
            let taken = end.unwrap_or(available.len());
            // What is longer than any line of ours is damaged: its beginning is enough to tell.
            let room = MAX_LINE.saturating_sub(self.begun.len());
            self.begun.extend_from_slice(&available[..taken.min(room)]);
            self.current.consume(taken + usize::from(end.is_some()));
            if end.is_some() {
                return Ok(true);
            }
        }
    }

    /// Looks for files that came after the current one; whether there are any.
    fn find_newer(&mut self) -> io::Result<bool> {
        let current = self.current.get_ref().metadata()?;
        self.newer = younger_than(&self.path, Some(&current))?;
        Ok(!self.newer.is_empty())
    }
}

/// The files that came after one of them, or all, the oldest last. They may be rotated meanwhile.
fn younger_than(path: &Path, known: Option<&Metadata>) -> io::Result<Vec<File>> {
    let same = |a: &Metadata, b: &Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    let mut files: Vec<(File, Metadata)> = Vec::new();
    for n in 0.. {
        let file = match File::open(rotated(path, n)) {
            Ok(file) => file,
            // Just now there is no newest one, maybe.
            Err(e) if e.kind() == io::ErrorKind::NotFound && n == 0 => continue,
            Err(e) if e.kind() == io::ErrorKind::NotFound => break,
            Err(e) => return Err(e),
        };
        let there = file.metadata()?;
        if known.is_some_and(|known| same(known, &there)) {
            break;
        }
        if !files.last().is_some_and(|(_, last)| same(last, &there)) {
            files.push((file, there));
        }
    }
    Ok(files.into_iter().map(|(file, _)| file).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const AT: u64 = 1_700_000_000_123_456_789;

    fn all(reader: &mut Reader) -> Vec<Entry> {
        std::iter::from_fn(|| reader.read().unwrap()).collect()
    }

    fn text(entries: &[Entry], stream: Stream) -> Vec<u8> {
        let of_stream = entries.iter().filter(|e| e.stream == stream);
        of_stream.flat_map(|e| e.content.clone()).collect()
    }

    #[test]
    fn append_writes_the_format_of_the_cri() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Writer::open(dir.path(), Limits::default()).unwrap();
        log.append(AT, Stream::Stderr, b"one\ntwo").unwrap();
        let written = std::fs::read_to_string(dir.path().join(FILE_NAME)).unwrap();
        let expected = "2023-11-14T22:13:20.123456789Z stderr F one\n\
                        2023-11-14T22:13:20.123456789Z stderr P two\n";
        assert_eq!(written, expected);
    }

    #[test]
    fn reader_without_log_is_none() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Reader::open(dir.path()).unwrap().is_none());
    }

    #[test]
    fn rotation_keeps_the_newest_within_the_bound() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits {
            size: 1000,
            files: 3,
        };
        let mut log = Writer::open(dir.path(), limits).unwrap();
        for n in 0..200 {
            let line = format!("line {n}\n");
            log.append(AT, Stream::Stdout, line.as_bytes()).unwrap();
        }
        let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(files.len(), 3);
        for file in files {
            assert!(file.unwrap().metadata().unwrap().len() <= 1000);
        }
        let kept = all(&mut Reader::open(dir.path()).unwrap().unwrap());
        assert!(kept.len() > 40);
        assert_eq!(kept.last().unwrap().content, b"line 199\n");
    }

    #[test]
    fn output_larger_than_a_file_is_spread_over_files() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits {
            size: 4096,
            files: 1000,
        };
        let mut log = Writer::open(dir.path(), limits).unwrap();
        log.append(AT, Stream::Stdout, &[b'\n'; 5000]).unwrap();
        for file in std::fs::read_dir(dir.path()).unwrap() {
            assert!(file.unwrap().metadata().unwrap().len() <= 4096);
        }
        let entries = all(&mut Reader::open(dir.path()).unwrap().unwrap());
        assert_eq!(entries.len(), 5000);
    }

    #[test]
    fn one_file_only_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits { size: 60, files: 1 };
        let mut log = Writer::open(dir.path(), limits).unwrap();
        for content in [b"one\n", b"two\n"] {
            log.append(AT, Stream::Stdout, content).unwrap();
        }
        let kept = all(&mut Reader::open(dir.path()).unwrap().unwrap());
        assert_eq!(text(&kept, Stream::Stdout), b"two\n");
    }

    #[test]
    fn follower_reads_everything_once_across_rotations() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits {
            size: 500,
            files: 10,
        };
        let mut log = Writer::open(dir.path(), limits).unwrap();
        let mut reader = Reader::open(dir.path()).unwrap().unwrap();
        let (mut sent, mut got) = (Vec::new(), Vec::new());
        for n in 0..100 {
            let line = format!("line {n}\n");
            log.append(AT, Stream::Stdout, line.as_bytes()).unwrap();
            sent.extend_from_slice(line.as_bytes());
            if n % 17 == 0 {
                got.extend(text(&all(&mut reader), Stream::Stdout));
            }
        }
        got.extend(text(&all(&mut reader), Stream::Stdout));
        assert_eq!(String::from_utf8(got), String::from_utf8(sent));
    }

    #[test]
    fn reader_at_the_end_sees_what_comes_then() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Reader::open_at_end(dir.path()).unwrap().is_none());
        let mut log = Writer::open(dir.path(), Limits::default()).unwrap();
        log.append(AT, Stream::Stdout, b"before\n").unwrap();
        let mut reader = Reader::open_at_end(dir.path()).unwrap().unwrap();
        log.append(AT, Stream::Stdout, b"after\n").unwrap();
        assert_eq!(text(&all(&mut reader), Stream::Stdout), b"after\n");
    }

    #[test]
    fn lines_of_others_and_torn_ones_are_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = b"nonsense\n2023-11-14T22:13:20Z stdout X y\n".to_vec();
        bytes.extend(vec![b'a'; 1 << 20]);
        bytes.extend(b"\n2023-11-14T22:13:20Z stdout F good\n2023-11-14T22:13:20Z stdout F to");
        std::fs::write(dir.path().join(FILE_NAME), bytes).unwrap();
        let mut reader = Reader::open(dir.path()).unwrap().unwrap();
        let entries = all(&mut reader);
        assert_eq!(text(&entries, Stream::Stdout), b"good\n");
        assert!(reader.begun.len() <= MAX_LINE);
    }

    proptest! {
        #[test]
        fn parse_of_anything_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Entry::parse(&bytes);
        }

        #[test]
        fn what_is_written_comes_back(pieces in proptest::collection::vec(
            (any::<bool>(), proptest::collection::vec(any::<u8>(), 0..40_000)), 0..6)) {
            let dir = tempfile::tempdir().unwrap();
            let mut log = Writer::open(dir.path(), Limits { size: 1 << 30, files: 2 }).unwrap();
            let mut sent = [Vec::new(), Vec::new()];
            for (to_stderr, bytes) in &pieces {
                let stream = if *to_stderr { Stream::Stderr } else { Stream::Stdout };
                log.append(AT, stream, bytes).unwrap();
                sent[usize::from(*to_stderr)].extend_from_slice(bytes);
            }
            let entries = all(&mut Reader::open(dir.path()).unwrap().unwrap());
            prop_assert_eq!(text(&entries, Stream::Stdout), sent[0].clone());
            prop_assert_eq!(text(&entries, Stream::Stderr), sent[1].clone());
        }
    }
}
