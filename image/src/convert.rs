//! Compressed bytes in, a verified layer in the store's temporary files out.
//!
//! Two threads share the work: one takes bytes as they arrive, hashes and inflates them; the other hashes the archive and writes
//! the blob. Few buffers travel between them and are used again, so that memory stays bounded whatever the layer.

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::layer::{Converted, Layer};
use crate::limits::Limits;
use crate::recipe::RecipeWriter;
use crate::tar::input_error;

/// Inflated bytes that travel at once, and how many such buffers there are.
const BUFFER: usize = 256 * 1024;
const BUFFERS: usize = 4;

/// Bytes of a layer that turned out bad which are still read to tell wrong bytes from a bad image.
const PATIENCE: u64 = 256 << 20;

/// What the bytes must turn out to be.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    /// For messages.
    pub(crate) what: String,
    /// Digest and length of the bytes as they come; archives have none.
    pub(crate) blob: Option<(Digest, u64)>,
    /// Digest of the archive inside.
    pub(crate) diff_id: Digest,
}

/// Converts the layer in `input` into `blob` and `recipe`, verifying it against `expected`.
pub(crate) fn convert(
    input: impl BufRead + Send,
    expected: &Expected,
    blob: (&File, &Path),
    recipe: (&File, &Path),
    limits: &Limits,
) -> Result<Converted> {
    let (full, filled) = sync_channel(BUFFERS);
    let (empty, emptied) = channel();
    let converted = std::thread::scope(|scope| {
        let inflate = std::thread::Builder::new()
            .name("inflate".into())
            .spawn_scoped(scope, move || {
                inflate(input, expected, limits, &full, &emptied)
            })
            .map_err(|e| Error::io("cannot start a thread", "", e))?;
        let written = write(Archive::new(filled, empty), expected, blob, recipe, limits);
        let inflated = inflate
            .join()
            .map_err(|_| Error::Worker("the decompressor"))?;
        match (written, inflated) {
            (Ok(converted), Ok(())) => Ok(converted),
            // The writer only saw that no more came; and wrong bytes explain whatever else went wrong.
            (Err(Error::Worker(_)) | Ok(_), Err(e))
            | (_, Err(e @ (Error::DigestMismatch { .. } | Error::Truncated { .. }))) => Err(e),
            (Err(e), _) => Err(e),
        }
    });
    converted.map_err(|e: Error| e.in_layer(&expected.what))
}

fn write(
    archive: Archive,
    expected: &Expected,
    (blob, blob_path): (&File, &Path),
    (recipe, recipe_path): (&File, &Path),
    limits: &Limits,
) -> Result<Converted> {
    let failed = |e| Error::io("cannot write layer recipe", recipe_path, e);
    let mut layer = Layer::new(blob, blob_path, limits);
    let (archive, recipe) = layer.read(archive, RecipeWriter::new(recipe).map_err(failed)?)?;
    recipe.finish().map_err(failed)?;
    let actual = archive.hasher.finish();
    if actual != expected.diff_id {
        return Err(mismatch(
            &format!("{} (uncompressed)", expected.what),
            &expected.diff_id,
            &actual,
        ));
    }
    layer.seal(&expected.diff_id)
}

pub(crate) fn mismatch(what: &str, expected: &Digest, actual: &Digest) -> Error {
    Error::DigestMismatch {
        what: what.to_owned(),
        expected: expected.to_string(),
        actual: actual.to_string(),
    }
}

type Buffer = (Vec<u8>, usize);

/// The inflating thread. An error also reaches the writer, through the channel's end.
fn inflate(
    input: impl BufRead,
    expected: &Expected,
    limits: &Limits,
    full: &SyncSender<Result<Buffer>>,
    emptied: &Receiver<Vec<u8>>,
) -> Result<()> {
    let mut input = Counted::new(input, expected);
    let result = match pump(&mut input, expected, limits, full, emptied) {
        // A bomb isn't worth the rest of its bytes.
        Err(e @ Error::Limit { .. }) => Err(e),
        Ok(Pumped::All) => input.verify(u64::MAX),
        // Broken or unwanted: still see whether these were the right bytes at all.
        Ok(Pumped::Unwanted) => input.verify(PATIENCE),
        Err(e) => input.verify(PATIENCE).and(Err(e)),
    };
    result.inspect_err(|_| {
        // The writer must not take the channel's end for the archive's end.
        let _ = full.send(Err(Error::Worker("the decompressor")));
    })
}

/// How the inflating ended without an error.
enum Pumped {
    All,
    /// The writer gave up; its error tells why.
    Unwanted,
}

fn pump<R: BufRead>(
    input: &mut Counted<R>,
    expected: &Expected,
    limits: &Limits,
    full: &SyncSender<Result<Buffer>>,
    emptied: &Receiver<Vec<u8>>,
) -> Result<Pumped> {
    let (format, mut decoder) = decoder(input, expected)?;
    let mut total = 0u64;
    let mut made = 0;
    loop {
        let mut buffer = match emptied.try_recv() {
            Ok(buffer) => buffer,
            Err(_) if made < BUFFERS + 2 => {
                made += 1;
                vec![0; BUFFER]
            }
            Err(_) => match emptied.recv() {
                Ok(buffer) => buffer,
                Err(_) => return Ok(Pumped::Unwanted),
            },
        };
        let mut length = 0;
        while length < BUFFER {
            match decoder.read(&mut buffer[length..]) {
                Ok(0) => break,
                Ok(count) => length += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(decode_error(e, format, expected)),
            }
        }
        if length == 0 {
            return Ok(Pumped::All);
        }
        total += length as u64;
        decoder.check(total, expected, limits)?;
        if full.send(Ok((buffer, length))).is_err() {
            return Ok(Pumped::Unwanted);
        }
    }
}

fn decode_error(e: io::Error, format: &'static str, expected: &Expected) -> Error {
    match e.downcast::<Error>() {
        Ok(ours) => ours,
        Err(source) => Error::Decompress {
            what: expected.what.clone(),
            format,
            source,
        },
    }
}

enum Decoder<'a, R: BufRead> {
    Plain(&'a mut Counted<R>),
    Gzip(Box<flate2::bufread::MultiGzDecoder<&'a mut Counted<R>>>),
    Zstd(zstd::Decoder<'static, &'a mut Counted<R>>),
}

/// What the first bytes say; media types are often wrong.
fn decoder<'a, R: BufRead>(
    input: &'a mut Counted<R>,
    expected: &Expected,
) -> Result<(&'static str, Decoder<'a, R>)> {
    let start = input.fill_buf().map_err(input_error)?;
    if start.starts_with(&[0x1f, 0x8b]) {
        return Ok((
            "gzip",
            Decoder::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(input))),
        ));
    }
    let skippable =
        start.len() >= 4 && start[0] & 0xf0 == 0x50 && start[1..4] == [0x2a, 0x4d, 0x18];
    if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || skippable {
        let decoder =
            zstd::Decoder::with_buffer(input).map_err(|e| decode_error(e, "zstd", expected))?;
        return Ok(("zstd", Decoder::Zstd(decoder)));
    }
    Ok(("tar", Decoder::Plain(input)))
}

impl<R: BufRead> Decoder<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(input) => input.read(buffer),
            Self::Gzip(decoder) => decoder.read(buffer),
            Self::Zstd(decoder) => decoder.read(buffer),
        }
    }

    fn check(&self, inflated: u64, expected: &Expected, limits: &Limits) -> Result<()> {
        let taken = match self {
            Self::Plain(_) => None,
            Self::Gzip(decoder) => Some(decoder.get_ref().count),
            Self::Zstd(decoder) => Some(decoder.get_ref().count),
        };
        limits.inflated(&expected.what, inflated, taken)
    }
}

/// Counts and hashes compressed bytes.
struct Counted<R> {
    input: R,
    count: u64,
    hasher: Hasher,
    expected: Option<(Digest, u64)>,
    what: String,
    failed: bool,
}

impl<R: BufRead> Counted<R> {
    fn new(input: R, expected: &Expected) -> Self {
        let what = expected.what.clone();
        Self {
            input,
            count: 0,
            hasher: Hasher::default(),
            expected: expected.blob,
            what,
            failed: false,
        }
    }

    /// Reads to the end, or `patience` bytes, and checks length and digest.
    fn verify(&mut self, patience: u64) -> Result<()> {
        let Some((expected, length)) = self.expected else {
            return Ok(());
        };
        let start = self.count;
        while !self.failed {
            let count = self.fill_buf().map_err(input_error)?.len();
            if self.count - start > patience {
                return Ok(());
            }
            if count == 0 {
                break;
            }
            self.consume(count);
        }
        if self.failed {
            // The input's own error was returned already.
            return Ok(());
        }
        if self.count < length {
            return Err(Error::Truncated {
                what: self.what.clone(),
                detail: format!("{} of {length} bytes came", self.count),
            });
        }
        let actual = std::mem::take(&mut self.hasher).finish();
        if actual == expected {
            Ok(())
        } else {
            Err(mismatch(&self.what, &expected, &actual))
        }
    }
}

impl<R: BufRead> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

impl<R: BufRead> BufRead for Counted<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let bytes = match self.input.fill_buf() {
            Ok(bytes) => bytes,
            Err(e) => {
                self.failed = true;
                return Err(e);
            }
        };
        if let Some((_, length)) = self.expected
            && self.count + bytes.len() as u64 > length
        {
            self.failed = true;
            return Err(io::Error::other(Error::BadDocument {
                what: self.what.clone(),
                reason: format!("longer than the {length} bytes the manifest gives it"),
            }));
        }
        Ok(bytes)
    }

    fn consume(&mut self, count: usize) {
        if count > 0
            && let Ok(bytes) = self.input.fill_buf()
        {
            self.hasher.update(&bytes[..count]);
        }
        self.count += count as u64;
        self.input.consume(count);
    }
}

/// The archive as the writer reads it: buffers from the other thread, hashed whole.
struct Archive {
    filled: Receiver<Result<Buffer>>,
    empty: Sender<Vec<u8>>,
    current: Vec<u8>,
    used: usize,
    length: usize,
    ended: bool,
    hasher: Hasher,
}

impl Archive {
    fn new(filled: Receiver<Result<Buffer>>, empty: Sender<Vec<u8>>) -> Self {
        Self {
            filled,
            empty,
            current: Vec::new(),
            used: 0,
            length: 0,
            ended: false,
            hasher: Hasher::default(),
        }
    }
}

impl Read for Archive {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for Archive {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.used == self.length && !self.ended {
            let old = std::mem::take(&mut self.current);
            if !old.is_empty() {
                let _ = self.empty.send(old);
            }
            (self.used, self.length) = (0, 0);
            match self.filled.recv() {
                Ok(Ok((buffer, length))) => {
                    self.hasher.update(&buffer[..length]);
                    (self.current, self.length) = (buffer, length);
                }
                Ok(Err(e)) => return Err(io::Error::other(e)),
                Err(_) => self.ended = true,
            }
        }
        Ok(&self.current[self.used..self.length])
    }

    fn consume(&mut self, count: usize) {
        self.used += count;
    }
}

/// Bytes that arrive in pieces from an asynchronous download.
pub(crate) struct Pieces {
    pieces: tokio::sync::mpsc::Receiver<Result<bytes::Bytes>>,
    current: bytes::Bytes,
}

impl Pieces {
    pub(crate) fn new(pieces: tokio::sync::mpsc::Receiver<Result<bytes::Bytes>>) -> Self {
        Self {
            pieces,
            current: bytes::Bytes::new(),
        }
    }
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for Pieces {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() {
            match self.pieces.blocking_recv() {
                Some(Ok(piece)) => self.current = piece,
                Some(Err(e)) => return Err(io::Error::other(e)),
                None => break,
            }
        }
        Ok(&self.current)
    }

    fn consume(&mut self, count: usize) {
        bytes::Buf::advance(&mut self.current, count);
    }
}
