//! Reads back what the writer writes, and believes none of it: every offset and count is checked against the source.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::rc::Rc;

use hashbrown::HashMap;

use crate::error::{Error, Result};
use crate::tree::{Attributes, ChunkMap, LINK_MAX, NAME_MAX, Xattr, XattrId, Xattrs};

use super::format::*;
use super::xattr::prefix;

/// Somewhere to read an image from.
pub(crate) trait Source {
    /// Fills `buffer` from `offset`.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Bytes there are.
    fn size(&self) -> io::Result<u64>;
}

impl Source for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl Source for &File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl Source for &[u8] {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset)
            .ok()
            .filter(|&start| start <= self.len());
        let piece = start.and_then(|start| self[start..].get(..buffer.len()));
        buffer.copy_from_slice(piece.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

/// An entry of the device table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// The layer's diff id in hexadecimal.
    pub(crate) tag: String,
    pub(crate) blocks: u32,
    pub(crate) mapped: u32,
}

/// An inode as stored.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) number: u64,
    /// Type and permissions.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) mtime_nsec: u32,
    pub(crate) nlink: u32,
    pub(crate) size: u64,
    layout: u16,
    data: u32,
    /// Where the inode ends and its attributes begin.
    body: u64,
    xattr_bytes: u64,
}

/// Types of inodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    Regular,
    Symlink,
    Char,
    Block,
    Fifo,
    Socket,
}

/// Where a file's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    Empty,
    /// One run from this block on.
    Run(u32),
    /// The file's tail follows its inode; only foreign images have that.
    Inline,
    Chunks(ChunkMap),
}

impl Node {
    pub(crate) fn attributes(&self, xattrs: XattrId) -> Attributes {
        Attributes {
            mode: self.mode & 0o7777,
            uid: self.uid,
            gid: self.gid,
            mtime: self.mtime,
            mtime_nsec: self.mtime_nsec,
            xattrs,
        }
    }

    pub(crate) fn kind(&self) -> Kind {
        match self.mode & S_IFMT {
            S_IFDIR => Kind::Directory,
            S_IFLNK => Kind::Symlink,
            S_IFCHR => Kind::Char,
            S_IFBLK => Kind::Block,
            S_IFIFO => Kind::Fifo,
            S_IFSOCK => Kind::Socket,
            _ => Kind::Regular,
        }
    }

    /// A device node's number as stored.
    pub(crate) fn device(&self) -> u32 {
        self.data
    }
}

/// Bytes read at once, and how many such pieces are kept: a megabyte whatever the image's size.
const WINDOW: u64 = 64 * 1024;
const WINDOWS: usize = 16;

/// An open image.
pub(crate) struct Reader<S> {
    source: S,
    size: u64,
    metadata: u64,
    shared_xattrs: u64,
    root: u64,
    epoch: (i64, u32),
    devices: Vec<Slot>,
    windows: RefCell<HashMap<u64, Rc<[u8]>>>,
}

impl<S: Source> Reader<S> {
    /// Reads and checks superblock and device table.
    pub(crate) fn open(source: S) -> Result<Self> {
        let size = source
            .size()
            .map_err(|e| Error::io("cannot read image", "", e))?;
        let mut reader = Self {
            source,
            size,
            metadata: 0,
            shared_xattrs: 0,
            root: 0,
            epoch: (0, 0),
            devices: Vec::new(),
            windows: RefCell::default(),
        };
        let mut block = reader.bytes(SUPER_OFFSET as u64, BLOCK as usize - SUPER_OFFSET)?;
        let head = Fields(block.clone());
        if head.u32(0) != MAGIC {
            return Err(bad("no EROFS superblock", SUPER_OFFSET as u64));
        }
        block[4..8].fill(0);
        if head.u32(8) & COMPAT_CHECKSUM == 0 || checksum(&block) != head.u32(4) {
            return Err(bad("wrong superblock checksum", SUPER_OFFSET as u64 + 4));
        }
        let features = head.u32(80);
        if block[12] != BLOCK_BITS
            || block[13] != 0
            || features & !(INCOMPAT_CHUNKED | INCOMPAT_DEVICES) != 0
        {
            return Err(bad(
                "block size or features we don't write",
                SUPER_OFFSET as u64,
            ));
        }
        reader.root = u64::from(head.u16(14));
        reader.epoch = (head.u64(24) as i64, head.u32(32));
        reader.metadata = u64::from(head.u32(40)) * BLOCK;
        reader.shared_xattrs = u64::from(head.u32(44)) * BLOCK;
        if features & INCOMPAT_DEVICES != 0 {
            let table = u64::from(head.u16(88)) * DEVICE_SLOT as u64;
            for number in 0..u64::from(head.u16(86)) {
                let slot = Fields(reader.bytes(table + number * DEVICE_SLOT as u64, DEVICE_SLOT)?);
                let tag = slot.0[..64].split(|&b| b == 0).next().unwrap_or_default();
                reader.devices.push(Slot {
                    tag: String::from_utf8_lossy(tag).into_owned(),
                    blocks: slot.u32(64),
                    mapped: slot.u32(68),
                });
            }
        }
        Ok(reader)
    }

    /// The device table.
    pub(crate) fn devices(&self) -> &[Slot] {
        &self.devices
    }

    /// The root directory.
    pub(crate) fn root(&self) -> Result<Node> {
        let root = self.node(self.root)?;
        if root.kind() != Kind::Directory {
            return Err(bad(
                "the root is not a directory",
                self.metadata + self.root * INODE_UNIT,
            ));
        }
        Ok(root)
    }

    /// The inode of this number.
    pub(crate) fn node(&self, number: u64) -> Result<Node> {
        let position = number
            .checked_mul(INODE_UNIT)
            .and_then(|offset| offset.checked_add(self.metadata))
            .ok_or_else(|| bad("inode number out of range", number))?;
        let head = Fields(self.bytes(position, COMPACT_SIZE)?);
        let format = head.u16(0);
        let layout = format >> 1;
        if format > 0xf || !matches!(layout, LAYOUT_PLAIN | LAYOUT_INLINE | LAYOUT_CHUNKED) {
            return Err(bad(
                format!("inode format {format:#x} we don't write"),
                position,
            ));
        }
        let words = u64::from(head.u16(2));
        let xattr_bytes = if words == 0 {
            0
        } else {
            XATTR_HEADER as u64 + 4 * (words - 1)
        };
        let mut node = Node {
            number,
            mode: head.u16(4),
            uid: u32::from(head.u16(24)),
            gid: u32::from(head.u16(26)),
            mtime: self.epoch.0,
            mtime_nsec: self.epoch.1,
            nlink: u32::from(head.u16(6)),
            size: u64::from(head.u32(8)),
            layout,
            data: head.u32(16),
            body: position + COMPACT_SIZE as u64,
            xattr_bytes,
        };
        if format & 1 == 1 {
            let head = Fields(self.bytes(position, EXTENDED_SIZE)?);
            node.size = head.u64(8);
            node.uid = head.u32(24);
            node.gid = head.u32(28);
            node.mtime = head.u64(32) as i64;
            node.mtime_nsec = head.u32(40);
            node.nlink = head.u32(44);
            node.body = position + EXTENDED_SIZE as u64;
        }
        let known = [
            S_IFREG, S_IFDIR, S_IFLNK, S_IFCHR, S_IFBLK, S_IFIFO, S_IFSOCK,
        ];
        if !known.contains(&(node.mode & S_IFMT))
            || node.size > i64::MAX as u64
            || node.mtime_nsec >= 1_000_000_000
        {
            return Err(bad("an inode's mode, size or time is impossible", position));
        }
        Ok(node)
    }

    /// Calls `each` with name and inode number of every entry but `.` and `..`.
    pub(crate) fn entries(
        &self,
        node: &Node,
        mut each: impl FnMut(&[u8], u64) -> Result<()>,
    ) -> Result<()> {
        let mut previous: Vec<u8> = Vec::new();
        let mut start = 0;
        while start < node.size {
            let length = (node.size - start).min(BLOCK) as usize;
            let block = Fields(self.content(node, start, length)?);
            let at = |entry: usize| block.u16(entry * DIRENT + 8) as usize;
            if length < DIRENT || at(0) < DIRENT || at(0) % DIRENT != 0 || at(0) > length {
                return Err(bad("directory without entries", node.body));
            }
            let count = at(0) / DIRENT;
            for entry in 0..count {
                let from = at(entry);
                let to = if entry + 1 < count {
                    at(entry + 1)
                } else {
                    length
                };
                let name = block
                    .0
                    .get(from..to)
                    .ok_or_else(|| bad("directory entry out of its block", node.body))?;
                let name = name.split(|&b| b == 0).next().unwrap_or_default();
                if name.is_empty() || name.len() > NAME_MAX || name.contains(&b'/') {
                    return Err(bad("impossible name in a directory", node.body));
                }
                if name <= previous.as_slice() {
                    return Err(bad("directory entries out of order", node.body));
                }
                previous = name.to_vec();
                if name != b"." && name != b".." {
                    each(name, block.u64(entry * DIRENT))?;
                }
            }
            start += BLOCK;
        }
        Ok(())
    }

    /// The target of a symbolic link.
    pub(crate) fn link_target(&self, node: &Node) -> Result<Vec<u8>> {
        if node.size == 0 || node.size > LINK_MAX as u64 {
            return Err(bad(
                format!("symbolic link of {} bytes", node.size),
                node.body,
            ));
        }
        self.content(node, 0, node.size as usize)
    }

    /// The extended attributes of an inode, sorted.
    pub(crate) fn xattrs(&self, node: &Node) -> Result<Xattrs> {
        let mut all = Vec::new();
        if node.xattr_bytes == 0 {
            return Ok(all);
        }
        let end = node.body + node.xattr_bytes;
        let shared = u64::from(self.bytes(node.body, XATTR_HEADER)?[4]);
        let mut position = node.body + XATTR_HEADER as u64;
        if position + shared * 4 > end {
            return Err(bad("shared attributes beyond the inode", position));
        }
        for _ in 0..shared {
            let id = u64::from(Fields(self.bytes(position, 4)?).u32(0));
            position += 4;
            all.push(self.xattr(self.shared_xattrs + id * 4)?.0);
        }
        while position < end {
            let (pair, next) = self.xattr(position)?;
            if next > end {
                return Err(bad("attribute beyond the inode", position));
            }
            all.push(pair);
            position = next;
        }
        all.sort();
        Ok(all)
    }

    fn xattr(&self, position: u64) -> Result<(Xattr, u64)> {
        let head = Fields(self.bytes(position, 4)?);
        let (name_length, size) = (u64::from(head.0[0]), u64::from(head.u16(2)));
        let prefix = prefix(head.0[1]).ok_or_else(|| bad("unknown attribute prefix", position))?;
        let bytes = self.bytes(position + 4, (name_length + size) as usize)?;
        let (rest, value) = bytes.split_at(name_length as usize);
        let name = [prefix, rest].concat();
        Ok((
            (name.into(), value.into()),
            align(position + 4 + name_length + size, 4),
        ))
    }

    /// Where the bytes of a regular file are.
    pub(crate) fn data(&self, node: &Node) -> Result<Data> {
        match node.layout {
            _ if node.size == 0 => Ok(Data::Empty),
            LAYOUT_PLAIN => Ok(Data::Run(node.data)),
            LAYOUT_INLINE => Ok(Data::Inline),
            _ => self.chunks(node).map(Data::Chunks),
        }
    }

    fn chunks(&self, node: &Node) -> Result<ChunkMap> {
        let format = node.data as u16;
        let bits = format & CHUNK_BITS_MASK;
        if format & !CHUNK_BITS_MASK != CHUNK_INDEXES_FLAG {
            return Err(bad("chunk format we don't write", node.body));
        }
        let count = node.size.div_ceil(BLOCK << bits);
        let position = align(node.body + node.xattr_bytes, CHUNK_INDEX);
        if count > self.size / CHUNK_INDEX {
            return Err(bad("more chunks than the image has bytes", node.body));
        }
        let mut chunks = Vec::with_capacity(count as usize);
        let bytes = self.bytes(position, (count * CHUNK_INDEX) as usize)?;
        for index in bytes.chunks_exact(CHUNK_INDEX as usize) {
            let index = Fields(index.to_vec());
            let block = index.u32(4);
            chunks.push((block != NO_BLOCK).then(|| (index.u16(2), block)));
        }
        Ok(ChunkMap {
            bits: bits as u8,
            chunks,
        })
    }

    /// Bytes of a directory or link.
    fn content(&self, node: &Node, start: u64, length: usize) -> Result<Vec<u8>> {
        let whole = node.size - node.size % BLOCK;
        match node.layout {
            LAYOUT_INLINE if start >= whole => {
                self.bytes(node.body + node.xattr_bytes + start - whole, length)
            }
            LAYOUT_PLAIN | LAYOUT_INLINE => {
                self.bytes(u64::from(node.data) * BLOCK + start, length)
            }
            _ => Err(bad("directory or link in chunks", node.body)),
        }
    }

    fn bytes(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let end = offset
            .checked_add(length as u64)
            .filter(|&end| end <= self.size);
        let end =
            end.ok_or_else(|| bad(format!("{length} bytes are due beyond its end"), offset))?;
        let mut bytes = Vec::with_capacity(length);
        let mut at = offset;
        while at < end {
            let window = self.window(at / WINDOW)?;
            let from = (at % WINDOW) as usize;
            let to = window.len().min(from + (end - at) as usize);
            bytes.extend_from_slice(&window[from..to]);
            at += (to - from) as u64;
        }
        Ok(bytes)
    }

    fn window(&self, number: u64) -> Result<Rc<[u8]>> {
        if let Some(window) = self.windows.borrow().get(&number) {
            return Ok(Rc::clone(window));
        }
        let length = (self.size - number * WINDOW).min(WINDOW);
        let mut buffer = vec![0; length as usize];
        self.source
            .read_at(&mut buffer, number * WINDOW)
            .map_err(|e| Error::io("cannot read image", "", e))?;
        let window: Rc<[u8]> = buffer.into();
        let mut windows = self.windows.borrow_mut();
        if windows.len() >= WINDOWS {
            windows.clear();
        }
        windows.insert(number, Rc::clone(&window));
        Ok(window)
    }
}

struct Fields(Vec<u8>);

/// Little-endian fields at offsets that the caller knows to be inside.
impl Fields {
    fn array<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut array = [0; N];
        if let Some(bytes) = self.0.get(offset..offset + N) {
            array.copy_from_slice(bytes);
        }
        array
    }

    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.array(offset))
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.array(offset))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.array(offset))
    }
}

fn bad(reason: impl Into<String>, offset: u64) -> Error {
    Error::BadErofs {
        reason: reason.into(),
        offset,
    }
}
