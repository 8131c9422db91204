//! Files of an archive or a layout directory, by name.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result, printable};
use crate::tar::{Archive, Kind};
use crate::tree::components;

/// Files of an image archive; a hundred images have some thousands.
const FILES_MAX: usize = 200_000;
/// Links from layer to layer, as old Docker versions wrote them.
const LINKS_MAX: usize = 8;

/// Where a load's files come from.
pub(super) enum Input {
    Directory(PathBuf),
    Archive {
        file: Arc<File>,
        entries: HashMap<Vec<u8>, Place>,
    },
}

/// Where a file is in an archive.
pub(super) enum Place {
    At { offset: u64, size: u64 },
    LinkTo(Vec<u8>),
}

/// A part of a file, read from its start.
pub(super) struct Part {
    file: Arc<File>,
    offset: u64,
    left: u64,
}

impl Part {
    /// Bytes not read yet.
    pub(super) fn left(&self) -> u64 {
        self.left
    }
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = buffer
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = self.file.read_at(&mut buffer[..count], self.offset)?;
        self.offset += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

impl Input {
    /// Lists an archive's files. Their data is skipped, not read.
    pub(super) fn archive(file: File, what: &Path) -> Result<Self> {
        let file = Arc::new(file);
        let mut archive = Archive::new(BufReader::new(&*file), ());
        let mut entries = HashMap::new();
        let bad = |reason: String| Error::NotAnArchive {
            what: what.display().to_string(),
            reason,
        };
        loop {
            let entry = match archive.next_entry() {
                Ok(Some(entry)) => entry,
                Ok(None) => break,
                Err(e) => return Err(bad(e.to_string())),
            };
            let name = components(&entry.name).collect::<Vec<_>>().join(&b'/');
            let place = match entry.kind {
                Kind::Regular if entry.sparse.is_some() => {
                    return Err(bad(format!(
                        "\"{}\" is a sparse file",
                        printable(&entry.name)
                    )));
                }
                Kind::Regular => Some(Place::At {
                    offset: archive.position(),
                    size: entry.size,
                }),
                Kind::Symlink => {
                    let parent = name
                        .iter()
                        .rposition(|&b| b == b'/')
                        .map_or(&b""[..], |at| &name[..at]);
                    Some(Place::LinkTo(join(parent, &entry.link)))
                }
                Kind::HardLink => Some(Place::LinkTo(join(b"", &entry.link))),
                _ => None,
            };
            if let Some(place) = place {
                entries.insert(name, place);
            }
            if entries.len() > FILES_MAX {
                return Err(bad(format!("more than {FILES_MAX} files")));
            }
            archive.seek_data()?;
        }
        drop(archive);
        let size = file
            .metadata()
            .map_err(|e| Error::io("cannot read", what, e))?
            .len();
        for (name, place) in &entries {
            if let Place::At {
                offset,
                size: length,
            } = place
                && offset.checked_add(*length).is_none_or(|end| end > size)
            {
                let detail = format!("\"{}\" isn't whole", printable(name));
                return Err(Error::Truncated {
                    what: what.display().to_string(),
                    detail,
                });
            }
        }
        Ok(Self::Archive { file, entries })
    }

    /// Opens a file; `None` if there is none of this name.
    pub(super) fn open(&self, name: &str) -> Result<Option<Part>> {
        match self {
            Self::Directory(root) => {
                let path = root.join(name);
                match File::open(&path) {
                    Ok(file) => {
                        let size = file
                            .metadata()
                            .map_err(|e| Error::io("cannot read", &path, e))?
                            .len();
                        Ok(Some(Part {
                            file: Arc::new(file),
                            offset: 0,
                            left: size,
                        }))
                    }
                    Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(e) => Err(Error::io("cannot open", path, e)),
                }
            }
            Self::Archive { file, entries } => {
                let mut name = components(name.as_bytes()).collect::<Vec<_>>().join(&b'/');
                for _ in 0..LINKS_MAX {
                    match entries.get(&name) {
                        Some(Place::At { offset, size }) => {
                            return Ok(Some(Part {
                                file: Arc::clone(file),
                                offset: *offset,
                                left: *size,
                            }));
                        }
                        Some(Place::LinkTo(target)) => name = target.clone(),
                        None => return Ok(None),
                    }
                }
                Ok(None)
            }
        }
    }

    /// A small file, whole.
    pub(super) fn document(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let Some(part) = self.open(name)? else {
            return Ok(None);
        };
        let size = part.left;
        if size > limit {
            return Err(Error::Limit {
                what: printable(name.as_bytes()),
                limit,
                unit: "bytes",
                key: "document_bytes",
            });
        }
        let mut bytes = Vec::new();
        part.take(limit)
            .read_to_end(&mut bytes)
            .map_err(|e| Error::io("cannot read", name, e))?;
        Ok(Some(bytes))
    }
}

/// A link's target as a name in the archive.
fn join(parent: &[u8], target: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = components(parent).collect();
    for part in components(target) {
        if part == b".." {
            parts.pop();
        } else {
            parts.push(part);
        }
    }
    parts.join(&b'/')
}
