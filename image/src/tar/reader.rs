//! The archive as a stream of entries.

use std::io::{self, BufRead};

use crate::error::{Error, Result};

use super::BLOCK;
use super::header::{Header, Kind, text};
use super::pax::Pax;
use super::sparse::{LineMap, OldMap, Segment, check};

/// Bytes of a pax header or GNU long name. A file's attributes may be 64 KiB each; nothing real comes near this.
const SPECIAL_MAX: u64 = 4 << 20;

/// Sees every byte that isn't file data.
pub(crate) trait Tap {
    /// Bytes of headers and padding, in order.
    fn literal(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// Sees nothing.
impl Tap for () {
    fn literal(&mut self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// One entry. Its data must be read before the next.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: Kind,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) mtime_nsec: u32,
    pub(crate) device: (u32, u32),
    /// The file's size, holes included.
    pub(crate) size: u64,
    /// The pieces that have data, if it is a sparse file.
    pub(crate) sparse: Option<Vec<Segment>>,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// An archive being read.
pub(crate) struct Archive<R, T> {
    input: R,
    tap: T,
    /// Data of the current entry not read yet, and the padding after it.
    data: u64,
    padding: u64,
    at: u64,
}

impl<R: BufRead, T: Tap> Archive<R, T> {
    pub(crate) fn new(input: R, tap: T) -> Self {
        Self {
            input,
            tap,
            data: 0,
            padding: 0,
            at: 0,
        }
    }

    pub(crate) fn tap(&mut self) -> &mut T {
        &mut self.tap
    }

    /// Bytes of the archive read so far.
    pub(crate) fn position(&self) -> u64 {
        self.at
    }

    /// The rest of the input after the archive's end, and the tap.
    pub(crate) fn finish(mut self) -> Result<(R, T)> {
        loop {
            let bytes = self.input.fill_buf().map_err(input_error)?;
            if bytes.is_empty() {
                return Ok((self.input, self.tap));
            }
            self.tap.literal(bytes).map_err(write_error)?;
            let count = bytes.len();
            self.input.consume(count);
        }
    }

    /// The next entry, or none at the archive's end.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>> {
        assert_eq!(
            self.data, 0,
            "an entry's data is read before the next entry"
        );
        self.skip_padding()?;
        let mut pax = Pax::default();
        let (mut long_name, mut long_link) = (None, None);
        loop {
            let Some(raw) = self.header_block()? else {
                return Ok(None);
            };
            let header = Header::parse(raw).map_err(|reason| self.at_error(reason))?;
            let size = header.size().and_then(|size| u64::try_from(size).ok());
            let size = size.ok_or_else(|| self.at_error("unreadable size"))?;
            match header.flag {
                b'x' | b'X' => {
                    let bytes = self.special(size)?;
                    pax = Pax::default();
                    pax.parse(&bytes).map_err(|reason| self.at_error(reason))?;
                }
                // Other extractors ignore global headers as well (git's hold a commit id).
                b'g' => drop(self.special(size)?),
                b'L' => long_name = Some(text(&self.special(size)?).to_vec()),
                b'K' => long_link = Some(text(&self.special(size)?).to_vec()),
                b'V' => drop(self.special(size)?),
                _ => {
                    return self
                        .entry(&header, size, pax, long_name, long_link)
                        .map(Some);
                }
            }
        }
    }

    fn entry(
        &mut self,
        header: &Header,
        header_size: u64,
        mut pax: Pax,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry> {
        let sparse_name = pax.sparse.name.take();
        let name = long_name
            .or(sparse_name)
            .or(pax.path.take())
            .unwrap_or_else(|| header.name());
        let link = long_link
            .or(pax.link.take())
            .unwrap_or_else(|| header.link().to_vec());
        let bad = |reason: &str| Error::layer(&name, reason);
        let kind = match header.flag {
            0 if name.last() == Some(&b'/') => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::Regular,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Char,
            b'4' => Kind::Block,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(bad(&format!(
                    "unknown kind of entry {:?}",
                    char::from(other)
                )));
            }
        };
        let has_data = kind == Kind::Regular || header.flag == 0;
        let mut stored = if has_data {
            pax.size.unwrap_or(header_size)
        } else {
            0
        };
        self.set_data(stored)
            .ok_or_else(|| bad("size out of range"))?;

        let mut size = stored;
        let mut sparse = None;
        if header.flag == b'S' {
            let (mut map, real) =
                OldMap::from_header(&header.raw).ok_or_else(|| bad("malformed sparse map"))?;
            while map.extended {
                let block = self.block()?;
                map.extend(&block)
                    .ok_or_else(|| bad("malformed sparse map"))?;
            }
            sparse = Some((map.segments, real));
        } else if kind == Kind::Regular
            && (pax.sparse.major, pax.sparse.minor) == (Some(1), Some(0))
        {
            let mut map = LineMap::default();
            let segments = loop {
                stored = stored
                    .checked_sub(BLOCK as u64)
                    .ok_or_else(|| bad("sparse map beyond its entry"))?;
                let block = self.block()?;
                self.data -= BLOCK as u64;
                if let Some(segments) = map.feed(&block).map_err(bad)? {
                    break segments;
                }
            };
            sparse = Some((
                segments,
                pax.sparse
                    .real_size
                    .ok_or_else(|| bad("sparse file without a size"))?,
            ));
        } else if let (Kind::Regular, Some(segments)) = (kind, pax.sparse.map.take()) {
            sparse = Some((
                segments,
                pax.sparse
                    .real_size
                    .ok_or_else(|| bad("sparse file without a size"))?,
            ));
        }
        let sparse = match sparse {
            Some((segments, real)) => {
                size = real;
                Some(check(segments, real, stored).map_err(bad)?)
            }
            None => None,
        };

        let owner = |pax: Option<i64>, header: Option<i64>, what: &str| {
            let id = pax.or(header).and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| Error::layer(&name, format!("{what} out of range")))
        };
        let device = match kind {
            Kind::Char | Kind::Block => {
                let numbers = header
                    .device()
                    .map(|(major, minor)| (u32::try_from(major), u32::try_from(minor)));
                match numbers {
                    Some((Ok(major @ 0..=0xfff), Ok(minor @ 0..=0xf_ffff))) => (major, minor),
                    _ => return Err(bad("device number out of range")),
                }
            }
            _ => (0, 0),
        };
        let (mtime, mtime_nsec) = pax
            .mtime
            .or(header.mtime().map(|seconds| (seconds, 0)))
            .ok_or_else(|| bad("unreadable time"))?;
        Ok(Entry {
            kind,
            mode: (header.mode().ok_or_else(|| bad("unreadable mode"))? & 0o7777) as u16,
            uid: owner(pax.uid, header.uid(), "owner")?,
            gid: owner(pax.gid, header.gid(), "group")?,
            mtime,
            mtime_nsec,
            device,
            size,
            sparse,
            xattrs: pax.take_xattrs(),
            link,
            name,
        })
    }

    /// Reads `length` bytes of the entry's data.
    pub(crate) fn data(
        &mut self,
        length: u64,
        mut sink: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        assert!(
            length <= self.data,
            "an entry has no more data than it says"
        );
        let mut rest = length;
        while rest > 0 {
            let bytes = self.input.fill_buf().map_err(input_error)?;
            if bytes.is_empty() {
                return Err(self.truncated());
            }
            let count = bytes.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
            sink(&bytes[..count])?;
            self.input.consume(count);
            rest -= count as u64;
            self.at += count as u64;
        }
        self.data -= length;
        Ok(())
    }

    /// Passes the data that nobody read to the tap.
    pub(crate) fn skip_data(&mut self) -> Result<()> {
        let mut bytes = [0; BLOCK];
        while self.data > 0 {
            let count = self.data.min(BLOCK as u64);
            self.read(&mut bytes[..count as usize])?;
            self.data -= count;
        }
        Ok(())
    }

    fn set_data(&mut self, size: u64) -> Option<()> {
        self.padding = size.checked_next_multiple_of(BLOCK as u64)? - size;
        self.data = size;
        Some(())
    }

    fn skip_padding(&mut self) -> Result<()> {
        let count = std::mem::take(&mut self.padding) as usize;
        let mut bytes = [0; BLOCK];
        self.read(&mut bytes[..count])
    }

    /// The contents of a header that describes the next one.
    fn special(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > SPECIAL_MAX {
            return Err(self.at_error(format!("extended header of {size} bytes")));
        }
        let mut bytes = vec![0; size as usize];
        self.read(&mut bytes)?;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        self.skip_padding()?;
        Ok(bytes)
    }

    /// A header, or none at the end: two blocks of zeros, or just no more input.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>> {
        for zeros in 0..2 {
            if self.input.fill_buf().map_err(input_error)?.is_empty() {
                return Ok(None);
            }
            let block = self.block()?;
            if block != [0; BLOCK] {
                return if zeros == 0 {
                    Ok(Some(block))
                } else {
                    Err(self.at_error("lone block of zeros"))
                };
            }
        }
        Ok(None)
    }

    fn block(&mut self) -> Result<[u8; BLOCK]> {
        let mut block = [0; BLOCK];
        self.read(&mut block)?;
        Ok(block)
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<()> {
        if let Err(e) = io::Read::read_exact(&mut self.input, bytes) {
            return Err(if e.kind() == io::ErrorKind::UnexpectedEof {
                self.truncated()
            } else {
                input_error(e)
            });
        }
        self.at += bytes.len() as u64;
        self.tap.literal(bytes).map_err(write_error)
    }

    fn truncated(&self) -> Error {
        Error::Truncated {
            what: "layer".into(),
            detail: format!("it ends in the entry at byte {}", self.at),
        }
    }

    fn at_error(&self, reason: impl Into<String>) -> Error {
        Error::layer(
            format!("(header before byte {})", self.at).as_bytes(),
            reason,
        )
    }
}

impl<R: io::Read + io::Seek, T: Tap> Archive<io::BufReader<R>, T> {
    /// Leaves the entry's data and padding out without reading them, for archives in files.
    pub(crate) fn seek_data(&mut self) -> Result<()> {
        let length = std::mem::take(&mut self.data) + std::mem::take(&mut self.padding);
        let step = i64::try_from(length).map_err(|_| self.at_error("size out of range"))?;
        self.input.seek_relative(step).map_err(input_error)?;
        self.at += length;
        Ok(())
    }
}

/// An error of the input, which may carry one of ours.
pub(crate) fn input_error(e: io::Error) -> Error {
    match e.downcast::<Error>() {
        Ok(ours) => ours,
        Err(e) => Error::io("cannot read layer", "", e),
    }
}

fn write_error(e: io::Error) -> Error {
    Error::io("cannot write layer recipe", "", e)
}
