//! Extended attributes: short prefixes, inline entries and the shared area.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::tree::{Tree, XattrId};

use super::format::XATTR_HEADER;

/// Name prefixes with a number of their own. The two ACL names are whole names.
const PREFIXES: [(u8, &[u8]); 6] = [
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (1, b"user."),
    (4, b"trusted."),
    (5, b"lustre."),
    (6, b"security."),
];
/// An entry used more than once is shared if it is at least this long: a reference takes four bytes, but another block to read.
const SHARE_FROM: usize = 24;
/// The count of shared entries of an inode is a byte.
const SHARED_MAX: usize = 255;
/// The size of an inode's attributes is a 16-bit count of words.
const BODY_MAX: usize = XATTR_HEADER + 4 * (u16::MAX as usize - 1);

/// The number and the rest of a name.
pub(super) fn split_name(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|&(index, prefix)| {
        let rest = name.strip_prefix(prefix)?;
        // An ACL has nothing after its name; the others have something.
        ((index == 2 || index == 3) == rest.is_empty() && rest.len() <= 255)
            .then_some((index, rest))
    })
}

/// The prefix behind a number.
pub(super) fn prefix(index: u8) -> Option<&'static [u8]> {
    PREFIXES
        .iter()
        .find(|(number, _)| *number == index)
        .map(|(_, prefix)| *prefix)
}

/// Whether EROFS can hold the name at all; others (`system.nfs4_acl`, …) have no number.
pub(crate) fn is_storable(name: &[u8]) -> bool {
    split_name(name).is_some()
}

/// The attributes of all inodes, encoded.
pub(super) struct XattrArea {
    /// The shared area.
    pub(super) shared: Vec<u8>,
    /// By set: the bytes after the inode, empty or header, shared ids, inline entries.
    bodies: Vec<Vec<u8>>,
}

impl XattrArea {
    /// `uses` counts the inodes of each set.
    pub(super) fn build(tree: &Tree, uses: &[u32]) -> Result<Self> {
        let mut entries: BTreeMap<Vec<u8>, (u32, Option<u32>)> = BTreeMap::new();
        let sets = (0..uses.len() as u32).map(|id| tree.xattrs(XattrId(id)));
        for (set, &count) in sets.clone().zip(uses) {
            for (name, value) in set.iter().filter(|_| count > 0) {
                let slot = entries.entry(encode(name, value)?).or_default();
                slot.0 = slot.0.saturating_add(count);
            }
        }
        let mut shared = Vec::new();
        for (bytes, (count, place)) in &mut entries {
            if *count > 1 && bytes.len() >= SHARE_FROM {
                *place = Some((shared.len() / 4) as u32);
                shared.extend_from_slice(bytes);
            }
        }
        let mut bodies = Vec::with_capacity(uses.len());
        for (set, &count) in sets.zip(uses) {
            let mut ids = Vec::new();
            let mut inline = Vec::new();
            for (name, value) in set.iter().filter(|_| count > 0) {
                let bytes = encode(name, value)?;
                match entries.get(&bytes).and_then(|(_, place)| *place) {
                    Some(place) if ids.len() < SHARED_MAX => ids.push(place),
                    _ => inline.extend_from_slice(&bytes),
                }
            }
            if ids.is_empty() && inline.is_empty() {
                bodies.push(Vec::new());
                continue;
            }
            let mut body = vec![0; XATTR_HEADER];
            body[4] = ids.len() as u8;
            ids.iter()
                .for_each(|id| body.extend_from_slice(&id.to_le_bytes()));
            body.extend_from_slice(&inline);
            if body.len() > BODY_MAX {
                return Err(Error::BadDocument {
                    what: "extended attributes of one file".into(),
                    reason: format!("{} bytes; EROFS holds at most {BODY_MAX}", body.len()),
                });
            }
            bodies.push(body);
        }
        Ok(Self { shared, bodies })
    }

    /// What follows an inode with this set.
    pub(super) fn body(&self, id: XattrId) -> &[u8] {
        &self.bodies[id.0 as usize]
    }
}

/// One entry: length of the name, prefix number, size of the value, name, value, padded to a word.
fn encode(name: &[u8], value: &[u8]) -> Result<Vec<u8>> {
    let fits = split_name(name).zip(u16::try_from(value.len()).ok());
    let Some(((index, rest), size)) = fits else {
        return Err(Error::BadDocument {
            what: format!("extended attribute {:?}", crate::error::printable(name)),
            reason: format!(
                "EROFS can't hold this name with a value of {} bytes",
                value.len()
            ),
        });
    };
    let mut bytes = Vec::with_capacity(4 + rest.len() + value.len() + 3);
    bytes.extend_from_slice(&[rest.len() as u8, index]);
    bytes.extend_from_slice(&size.to_le_bytes());
    bytes.extend_from_slice(rest);
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_name_known_prefixes_have_numbers() {
        assert_eq!(split_name(b"user.mime"), Some((1, &b"mime"[..])));
        assert_eq!(split_name(b"system.posix_acl_access"), Some((2, &b""[..])));
        assert_eq!(
            split_name(b"security.capability"),
            Some((6, &b"capability"[..]))
        );
    }

    #[test]
    fn split_name_unknown_is_none() {
        for name in [
            &b"user."[..],
            b"system.nfs4_acl",
            b"system.posix_acl_access2",
            b"",
            b"userx.y",
        ] {
            assert_eq!(split_name(name), None);
        }
    }
}
