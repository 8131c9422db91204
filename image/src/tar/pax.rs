//! pax extended headers: `length key=value` records.

use super::numbers::{decimal, time};
use super::sparse::Segment;

/// What the records of one entry say. Unknown keys are left out.
#[derive(Default)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<i64>,
    pub(super) gid: Option<i64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Attributes as libarchive writes them, used for names star's way doesn't give.
    pub(super) other_xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: PaxSparse,
}

/// The GNU.sparse.* keys.
#[derive(Default)]
pub(super) struct PaxSparse {
    pub(super) major: Option<i64>,
    pub(super) minor: Option<i64>,
    pub(super) name: Option<Vec<u8>>,
    /// The file's size with its holes.
    pub(super) real_size: Option<u64>,
    /// Format 0.0 and 0.1: the map itself.
    pub(super) map: Option<Vec<Segment>>,
    pending_offset: Option<u64>,
}

/// Records of one header, in order; the rest of `bytes` follows a record's end.
fn next_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|&b| b == b' ')?;
    let length = usize::try_from(decimal(&bytes[..space])?).ok()?;
    let record = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|&b| b == b'=')?;
    Some((&record[..equals], &record[equals + 1..], &bytes[length..]))
}

impl Pax {
    /// Adds the records of a header.
    pub(super) fn parse(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        while !bytes.is_empty() {
            let Some((key, value, rest)) = next_record(bytes) else {
                // Some writers pad with NULs.
                return if bytes.iter().all(|&b| b == 0) {
                    Ok(())
                } else {
                    Err("malformed pax record".into())
                };
            };
            bytes = rest;
            self.record(key, value).ok_or_else(|| {
                format!("malformed pax value of {:?}", crate::error::printable(key))
            })?;
        }
        Ok(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        let some = |value: &[u8]| (!value.is_empty()).then(|| value.to_vec());
        let number = |value: &[u8]| u64::try_from(decimal(value)?).ok();
        match key {
            b"path" | b"linkpath" | b"GNU.sparse.name" if value.contains(&0) => return None,
            // An empty value takes a key back.
            b"size" | b"uid" | b"gid" | b"mtime" if value.is_empty() => match key {
                b"size" => self.size = None,
                b"uid" => self.uid = None,
                b"gid" => self.gid = None,
                _ => self.mtime = None,
            },
            b"path" => self.path = some(value),
            b"linkpath" => self.link = some(value),
            b"size" => self.size = Some(number(value)?),
            b"uid" => self.uid = Some(decimal(value)?),
            b"gid" => self.gid = Some(decimal(value)?),
            b"mtime" => self.mtime = Some(time(value)?),
            b"GNU.sparse.major" => self.sparse.major = Some(decimal(value)?),
            b"GNU.sparse.minor" => self.sparse.minor = Some(decimal(value)?),
            b"GNU.sparse.name" => self.sparse.name = some(value),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                self.sparse.real_size = Some(number(value)?)
            }
            b"GNU.sparse.numblocks" => {
                self.sparse.map.get_or_insert_default();
            }
            b"GNU.sparse.offset" => self.sparse.pending_offset = Some(number(value)?),
            b"GNU.sparse.numbytes" => {
                let segment = Segment {
                    offset: self.sparse.pending_offset.take()?,
                    length: number(value)?,
                };
                self.sparse.map.get_or_insert_default().push(segment);
            }
            b"GNU.sparse.map" => self.sparse.map = Some(parse_map(value)?),
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    // libarchive's own form may be malformed without harm: star's form is beside it.
                    if let Some(pair) = unescape(name).zip(base64(value)) {
                        self.other_xattrs.push(pair);
                    }
                }
            }
        }
        Some(())
    }

    /// Attributes of both forms.
    pub(super) fn take_xattrs(&mut self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut all = std::mem::take(&mut self.other_xattrs);
        all.append(&mut self.xattrs);
        all
    }
}

/// Format 0.1: `offset,length,offset,length…`.
fn parse_map(value: &[u8]) -> Option<Vec<Segment>> {
    if value.is_empty() {
        return Some(Vec::new());
    }
    let mut numbers = value
        .split(|&b| b == b',')
        .map(|text| u64::try_from(decimal(text)?).ok());
    let mut map = Vec::new();
    while let Some(offset) = numbers.next() {
        map.push(Segment {
            offset: offset?,
            length: numbers.next()??,
        });
    }
    Some(map)
}

/// `%41` to `A`.
fn unescape(name: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&first, after)) = rest.split_first() {
        if first == b'%' {
            let digits = std::str::from_utf8(after.get(..2)?).ok()?;
            out.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &after[2..];
        } else {
            out.push(first);
            rest = after;
        }
    }
    Some(out)
}

/// Base 64, padded or not.
pub(crate) fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let text: Vec<u8> = text
        .iter()
        .copied()
        .filter(|b| *b != b'=' && *b != b'\n')
        .collect();
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    for group in text.chunks(4) {
        let mut bits = 0u32;
        for &c in group {
            let value = match c {
                b'A'..=b'Z' => c - b'A',
                b'a'..=b'z' => c - b'a' + 26,
                b'0'..=b'9' => c - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(value);
        }
        bits <<= 6 * (4 - group.len());
        let bytes = bits.to_be_bytes();
        let count = match group.len() {
            4 => 3,
            3 => 2,
            2 => 1,
            _ => return None,
        };
        out.extend_from_slice(&bytes[1..1 + count]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8]) -> Result<Pax, String> {
        let mut pax = Pax::default();
        pax.parse(bytes).map(|()| pax)
    }

    /// A record with its length, which counts its own digits.
    fn record(text: &str) -> Vec<u8> {
        let length = (0..).find(|n| format!("{n} {text}\n").len() == *n).unwrap();
        format!("{length} {text}\n").into_bytes()
    }

    #[test]
    fn parse_known_records() {
        let records = [
            "path=a/b",
            "mtime=1.5",
            "SCHILY.xattr.user.x=a\nb=c",
            "unknown=1",
        ];
        let pax = parse(&records.map(record).concat()).unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"a/b"[..]));
        assert_eq!(pax.mtime, Some((1, 500_000_000)));
        assert_eq!(pax.xattrs, [(b"user.x".to_vec(), b"a\nb=c".to_vec())]);
    }

    #[test]
    fn parse_malformed_is_refused() {
        for bytes in [
            &b"9 path=a"[..],
            b"x path=a\n",
            b"99 path=a\n",
            b"0 a=b\n",
            b"-5 a=b\n",
            b"3 \n",
        ] {
            assert!(parse(bytes).is_err(), "{}", String::from_utf8_lossy(bytes));
        }
        for text in [
            "path=a\0b",
            "size=x",
            "size=-1",
            "mtime=never",
            "no equals sign",
        ] {
            assert!(parse(&record(text)).is_err(), "{text}");
        }
    }

    #[test]
    fn parse_sparse_maps() {
        let pairs = ["GNU.sparse.offset=5", "GNU.sparse.numbytes=7"]
            .map(record)
            .concat();
        assert_eq!(
            parse(&pairs).unwrap().sparse.map.unwrap(),
            [Segment {
                offset: 5,
                length: 7
            }]
        );
        assert_eq!(
            parse(&record("GNU.sparse.map=1,2,3,4"))
                .unwrap()
                .sparse
                .map
                .unwrap()
                .len(),
            2
        );
        assert!(parse(&record("GNU.sparse.map=1,2,3")).is_err());
        assert!(parse(&record("GNU.sparse.numbytes=3")).is_err());
    }

    #[test]
    fn base64_and_escapes() {
        assert_eq!(base64(b"aGVsbG8=").unwrap(), b"hello");
        assert_eq!(base64(b"aGVsbG8").unwrap(), b"hello");
        assert!(base64(b"a").is_none());
        assert_eq!(unescape(b"user%2Ex").unwrap(), b"user.x");
        assert!(unescape(b"user%2").is_none());
    }
}
