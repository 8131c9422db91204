//! Where each inode and directory goes: sizes only, no contents.

use crate::error::{Error, Result};
use crate::tree::{Body, Inode, InodeId, ROOT, Tree, XattrId};

use super::format::{
    BLOCK, CHUNK_INDEX, COMPACT_SIZE, DIRENT, EXTENDED_SIZE, INODE_UNIT, align, block_count,
};
use super::xattr::XattrArea;

/// A chunk covers a whole file where possible; larger files have one index for each of these.
const CHUNK_BITS_MAX: u32 = 18;

/// A placed inode; small, since there are as many as files.
#[derive(Clone, Copy, Default)]
pub(super) struct Place {
    /// Its number: the offset in the metadata area by 32. 0 for inodes that nothing leads to.
    pub(super) number: u32,
    /// First block of its data outside the inode, counted in the metadata area; 0 if there is none (inodes come first).
    pub(super) block: u32,
    /// Bytes of a directory or link; other inodes keep theirs.
    pub(super) size: u32,
    pub(super) nlink: u32,
    pub(super) extended: bool,
    /// Whether the data's tail follows the inode.
    pub(super) inline: bool,
}

/// The plan of a metadata area.
pub(super) struct Layout {
    /// Inodes in the order they are written.
    pub(super) order: Vec<InodeId>,
    /// By inode.
    places: Vec<Place>,
    pub(super) xattrs: XattrArea,
    /// Block of the shared attributes, in blocks of the metadata area.
    pub(super) xattr_block: u64,
    /// Bytes of the inodes, directories after them, shared attributes last.
    pub(super) inode_bytes: u64,
    pub(super) total_blocks: u64,
    /// The commonest modification time: inodes that have it can be compact.
    pub(super) epoch: (i64, u32),
}

impl Layout {
    /// Plans `tree`. With `indexed` every file with data has chunk indexes, because its data is on another device.
    pub(super) fn plan(tree: &Tree, indexed: bool) -> Result<Self> {
        let order = visit_order(tree);
        let mut set_uses = vec![
            0u32;
            order
                .iter()
                .map(|&id| tree.inode(id).attributes.xattrs.0 + 1)
                .max()
                .unwrap_or(1) as usize
        ];
        for &id in &order {
            set_uses[tree.inode(id).attributes.xattrs.0 as usize] += 1;
        }
        let xattrs = XattrArea::build(tree, &set_uses)?;
        let epoch = commonest_time(tree, &order);

        // The first unit stays empty: inode number 0 means "no inode" to some programs.
        let mut next = INODE_UNIT;
        let mut places = vec![Place::default(); tree.inode_count()];
        let mut outside = Vec::new();
        for &id in &order {
            let inode = tree.inode(id);
            let (size, nlink) = match inode.body {
                Body::Directory { .. } => directory_size(tree, id),
                Body::Symlink(target) | Body::LowerLink(target) => {
                    (tree.text(target).len() as u64, inode.nlink)
                }
                _ => (0, inode.nlink),
            };
            let extended = needs_extended(inode, size.max(inode.size), nlink, epoch);
            let header = header_size(extended, &xattrs, inode.attributes.xattrs);
            let tail = size % BLOCK;
            let inline = tail > 0 && header % BLOCK + tail <= BLOCK;
            let mut offset = align(next, INODE_UNIT);
            if inline && (offset + header) % BLOCK + tail > BLOCK {
                // An inline tail can't cross into another block; from the start of a block it fits.
                offset = align(offset, BLOCK);
            }
            let chunks = chunk_count(tree, inode, indexed) * CHUNK_INDEX;
            next = if chunks > 0 {
                align(offset + header, CHUNK_INDEX) + chunks
            } else {
                offset + header
            };
            let blocks = if inline {
                size / BLOCK
            } else {
                block_count(size)
            };
            if inline {
                next += tail;
            }
            if blocks > 0 {
                outside.push((id, blocks));
            }
            let number = u32::try_from(offset / INODE_UNIT).map_err(|_| too_large())?;
            let size = u32::try_from(size).map_err(|_| too_large())?;
            places[id as usize] = Place {
                number,
                block: 0,
                size,
                nlink,
                extended,
                inline,
            };
        }
        let inode_bytes = next;
        let mut block = block_count(inode_bytes);
        for (id, blocks) in outside {
            places[id as usize].block = u32::try_from(block).map_err(|_| too_large())?;
            block += blocks;
        }
        let xattr_block = block;
        let total_blocks = block + block_count(xattrs.shared.len() as u64);
        let layout = Self {
            order,
            places,
            xattrs,
            xattr_block,
            inode_bytes,
            total_blocks,
            epoch,
        };
        // The superblock has 16 bits for the root's number; the root is the first inode, and its attributes are bounded.
        if layout.place(ROOT).number > u32::from(u16::MAX) {
            return Err(too_large());
        }
        Ok(layout)
    }

    pub(super) fn place(&self, id: InodeId) -> Place {
        self.places[id as usize]
    }
}

fn too_large() -> Error {
    Error::BadErofs {
        reason: "the metadata doesn't fit the format".into(),
        offset: 0,
    }
}
/// Bytes from the start of an inode to what follows its attributes.
pub(super) fn header_size(extended: bool, xattrs: &XattrArea, id: XattrId) -> u64 {
    let inode = if extended {
        EXTENDED_SIZE
    } else {
        COMPACT_SIZE
    };
    (inode + xattrs.body(id).len()) as u64
}

/// Depth first, all children of a directory together: what a program looks at together lies together.
fn visit_order(tree: &Tree) -> Vec<InodeId> {
    let mut seen = vec![false; tree.inode_count()];
    let mut order = vec![ROOT];
    let mut pending = vec![ROOT];
    while let Some(directory) = pending.pop() {
        let first_new = pending.len();
        for (_, child) in tree.children(directory) {
            if !std::mem::replace(&mut seen[child as usize], true) {
                order.push(child);
                if tree.inode(child).is_directory() {
                    pending.push(child);
                }
            }
        }
        pending[first_new..].reverse();
    }
    order
}

fn commonest_time(tree: &Tree, order: &[InodeId]) -> (i64, u32) {
    let mut counts = hashbrown::HashMap::new();
    for &id in order {
        let attributes = &tree.inode(id).attributes;
        *counts
            .entry((attributes.mtime, attributes.mtime_nsec))
            .or_insert(0u32) += 1;
    }
    // Ties go to the earliest time: the same tree gives the same image.
    counts
        .into_iter()
        .max_by_key(|&(time, count)| (count, std::cmp::Reverse(time)))
        .map_or((0, 0), |(time, _)| time)
}

fn needs_extended(inode: &Inode, size: u64, nlink: u32, epoch: (i64, u32)) -> bool {
    let attributes = &inode.attributes;
    attributes.uid > 0xffff
        || attributes.gid > 0xffff
        || nlink > 0xffff
        || size > u64::from(u32::MAX)
        || (attributes.mtime, attributes.mtime_nsec) != epoch
}

/// Chunk size and number of a file that lies in one run.
pub(super) fn run_chunks(size: u64) -> (u8, u64) {
    let blocks = size.div_ceil(BLOCK).max(1);
    let bits = blocks
        .next_power_of_two()
        .trailing_zeros()
        .min(CHUNK_BITS_MAX);
    (bits as u8, blocks.div_ceil(1 << bits))
}

fn chunk_count(tree: &Tree, inode: &Inode, indexed: bool) -> u64 {
    match inode.body {
        Body::Chunked(map) => tree.chunk_maps[map as usize].chunks.len() as u64,
        Body::Regular { .. } if indexed && inode.size > 0 => run_chunks(inode.size).1,
        _ => 0,
    }
}

/// Directory entries, `.` and `..` among them, split into blocks: each has entries, then names, and no entry crosses.
pub(super) fn directory_blocks<'a>(
    names: impl Iterator<Item = &'a [u8]>,
    mut block: impl FnMut(usize, usize),
) {
    let (mut used, mut count) = (0, 0);
    for name in names {
        let more = DIRENT + name.len();
        if used + more > BLOCK as usize {
            block(count, used);
            (used, count) = (0, 0);
        }
        used += more;
        count += 1;
    }
    if count > 0 {
        block(count, used);
    }
}

/// Names of a directory as stored.
pub(super) fn dirents(tree: &Tree, id: InodeId) -> Vec<(&[u8], InodeId)> {
    let Body::Directory { parent, .. } = tree.inode(id).body else {
        return Vec::new();
    };
    let mut all = tree.children(id);
    all.extend([(&b"."[..], id), (&b".."[..], parent)]);
    all.sort_unstable_by(|a, b| a.0.cmp(b.0));
    all
}

/// Bytes and link count of a directory.
fn directory_size(tree: &Tree, id: InodeId) -> (u64, u32) {
    let all = dirents(tree, id);
    let (mut blocks, mut last) = (0, 0);
    directory_blocks(all.iter().map(|(name, _)| *name), |_, used| {
        (blocks, last) = (blocks + 1, used as u64)
    });
    let size = (blocks - 1) * BLOCK + last;
    // `.` and `..` are directories, so that an empty one has two links.
    let links = all
        .iter()
        .filter(|(_, child)| tree.inode(*child).is_directory())
        .count();
    (size, links as u32)
}
