//! Taking images and files away.

use std::collections::HashSet;
use std::fs::File;
use std::path::PathBuf;

use rustix::fs::{FlockOperation, flock};

use crate::digest::Digest;
use crate::erofs::Reader;
use crate::error::{Error, Result};
use crate::reference::parse_reference;

use super::files::{self, clean_tmp, disk_bytes};
use super::index::{Index, Record};
use super::install::chain_id;
use super::{Pruned, Removed, Store, find, require};

impl Store {
    /// Takes a name away, and with the last name the image; by id, all of it if it has one name at most or `force` is set.
    pub fn remove(&self, name_or_id: &str, force: bool) -> Result<Removed> {
        let mut removed = Index::update(&self.paths, |index| {
            let record = require(index, name_or_id)?.clone();
            let name = parse_reference(name_or_id)
                .ok()
                .map(|name| name.whole())
                .filter(|name| record.names.contains(name));
            let in_use = |reason: String| Error::InUse {
                name: name_or_id.to_owned(),
                reason,
            };
            let untagged = match name {
                Some(name) if record.names.len() > 1 => vec![name],
                None if record.names.len() > 1 && !force => {
                    return Err(in_use(format!(
                        "it has the names {}",
                        record.names.join(", ")
                    )));
                }
                _ => record.names.clone(),
            };
            let whole = untagged.len() == record.names.len();
            if whole && !force {
                if let Some(reason) = self.needed.get(&record.id) {
                    return Err(in_use(reason.clone()));
                }
                if self.is_leased(&record)? {
                    return Err(in_use("a sandbox runs on it".into()));
                }
            }
            if whole {
                index.images.retain(|other| other.id != record.id);
            } else if let Some(record) = index.images.iter_mut().find(|other| other.id == record.id)
            {
                record.names.retain(|name| !untagged.contains(name));
            }
            let deleted = if whole { vec![record.id] } else { Vec::new() };
            Ok(Removed {
                untagged,
                deleted,
                freed: 0,
            })
        })?;
        removed.freed = self.collect()?.1;
        Ok(removed)
    }

    /// Removes images without a name (`all`: those no sandbox uses) and every file no image needs.
    pub fn prune(&self, all: bool) -> Result<Pruned> {
        let deleted = Index::update(&self.paths, |index| {
            let mut deleted = Vec::new();
            let mut kept = Vec::new();
            for record in std::mem::take(&mut index.images) {
                let is_needed = self.needed.contains_key(&record.id);
                if (all || record.names.is_empty()) && !is_needed && !self.is_leased(&record)? {
                    deleted.push(record.id);
                } else {
                    kept.push(record);
                }
            }
            index.images = kept;
            Ok(deleted)
        })?;
        let (left, left_bytes) = clean_tmp(&self.paths)?;
        let (files, freed) = self.collect()?;
        Ok(Pruned {
            deleted,
            files: files + left,
            freed: freed + left_bytes,
        })
    }

    fn is_leased(&self, record: &Record) -> Result<bool> {
        let path = self.paths.rootfs(&chain_id(&record.layers));
        match File::open(&path) {
            Ok(file) => Ok(flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(Error::io("cannot open", path, e)),
        }
    }

    /// Removes files that no image needs. While anybody adds files nothing is removed: the next time will do.
    fn collect(&self) -> Result<(usize, u64)> {
        let lock = files::try_lock(
            &self.paths.use_lock(),
            FlockOperation::NonBlockingLockExclusive,
        )?;
        let Some(_lock) = lock else { return Ok((0, 0)) };
        let index = Index::read(&self.paths)?;
        let mut needed: HashSet<PathBuf> = HashSet::new();
        for record in &index.images {
            needed.insert(self.paths.document(&record.id));
            needed.insert(self.paths.document(&record.manifest));
            needed.insert(self.paths.rootfs(&chain_id(&record.layers)));
            record
                .layers
                .iter()
                .for_each(|layer| self.need_layer(&mut needed, layer));
        }
        let (mut count, mut bytes) = (0, 0);
        let mut take = |path: &PathBuf| {
            bytes += disk_bytes(path);
            count += usize::from(std::fs::remove_file(path).is_ok());
        };
        for path in files::list(&self.paths.rootfses())? {
            if needed.contains(&path) {
                continue;
            }
            let Ok(file) = File::open(&path) else {
                continue;
            };
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                take(&path);
                continue;
            }
            // A sandbox still runs on an image that was removed by force: its layers stay with it.
            let devices = Reader::open(file)
                .map(|reader| reader.devices().to_vec())
                .unwrap_or_default();
            for device in devices {
                if let Ok(layer) = format!("sha256:{}", device.tag).parse::<Digest>() {
                    self.need_layer(&mut needed, &layer);
                }
            }
        }
        for directory in [self.paths.layers(), self.paths.documents()] {
            files::list(&directory)?
                .iter()
                .filter(|path| !needed.contains(*path))
                .for_each(&mut take);
        }
        Ok((count, bytes))
    }

    fn need_layer(&self, needed: &mut HashSet<PathBuf>, layer: &Digest) {
        needed.insert(self.paths.layer(layer));
        needed.insert(self.paths.recipe(layer));
    }

    /// Whether an image of this name or id is there.
    pub fn contains(&self, name_or_id: &str) -> Result<bool> {
        Ok(find(&Index::read(&self.paths)?, name_or_id)?.is_some())
    }
}
