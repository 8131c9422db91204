//! One layer: an archive streams in, an EROFS blob and the archive's recipe come out.

use std::fs::File;
use std::io::{BufRead, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::blob::Blob;
use crate::digest::Digest;
use crate::erofs::{self, BLOCK};
use crate::error::{Error, Result, printable};
use crate::limits::Limits;
use crate::recipe::RecipeWriter;
use crate::tar::{Archive, Entry, Kind, Segment, Tap};
use crate::tree::{
    Attributes, Body, ChunkMap, InodeId, LINK_MAX, ROOT, Tree, TreeLimits, XattrId, components,
};

/// Marks that a layer's blob carries for the merge. They are xattrs so that the blob stays an ordinary overlayfs layer.
pub(crate) mod mark {
    /// overlayfs's own: the directory hides lower layers' entries.
    pub(crate) const OPAQUE: &[u8] = b"trusted.overlay.opaque";
    /// The archive didn't list the directory: the lower layer's attributes stay.
    pub(crate) const IMPLIED: &[u8] = b"trusted.casemate.implied";
    /// The symbolic link stands for a hard link to a path of a lower layer.
    pub(crate) const LINK: &[u8] = b"trusted.casemate.link";
    /// On the root: the layer has such links.
    pub(crate) const HAS_LINKS: &[u8] = b"trusted.casemate.has-links";
    /// Prefixes that an archive may not set: they would be taken for marks.
    pub(crate) const RESERVED: [&[u8]; 2] = [b"trusted.overlay.", b"trusted.casemate."];
}

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE_WHITEOUT: &[u8] = b".wh..wh..opq";
/// AUFS's own files (`.wh..wh.plnk`, …), which no extractor unpacks.
const WHITEOUT_META: &[u8] = b".wh..wh.";

/// The largest file EROFS addresses with 4 KiB blocks, and ext4 as well.
const FILE_MAX: u64 = 1 << 44;
/// Chunks of a sparse file: half a megabyte of index at most.
const CHUNKS_MAX: u64 = 1 << 16;
/// Chunks aren't made larger than a gigabyte for alignment's sake alone.
const ALIGNED_BITS_MAX: u32 = 18;

/// What came out of a conversion.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Converted {
    pub(crate) blob_bytes: u64,
    pub(crate) entries: u64,
}

/// Converts the archive in `input`, read to its end, into `blob` and `recipe`. The result becomes an image when
/// [`Layer::seal`] writes its superblock.
pub(crate) struct Layer<'a> {
    tree: Tree,
    blob: Blob<'a>,
    file: &'a File,
    limits: &'a Limits,
    entries: u64,
    has_links: bool,
    path: &'a Path,
}

impl<W: std::io::Write> Tap for RecipeWriter<W> {
    fn literal(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        RecipeWriter::literal(self, bytes)
    }
}

/// What the archive's data is told to, besides the blob.
pub(crate) trait DataTap: Tap {
    /// Data of the archive lies at this place of the blob.
    fn data(&mut self, offset: u64, length: u64) -> std::io::Result<()>;
}

impl<W: std::io::Write> DataTap for RecipeWriter<W> {
    fn data(&mut self, offset: u64, length: u64) -> std::io::Result<()> {
        RecipeWriter::data(self, offset, length)
    }
}

impl DataTap for () {
    fn data(&mut self, _: u64, _: u64) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> Layer<'a> {
    /// A layer to be written to `file`, which is `path` in error messages.
    pub(crate) fn new(file: &'a File, path: &'a Path, limits: &'a Limits) -> Self {
        let tree = TreeLimits {
            entries: limits.layer_entries,
            bytes: limits.layer_metadata_bytes,
        };
        Self {
            tree: Tree::new(tree),
            // The superblock's place is left free.
            blob: Blob::new(file, BLOCK),
            file,
            limits,
            entries: 0,
            has_links: false,
            path,
        }
    }

    /// Reads the whole archive.
    pub(crate) fn read<R: BufRead, T: DataTap>(&mut self, input: R, tap: T) -> Result<(R, T)> {
        let mut archive = Archive::new(input, tap);
        while let Some(entry) = archive.next_entry()? {
            self.entries += 1;
            if self.entries > self.limits.layer_entries {
                return Err(Error::Limit {
                    what: "layer".into(),
                    limit: self.limits.layer_entries,
                    unit: "entries",
                    key: "layer_entries",
                });
            }
            self.entry(&entry, &mut archive)?;
            archive.skip_data()?;
        }
        archive.finish()
    }

    /// Writes metadata and superblock; `diff_id` makes the image's UUID.
    pub(crate) fn seal(mut self, diff_id: &Digest) -> Result<Converted> {
        let path = self.path;
        let failed = |e| Error::io("cannot write layer", path, e);
        self.blob.fill_block().map_err(failed)?;
        apply_marks(&mut self.tree, self.has_links)?;
        let start = self.blob.position() / BLOCK;
        let metadata =
            erofs::write_metadata(&self.tree, &mut self.blob, start, None, uuid(diff_id))
                .map_err(|e| e.at(path))?;
        self.blob.flush().map_err(failed)?;
        let blob_bytes = u64::from(metadata.blocks) * BLOCK;
        self.file.set_len(blob_bytes).map_err(failed)?;
        self.file.write_all_at(&metadata.head, 0).map_err(failed)?;
        Ok(Converted {
            blob_bytes,
            entries: self.entries,
        })
    }

    fn entry<R: BufRead, T: DataTap>(
        &mut self,
        entry: &Entry,
        archive: &mut Archive<R, T>,
    ) -> Result<()> {
        self.check_path(&entry.name, &entry.name)?;
        let mut path: Vec<&[u8]> = components(&entry.name).collect();
        let Some(name) = path.pop() else {
            return self.root(entry);
        };
        if name.starts_with(WHITEOUT) {
            return self.whiteout(entry, &path.join(&b'/'), name);
        }
        if let Some(part) = path.iter().find(|part| part.starts_with(WHITEOUT)) {
            return Err(Error::layer(
                &entry.name,
                format!("{:?} is a whiteout, not a directory", printable(part)),
            ));
        }
        let directory = self
            .tree
            .walk_or_make(ROOT, &path.join(&b'/'), false, &entry.name)?;
        if entry.kind == Kind::HardLink {
            return self.hard_link(entry, directory, name);
        }
        let attributes = self.attributes(entry)?;
        if entry.kind == Kind::Directory {
            return self.directory(directory, name, attributes);
        }
        let body = match entry.kind {
            Kind::Regular => self.file_data(entry, archive)?,
            Kind::Symlink => {
                if entry.link.is_empty() || entry.link.len() > LINK_MAX {
                    return Err(Error::layer(
                        &entry.name,
                        format!("symbolic link target of {} bytes", entry.link.len()),
                    ));
                }
                Body::Symlink(self.tree.intern(&entry.link)?)
            }
            Kind::Char => Body::Char(encode_device(entry.device)),
            Kind::Block => Body::Block(encode_device(entry.device)),
            _ => Body::Fifo,
        };
        let size = if entry.kind == Kind::Regular {
            entry.size
        } else {
            0
        };
        let id = self.tree.add_inode(attributes, size, body)?;
        self.tree.link(directory, name, id)
    }

    /// Refuses paths that leave the tree or that no program could open.
    fn check_path(&self, path: &[u8], whole: &[u8]) -> Result<()> {
        if path.len() as u64 > self.limits.path_bytes {
            return Err(Error::Limit {
                what: format!("layer: path {:?}", printable(whole)),
                limit: self.limits.path_bytes,
                unit: "bytes",
                key: "path_bytes",
            });
        }
        if path.is_empty() || path.contains(&0) {
            return Err(Error::layer(whole, "empty path"));
        }
        if path[0] == b'/' && !self.limits.allow_absolute_paths {
            return Err(Error::layer(
                whole,
                "absolute path; if you trust the image set `image.limits.allow_absolute_paths` to place it inside the root",
            ));
        }
        if components(path).any(|part| part == b"..") {
            return Err(Error::layer(
                whole,
                format!("{:?} leads out of the layer", printable(path)),
            ));
        }
        Ok(())
    }

    /// An entry for the root itself.
    fn root(&mut self, entry: &Entry) -> Result<()> {
        if entry.kind != Kind::Directory {
            return Err(Error::layer(
                &entry.name,
                "the root can only be a directory",
            ));
        }
        let attributes = self.attributes(entry)?;
        let root = self.tree.inode_mut(ROOT);
        root.attributes = attributes;
        root.implied = false;
        Ok(())
    }

    fn directory(&mut self, parent: InodeId, name: &[u8], attributes: Attributes) -> Result<()> {
        let existing = self.tree.lookup(parent, name);
        if let Some(id) = existing.filter(|&id| self.tree.inode(id).is_directory()) {
            let inode = self.tree.inode_mut(id);
            inode.attributes = attributes;
            inode.implied = false;
            return Ok(());
        }
        let id = self.tree.add_directory(parent, name, attributes)?;
        // In place of a whiteout or a file of this layer: the lower layers' directory doesn't shine through.
        self.tree.inode_mut(id).opaque = existing.is_some();
        Ok(())
    }

    /// `.wh.NAME` hides a lower layer's entry, never one of this layer.
    fn whiteout(&mut self, entry: &Entry, parent: &[u8], name: &[u8]) -> Result<()> {
        let bad = |reason: &str| Err(Error::layer(&entry.name, reason));
        if name == OPAQUE_WHITEOUT {
            let directory = self.tree.walk_or_make(ROOT, parent, false, &entry.name)?;
            self.tree.inode_mut(directory).opaque = true;
            return Ok(());
        }
        if name.starts_with(WHITEOUT_META) {
            return Ok(());
        }
        let hidden = &name[WHITEOUT.len()..];
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return bad("a whiteout of nothing: it has no name");
        }
        let directory = self.tree.walk_or_make(ROOT, parent, false, &entry.name)?;
        match self.tree.lookup(directory, hidden) {
            Some(id) if self.tree.inode(id).is_directory() => self.tree.inode_mut(id).opaque = true,
            // The entry of this layer replaces the lower one anyway.
            Some(_) => {}
            None => {
                let id = self
                    .tree
                    .add_inode(Attributes::implied(), 0, Body::Char(0))?;
                self.tree.link(directory, hidden, id)?;
            }
        }
        Ok(())
    }

    fn hard_link(&mut self, entry: &Entry, directory: InodeId, name: &[u8]) -> Result<()> {
        self.check_path(&entry.link, &entry.name)?;
        let found = self
            .tree
            .resolve(&entry.link)
            .filter(|&id| !self.tree.inode(id).is_whiteout());
        let inode = match found {
            Some(id) if self.tree.inode(id).is_directory() => {
                return Err(Error::layer(
                    &entry.name,
                    format!("hard link to the directory {:?}", printable(&entry.link)),
                ));
            }
            Some(id) => id,
            None => {
                self.has_links = true;
                let target = self.tree.intern(&entry.link)?;
                let attributes = Attributes {
                    mode: 0o777,
                    ..Attributes::implied()
                };
                self.tree
                    .add_inode(attributes, 0, Body::LowerLink(target))?
            }
        };
        // A link onto itself changes nothing; replacing would drop the inode.
        if self.tree.lookup(directory, name) == Some(inode) {
            return Ok(());
        }
        self.tree.link(directory, name, inode)
    }

    fn attributes(&mut self, entry: &Entry) -> Result<Attributes> {
        let xattrs = entry
            .xattrs
            .iter()
            .filter(|(name, value)| self.takes_xattr(name, value))
            .map(|(name, value)| (name.as_slice().into(), value.as_slice().into()))
            .collect();
        Ok(Attributes {
            mode: if entry.kind == Kind::Symlink {
                0o777
            } else {
                entry.mode
            },
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            mtime_nsec: entry.mtime_nsec,
            xattrs: self.tree.intern_xattrs(xattrs)?,
        })
    }

    /// Attributes that Linux or EROFS can't hold are left out, as other extractors do on file systems without them.
    fn takes_xattr(&self, name: &[u8], value: &[u8]) -> bool {
        erofs::is_storable(name)
            && value.len() <= usize::from(u16::MAX)
            && !mark::RESERVED.iter().any(|prefix| name.starts_with(prefix))
    }

    fn file_data<R: BufRead, T: DataTap>(
        &mut self,
        entry: &Entry,
        archive: &mut Archive<R, T>,
    ) -> Result<Body> {
        if entry.size > FILE_MAX {
            return Err(Error::layer(
                &entry.name,
                format!("a file of {} bytes; 16 TiB is the largest", entry.size),
            ));
        }
        if let Some(segments) = &entry.sparse {
            return self.sparse_data(entry, segments, archive);
        }
        if entry.size == 0 {
            return Ok(Body::Regular {
                device: 0,
                block: 0,
            });
        }
        self.blob.fill_block().map_err(|e| self.failed(e))?;
        let block = self.block_here(entry)?;
        self.copy(entry.size, archive)?;
        Ok(Body::Regular { device: 0, block })
    }

    /// Data goes to chunks that have any; the others are holes.
    fn sparse_data<R: BufRead, T: DataTap>(
        &mut self,
        entry: &Entry,
        segments: &[Segment],
        archive: &mut Archive<R, T>,
    ) -> Result<Body> {
        if entry.size == 0 {
            return Ok(Body::Regular {
                device: 0,
                block: 0,
            });
        }
        let bits = chunk_bits(entry.size, segments);
        let chunk = BLOCK << bits;
        let mut chunks = vec![None; entry.size.div_ceil(chunk) as usize];
        // Where the chunk being filled starts in the file and in the blob.
        let mut open: Option<(u64, u64)> = None;
        for segment in segments {
            let (mut offset, end) = (segment.offset, segment.offset + segment.length);
            while offset < end {
                let start = offset - offset % chunk;
                let base = match open {
                    Some((of, base)) if of == start => base,
                    _ => {
                        if let Some((_, base)) = open {
                            self.blob
                                .skip_to(base + chunk)
                                .map_err(|e| self.failed(e))?;
                        }
                        self.blob.fill_block().map_err(|e| self.failed(e))?;
                        chunks[(start / chunk) as usize] = Some((0, self.block_here(entry)?));
                        self.blob.position()
                    }
                };
                open = Some((start, base));
                self.blob
                    .skip_to(base + offset - start)
                    .map_err(|e| self.failed(e))?;
                let length = end.min(start + chunk) - offset;
                self.copy(length, archive)?;
                offset += length;
            }
        }
        if let Some((start, base)) = open {
            let rest = (entry.size - start).min(chunk).next_multiple_of(BLOCK);
            self.blob.skip_to(base + rest).map_err(|e| self.failed(e))?;
        }
        self.tree.chunk_maps.push(ChunkMap { bits, chunks });
        Ok(Body::Chunked((self.tree.chunk_maps.len() - 1) as u32))
    }

    fn copy<R: BufRead, T: DataTap>(
        &mut self,
        length: u64,
        archive: &mut Archive<R, T>,
    ) -> Result<()> {
        let offset = self.blob.position();
        let (blob, path) = (&mut self.blob, self.path);
        archive.data(length, |bytes| {
            blob.write_all(bytes)
                .map_err(|e| Error::io("cannot write layer", path, e))
        })?;
        archive
            .tap()
            .data(offset, length)
            .map_err(|e| self.failed(e))
    }

    fn block_here(&self, entry: &Entry) -> Result<u32> {
        u32::try_from(self.blob.position() / BLOCK)
            .ok()
            .filter(|&block| block < u32::MAX)
            .ok_or_else(|| Error::layer(&entry.name, "the layer is larger than 16 TiB"))
    }

    fn failed(&self, e: std::io::Error) -> Error {
        Error::io("cannot write layer", self.path, e)
    }
}

/// Puts marks into the attributes of opaque and implied directories and of links to lower layers.
fn apply_marks(tree: &mut Tree, has_links: bool) -> Result<()> {
    for id in 0..tree.inode_count() as InodeId {
        let inode = tree.inode(id);
        let mut marks: Vec<&[u8]> = Vec::new();
        if inode.opaque {
            marks.push(mark::OPAQUE);
        }
        if inode.implied {
            marks.push(mark::IMPLIED);
        }
        if matches!(inode.body, Body::LowerLink(_)) {
            marks.push(mark::LINK);
        }
        if id == ROOT && has_links {
            marks.push(mark::HAS_LINKS);
        }
        if marks.is_empty() || (inode.nlink == 0 && id != ROOT) {
            continue;
        }
        let mut set = tree.xattrs(inode.attributes.xattrs).clone();
        set.extend(marks.into_iter().map(|name| (name.into(), (*b"y").into())));
        let set: XattrId = tree.intern_xattrs(set)?;
        tree.inode_mut(id).attributes.xattrs = set;
    }
    Ok(())
}

/// Linux's 32-bit form of a device number, the one `mknod` takes.
fn encode_device((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | major << 8 | (minor & !0xff) << 12
}

/// An image's UUID: the digest's first bytes in the form of a version 8 (own scheme) UUID.
pub(crate) fn uuid(digest: &Digest) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest.bytes()[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// The chunk size: as large as the pieces' alignment lets it be without storing zeros, and at least so large that the index
/// stays small.
fn chunk_bits(size: u64, segments: &[Segment]) -> u8 {
    let bounds = segments
        .iter()
        .flat_map(|s| [s.offset, s.offset + s.length])
        .filter(|&bound| bound != size);
    let aligned = bounds.fold(u64::MAX, |bits, bound| {
        if bound == 0 {
            bits
        } else {
            bits.min(u64::from(bound.trailing_zeros()))
        }
    });
    let aligned = (aligned.clamp(12, 63) - 12).min(u64::from(ALIGNED_BITS_MAX));
    let needed = u64::from(
        size.div_ceil(BLOCK * CHUNKS_MAX)
            .next_power_of_two()
            .trailing_zeros(),
    );
    // A file smaller than a chunk needs no larger one.
    let whole = u64::from(size.div_ceil(BLOCK).next_power_of_two().trailing_zeros());
    aligned.max(needed).min(whole) as u8
}

#[cfg(test)]
mod tests;
