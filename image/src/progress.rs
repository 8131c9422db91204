//! What a pull or load tells while it works. Bars and lines are the front end's business.

use crate::digest::Digest;

/// A step of a pull or load. Layers are named by their index, bottom first, and by diff id.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The manifest is being looked up.
    Resolving {
        /// The reference as normalised.
        reference: &'a str,
    },
    /// The manifest and configuration are here and verified.
    Resolved {
        /// Digest of the manifest.
        manifest: &'a Digest,
        /// Number of layers.
        layers: usize,
        /// Compressed bytes of all layers.
        bytes: u64,
    },
    /// The layer is in the store already.
    LayerCached {
        /// Bottom first.
        index: usize,
        /// Diff id.
        layer: &'a Digest,
    },
    /// Another process is fetching the same layer; we wait for it.
    LayerWaiting {
        /// Bottom first.
        index: usize,
        /// Diff id.
        layer: &'a Digest,
    },
    /// The layer's download begins (again, if a try failed).
    LayerStarted {
        /// Bottom first.
        index: usize,
        /// Diff id.
        layer: &'a Digest,
        /// Compressed bytes to come.
        bytes: u64,
    },
    /// Bytes have arrived.
    LayerBytes {
        /// Bottom first.
        index: usize,
        /// Diff id.
        layer: &'a Digest,
        /// Compressed bytes since the layer started.
        received: u64,
    },
    /// A try failed; another follows.
    Retrying {
        /// What failed.
        what: &'a str,
        /// Why.
        reason: &'a str,
        /// Milliseconds until the next try.
        delay_ms: u64,
    },
    /// The layer is verified and in the store.
    LayerDone {
        /// Bottom first.
        index: usize,
        /// Diff id.
        layer: &'a Digest,
        /// Bytes of its EROFS blob.
        blob_bytes: u64,
    },
    /// All layers are here; the root file system is put together.
    Merging,
    /// The image has its name.
    Done {
        /// The image's id.
        id: &'a Digest,
    },
}

/// Receives events from several threads; must not block for long.
pub trait Progress: Send + Sync {
    /// One step was made.
    fn event(&self, event: Event<'_>);
}

/// Progress nobody looks at.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn event(&self, _: Event<'_>) {}
}
