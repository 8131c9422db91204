//! Layers put together: overlayfs's rules applied once, on metadata, instead of by the kernel at every look-up.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use crate::blob::Blob;
use crate::digest::Digest;
use crate::erofs::{self, BLOCK, Data, Device, Node, NodeKind, Reader, Source};
use crate::error::{Error, Result};
use crate::layer::{mark, uuid};
use crate::tree::{Attributes, Body, InodeId, ROOT, Tree, TreeLimits, XattrId};

/// Entries of a merged tree: 16 million, some two gigabytes of memory while merging, more than any image has.
const ENTRIES_MAX: u64 = 1 << 24;
/// Names and attributes of a merged tree.
const BYTES_MAX: u64 = 2 << 30;

/// A layer's blob in the store.
#[derive(Clone, Debug)]
pub(crate) struct LayerFile {
    pub(crate) diff_id: Digest,
    pub(crate) path: PathBuf,
}

/// Merges `layers`, bottom first, and writes the image of the result to `file`.
pub(crate) fn merge(layers: &[LayerFile], chain_id: &Digest, file: &File) -> Result<()> {
    let mut files = Vec::with_capacity(layers.len());
    for layer in layers {
        let file =
            File::open(&layer.path).map_err(|e| Error::io("cannot open layer", &layer.path, e))?;
        files.push((layer.diff_id, file));
    }
    merge_files(files, chain_id, file)
}

/// The same with the layers' blobs open.
pub(crate) fn merge_files(
    layers: Vec<(Digest, File)>,
    chain_id: &Digest,
    out: &File,
) -> Result<()> {
    let mut merge = Merge {
        tree: Tree::new(TreeLimits {
            entries: ENTRIES_MAX,
            bytes: BYTES_MAX,
        }),
    };
    let mut devices: Vec<(Digest, Device)> = Vec::new();
    for (diff_id, file) in layers {
        let name = format!("layer {diff_id}");
        let size = file
            .metadata()
            .map_err(|e| Error::io("cannot read", &name, e))?
            .len();
        // A layer that appears twice is one device.
        let number = match devices.iter().position(|(id, _)| *id == diff_id) {
            Some(number) => number,
            None => {
                devices.push((diff_id, device(&diff_id, size)?));
                devices.len() - 1
            }
        };
        let device = u16::try_from(number + 1).map_err(|_| too_many_layers())?;
        let damaged = |e| match e {
            Error::BadErofs { reason, offset } => Error::Damaged {
                path: name.clone().into(),
                reason: format!("{reason} at byte {offset}"),
            },
            other => other.in_layer(&name),
        };
        let reader = Reader::open(file).map_err(damaged)?;
        merge.layer(&reader, device).map_err(damaged)?;
    }
    let used = used_devices(&merge.tree, devices.len());
    let kept: Vec<Device> = devices
        .into_iter()
        .zip(&used)
        .filter(|(_, number)| number.is_some())
        .map(|((_, device), _)| device)
        .collect();
    renumber(&mut merge.tree, &used);
    let start = erofs::head_blocks(kept.len());
    let mut blob = Blob::new(out, start * BLOCK);
    let metadata =
        erofs::write_metadata(&merge.tree, &mut blob, start, Some(&kept), uuid(chain_id))?;
    blob.flush()
        .and_then(|()| out.write_all_at(&metadata.head, 0))
        .map_err(|e| Error::io("cannot write root file system", "", e))
}

fn device(diff_id: &Digest, bytes: u64) -> Result<Device> {
    let mut tag = [0; 64];
    tag.copy_from_slice(diff_id.hex().as_bytes());
    let blocks = u32::try_from(bytes.div_ceil(BLOCK)).map_err(|_| too_many_layers())?;
    Ok(Device { tag, blocks })
}

fn too_many_layers() -> Error {
    Error::BadErofs {
        reason: "more or larger layers than the format can number".into(),
        offset: 0,
    }
}

struct Merge {
    tree: Tree,
}

/// What a directory of a layer says besides its entries.
struct Marks {
    xattrs: XattrId,
    opaque: bool,
    implied: bool,
    link: bool,
}

impl Merge {
    fn layer<S: Source>(&mut self, reader: &Reader<S>, device: u16) -> Result<()> {
        let root = reader.root()?;
        let xattrs = reader.xattrs(&root)?;
        let has_links = xattrs
            .iter()
            .any(|(name, _)| name.as_ref() == mark::HAS_LINKS);
        // Hard links to lower files mean those files as they were before this layer changed anything.
        let mut linked = if has_links {
            self.lower_links(reader, &root)?
        } else {
            HashMap::new()
        };

        let marks = self.marks(reader, &root)?;
        if !marks.implied {
            self.tree.inode_mut(ROOT).attributes = root.attributes(marks.xattrs);
            self.tree.inode_mut(ROOT).implied = false;
        }
        if marks.opaque {
            self.tree.clear(ROOT);
        }
        let mut pending = vec![(root, ROOT)];
        let mut visited = std::collections::HashSet::new();
        while let Some((node, target)) = pending.pop() {
            if !visited.insert(node.number) {
                return Err(Error::BadErofs {
                    reason: "a directory has two parents".into(),
                    offset: node.number,
                });
            }
            let mut children = Vec::new();
            reader.entries(&node, |name, number| {
                children.push((name.to_vec(), number));
                Ok(())
            })?;
            for (name, number) in children {
                let child = reader.node(number)?;
                if let Some(directory) =
                    self.child(reader, device, target, &name, &child, &mut linked)?
                {
                    pending.push((child, directory));
                }
            }
        }
        Ok(())
    }

    /// Applies one entry; a directory's counterpart is returned for its entries to follow.
    fn child<S: Source>(
        &mut self,
        reader: &Reader<S>,
        device: u16,
        parent: InodeId,
        name: &[u8],
        node: &Node,
        linked: &mut HashMap<u64, InodeId>,
    ) -> Result<Option<InodeId>> {
        if node.kind() == NodeKind::Char && node.device() == 0 {
            self.tree.unlink(parent, name);
            return Ok(None);
        }
        if let Some(&inode) = linked.get(&node.number) {
            if self.tree.lookup(parent, name) != Some(inode) {
                self.tree.link(parent, name, inode)?;
            }
            return Ok(None);
        }
        let marks = self.marks(reader, node)?;
        if node.kind() == NodeKind::Directory {
            return self.directory(parent, name, node, &marks).map(Some);
        }
        if marks.link {
            let target = reader.link_target(node)?;
            return Err(Error::layer(
                name,
                format!(
                    "hard link to {:?}, which no layer has",
                    crate::error::printable(&target)
                ),
            ));
        }
        let body = match node.kind() {
            NodeKind::Symlink => Body::Symlink(self.tree.intern(&reader.link_target(node)?)?),
            NodeKind::Char => Body::Char(node.device()),
            NodeKind::Block => Body::Block(node.device()),
            NodeKind::Fifo => Body::Fifo,
            NodeKind::Socket => Body::Socket,
            _ => self.data(reader, node, device)?,
        };
        let size = if node.kind() == NodeKind::Regular {
            node.size
        } else {
            0
        };
        let id = self
            .tree
            .add_inode(node.attributes(marks.xattrs), size, body)?;
        self.tree.link(parent, name, id)?;
        if node.nlink > 1 {
            linked.insert(node.number, id);
        }
        Ok(None)
    }

    fn directory(
        &mut self,
        parent: InodeId,
        name: &[u8],
        node: &Node,
        marks: &Marks,
    ) -> Result<InodeId> {
        let existing = self.tree.lookup(parent, name);
        let attributes = if marks.implied {
            Attributes::implied()
        } else {
            node.attributes(marks.xattrs)
        };
        let id = match existing.map(|id| (id, self.tree.inode(id).body)) {
            Some((id, Body::Directory { .. })) => {
                if !marks.implied {
                    self.tree.inode_mut(id).attributes = attributes;
                }
                if marks.opaque {
                    self.tree.clear(id);
                }
                return Ok(id);
            }
            // The layer says `bin/x` and the lower layer has `bin -> usr/bin`: the file goes where the link leads.
            Some((_, Body::Symlink(_))) if marks.implied && !marks.opaque => {
                match self.tree.walk_or_make(parent, name, true, name) {
                    Ok(id) => return Ok(id),
                    Err(_) => self.tree.add_directory(parent, name, attributes)?,
                }
            }
            _ => self.tree.add_directory(parent, name, attributes)?,
        };
        Ok(id)
    }

    fn data<S: Source>(&mut self, reader: &Reader<S>, node: &Node, device: u16) -> Result<Body> {
        Ok(match reader.data(node)? {
            Data::Empty => Body::Regular {
                device: 0,
                block: 0,
            },
            Data::Run(block) => Body::Regular { device, block },
            Data::Inline => {
                return Err(Error::BadErofs {
                    reason: "a file's data is in its inode".into(),
                    offset: node.number,
                });
            }
            Data::Chunks(mut map) => {
                for (of, _) in map.chunks.iter_mut().flatten() {
                    *of = device;
                }
                self.tree.chunk_maps.push(map);
                Body::Chunked((self.tree.chunk_maps.len() - 1) as u32)
            }
        })
    }

    /// Attributes of an inode without the marks, and the marks.
    fn marks<S: Source>(&mut self, reader: &Reader<S>, node: &Node) -> Result<Marks> {
        let mut all = reader.xattrs(node)?;
        let mut has = |wanted: &[u8]| {
            let before = all.len();
            all.retain(|(name, _)| name.as_ref() != wanted);
            all.len() < before
        };
        let (opaque, implied, link) = (has(mark::OPAQUE), has(mark::IMPLIED), has(mark::LINK));
        has(mark::HAS_LINKS);
        Ok(Marks {
            xattrs: self.tree.intern_xattrs(all)?,
            opaque,
            implied,
            link,
        })
    }

    /// Inode numbers of the layer's links to lower files, and the inodes they mean.
    fn lower_links<S: Source>(
        &mut self,
        reader: &Reader<S>,
        root: &Node,
    ) -> Result<HashMap<u64, InodeId>> {
        let mut links = HashMap::new();
        let mut pending = vec![root.clone()];
        let mut visited = std::collections::HashSet::new();
        while let Some(directory) = pending.pop() {
            if !visited.insert(directory.number) {
                break;
            }
            let mut numbers = Vec::new();
            reader.entries(&directory, |_, number| {
                numbers.push(number);
                Ok(())
            })?;
            for number in numbers {
                let node = reader.node(number)?;
                match node.kind() {
                    NodeKind::Directory => pending.push(node),
                    NodeKind::Symlink if self.marks(reader, &node)?.link => {
                        let found = self.tree.resolve(&reader.link_target(&node)?);
                        if let Some(id) = found.filter(|&id| !self.tree.inode(id).is_directory()) {
                            links.insert(number, id);
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(links)
    }
}

/// New numbers of the devices that files of the tree have data on; the others needn't be on the disk.
fn used_devices(tree: &Tree, count: usize) -> Vec<Option<u16>> {
    let mut used = vec![false; count + 1];
    for id in 0..tree.inode_count() as InodeId {
        let inode = tree.inode(id);
        match inode.body {
            _ if inode.nlink == 0 => {}
            Body::Regular { device, .. } if inode.size > 0 => used[usize::from(device)] = true,
            Body::Chunked(map) => {
                let chunks = tree.chunk_maps[map as usize].chunks.iter().flatten();
                chunks.for_each(|(device, _)| used[usize::from(*device)] = true);
            }
            _ => {}
        }
    }
    let mut next = 0;
    used.into_iter()
        .skip(1)
        .map(|used| {
            next += u16::from(used);
            used.then_some(next)
        })
        .collect()
}

fn renumber(tree: &mut Tree, numbers: &[Option<u16>]) {
    let renumbered = |device: u16| match device {
        0 => 0,
        _ => numbers[usize::from(device) - 1].unwrap_or(0),
    };
    for id in 0..tree.inode_count() as InodeId {
        if let Body::Regular { device, .. } = &mut tree.inode_mut(id).body {
            *device = renumbered(*device);
        }
    }
    for (device, _) in tree
        .chunk_maps
        .iter_mut()
        .flat_map(|map| map.chunks.iter_mut().flatten())
    {
        *device = renumbered(*device);
    }
}

#[cfg(test)]
mod tests;
