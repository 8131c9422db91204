//! Saved state of a device: how it is read back, and why it may be refused.

use serde::de::DeserializeOwned;
use std::io;

/// Why a device can't be built from a saved state.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Not a state of this device.
    #[error("the saved state of {device} can't be read; it was written by another version")]
    Format {
        /// Which device.
        device: &'static str,
        /// What doesn't fit.
        #[source]
        source: serde_json::Error,
    },
    /// What is given differs from what the guest was told.
    #[error(
        "{device}: the saved {what} is {saved}, but {given} is given; restore with the same configuration"
    )]
    Mismatch {
        /// Which device.
        device: &'static str,
        /// Which property.
        what: &'static str,
        /// Its saved value.
        saved: String,
        /// Its value now.
        given: String,
    },
    /// The device itself can't be built.
    #[error("{device} can't be built")]
    Build {
        /// Which device.
        device: &'static str,
        /// What failed.
        #[source]
        source: io::Error,
    },
}

/// Reads a state back.
pub(crate) fn parse<T: DeserializeOwned>(
    device: &'static str,
    state: &serde_json::Value,
) -> Result<T, RestoreError> {
    T::deserialize(state).map_err(|source| RestoreError::Format { device, source })
}

/// Refuses a property that the guest already relies on.
pub(crate) fn require_same<T: PartialEq + std::fmt::Debug>(
    device: &'static str,
    what: &'static str,
    saved: &T,
    given: &T,
) -> Result<(), RestoreError> {
    if saved == given {
        return Ok(());
    }
    Err(RestoreError::Mismatch {
        device,
        what,
        saved: format!("{saved:?}"),
        given: format!("{given:?}"),
    })
}

/// A state as a value. Ours are plain structs: that can't fail.
pub(crate) fn value<T: serde::Serialize>(state: &T) -> serde_json::Value {
    serde_json::to_value(state).expect("plain data always becomes a JSON value")
}

/// Reads from a configuration space held as bytes; zeros past its end.
pub(crate) fn read_config(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    if let Some(rest) = usize::try_from(offset)
        .ok()
        .and_then(|offset| space.get(offset..))
    {
        let n = rest.len().min(data.len());
        data[..n].copy_from_slice(&rest[..n]);
    }
}
