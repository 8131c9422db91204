//! Archives made for tests, as bytes.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use crate::digest::Digest;
use crate::erofs::{Data, Node, NodeKind, Reader, Source};
use crate::error::Result;
use crate::layer::Layer;
use crate::limits::Limits;
use crate::tree::Xattrs;

/// An archive being written. Headers are what the test says, right or wrong.
#[derive(Default)]
pub(crate) struct Tar {
    bytes: Vec<u8>,
    pub(crate) mtime: u64,
}

impl Tar {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Any entry, with the checksum put right.
    pub(crate) fn entry(self, name: &str, flag: u8, link: &str, data: &[u8]) -> Self {
        let mut header = Self::header(
            name.as_bytes(),
            flag,
            link.as_bytes(),
            data.len() as u64,
            self.mtime,
        );
        seal(&mut header);
        self.raw(&header).data(data)
    }

    pub(crate) fn header(name: &[u8], flag: u8, link: &[u8], size: u64, mtime: u64) -> [u8; 512] {
        let mut header = [0; 512];
        header[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
        header[100..108].copy_from_slice(if flag == b'5' {
            b"0000755\0"
        } else {
            b"0000644\0"
        });
        header[108..116].copy_from_slice(b"0001750\0");
        header[116..124].copy_from_slice(b"0000144\0");
        header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        header[136..148].copy_from_slice(format!("{mtime:011o}\0").as_bytes());
        header[156] = flag;
        header[157..157 + link.len().min(100)].copy_from_slice(&link[..link.len().min(100)]);
        header[257..265].copy_from_slice(b"ustar\x0000");
        header
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Data with its padding.
    pub(crate) fn data(mut self, data: &[u8]) -> Self {
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Self {
        self.entry(name, b'0', "", data)
    }

    pub(crate) fn directory(self, name: &str) -> Self {
        self.entry(name, b'5', "", b"")
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(name, b'2', target, b"")
    }

    pub(crate) fn link(self, name: &str, target: &str) -> Self {
        self.entry(name, b'1', target, b"")
    }

    /// A pax header for the next entry.
    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut body = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let length = (rest..).find(|n| n.to_string().len() + rest == *n).unwrap();
            body.extend_from_slice(format!("{length} {key}=").as_bytes());
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        self.entry("pax", b'x', "", &body)
    }

    pub(crate) fn end(self) -> Vec<u8> {
        self.raw(&[0; 1024]).bytes
    }

    /// Without the end's zeros.
    pub(crate) fn cut(self) -> Vec<u8> {
        self.bytes
    }
}

/// Puts the checksum in.
pub(crate) fn seal(header: &mut [u8; 512]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Converts an archive into a blob.
pub(crate) fn convert(archive: &[u8], limits: &Limits) -> Result<File> {
    let file = tempfile::tempfile().unwrap();
    let mut layer = Layer::new(&file, Path::new("blob"), limits);
    layer.read(archive, ())?;
    layer.seal(&Digest::of(archive))?;
    Ok(file)
}

/// An inode read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) kind: NodeKind,
    pub(crate) node_mode: u16,
    pub(crate) uid: u32,
    pub(crate) nlink: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) device: u32,
    /// A file's bytes or a link's target.
    pub(crate) content: Vec<u8>,
    pub(crate) xattrs: Xattrs,
    pub(crate) number: u64,
}

/// Every path of an image; `devices` are the files behind its device numbers, the image itself first.
pub(crate) fn read_back(devices: &[&File]) -> BTreeMap<String, Found> {
    let reader = Reader::open(devices[0]).unwrap();
    let mut found = BTreeMap::new();
    let mut pending = vec![(String::new(), reader.root().unwrap())];
    while let Some((path, node)) = pending.pop() {
        if node.kind() == NodeKind::Directory {
            reader
                .entries(&node, |name, number| {
                    let name = String::from_utf8_lossy(name);
                    let child = if path.is_empty() {
                        name.into_owned()
                    } else {
                        format!("{path}/{name}")
                    };
                    pending.push((child, reader.node(number)?));
                    Ok(())
                })
                .unwrap();
        }
        found.insert(path, describe(&reader, &node, devices));
    }
    found
}

fn describe<S: Source>(reader: &Reader<S>, node: &Node, devices: &[&File]) -> Found {
    let content = match node.kind() {
        NodeKind::Symlink => reader.link_target(node).unwrap(),
        NodeKind::Regular => content(reader.data(node).unwrap(), node.size, devices),
        _ => Vec::new(),
    };
    Found {
        kind: node.kind(),
        node_mode: node.mode & 0o7777,
        uid: node.uid,
        nlink: node.nlink,
        mtime: (node.mtime, node.mtime_nsec),
        device: if matches!(node.kind(), NodeKind::Char | NodeKind::Block) {
            node.device()
        } else {
            0
        },
        content,
        xattrs: reader.xattrs(node).unwrap(),
        number: node.number,
    }
}

fn content(data: Data, size: u64, devices: &[&File]) -> Vec<u8> {
    use std::os::unix::fs::FileExt as _;
    let mut bytes = vec![0; size as usize];
    match data {
        Data::Empty => {}
        Data::Inline => unreachable!("the writer inlines no file data"),
        Data::Run(block) => devices[0]
            .read_exact_at(&mut bytes, u64::from(block) * 4096)
            .unwrap(),
        Data::Chunks(map) => {
            for (chunk, piece) in map.chunks.iter().zip(bytes.chunks_mut(4096 << map.bits)) {
                if let Some((device, block)) = chunk {
                    devices[usize::from(*device)]
                        .read_exact_at(piece, u64::from(*block) * 4096)
                        .unwrap();
                }
            }
        }
    }
    bytes
}
