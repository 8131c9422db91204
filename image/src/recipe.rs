//! How to get a layer's archive back from its blob, byte by byte.
//!
//! An archive is headers and padding, which the recipe holds, around the bytes of files, which the blob holds already. So a
//! recipe is a list of `literal bytes` and `blob offset, length`, compressed with zstd: some two per cent of the archive. What
//! comes out is verified against the diff id, so a recipe needs no digest of its own.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt as _;

const LITERAL: u8 = 0;
const DATA: u8 = 1;
const END: u8 = 2;
/// Literals are cut at this length, which bounds what a reader allocates.
const LITERAL_MAX: usize = 64 * 1024;
/// Headers compress as well at the fastest level, and recipes are seldom read.
const LEVEL: i32 = 1;

/// Writes a recipe.
pub(crate) struct RecipeWriter<W: Write> {
    out: zstd::Encoder<'static, BufWriter<W>>,
    literal: Vec<u8>,
    /// Offset and length of data not written out yet.
    data: (u64, u64),
}

impl<W: Write> RecipeWriter<W> {
    pub(crate) fn new(out: W) -> io::Result<Self> {
        Ok(Self {
            out: zstd::Encoder::new(BufWriter::new(out), LEVEL)?,
            literal: Vec::with_capacity(LITERAL_MAX),
            data: (0, 0),
        })
    }

    /// Bytes of the archive that no file has.
    pub(crate) fn literal(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        self.end_data()?;
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(LITERAL_MAX - self.literal.len()));
            self.literal.extend_from_slice(now);
            bytes = later;
            if self.literal.len() == LITERAL_MAX {
                self.end_literal()?;
            }
        }
        Ok(())
    }

    /// Bytes of the archive that lie in the blob.
    pub(crate) fn data(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.end_literal()?;
        if self.data.0 + self.data.1 == offset && self.data.1 > 0 {
            self.data.1 += length;
        } else {
            self.end_data()?;
            self.data = (offset, length);
        }
        Ok(())
    }

    fn end_literal(&mut self) -> io::Result<()> {
        if !self.literal.is_empty() {
            self.out.write_all(&[LITERAL])?;
            self.out
                .write_all(&(self.literal.len() as u32).to_le_bytes())?;
            self.out.write_all(&self.literal)?;
            self.literal.clear();
        }
        Ok(())
    }

    fn end_data(&mut self) -> io::Result<()> {
        let (offset, length) = std::mem::take(&mut self.data);
        if length > 0 {
            self.out.write_all(&[DATA])?;
            self.out.write_all(&offset.to_le_bytes())?;
            self.out.write_all(&length.to_le_bytes())?;
        }
        Ok(())
    }

    /// Ends the recipe.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.end_literal()?;
        self.end_data()?;
        self.out.write_all(&[END])?;
        self.out.finish()?.flush()
    }
}

/// The archive that a recipe and a blob make.
pub(crate) struct ArchiveReader<'a> {
    recipe: zstd::Decoder<'static, BufReader<&'a File>>,
    blob: &'a File,
    literal: Vec<u8>,
    used: usize,
    data: (u64, u64),
    ended: bool,
}

impl<'a> ArchiveReader<'a> {
    pub(crate) fn new(recipe: &'a File, blob: &'a File) -> io::Result<Self> {
        Ok(Self {
            recipe: zstd::Decoder::new(recipe)?,
            blob,
            literal: Vec::new(),
            used: 0,
            data: (0, 0),
            ended: false,
        })
    }

    fn next_part(&mut self) -> io::Result<()> {
        let mut tag = [0];
        self.recipe.read_exact(&mut tag)?;
        match tag[0] {
            LITERAL => {
                let mut length = [0; 4];
                self.recipe.read_exact(&mut length)?;
                let length = u32::from_le_bytes(length) as usize;
                if length > LITERAL_MAX {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "literal too long",
                    ));
                }
                self.literal.resize(length, 0);
                self.used = 0;
                self.recipe.read_exact(&mut self.literal)
            }
            DATA => {
                let mut fields = [0; 16];
                self.recipe.read_exact(&mut fields)?;
                let [offset, length] = [0, 8].map(|at| {
                    let mut field = [0; 8];
                    field.copy_from_slice(&fields[at..at + 8]);
                    u64::from_le_bytes(field)
                });
                self.data = (offset, length);
                Ok(())
            }
            END => {
                self.ended = true;
                Ok(())
            }
            other => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("unknown part {other}"),
            )),
        }
    }
}

/// Bytes of the archive that a recipe makes.
pub(crate) fn archive_length(recipe: &File) -> io::Result<u64> {
    // The blob isn't touched; the recipe stands in for it.
    let mut reader = ArchiveReader::new(recipe, recipe)?;
    let mut total = 0u64;
    while !reader.ended {
        reader.next_part()?;
        let part =
            std::mem::take(&mut reader.literal).len() as u64 + std::mem::take(&mut reader.data).1;
        total = total.checked_add(part).ok_or(io::ErrorKind::InvalidData)?;
    }
    Ok(total)
}

impl Read for ArchiveReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if self.used < self.literal.len() {
                let count = buffer.len().min(self.literal.len() - self.used);
                buffer[..count].copy_from_slice(&self.literal[self.used..][..count]);
                self.used += count;
                return Ok(count);
            }
            let (offset, length) = self.data;
            if length > 0 {
                let count = buffer
                    .len()
                    .min(usize::try_from(length).unwrap_or(usize::MAX));
                self.blob.read_exact_at(&mut buffer[..count], offset)?;
                self.data = (offset + count as u64, length - count as u64);
                return Ok(count);
            }
            if self.ended {
                return Ok(0);
            }
            self.next_part()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipe_read_back_gives_the_archive() {
        let blob = tempfile::tempfile().unwrap();
        blob.write_all_at(b"..hello, world..", 0).unwrap();
        let mut recipe = tempfile::tempfile().unwrap();
        let mut writer = RecipeWriter::new(&recipe).unwrap();
        let long = vec![7; 3 * LITERAL_MAX + 5];
        writer.literal(b"head").unwrap();
        writer.literal(&long).unwrap();
        writer.data(2, 5).unwrap();
        writer.data(7, 7).unwrap();
        writer.literal(b"tail").unwrap();
        writer.finish().unwrap();
        io::Seek::rewind(&mut recipe).unwrap();

        let mut archive = Vec::new();
        ArchiveReader::new(&recipe, &blob)
            .unwrap()
            .read_to_end(&mut archive)
            .unwrap();

        assert_eq!(
            archive,
            [b"head", &long[..], b"hello, world", b"tail"].concat()
        );
    }

    #[test]
    fn recipe_truncated_is_an_error() {
        let blob = tempfile::tempfile().unwrap();
        let mut recipe = tempfile::tempfile().unwrap();
        RecipeWriter::new(&recipe).unwrap().finish().unwrap();
        let length = recipe.metadata().unwrap().len();
        recipe.set_len(length - 4).unwrap();
        io::Seek::rewind(&mut recipe).unwrap();
        let mut archive = Vec::new();
        assert!(
            ArchiveReader::new(&recipe, &blob)
                .unwrap()
                .read_to_end(&mut archive)
                .is_err()
        );
    }
}
