//! One request: a header, the data and a status byte, in one descriptor chain.

use super::backing::Backing;
use super::{BlockCounters, MAX_RANGE_SECTORS, MAX_RANGES, MAX_REQUEST_BYTES, SECTOR};
use crate::virtio::ring::Chain;
use std::io;
use std::sync::Arc;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

/// Bytes of the header: type, reserved, sector.
pub(super) const HEADER: usize = 16;
/// Bytes of one range of discard and write-zeroes: sector, count, flags.
const RANGE: usize = 16;

/// Why a request fails.
enum Failure {
    /// The guest asks for what makes no sense, or the host's file fails.
    Io,
    /// The device doesn't do it.
    Unsupported,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => Failure::Unsupported,
            _ => Failure::Io,
        }
    }
}

/// A disk without its queue.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) backing: Backing,
    pub(super) read_only: bool,
    /// Padded with zeros.
    pub(super) serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    pub(super) counters: Arc<BlockCounters>,
}

impl Disk {
    /// Carries out the request in `chain`; returns the bytes written to the guest.
    pub(super) fn execute(&mut self, chain: &mut Chain) -> u32 {
        let Some(status) = chain.writable.split_last_byte() else {
            // Nowhere to say what's wrong.
            self.counters.malformed.add(1);
            return 0;
        };
        let room = chain.writable.len();
        let result = if chain.outside {
            Err(Failure::Io)
        } else {
            self.run(chain)
        };
        let (code, written) = match result {
            Ok(()) => (VIRTIO_BLK_S_OK, room - chain.writable.len()),
            Err(Failure::Io) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
        };
        if code != VIRTIO_BLK_S_OK {
            self.counters.errors.add(1);
        }
        status.write(code as u8);
        // Bounded by the chain's length, which fits 32 bits.
        written as u32 + 1
    }

    fn run(&mut self, chain: &mut Chain) -> Result<(), Failure> {
        let header: [u8; HEADER] = chain.readable.read().ok_or(Failure::Io)?;
        let [kind, _, low, high] = words(header);
        let sector = u64::from(high) << 32 | u64::from(low);
        match kind {
            VIRTIO_BLK_T_IN => {
                let (offset, len) = self.span(sector, chain.writable.len())?;
                self.backing.read(offset, len, &mut chain.writable)?;
                self.counters.read_ops.add(1);
                self.counters.read_bytes.add(len as u64);
            }
            VIRTIO_BLK_T_OUT => {
                self.writable()?;
                let (offset, len) = self.span(sector, chain.readable.len())?;
                self.backing.write(offset, len, &mut chain.readable)?;
                self.counters.write_ops.add(1);
                self.counters.write_bytes.add(len as u64);
            }
            VIRTIO_BLK_T_FLUSH => {
                self.backing.flush()?;
                self.counters.flush_ops.add(1);
            }
            VIRTIO_BLK_T_GET_ID => {
                let n = self.serial.len().min(chain.writable.len());
                chain.writable.write(&self.serial[..n]);
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => self.zero(kind, chain)?,
            _ => return Err(Failure::Unsupported),
        }
        Ok(())
    }

    fn writable(&self) -> Result<(), Failure> {
        if self.read_only {
            Err(Failure::Io)
        } else {
            Ok(())
        }
    }

    /// The bytes that a transfer of `len` at `sector` covers, if all of them are on the disk.
    fn span(&self, sector: u64, len: usize) -> Result<(u64, usize), Failure> {
        let offset = sector.checked_mul(SECTOR).ok_or(Failure::Io)?;
        let whole = (len as u64).is_multiple_of(SECTOR) && len <= MAX_REQUEST_BYTES;
        if whole && self.backing.contains(offset, len as u64) {
            Ok((offset, len))
        } else {
            Err(Failure::Io)
        }
    }

    fn zero(&mut self, kind: u32, chain: &mut Chain) -> Result<(), Failure> {
        self.writable()?;
        let len = chain.readable.len();
        if len == 0 || !len.is_multiple_of(RANGE) || len / RANGE > MAX_RANGES as usize {
            return Err(Failure::Io);
        }
        while let Some(range) = chain.readable.read::<RANGE>() {
            let [low, high, count, flags] = words(range);
            let sector = u64::from(high) << 32 | u64::from(low);
            let known_flags = if kind == VIRTIO_BLK_T_DISCARD {
                0
            } else {
                VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
            };
            if flags & !known_flags != 0 {
                return Err(Failure::Unsupported);
            }
            let offset = sector.checked_mul(SECTOR).ok_or(Failure::Io)?;
            let bytes = u64::from(count) * SECTOR;
            if count > MAX_RANGE_SECTORS || !self.backing.contains(offset, bytes) {
                return Err(Failure::Io);
            }
            self.backing
                .zero(offset, bytes, kind == VIRTIO_BLK_T_DISCARD || flags != 0)?;
            self.counters.discard_ops.add(1);
            self.counters.discard_bytes.add(bytes);
        }
        Ok(())
    }
}

/// Four little-endian words.
fn words(bytes: [u8; 16]) -> [u32; 4] {
    std::array::from_fn(|i| u32::from_le_bytes(std::array::from_fn(|j| bytes[4 * i + j])))
}
