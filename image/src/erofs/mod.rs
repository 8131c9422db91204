//! EROFS, written and read in the part of its format that container images need: uncompressed, 4 KiB blocks.
//!
//! A layer's image is `superblock | file data | metadata`: data is appended while the layer downloads, metadata follows when
//! all of it is known, and the superblock is written last, so that an unfinished file is not an EROFS image. A merged image is
//! `superblock, device table | metadata` and its files' chunks point into the layers.

mod format;
mod layout;
mod reader;
mod writer;
mod xattr;

pub(crate) use format::BLOCK;
pub(crate) use reader::{Data, Kind as NodeKind, Node, Reader, Source};
pub(crate) use writer::{Device, head_blocks, sealed, write_metadata};
pub(crate) use xattr::is_storable;
