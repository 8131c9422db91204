//! `logs`: what a container wrote.

use super::args::LogsArgs;
use super::containers;
use super::follow::Follower;
use super::streams::{Output, OutputEnd};
use crate::log::{self, Entry, Reader, Stream};
use crate::settings::Settings;
use crate::state::now_ns;
use crate::times;
use anyhow::{Context, bail};
use std::collections::VecDeque;
use std::time::Duration;

/// `casemate logs`
pub(super) async fn logs(settings: &Settings, args: &LogsArgs) -> anyhow::Result<()> {
    let now = now_ns();
    let parse = |name: &str, text: &Option<String>| -> anyhow::Result<Option<u64>> {
        text.as_deref()
            .map(|text| time(name, text, now))
            .transpose()
    };
    let since = parse("--since", &args.since)?.unwrap_or(0);
    let until = parse("--until", &args.until)?.unwrap_or(u64::MAX);
    let tail = match args.tail.as_str() {
        "all" => None,
        // As Docker has it: fewer than none is all.
        text => match text.parse::<i64>() {
            Ok(lines) => usize::try_from(lines).ok(),
            Err(_) => bail!("--tail: {text:?} is no number of lines"),
        },
    };

    let container = containers::state(settings)?.find(&args.container)?;
    if container.meta.log.is_none() {
        bail!(
            "the output of container {} is not logged (--log-driver none, or run --rm in the foreground)",
            args.container
        );
    }
    let mut printer = Printer::new(args.timestamps);
    let dir = log::dir_of(&settings.data_dir, &settings.state_dir, &container.meta.id);
    let mut reader = Reader::open(&dir).context("can't read the log")?;
    let mut last = LastLines::new(tail);
    while let Some(reader) = &mut reader
        && let Some(entry) = reader.read().context("can't read the log")?
    {
        if entry.at_ns >= since
            && entry.at_ns <= until
            && let Some(entry) = last.push(entry)
            && printer.print(&entry)? == OutputEnd::ReaderGone
        {
            return Ok(());
        }
    }
    for entry in last.into_entries() {
        if printer.print(&entry)? == OutputEnd::ReaderGone {
            return Ok(());
        }
    }
    if !args.follow {
        return Ok(());
    }
    let mut follower = Follower::new(&container.dir, &dir, reader)?;
    let follow = async {
        while let Some(entry) = follower.next().await? {
            if entry.at_ns > until || printer.print(&entry)? == OutputEnd::ReaderGone {
                break;
            }
        }
        Ok(())
    };
    let left = Duration::from_nanos(until.saturating_sub(now_ns()));
    tokio::time::timeout(left, follow).await.unwrap_or(Ok(()))
}

/// The value of a time's option.
pub(super) fn time(option: &str, text: &str, now: u64) -> anyhow::Result<u64> {
    point_in_time(text, now).with_context(|| option.to_owned())
}

/// A time, or an age counted back from `now`, as nanoseconds since the epoch.
fn point_in_time(text: &str, now: u64) -> anyhow::Result<u64> {
    if let Some(time) = times::parse(text) {
        return Ok(time);
    }
    // Seconds since the epoch, with decimals if need be.
    if let Ok(seconds) = text.parse::<f64>()
        && seconds >= 0.0
    {
        return Ok((seconds * 1e9) as u64);
    }
    if let Some(age) = times::parse_duration(text) {
        return Ok(now.saturating_sub(age));
    }
    bail!("{text:?} is neither a time like 2026-01-31T12:00:00Z nor an age like 10m");
}

/// Prints entries as they were written, with their times if asked for.
struct Printer {
    timestamps: bool,
    /// Whether stdout and stderr are within a line.
    within_line: [bool; 2],
}

impl Printer {
    fn new(timestamps: bool) -> Self {
        Self {
            timestamps,
            within_line: [false; 2],
        }
    }

    fn print(&mut self, entry: &Entry) -> anyhow::Result<OutputEnd> {
        let (output, within) = match entry.stream {
            Stream::Stdout => (Output::Stdout, &mut self.within_line[0]),
            Stream::Stderr => (Output::Stderr, &mut self.within_line[1]),
        };
        let mut bytes = Vec::new();
        if self.timestamps && !*within {
            bytes.extend_from_slice(times::rfc3339(entry.at_ns).as_bytes());
            bytes.push(b' ');
        }
        bytes.extend_from_slice(&entry.content);
        *within = entry.content.last() != Some(&b'\n');
        Ok(output.write(&bytes)?)
    }
}

/// Keeps the last lines; without a bound it keeps nothing.
struct LastLines {
    lines: Option<usize>,
    /// Whole lines, but for the last one, which may go on.
    kept: VecDeque<Vec<Entry>>,
}

impl LastLines {
    fn new(lines: Option<usize>) -> Self {
        Self {
            lines,
            kept: VecDeque::new(),
        }
    }

    /// Takes an entry, or gives it back when there is no bound.
    fn push(&mut self, entry: Entry) -> Option<Entry> {
        let Some(lines) = self.lines else {
            return Some(entry);
        };
        let open = self.kept.back_mut().filter(|line| {
            let last = line.last();
            last.is_some_and(|e| e.stream == entry.stream && e.content.last() != Some(&b'\n'))
        });
        match open {
            Some(line) => line.push(entry),
            None => self.kept.push_back(vec![entry]),
        }
        while self.kept.len() > lines {
            self.kept.pop_front();
        }
        None
    }

    fn into_entries(self) -> impl Iterator<Item = Entry> {
        self.kept.into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_700_000_000_000_000_000;

    fn entry(content: &str) -> Entry {
        Entry {
            at_ns: 0,
            stream: Stream::Stdout,
            content: content.into(),
        }
    }

    #[test]
    fn point_in_time_takes_times_ages_and_seconds() {
        let at = |text| point_in_time(text, NOW).unwrap();
        assert_eq!(at("2023-11-14T22:13:20Z"), NOW);
        assert_eq!(at("1700000000"), NOW);
        assert_eq!(at("1h30m"), NOW - 5400 * 1_000_000_000);
        assert_eq!(at("10m"), NOW - 600 * 1_000_000_000);
        for text in ["", "soon", "-5", "10 parsecs"] {
            assert!(point_in_time(text, NOW).is_err(), "{text}");
        }
    }

    #[test]
    fn last_lines_counts_lines_and_not_pieces() {
        let mut last = LastLines::new(Some(2));
        for piece in ["one\n", "tw", "o\n", "th", "ree"] {
            assert!(last.push(entry(piece)).is_none());
        }
        let kept: Vec<u8> = last.into_entries().flat_map(|e| e.content).collect();
        assert_eq!(kept, b"two\nthree");
    }

    #[test]
    fn last_lines_without_a_bound_keeps_nothing() {
        let mut last = LastLines::new(None);
        assert!(last.push(entry("one\n")).is_some());
        let mut none = LastLines::new(Some(0));
        assert!(none.push(entry("one\n")).is_none());
        assert_eq!(none.into_entries().count(), 0);
    }
}
