//! One 512-byte header.

use super::BLOCK;
use super::numbers::header_number;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Regular,
    HardLink,
    Symlink,
    Char,
    Block,
    Directory,
    Fifo,
}

/// Fields of a header, checked for range but not for sense.
pub(super) struct Header {
    pub(super) raw: [u8; BLOCK],
    pub(super) flag: u8,
    pub(super) gnu: bool,
}

impl Header {
    /// A header, if checksum and magic are right.
    pub(super) fn parse(raw: [u8; BLOCK]) -> Result<Self, &'static str> {
        let stored = header_number(&raw[148..156]).ok_or("unreadable header checksum")?;
        let sum = |signed: bool| -> i64 {
            raw.iter()
                .enumerate()
                .map(|(at, &byte)| match at {
                    148..156 => i64::from(b' '),
                    _ if signed => i64::from(byte.cast_signed()),
                    _ => i64::from(byte),
                })
                .sum()
        };
        // Some old programs added signed bytes.
        if stored != sum(false) && stored != sum(true) {
            return Err("wrong header checksum: not an archive, or a damaged one");
        }
        Ok(Self {
            flag: raw[156],
            gnu: &raw[257..265] == b"ustar  \0",
            raw,
        })
    }

    fn posix(&self) -> bool {
        &self.raw[257..262] == b"ustar" && !self.gnu
    }

    /// Name with ustar's prefix.
    pub(super) fn name(&self) -> Vec<u8> {
        let name = text(&self.raw[..100]);
        let prefix = text(&self.raw[345..500]);
        if self.posix() && !prefix.is_empty() {
            [prefix, b"/", name].concat()
        } else {
            name.to_vec()
        }
    }

    pub(super) fn link(&self) -> &[u8] {
        text(&self.raw[157..257])
    }

    pub(super) fn mode(&self) -> Option<i64> {
        header_number(&self.raw[100..108])
    }

    pub(super) fn uid(&self) -> Option<i64> {
        header_number(&self.raw[108..116])
    }

    pub(super) fn gid(&self) -> Option<i64> {
        header_number(&self.raw[116..124])
    }

    pub(super) fn size(&self) -> Option<i64> {
        header_number(&self.raw[124..136])
    }

    pub(super) fn mtime(&self) -> Option<i64> {
        header_number(&self.raw[136..148])
    }

    /// Major and minor number of a device.
    pub(super) fn device(&self) -> Option<(i64, i64)> {
        Some((
            header_number(&self.raw[329..337])?,
            header_number(&self.raw[337..345])?,
        ))
    }
}

/// A field up to its NUL.
pub(super) fn text(field: &[u8]) -> &[u8] {
    field.split(|&b| b == 0).next().unwrap_or_default()
}
