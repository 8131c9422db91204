//! Maps of sparse files: GNU's old format in the header, and its three pax formats.

use super::BLOCK;
use super::header::text;
use super::numbers::{decimal, header_number};

/// Pieces of a sparse file; real files have thousands, each costs 16 bytes.
const SEGMENTS_MAX: usize = 1 << 20;

/// A piece of a sparse file that has data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// Old GNU format: 4 pieces in the header, 21 in each extension block.
pub(super) struct OldMap {
    pub(super) segments: Vec<Segment>,
    pub(super) extended: bool,
    ended: bool,
}

impl OldMap {
    /// The header's part of the map and the file's real size.
    pub(super) fn from_header(raw: &[u8; BLOCK]) -> Option<(Self, u64)> {
        let mut map = Self {
            segments: Vec::new(),
            extended: raw[482] != 0,
            ended: false,
        };
        map.add(&raw[386..482])?;
        Some((map, u64::try_from(header_number(&raw[483..495])?).ok()?))
    }

    /// A following block's part.
    pub(super) fn extend(&mut self, raw: &[u8; BLOCK]) -> Option<()> {
        self.extended = raw[504] != 0;
        self.add(&raw[..504])
    }

    fn add(&mut self, pairs: &[u8]) -> Option<()> {
        for pair in pairs.chunks_exact(24) {
            // The first empty slot ends the map.
            self.ended |= pair[0] == 0;
            if !self.ended {
                let number = |field: &[u8]| u64::try_from(header_number(field)?).ok();
                self.segments.push(Segment {
                    offset: number(&pair[..12])?,
                    length: number(&pair[12..])?,
                });
            }
        }
        (self.segments.len() <= SEGMENTS_MAX).then_some(())
    }
}

/// pax format 1.0: decimal lines at the start of the data, padded to a block. Fed block by block.
#[derive(Default)]
pub(super) struct LineMap {
    line: Vec<u8>,
    numbers: Vec<u64>,
}

impl LineMap {
    /// Takes a block; the map when it is complete, an error text when it can't be.
    pub(super) fn feed(
        &mut self,
        block: &[u8; BLOCK],
    ) -> Result<Option<Vec<Segment>>, &'static str> {
        for &byte in block {
            if byte != b'\n' {
                self.line.push(byte);
                if self.line.len() > 20 {
                    return Err("malformed sparse map");
                }
                continue;
            }
            let number = decimal(text(&self.line))
                .and_then(|n| u64::try_from(n).ok())
                .ok_or("malformed sparse map")?;
            self.line.clear();
            self.numbers.push(number);
            let count = self.numbers[0];
            if count > SEGMENTS_MAX as u64 {
                return Err("too many pieces in a sparse file");
            }
            if self.numbers.len() as u64 == 1 + 2 * count {
                let pairs = self.numbers[1..].chunks_exact(2);
                return Ok(Some(
                    pairs
                        .map(|pair| Segment {
                            offset: pair[0],
                            length: pair[1],
                        })
                        .collect(),
                ));
            }
        }
        Ok(None)
    }
}

/// A map that is in order, inside the file, and has as many bytes as are stored. Empty pieces are dropped.
pub(super) fn check(
    segments: Vec<Segment>,
    real_size: u64,
    stored: u64,
) -> Result<Vec<Segment>, &'static str> {
    if segments.len() > SEGMENTS_MAX {
        return Err("too many pieces in a sparse file");
    }
    let (mut end, mut total) = (0u64, 0u64);
    for segment in &segments {
        let next = segment
            .offset
            .checked_add(segment.length)
            .ok_or("sparse map out of range")?;
        if segment.offset < end || next > real_size {
            return Err("sparse map out of order or beyond the file");
        }
        end = next;
        total = total.saturating_add(segment.length);
    }
    if total != stored {
        return Err("sparse map and stored size disagree");
    }
    Ok(segments
        .into_iter()
        .filter(|segment| segment.length > 0)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(pairs: &[(u64, u64)]) -> Vec<Segment> {
        pairs
            .iter()
            .map(|&(offset, length)| Segment { offset, length })
            .collect()
    }

    #[test]
    fn check_bad_maps_are_refused() {
        assert!(check(segments(&[(0, 4), (2, 4)]), 10, 8).is_err());
        assert!(check(segments(&[(8, 4)]), 10, 4).is_err());
        assert!(check(segments(&[(0, 4)]), 10, 5).is_err());
        assert!(check(segments(&[(u64::MAX, 4)]), u64::MAX, 4).is_err());
        assert_eq!(
            check(segments(&[(0, 4), (10, 0)]), 10, 4).unwrap(),
            segments(&[(0, 4)])
        );
    }

    #[test]
    fn line_map_split_over_blocks() {
        let mut map = LineMap::default();
        let mut lines = String::from("100\n");
        for n in 0..100 {
            lines += &format!("{}\n{}\n", n * 1000, 10);
        }
        let mut bytes = lines.into_bytes();
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        let results: Vec<_> = bytes
            .chunks_exact(BLOCK)
            .map(|b| map.feed(b.try_into().unwrap()).unwrap())
            .collect();
        assert_eq!(results.last().unwrap().as_ref().unwrap().len(), 100);
        assert!(LineMap::default().feed(&[b'1'; BLOCK]).is_err());
    }
}
