//! A streaming reader of tar archives in all the dialects that layers come in: v7, ustar, pax, GNU and star's sparse files.
//!
//! Libraries give entries but not the bytes around them. Those are needed to write a layer back with its digest unchanged, so
//! this reader hands every byte that isn't file data to a [`Tap`].

mod header;
mod numbers;
mod pax;
mod reader;
mod sparse;

pub(crate) use header::Kind;
pub(crate) use pax::base64;
pub(crate) use reader::{Archive, Entry, Tap, input_error};
pub(crate) use sparse::Segment;

/// A block of an archive.
pub(crate) const BLOCK: usize = 512;
