//! What happened to containers and images, for `casemate events`: a line of JSON each, in Docker's shape.
//!
//! `STATE/NAMESPACE.events` is appended to by whoever does something, in one write a line. It is bounded: a full file
//! becomes `NAMESPACE.events.1`, and what was there before is forgotten. Nothing fails because an event can't be told.

use crate::files;
use crate::state::now_ns;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A file beyond this is put away.
const FULL: u64 = 1 << 20;
/// Two full files and a little more are read at most.
const MAX_BYTES: u64 = 2 * FULL;
/// A longer line loses its attributes: labels have no bound.
const MAX_LINE: usize = 8 << 10;

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A container.
    Container,
    /// An image.
    Image,
    /// A volume.
    Volume,
    /// A network.
    Network,
}

impl Kind {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Image => "image",
            Self::Volume => "volume",
            Self::Network => "network",
        }
    }
}

/// Who it happened to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// Its id.
    #[serde(rename = "ID")]
    pub id: String,
    /// What else there is to say, by name.
    #[serde(rename = "Attributes", default)]
    pub attributes: BTreeMap<String, String>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// What it is about.
    #[serde(rename = "Type")]
    pub kind: Kind,
    /// What happened.
    #[serde(rename = "Action")]
    pub action: String,
    /// Who it happened to.
    #[serde(rename = "Actor")]
    pub actor: Actor,
    /// Always `local`: there is no cluster.
    pub scope: String,
    /// Seconds since the epoch.
    pub time: u64,
    /// The same in nanoseconds.
    #[serde(rename = "timeNano")]
    pub time_ns: u64,
}

impl Event {
    /// Something that happens now.
    pub fn now<const N: usize>(
        kind: Kind,
        action: &str,
        id: &str,
        attributes: [(&str, String); N],
    ) -> Self {
        let time_ns = now_ns();
        Self {
            kind,
            action: action.to_owned(),
            actor: Actor {
                id: id.to_owned(),
                attributes: attributes
                    .map(|(name, value)| (name.to_owned(), value))
                    .into(),
            },
            scope: "local".into(),
            time: time_ns / 1_000_000_000,
            time_ns,
        }
    }

    fn line(&self) -> Option<Vec<u8>> {
        let mut line = serde_json::to_vec(self).ok()?;
        if line.len() > MAX_LINE {
            let attributes = BTreeMap::new();
            let id = self.actor.id.clone();
            let actor = Actor { id, attributes };
            line = serde_json::to_vec(&Self {
                actor,
                ..self.clone()
            })
            .ok()?;
        }
        line.push(b'\n');
        Some(line)
    }
}

/// The events of one namespace.
#[derive(Debug, Clone)]
pub struct Events {
    path: PathBuf,
}

impl Events {
    /// Beside the directory of a namespace.
    pub fn of(namespace: &Path) -> Self {
        let mut name = namespace.file_name().unwrap_or_default().to_owned();
        name.push(".events");
        Self {
            path: namespace.with_file_name(name),
        }
    }

    /// Tells an event; one that can't be told is lost.
    pub fn tell(&self, event: &Event) {
        let _ = self.append(event);
    }

    fn append(&self, event: &Event) -> io::Result<()> {
        let Some(line) = event.line() else {
            return Ok(());
        };
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&self.path)?;
        file.write_all(&line)?;
        if file.metadata()?.len() > FULL {
            std::fs::rename(&self.path, self.older())?;
        }
        Ok(())
    }

    fn older(&self) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(".1");
        path.into()
    }

    /// Reads the events from the oldest on.
    pub fn read(&self) -> Reader {
        Reader {
            events: self.clone(),
            file: None,
            position: 0,
            rest: Vec::new(),
            older_read: false,
        }
    }
}

/// Goes through the events as they come.
#[derive(Debug)]
pub struct Reader {
    events: Events,
    file: Option<File>,
    position: u64,
    /// A line whose end is not there yet.
    rest: Vec<u8>,
    older_read: bool,
}

impl Reader {
    /// All that has been told since the last time.
    pub fn news(&mut self) -> io::Result<Vec<Event>> {
        let mut text = Vec::new();
        if !self.older_read {
            self.older_read = true;
            text = match files::read(&self.events.older(), MAX_BYTES) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
                read => read?,
            };
        }
        loop {
            // One that was put away is read to its end first.
            let put_away = self
                .file
                .as_ref()
                .is_some_and(|file| !is_at(file, &self.events.path));
            if self.file.is_none() {
                self.position = 0;
                self.file = match File::open(&self.events.path) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => None,
                    opened => Some(opened?),
                };
            }
            let Some(file) = &self.file else { break };
            self.position += read_from(file, self.position, &mut text)?;
            if !put_away {
                break;
            }
            self.file = None;
        }
        self.rest.append(&mut text);
        let end = self
            .rest
            .iter()
            .rposition(|b| *b == b'\n')
            .map_or(0, |at| at + 1);
        let lines: Vec<u8> = self.rest.drain(..end).collect();
        // A torn line is of someone who died in the middle of it.
        Ok(lines
            .split(|b| *b == b'\n')
            .filter_map(|line| serde_json::from_slice(line).ok())
            .collect())
    }
}

fn read_from(file: &File, from: u64, into: &mut Vec<u8>) -> io::Result<u64> {
    let mut chunk = vec![0; 64 << 10];
    let mut total = 0;
    while total < MAX_BYTES {
        match file.read_at(&mut chunk, from + total)? {
            0 => break,
            got => {
                into.extend_from_slice(&chunk[..got]);
                total += got as u64;
            }
        }
    }
    Ok(total)
}

/// Whether the file is the one that the path leads to.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(a), Ok(b)) => a.ino() == b.ino() && a.dev() == b.dev(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: usize, padding: &str) -> Event {
        let attributes = [("pad", padding.to_owned())];
        Event::now(Kind::Container, "start", &number.to_string(), attributes)
    }

    fn ids(events: Vec<Event>) -> Vec<usize> {
        events
            .into_iter()
            .map(|e| e.actor.id.parse().unwrap())
            .collect()
    }

    #[test]
    fn reader_follows_over_a_change_of_files_without_a_gap() {
        let dir = tempfile::tempdir().unwrap();
        let events = Events::of(&dir.path().join("default"));
        let mut reader = events.read();
        assert_eq!(reader.news().unwrap(), []);
        let padding = "x".repeat(4000);
        let mut seen = Vec::new();
        for number in 0..600 {
            events.tell(&event(number, &padding));
            if number % 7 == 0 {
                seen.extend(ids(reader.news().unwrap()));
            }
        }
        seen.extend(ids(reader.news().unwrap()));
        assert_eq!(seen, (0..600).collect::<Vec<_>>());
        // What is kept is bounded.
        let kept = ids(events.read().news().unwrap());
        assert!(
            kept.len() < 600 && kept.last() == Some(&599),
            "{}",
            kept.len()
        );
    }

    #[test]
    fn event_that_is_too_long_loses_its_attributes() {
        let long = event(1, &"x".repeat(MAX_LINE));
        let line = long.line().unwrap();
        assert!(line.len() < 300, "{}", line.len());
        let read: Event = serde_json::from_slice(&line).unwrap();
        assert_eq!(read.actor.id, "1");
    }

    #[test]
    fn news_of_torn_and_strange_lines_are_the_whole_ones() {
        let dir = tempfile::tempdir().unwrap();
        let events = Events::of(&dir.path().join("default"));
        events.tell(&event(1, ""));
        let mut file = OpenOptions::new().append(true).open(&events.path).unwrap();
        file.write_all(b"\xff\n{\"Type\":\"container\"}\n{\"Typ")
            .unwrap();
        let mut reader = events.read();
        assert_eq!(ids(reader.news().unwrap()), [1]);
        file.write_all(b"e\n").unwrap();
        events.tell(&event(2, ""));
        assert_eq!(ids(reader.news().unwrap()), [2]);
    }
}
