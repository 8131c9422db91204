//! Images into the store.

use std::cell::Cell;
use std::fs::File;
use std::io::{BufReader, Read, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::FutureExt as _;

use crate::convert::{Expected, mismatch};
use crate::digest::Digest;
use crate::error::{Error, Result, printable};
use crate::progress::Event;
use crate::reference::parse_reference;
use crate::registry::{Descriptor, Manifest, Select, parse, select};
use crate::store::{Config, Image, LoadOptions, LoadSource, Store, UseLock};

use super::input::{Input, Part};
use super::*;

/// A layer to load: its file, and the digest its bytes have as they are.
struct LayerInput {
    name: String,
    blob: Option<(Digest, u64)>,
}

/// An image to load, its documents verified.
struct ImageInput {
    config: Config,
    layers: Vec<LayerInput>,
    manifest: Option<Vec<u8>>,
    names: Vec<String>,
}

impl Store {
    /// Brings the images of an archive or layout into the store. The format is detected; gzip and zstd are undone.
    pub async fn load(&self, source: LoadSource<'_>, options: &LoadOptions) -> Result<Vec<Image>> {
        let run = || self.load_blocking(source, options);
        match tokio::runtime::Handle::try_current().map(|handle| handle.runtime_flavor()) {
            Ok(tokio::runtime::RuntimeFlavor::MultiThread) => tokio::task::block_in_place(run),
            _ => run(),
        }
    }

    fn load_blocking(&self, source: LoadSource<'_>, options: &LoadOptions) -> Result<Vec<Image>> {
        let lock = self.use_lock()?;
        let what = match &source {
            LoadSource::Path(path) => path.display().to_string(),
            LoadSource::Reader(_) => "standard input".to_owned(),
        };
        let spool;
        let input = match source {
            LoadSource::Path(path) if path.is_dir() => Input::Directory(path.to_owned()),
            LoadSource::Path(path) => {
                let file = File::open(path).map_err(|e| Error::io("cannot open", path, e))?;
                if is_plain(&file) {
                    Input::archive(file, path)?
                } else {
                    spool = self.spool(Box::new(file), &what, options)?;
                    Input::archive(clone(&spool.file)?, path)?
                }
            }
            LoadSource::Reader(reader) => {
                spool = self.spool(reader, &what, options)?;
                Input::archive(clone(&spool.file)?, Path::new(&what))?
            }
        };
        let images =
            if let Some(bytes) = input.document(DOCKER_INDEX, options.limits.document_bytes)? {
                docker_images(&input, &bytes, options)?
            } else if let Some(bytes) = input.document(OCI_INDEX, options.limits.document_bytes)? {
                oci_images(&input, &what, &bytes, options)?
            } else {
                return Err(Error::NotAnArchive {
                    what,
                    reason: format!("it has neither {DOCKER_INDEX} nor {OCI_INDEX}"),
                });
            };
        images
            .into_iter()
            .map(|image| self.load_image(&input, image, &lock, options))
            .collect()
    }

    fn load_image(
        &self,
        input: &Input,
        image: ImageInput,
        lock: &UseLock,
        options: &LoadOptions,
    ) -> Result<Image> {
        let ImageInput {
            config,
            layers,
            manifest,
            names,
        } = image;
        let next = AtomicUsize::new(0);
        let work = || -> Result<()> {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some((layer, diff_id)) = layers.get(index).zip(config.diff_ids.get(index))
                else {
                    return Ok(());
                };
                if !config.diff_ids[..index].contains(diff_id) {
                    self.load_layer(input, layer, index, *diff_id, options)?;
                }
            }
        };
        let threads = options
            .limits
            .parallel_layers
            .clamp(1, 16)
            .min(layers.len());
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            workers
                .into_iter()
                .try_for_each(|worker| worker.join().map_err(|_| Error::Worker("a conversion"))?)
        })?;
        let manifest = match manifest {
            Some(manifest) => manifest,
            None => self.plain_manifest_of(&config)?,
        };
        self.add_image(
            lock,
            &config,
            &manifest,
            names,
            Vec::new(),
            &options.progress,
        )
    }

    /// The manifest that its layers would have uncompressed.
    pub(crate) fn plain_manifest_of(&self, config: &Config) -> Result<Vec<u8>> {
        let sizes = config
            .diff_ids
            .iter()
            .map(|id| Ok((*id, self.archive_bytes(id)?)))
            .collect::<Result<Vec<_>>>()?;
        Ok(plain_manifest(
            (&config.id, config.bytes.len() as u64),
            &sizes,
        ))
    }

    fn load_layer(
        &self,
        input: &Input,
        layer: &LayerInput,
        index: usize,
        diff_id: Digest,
        options: &LoadOptions,
    ) -> Result<()> {
        let progress = &options.progress;
        let claim = self.claim_layer(index, &diff_id, progress.as_ref(), async |time| {
            std::thread::sleep(time)
        });
        let claim = claim
            .now_or_never()
            .expect("this thread slept instead of waiting");
        let Some(writer) = claim? else {
            return Ok(());
        };
        let part = input
            .open(&layer.name)?
            .ok_or_else(|| missing(&layer.name))?;
        let bytes = part.left();
        progress.event(Event::LayerStarted {
            index,
            layer: &diff_id,
            bytes,
        });
        let expected = Expected {
            what: format!("layer {}", layer.blob.map_or(diff_id, |(digest, _)| digest)),
            blob: layer.blob,
            diff_id,
        };
        let reader = Told {
            part,
            received: 0,
            told: |received| {
                progress.event(Event::LayerBytes {
                    index,
                    layer: &diff_id,
                    received,
                })
            },
        };
        let blob_bytes = self.write_layer(
            writer,
            BufReader::with_capacity(256 * 1024, reader),
            &expected,
            &options.limits,
        )?;
        progress.event(Event::LayerDone {
            index,
            layer: &diff_id,
            blob_bytes,
        });
        Ok(())
    }

    /// Copies a pipe or a compressed archive to a file, uncompressed: its index may come last.
    fn spool(
        &self,
        reader: Box<dyn Read + Send + '_>,
        what: &str,
        options: &LoadOptions,
    ) -> Result<crate::store::Partial> {
        let mut spool = self.spool_file()?;
        let taken = Cell::new(0);
        let counted = Taken {
            reader,
            count: &taken,
        };
        let mut reader = BufReader::with_capacity(256 * 1024, counted);
        let failed = |e| Error::io("cannot read", what, e);
        let start = std::io::BufRead::fill_buf(&mut reader).map_err(failed)?;
        let gzip = start.starts_with(&[0x1f, 0x8b]);
        let zstd = start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]);
        let mut inflated: Box<dyn Read + '_> = if gzip {
            Box::new(flate2::bufread::MultiGzDecoder::new(reader))
        } else if zstd {
            Box::new(zstd::Decoder::with_buffer(reader).map_err(failed)?)
        } else {
            Box::new(reader)
        };
        let mut total = 0;
        let mut checked = 0;
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let count = match inflated.read(&mut buffer) {
                Ok(0) => {
                    drop(inflated);
                    return Ok(spool);
                }
                Ok(count) => count,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    return Err(Error::NotAnArchive {
                        what: what.to_owned(),
                        reason: e.to_string(),
                    });
                }
            };
            total += count as u64;
            let compressed = (gzip || zstd).then(|| taken.get());
            options.limits.inflated(what, total, compressed)?;
            if total - checked >= ROOM_EVERY {
                checked = total;
                leaves_room(&spool)?;
            }
            let path = spool.path.clone();
            spool
                .file
                .write_all(&buffer[..count])
                .map_err(|e| Error::io("cannot write", path, e))?;
        }
    }
}

/// How often the disk is looked at while an archive is spooled.
const ROOM_EVERY: u64 = 4 << 20;
/// An archive is there twice for a while (as it came and as layers): spooling it must not take the disk's last bytes from others.
const ROOM_LEFT: u64 = 256 << 20;

/// Whether the disk still has a fiftieth of itself, or enough; the spool goes on only then.
pub(crate) fn leaves_room(spool: &crate::store::Partial) -> Result<()> {
    let disk = rustix::fs::fstatvfs(&spool.file)
        .map_err(|e| Error::io("cannot look at the disk of", &spool.path, e.into()))?;
    let bytes = |blocks: u64| blocks.saturating_mul(disk.f_frsize);
    if bytes(disk.f_bavail) < ROOM_LEFT.min(bytes(disk.f_blocks) / 50) {
        return Err(Error::DiskFull {
            path: spool.path.clone(),
        });
    }
    Ok(())
}

/// Counts what was read.
struct Taken<'a, R> {
    reader: R,
    count: &'a Cell<u64>,
}

impl<R: Read> Read for Taken<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.reader.read(buffer)?;
        self.count.set(self.count.get() + count as u64);
        Ok(count)
    }
}

fn clone(file: &File) -> Result<File> {
    let file = file
        .try_clone()
        .map_err(|e| Error::io("cannot duplicate", "a file", e))?;
    std::io::Seek::rewind(&mut &file).map_err(|e| Error::io("cannot rewind", "a file", e))?;
    Ok(file)
}

/// Whether a file can be read in place: a regular file that isn't compressed.
fn is_plain(file: &File) -> bool {
    let mut start = [0; 4];
    let regular = file.metadata().is_ok_and(|metadata| metadata.is_file());
    let read = std::os::unix::fs::FileExt::read_at(file, &mut start, 0).is_ok();
    regular && read && !start.starts_with(&[0x1f, 0x8b]) && start != [0x28, 0xb5, 0x2f, 0xfd]
}

fn missing(name: &str) -> Error {
    Error::BadDocument {
        what: "archive".into(),
        reason: format!("it names {name:?} but doesn't have it"),
    }
}

fn docker_images(input: &Input, index: &[u8], options: &LoadOptions) -> Result<Vec<ImageInput>> {
    let bad = |reason: String| Error::BadDocument {
        what: DOCKER_INDEX.to_owned(),
        reason,
    };
    let images: Vec<DockerImage> =
        serde_json::from_slice(index).map_err(|e| bad(printable(e.to_string().as_bytes())))?;
    let mut inputs = Vec::new();
    for image in images {
        let bytes = input.document(&image.config, options.limits.document_bytes)?;
        let bytes = bytes.ok_or_else(|| missing(&image.config))?;
        let id = Digest::of(&bytes);
        // Its name is its digest, where it looks like one.
        let stem = image
            .config
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .trim_end_matches(".json");
        if let Ok(expected) = format!("sha256:{stem}").parse::<Digest>()
            && expected != id
        {
            return Err(mismatch(
                &format!("configuration {}", printable(image.config.as_bytes())),
                &expected,
                &id,
            ));
        }
        let names = image.names.unwrap_or_default();
        let names = names
            .iter()
            .map(|name| Ok(parse_reference(name)?.whole()))
            .collect::<Result<Vec<_>>>()?;
        let what = names.first().cloned().unwrap_or_else(|| id.to_string());
        let config = Config::parse(&what, id, bytes, image.layers.len(), &options.limits)?;
        let layers = image
            .layers
            .into_iter()
            .map(|name| LayerInput { name, blob: None })
            .collect();
        inputs.push(ImageInput {
            config,
            layers,
            manifest: None,
            names,
        });
    }
    Ok(inputs)
}

fn oci_images(
    input: &Input,
    what: &str,
    index: &[u8],
    options: &LoadOptions,
) -> Result<Vec<ImageInput>> {
    let Select::Index(entries) = parse(what, index)? else {
        return Err(Error::BadDocument {
            what: OCI_INDEX.to_owned(),
            reason: "it is not an index".into(),
        });
    };
    let mut inputs: Vec<ImageInput> = Vec::new();
    for entry in &entries {
        // Of several platforms only the wanted one; an entry without a platform tells it in its configuration.
        if entries.len() > 1
            && entry.platform.is_some()
            && select(what, &options.platform, std::slice::from_ref(entry)).is_err()
        {
            continue;
        }
        let (manifest, bytes) = manifest_of(input, what, entry, options)?;
        let config = verified(input, &manifest.config, options)?;
        let config = Config::parse(
            what,
            manifest.config.digest,
            config,
            manifest.layers.len(),
            &options.limits,
        )?;
        let names = name_of(entry).into_iter().collect::<Vec<_>>();
        // The same image under several names has several entries.
        if let Some(same) = inputs.iter_mut().find(|input| input.config.id == config.id) {
            same.names.extend(names);
            continue;
        }
        let layers = manifest
            .layers
            .iter()
            .map(|layer| LayerInput {
                name: blob_path(&layer.digest),
                blob: Some((layer.digest, layer.size)),
            })
            .collect();
        inputs.push(ImageInput {
            config,
            layers,
            manifest: Some(bytes),
            names,
        });
    }
    if inputs.is_empty() {
        select(what, &options.platform, &entries)?;
    }
    Ok(inputs)
}

/// The manifest behind an entry, through an index of platforms if there is one.
fn manifest_of(
    input: &Input,
    what: &str,
    entry: &Descriptor,
    options: &LoadOptions,
) -> Result<(Manifest, Vec<u8>)> {
    let bytes = verified(input, entry, options)?;
    let (parsed, bytes) = match parse(what, &bytes)? {
        Select::Image(manifest) => return Ok((manifest, bytes)),
        Select::Index(entries) => {
            let bytes = verified(input, select(what, &options.platform, &entries)?, options)?;
            (parse(what, &bytes)?, bytes)
        }
    };
    match parsed {
        Select::Image(manifest) => Ok((manifest, bytes)),
        Select::Index(_) => Err(Error::BadDocument {
            what: format!("index of {what}"),
            reason: "it leads to another index".into(),
        }),
    }
}

fn verified(input: &Input, blob: &Descriptor, options: &LoadOptions) -> Result<Vec<u8>> {
    let name = blob_path(&blob.digest);
    let bytes = input
        .document(&name, options.limits.document_bytes)?
        .ok_or_else(|| missing(&name))?;
    let actual = Digest::of(&bytes);
    if actual == blob.digest {
        Ok(bytes)
    } else {
        Err(mismatch(&name, &blob.digest, &actual))
    }
}

/// The full name an entry gives, if it does: a bare tag names no repository.
fn name_of(entry: &Descriptor) -> Option<String> {
    let name = entry.annotations.get(FULL_NAME).or_else(|| {
        entry
            .annotations
            .get(REF_NAME)
            .filter(|name| name.contains(['/', ':']))
    })?;
    parse_reference(name).ok().map(|name| name.whole())
}

/// Reads a layer and tells how far.
struct Told<F> {
    part: Part,
    received: u64,
    told: F,
}

impl<F: Fn(u64)> Read for Told<F> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.part.read(buffer)?;
        self.received += count as u64;
        (self.told)(self.received);
        Ok(count)
    }
}
