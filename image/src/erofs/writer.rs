//! Writes the metadata of a tree: inodes, directories, shared attributes, and the superblock that makes them an image.

use std::io::{self, Write};

use crate::error::{Error, Result};
use crate::tree::{Body, Inode, InodeId, ROOT, Tree};

use super::format::*;
use super::layout::{Layout, Place, directory_blocks, dirents, header_size, run_chunks};

/// A device besides the image itself: a layer's blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    /// Names the device: the layer's diff id, 64 hexadecimal digits.
    pub(crate) tag: [u8; 64],
    pub(crate) blocks: u32,
}

/// What `write_metadata` leaves for its caller to put at the file's start.
pub(crate) struct Metadata {
    /// Superblock and device table, whole blocks.
    pub(crate) head: Vec<u8>,
    /// Blocks of the whole image.
    pub(crate) blocks: u32,
}

/// Blocks that the superblock and the table of so many devices take.
pub(crate) fn head_blocks(devices: usize) -> u64 {
    block_count((SUPER_OFFSET + SUPER_SIZE + devices * DEVICE_SLOT) as u64)
}

/// Writes the metadata area to `out`, which stands at block `start` of the image. Data of `tree`'s files lies before it, or with
/// `devices` in these, each mapped behind the image in their order.
pub(crate) fn write_metadata(
    tree: &Tree,
    out: &mut impl Write,
    start: u64,
    devices: Option<&[Device]>,
    uuid: [u8; 16],
) -> Result<Metadata> {
    let layout = Layout::plan(tree, devices.is_some())?;
    let end = start + layout.total_blocks;
    let blocks = u32::try_from(end)
        .ok()
        .filter(|&blocks| blocks != NO_BLOCK)
        .ok_or_else(|| Error::BadErofs {
            reason: "an image holds at most 16 TiB".into(),
            offset: end,
        })?;
    let mut area = Area {
        tree,
        layout: &layout,
        start,
        indexed: devices.is_some(),
        at: 0,
        chunked: false,
    };
    area.write(out)
        .map_err(|e| Error::io("cannot write image metadata", "", e))?;
    let head = superblock(
        &layout,
        start,
        blocks,
        devices.unwrap_or_default(),
        area.chunked,
        uuid,
    )?;
    Ok(Metadata { head, blocks })
}

struct Area<'a> {
    tree: &'a Tree,
    layout: &'a Layout,
    start: u64,
    indexed: bool,
    at: u64,
    chunked: bool,
}

impl Area<'_> {
    fn write(&mut self, out: &mut impl Write) -> io::Result<()> {
        for (serial, &id) in self.layout.order.iter().enumerate() {
            let place = self.layout.place(id);
            self.pad_to(out, u64::from(place.number) * INODE_UNIT)?;
            self.inode(out, id, place, serial as u32 + 1)?;
        }
        self.pad_to(out, block_count(self.layout.inode_bytes) * BLOCK)?;
        for &id in &self.layout.order {
            let place = self.layout.place(id);
            if place.block == 0 {
                continue;
            }
            let content = self.content(id);
            let whole = if place.inline {
                content.len() - content.len() % BLOCK as usize
            } else {
                content.len()
            };
            self.put(out, &content[..whole])?;
            self.pad_to(out, block_count(self.at) * BLOCK)?;
        }
        self.put(out, &self.layout.xattrs.shared)?;
        self.pad_to(out, self.layout.total_blocks * BLOCK)
    }

    fn put(&mut self, out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        out.write_all(bytes)
    }

    fn pad_to(&mut self, out: &mut impl Write, position: u64) -> io::Result<()> {
        const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];
        assert!(self.at <= position, "metadata is written in order");
        while self.at < position {
            let count = (position - self.at).min(BLOCK) as usize;
            self.put(out, &ZEROS[..count])?;
        }
        Ok(())
    }

    fn inode(
        &mut self,
        out: &mut impl Write,
        id: InodeId,
        place: Place,
        serial: u32,
    ) -> io::Result<()> {
        let inode = self.tree.inode(id);
        let xattrs = self.layout.xattrs.body(inode.attributes.xattrs);
        let (chunk_bits, chunks) = self.chunks(inode);
        self.chunked |= !chunks.is_empty();
        let layout = match (place.inline, chunks.is_empty()) {
            (true, _) => LAYOUT_INLINE,
            (false, false) => LAYOUT_CHUNKED,
            (false, true) => LAYOUT_PLAIN,
        };
        let data = match inode.body {
            Body::Directory { .. } | Body::Symlink(_) | Body::LowerLink(_) if place.block > 0 => {
                self.start as u32 + place.block
            }
            _ if layout == LAYOUT_CHUNKED => u32::from(CHUNK_INDEXES_FLAG | u16::from(chunk_bits)),
            Body::Regular { block, .. } if inode.size > 0 => block,
            Body::Char(device) | Body::Block(device) => device,
            _ => 0,
        };
        let size = match inode.body {
            Body::Directory { .. } | Body::Symlink(_) | Body::LowerLink(_) => u64::from(place.size),
            _ => inode.size,
        };
        let mut bytes = encode_inode(inode, place, layout, size, data, serial, xattrs.len());
        bytes.extend_from_slice(xattrs);
        debug_assert_eq!(
            bytes.len() as u64,
            header_size(place.extended, &self.layout.xattrs, inode.attributes.xattrs)
        );
        self.put(out, &bytes)?;
        if place.inline {
            let content = self.content(id);
            let tail = content.len() - content.len() % BLOCK as usize;
            self.put(out, &content[tail..])?;
        }
        if !chunks.is_empty() {
            self.pad_to(out, align(self.at, CHUNK_INDEX))?;
            for chunk in chunks {
                let (device, block) = chunk.unwrap_or((0, NO_BLOCK));
                let mut index = [0; CHUNK_INDEX as usize];
                index[2..4].copy_from_slice(&device.to_le_bytes());
                index[4..8].copy_from_slice(&block.to_le_bytes());
                self.put(out, &index)?;
            }
        }
        Ok(())
    }

    fn chunks(&self, inode: &Inode) -> (u8, Vec<Option<(u16, u32)>>) {
        match inode.body {
            Body::Chunked(map) => {
                let map = &self.tree.chunk_maps[map as usize];
                (map.bits, map.chunks.clone())
            }
            Body::Regular { device, block } if self.indexed && inode.size > 0 => {
                let (bits, count) = run_chunks(inode.size);
                (
                    bits,
                    (0..count)
                        .map(|n| Some((device, block + ((n << bits) as u32))))
                        .collect(),
                )
            }
            _ => (0, Vec::new()),
        }
    }

    /// The bytes of a directory or link.
    fn content(&self, id: InodeId) -> Vec<u8> {
        match self.tree.inode(id).body {
            Body::Directory { .. } => self.directory(id),
            Body::Symlink(target) | Body::LowerLink(target) => self.tree.text(target).to_vec(),
            _ => Vec::new(),
        }
    }

    fn directory(&self, id: InodeId) -> Vec<u8> {
        let all = dirents(self.tree, id);
        let mut blocks = Vec::new();
        directory_blocks(all.iter().map(|(name, _)| *name), |count, _| {
            blocks.push(count)
        });
        let mut bytes = Vec::new();
        let mut rest = all.as_slice();
        for count in blocks {
            bytes.resize(bytes.len().next_multiple_of(BLOCK as usize), 0);
            let (these, others) = rest.split_at(count);
            rest = others;
            let mut name_offset = count * DIRENT;
            for (name, child) in these {
                let mode = type_bits(&self.tree.inode(*child).body);
                bytes.extend_from_slice(&u64::from(self.layout.place(*child).number).to_le_bytes());
                bytes.extend_from_slice(&(name_offset as u16).to_le_bytes());
                bytes.extend_from_slice(&[dirent_type(mode), 0]);
                name_offset += name.len();
            }
            these
                .iter()
                .for_each(|(name, _)| bytes.extend_from_slice(name));
        }
        bytes
    }
}

fn type_bits(body: &Body) -> u16 {
    match body {
        Body::Directory { .. } => S_IFDIR,
        Body::Regular { .. } | Body::Chunked(_) => S_IFREG,
        Body::Symlink(_) | Body::LowerLink(_) => S_IFLNK,
        Body::Char(_) => S_IFCHR,
        Body::Block(_) => S_IFBLK,
        Body::Fifo => S_IFIFO,
        Body::Socket => S_IFSOCK,
    }
}

fn encode_inode(
    inode: &Inode,
    place: Place,
    layout: u16,
    size: u64,
    data: u32,
    serial: u32,
    xattr_bytes: usize,
) -> Vec<u8> {
    let attributes = &inode.attributes;
    let xattr_words = if xattr_bytes == 0 {
        0
    } else {
        (xattr_bytes - XATTR_HEADER) / 4 + 1
    };
    let mut bytes = Vec::with_capacity(EXTENDED_SIZE + xattr_bytes);
    bytes.extend_from_slice(&(u16::from(place.extended) | layout << 1).to_le_bytes());
    bytes.extend_from_slice(&(xattr_words as u16).to_le_bytes());
    bytes.extend_from_slice(&(type_bits(&inode.body) | attributes.mode & 0o7777).to_le_bytes());
    if place.extended {
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&size.to_le_bytes());
        bytes.extend_from_slice(&data.to_le_bytes());
        bytes.extend_from_slice(&serial.to_le_bytes());
        bytes.extend_from_slice(&attributes.uid.to_le_bytes());
        bytes.extend_from_slice(&attributes.gid.to_le_bytes());
        bytes.extend_from_slice(&attributes.mtime.to_le_bytes());
        bytes.extend_from_slice(&attributes.mtime_nsec.to_le_bytes());
        bytes.extend_from_slice(&place.nlink.to_le_bytes());
        bytes.extend_from_slice(&[0; 16]);
    } else {
        bytes.extend_from_slice(&(place.nlink as u16).to_le_bytes());
        bytes.extend_from_slice(&(size as u32).to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&data.to_le_bytes());
        bytes.extend_from_slice(&serial.to_le_bytes());
        bytes.extend_from_slice(&(attributes.uid as u16).to_le_bytes());
        bytes.extend_from_slice(&(attributes.gid as u16).to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
    }
    bytes
}

fn superblock(
    layout: &Layout,
    start: u64,
    blocks: u32,
    devices: &[Device],
    chunked: bool,
    uuid: [u8; 16],
) -> Result<Vec<u8>> {
    let mut head = vec![0; (head_blocks(devices.len()) * BLOCK) as usize];
    let mut features = 0;
    features |= if chunked { INCOMPAT_CHUNKED } else { 0 };
    features |= if devices.is_empty() {
        0
    } else {
        INCOMPAT_DEVICES
    };
    let mut put =
        |offset: usize, bytes: &[u8]| head[offset..offset + bytes.len()].copy_from_slice(bytes);
    let base = SUPER_OFFSET;
    put(base, &MAGIC.to_le_bytes());
    put(base + 8, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
    put(base + 12, &[BLOCK_BITS]);
    put(base + 14, &(layout.place(ROOT).number as u16).to_le_bytes());
    put(base + 16, &(layout.order.len() as u64).to_le_bytes());
    put(base + 24, &layout.epoch.0.to_le_bytes());
    put(base + 32, &layout.epoch.1.to_le_bytes());
    put(base + 36, &blocks.to_le_bytes());
    put(base + 40, &(start as u32).to_le_bytes());
    put(
        base + 44,
        &((start + layout.xattr_block) as u32).to_le_bytes(),
    );
    put(base + 48, &uuid);
    put(base + 80, &features.to_le_bytes());
    put(base + 86, &(devices.len() as u16).to_le_bytes());
    let table = if devices.is_empty() {
        0
    } else {
        DEVICE_TABLE_SLOT
    };
    put(base + 88, &table.to_le_bytes());
    // Flat mode: every device lies behind the image and the devices before it, on one disk.
    let mut mapped = blocks;
    for (number, device) in devices.iter().enumerate() {
        let slot = base + SUPER_SIZE + number * DEVICE_SLOT;
        put(slot, &device.tag);
        put(slot + 64, &device.blocks.to_le_bytes());
        put(slot + 68, &mapped.to_le_bytes());
        mapped = mapped
            .checked_add(device.blocks)
            .ok_or_else(|| Error::BadErofs {
                reason: "the layers of a root file system take at most 16 TiB together".into(),
                offset: 0,
            })?;
    }
    let sum = checksum(&head[base..BLOCK as usize]);
    head[base + 4..base + 8].copy_from_slice(&sum.to_le_bytes());
    Ok(head)
}

/// For fuzzing: `bytes` with a superblock that passes the reader's first checks.
pub(crate) fn sealed(bytes: &[u8]) -> Vec<u8> {
    let mut image = bytes.to_vec();
    image.resize(image.len().max(BLOCK as usize), 0);
    let base = SUPER_OFFSET;
    image[base..base + 4].copy_from_slice(&MAGIC.to_le_bytes());
    image[base + 4..base + 8].fill(0);
    image[base + 8..base + 14].copy_from_slice(&[COMPAT_CHECKSUM as u8, 0, 0, 0, BLOCK_BITS, 0]);
    image[base + 80] &= (INCOMPAT_CHUNKED | INCOMPAT_DEVICES) as u8;
    image[base + 81..base + 84].fill(0);
    let sum = checksum(&image[base..BLOCK as usize]);
    image[base + 4..base + 8].copy_from_slice(&sum.to_le_bytes());
    image
}
