//! A file system tree in memory: metadata only, some hundred bytes an entry.
//!
//! Layers of a million entries and more are real, so entries and inodes sit in arrays, names in one buffer, and one hash table
//! maps (directory, name) to the entry. Paths never touch the host: they are only looked up here.

use std::hash::{BuildHasher, RandomState};

use hashbrown::{HashMap, HashTable};

use crate::error::{Error, Result};

/// The longest name of a directory entry, in the kernel and in EROFS.
pub(crate) const NAME_MAX: usize = 255;
/// The longest target of a symbolic link, without its NUL.
pub(crate) const LINK_MAX: usize = 4095;
/// Symbolic links followed in one path before it is called a loop, as in the kernel.
const FOLLOW_MAX: usize = 40;

/// Index of an inode.
pub(crate) type InodeId = u32;
/// The root directory's inode.
pub(crate) const ROOT: InodeId = 0;
const NONE: u32 = u32::MAX;

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    Directory {
        parent: InodeId,
        first_child: u32,
    },
    /// Data in one run of blocks of a device (0: this image itself).
    Regular {
        device: u16,
        block: u32,
    },
    /// Data in chunks, some of them holes; index into the chunk maps.
    Chunked(u32),
    Symlink(Span),
    /// A hard link to a path of a lower layer; only in layers.
    LowerLink(Span),
    Char(u32),
    Block(u32),
    Fifo,
    Socket,
}

/// Where a file's chunks are. A chunk is `4096 << bits` bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ChunkMap {
    pub(crate) bits: u8,
    pub(crate) chunks: Vec<Option<(u16, u32)>>,
}

/// A piece of the names buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    offset: u32,
    length: u32,
}

/// Owner, permissions, times: what every kind of inode has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// Permission bits with set-id and sticky bits, no type.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) mtime_nsec: u32,
    /// Index of the set of extended attributes.
    pub(crate) xattrs: XattrId,
}

impl Attributes {
    /// A directory that an archive doesn't list but needs.
    pub(crate) fn implied() -> Self {
        Self {
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: 0,
            mtime_nsec: 0,
            xattrs: XattrId::EMPTY,
        }
    }
}

/// Index of a set of extended attributes; equal sets are stored once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct XattrId(pub(crate) u32);

impl XattrId {
    pub(crate) const EMPTY: Self = Self(0);
}

/// Extended attributes by full name, sorted.
pub(crate) type Xattrs = Vec<Xattr>;
/// Full name and value.
pub(crate) type Xattr = (Box<[u8]>, Box<[u8]>);

#[derive(Clone, Debug)]
pub(crate) struct Inode {
    pub(crate) attributes: Attributes,
    pub(crate) size: u64,
    pub(crate) body: Body,
    /// Names that lead here; directories count theirs when written.
    pub(crate) nlink: u32,
    /// A directory that hides what lower layers have in its place.
    pub(crate) opaque: bool,
    /// A directory the layer didn't list: it keeps the lower layer's attributes.
    pub(crate) implied: bool,
}

impl Inode {
    pub(crate) fn is_directory(&self) -> bool {
        matches!(self.body, Body::Directory { .. })
    }

    /// overlayfs's mark of a removed name.
    pub(crate) fn is_whiteout(&self) -> bool {
        self.body == Body::Char(0)
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    directory: InodeId,
    inode: InodeId,
    name: Span,
    next: u32,
    alive: bool,
}

/// Bounds on a tree.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TreeLimits {
    pub(crate) entries: u64,
    pub(crate) bytes: u64,
}

/// A tree being built.
pub(crate) struct Tree {
    inodes: Vec<Inode>,
    entries: Vec<Entry>,
    names: Vec<u8>,
    index: HashTable<u32>,
    /// Keyed at random: names come from outside and must not be able to collide on purpose.
    hasher: RandomState,
    pub(crate) chunk_maps: Vec<ChunkMap>,
    xattr_sets: Vec<Xattrs>,
    xattr_index: HashMap<Xattrs, XattrId>,
    xattr_bytes: u64,
    limits: TreeLimits,
}

impl Tree {
    /// A tree with an (implied) root directory.
    pub(crate) fn new(limits: TreeLimits) -> Self {
        let root = Inode {
            attributes: Attributes::implied(),
            size: 0,
            body: Body::Directory {
                parent: ROOT,
                first_child: NONE,
            },
            nlink: 1,
            opaque: false,
            implied: true,
        };
        Self {
            inodes: vec![root],
            entries: Vec::new(),
            names: Vec::new(),
            index: HashTable::new(),
            hasher: RandomState::new(),
            chunk_maps: Vec::new(),
            xattr_sets: vec![Vec::new()],
            xattr_index: HashMap::new(),
            xattr_bytes: 0,
            // Indexes are 32 bits wide, and the last value means none.
            limits: TreeLimits {
                entries: limits.entries.min(u64::from(u32::MAX) - 1),
                bytes: limits.bytes.min(u64::from(u32::MAX)),
            },
        }
    }

    pub(crate) fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id as usize]
    }

    pub(crate) fn inode_mut(&mut self, id: InodeId) -> &mut Inode {
        &mut self.inodes[id as usize]
    }

    pub(crate) fn inode_count(&self) -> usize {
        self.inodes.len()
    }

    pub(crate) fn text(&self, span: Span) -> &[u8] {
        &self.names[span.offset as usize..][..span.length as usize]
    }

    pub(crate) fn xattrs(&self, id: XattrId) -> &Xattrs {
        &self.xattr_sets[id.0 as usize]
    }

    /// Stores a text (a link's target).
    pub(crate) fn intern(&mut self, text: &[u8]) -> Result<Span> {
        let length = text.len() as u64;
        self.check_bytes(length)?;
        let span = Span {
            offset: self.names.len() as u32,
            length: length as u32,
        };
        self.names.extend_from_slice(text);
        Ok(span)
    }

    /// Stores a set of extended attributes, which need not be sorted; of two with one name the last counts.
    pub(crate) fn intern_xattrs(&mut self, mut set: Xattrs) -> Result<XattrId> {
        if set.is_empty() {
            return Ok(XattrId::EMPTY);
        }
        set.sort_by(|a, b| a.0.cmp(&b.0));
        set.reverse();
        set.dedup_by(|a, b| a.0 == b.0);
        set.reverse();
        if let Some(id) = self.xattr_index.get(&set) {
            return Ok(*id);
        }
        let bytes: usize = set
            .iter()
            .map(|(name, value)| name.len() + value.len() + 64)
            .sum();
        self.check_bytes(bytes as u64)?;
        self.xattr_bytes += bytes as u64;
        let id = XattrId(self.xattr_sets.len() as u32);
        self.xattr_sets.push(set.clone());
        self.xattr_index.insert(set, id);
        Ok(id)
    }

    fn check_bytes(&self, more: u64) -> Result<()> {
        if self.names.len() as u64 + self.xattr_bytes + more > self.limits.bytes {
            return Err(Error::Limit {
                what: "layer: names and attributes".into(),
                limit: self.limits.bytes,
                unit: "bytes",
                key: "layer_metadata_bytes",
            });
        }
        Ok(())
    }

    fn hash(&self, directory: InodeId, name: &[u8]) -> u64 {
        self.hasher.hash_one((directory, name))
    }

    fn find_entry(&self, directory: InodeId, name: &[u8]) -> Option<u32> {
        self.index
            .find(self.hash(directory, name), |&id| {
                let entry = &self.entries[id as usize];
                entry.directory == directory && self.text(entry.name) == name
            })
            .copied()
    }

    /// The inode of `name` in `directory`.
    pub(crate) fn lookup(&self, directory: InodeId, name: &[u8]) -> Option<InodeId> {
        self.find_entry(directory, name)
            .map(|id| self.entries[id as usize].inode)
    }

    /// Adds an inode without a name yet.
    pub(crate) fn add_inode(
        &mut self,
        attributes: Attributes,
        size: u64,
        body: Body,
    ) -> Result<InodeId> {
        if self.inodes.len() as u64 >= self.limits.entries {
            return Err(self.too_many());
        }
        self.inodes.push(Inode {
            attributes,
            size,
            body,
            nlink: 0,
            opaque: false,
            implied: false,
        });
        Ok((self.inodes.len() - 1) as InodeId)
    }

    fn too_many(&self) -> Error {
        Error::Limit {
            what: "layer".into(),
            limit: self.limits.entries,
            unit: "entries",
            key: "layer_entries",
        }
    }

    /// Names `inode` in `directory`; whatever had the name is taken away first.
    pub(crate) fn link(&mut self, directory: InodeId, name: &[u8], inode: InodeId) -> Result<()> {
        if self.entries.len() as u64 >= self.limits.entries {
            return Err(self.too_many());
        }
        if name.is_empty()
            || name.len() > NAME_MAX
            || name == b"."
            || name == b".."
            || name.contains(&b'/')
        {
            return Err(Error::layer(
                name,
                format!("not a file name of 1 to {NAME_MAX} bytes"),
            ));
        }
        self.unlink(directory, name);
        let Body::Directory { first_child, .. } = self.inode(directory).body else {
            return Err(Error::layer(name, "its parent is not a directory"));
        };
        let span = self.intern(name)?;
        let id = self.entries.len() as u32;
        self.entries.push(Entry {
            directory,
            inode,
            name: span,
            next: first_child,
            alive: true,
        });
        if let Body::Directory { first_child, .. } = &mut self.inode_mut(directory).body {
            *first_child = id;
        }
        self.inode_mut(inode).nlink += 1;
        if let Body::Directory { parent, .. } = &mut self.inode_mut(inode).body {
            *parent = directory;
        }
        let hash = self.hash(directory, name);
        let Self {
            index,
            entries,
            names,
            hasher,
            ..
        } = self;
        index.insert_unique(hash, id, |&id| {
            let entry = &entries[id as usize];
            let name = &names[entry.name.offset as usize..][..entry.name.length as usize];
            hasher.hash_one((entry.directory, name))
        });
        Ok(())
    }

    /// Takes a name away, with everything below it.
    pub(crate) fn unlink(&mut self, directory: InodeId, name: &[u8]) {
        if let Some(id) = self.find_entry(directory, name) {
            self.drop_entry(id);
        }
    }

    /// Takes away everything in a directory.
    pub(crate) fn clear(&mut self, directory: InodeId) {
        for id in self.child_entries(directory) {
            self.drop_entry(id);
        }
    }

    fn drop_entry(&mut self, id: u32) {
        let mut pending = vec![id];
        while let Some(id) = pending.pop() {
            let Entry {
                directory,
                inode,
                name,
                ..
            } = self.entries[id as usize];
            let hash = self.hash(directory, self.text(name));
            if let Ok(slot) = self.index.find_entry(hash, |&other| other == id) {
                slot.remove();
            }
            self.entries[id as usize].alive = false;
            self.inode_mut(inode).nlink -= 1;
            if self.inode(inode).is_directory() {
                pending.extend(self.child_entries(inode));
            }
        }
    }

    fn child_entries(&self, directory: InodeId) -> Vec<u32> {
        let Body::Directory { first_child, .. } = self.inode(directory).body else {
            return Vec::new();
        };
        let mut children = Vec::new();
        let mut id = first_child;
        while id != NONE {
            let entry = &self.entries[id as usize];
            if entry.alive {
                children.push(id);
            }
            id = entry.next;
        }
        children
    }

    /// Names and inodes of a directory, sorted by name as EROFS wants them.
    pub(crate) fn children(&self, directory: InodeId) -> Vec<(&[u8], InodeId)> {
        let mut children: Vec<_> = self
            .child_entries(directory)
            .into_iter()
            .map(|id| {
                (
                    self.text(self.entries[id as usize].name),
                    self.entries[id as usize].inode,
                )
            })
            .collect();
        children.sort_unstable_by(|a, b| a.0.cmp(b.0));
        children
    }

    /// The directory a path's components lead to. Symbolic links on the way are followed inside the tree, missing directories
    /// are made as implied ones. A link that points above the root is an
    /// error, and an absolute one too unless `absolute` allows it.
    pub(crate) fn walk_or_make(
        &mut self,
        start: InodeId,
        path: &[u8],
        absolute: bool,
        whole: &[u8],
    ) -> Result<InodeId> {
        let mut directory = start;
        let mut rest: Vec<Vec<u8>> = components(path).rev().map(<[u8]>::to_vec).collect();
        let mut followed = 0;
        while let Some(name) = rest.pop() {
            if name == b".." {
                let Body::Directory { parent, .. } = self.inode(directory).body else {
                    unreachable!()
                };
                if directory == ROOT {
                    return Err(Error::layer(
                        whole,
                        "a symbolic link on its path leads out of the image",
                    ));
                }
                directory = parent;
                continue;
            }
            let found = self.lookup(directory, &name);
            match found.map(|id| (id, self.inode(id).body)) {
                Some((id, Body::Directory { .. })) => directory = id,
                Some((_, Body::Symlink(target))) => {
                    followed += 1;
                    let target = self.text(target).to_vec();
                    if followed > FOLLOW_MAX || rest.len() > LINK_MAX {
                        return Err(Error::layer(
                            whole,
                            "symbolic links on its path form a loop",
                        ));
                    }
                    if target.first() == Some(&b'/') {
                        if !absolute {
                            return Err(Error::layer(
                                whole,
                                format!(
                                    "the symbolic link {:?} on its path leads to {:?}, out of the layer",
                                    crate::error::printable(&name),
                                    crate::error::printable(&target)
                                ),
                            ));
                        }
                        directory = ROOT;
                    }
                    rest.extend(components(&target).rev().map(<[u8]>::to_vec));
                }
                Some((id, _)) if !self.inode(id).is_whiteout() => {
                    return Err(Error::layer(
                        whole,
                        format!(
                            "{:?} on its path is not a directory",
                            crate::error::printable(&name)
                        ),
                    ));
                }
                _ => {
                    let hides = found.is_some();
                    let id = self.add_directory(directory, &name, Attributes::implied())?;
                    let inode = self.inode_mut(id);
                    inode.implied = true;
                    // It stands where the layer had a whiteout: nothing of the lower layers shines through.
                    inode.opaque = hides;
                    directory = id;
                }
            }
        }
        Ok(directory)
    }

    /// The inode a path leads to, symbolic links in its parents followed inside the tree, the last one not.
    pub(crate) fn resolve(&self, path: &[u8]) -> Option<InodeId> {
        let mut current = ROOT;
        let mut rest: Vec<&[u8]> = components(path).rev().collect();
        let mut followed = 0;
        while let Some(name) = rest.pop() {
            let Body::Directory { parent, .. } = self.inode(current).body else {
                return None;
            };
            if name == b".." {
                current = parent;
                continue;
            }
            let id = self.lookup(current, name)?;
            match self.inode(id).body {
                Body::Symlink(target) if !rest.is_empty() => {
                    followed += 1;
                    if followed > FOLLOW_MAX || rest.len() > LINK_MAX {
                        return None;
                    }
                    let target = self.text(target);
                    if target.first() == Some(&b'/') {
                        current = ROOT;
                    }
                    rest.extend(components(target).rev());
                }
                _ => current = id,
            }
        }
        Some(current)
    }

    /// A new empty directory at a name.
    pub(crate) fn add_directory(
        &mut self,
        parent: InodeId,
        name: &[u8],
        attributes: Attributes,
    ) -> Result<InodeId> {
        let id = self.add_inode(
            attributes,
            0,
            Body::Directory {
                parent,
                first_child: NONE,
            },
        )?;
        self.link(parent, name, id)?;
        Ok(id)
    }
}

/// The components of a path, empty ones and `.` left out.
pub(crate) fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|&b| b == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Tree {
        Tree::new(TreeLimits {
            entries: 1000,
            bytes: 1 << 20,
        })
    }

    fn file(tree: &mut Tree, directory: InodeId, name: &[u8]) -> InodeId {
        let id = tree
            .add_inode(
                Attributes::implied(),
                0,
                Body::Regular {
                    device: 0,
                    block: 0,
                },
            )
            .unwrap();
        tree.link(directory, name, id).unwrap();
        id
    }

    #[test]
    fn unlink_directory_takes_everything_below() {
        let mut tree = tree();
        let a = tree.walk_or_make(ROOT, b"a/b/c", false, b"").unwrap();
        let leaf = file(&mut tree, a, b"leaf");
        tree.unlink(ROOT, b"a");
        assert_eq!(tree.inode(leaf).nlink, 0);
        assert!(tree.children(ROOT).is_empty());
        assert!(tree.resolve(b"a/b/c/leaf").is_none());
    }

    #[test]
    fn link_existing_name_replaces_it() {
        let mut tree = tree();
        let first = file(&mut tree, ROOT, b"x");
        let second = file(&mut tree, ROOT, b"x");
        assert_eq!((tree.inode(first).nlink, tree.inode(second).nlink), (0, 1));
        assert_eq!(tree.children(ROOT), [(&b"x"[..], second)]);
    }

    #[test]
    fn walk_symlink_inside_is_followed() {
        let mut tree = tree();
        let usr = tree.walk_or_make(ROOT, b"usr/bin", false, b"").unwrap();
        let target = tree.intern(b"./usr/../usr/bin").unwrap();
        let link = tree
            .add_inode(Attributes::implied(), 0, Body::Symlink(target))
            .unwrap();
        tree.link(ROOT, b"bin", link).unwrap();
        assert_eq!(tree.walk_or_make(ROOT, b"bin", false, b"").unwrap(), usr);
    }

    #[test]
    fn walk_symlink_out_of_tree_is_refused() {
        for target in [&b"../../etc"[..], b"/etc", b"loop"] {
            let mut tree = tree();
            let target = tree.intern(target).unwrap();
            let link = tree
                .add_inode(Attributes::implied(), 0, Body::Symlink(target))
                .unwrap();
            tree.link(ROOT, b"loop", link).unwrap();
            assert!(
                tree.walk_or_make(ROOT, b"loop/passwd", false, b"loop/passwd")
                    .is_err()
            );
        }
    }

    #[test]
    fn link_bad_names_are_refused() {
        let mut tree = tree();
        let id = tree
            .add_inode(Attributes::implied(), 0, Body::Fifo)
            .unwrap();
        for name in [&b""[..], b".", b"..", b"a/b", &[b'n'; 256]] {
            assert!(tree.link(ROOT, name, id).is_err());
        }
    }

    #[test]
    fn limits_reached_is_an_error() {
        let mut tree = Tree::new(TreeLimits {
            entries: 3,
            bytes: 64,
        });
        assert!(tree.walk_or_make(ROOT, b"1/2", false, b"").is_ok());
        assert!(matches!(
            tree.walk_or_make(ROOT, b"1/2/3", false, b""),
            Err(Error::Limit { .. })
        ));
        assert!(matches!(tree.intern(&[0; 64]), Err(Error::Limit { .. })));
    }

    #[test]
    fn xattrs_equal_sets_are_stored_once() {
        let mut tree = tree();
        let pair = |n: &str, v: &str| (n.as_bytes().into(), v.as_bytes().into());
        let one = tree
            .intern_xattrs(vec![pair("user.b", "1"), pair("user.a", "2")])
            .unwrap();
        let two = tree
            .intern_xattrs(vec![
                pair("user.a", "0"),
                pair("user.a", "2"),
                pair("user.b", "1"),
            ])
            .unwrap();
        assert_eq!(one, two);
        assert_eq!(tree.xattrs(one)[0].0.as_ref(), b"user.a");
    }
}
