//! Random numbers, of the kernel's.

use rustix::rand::{GetRandomFlags, getrandom};
use std::io;

/// So many bytes; up to 256 are never cut short (getrandom(2)).
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(bytes)
}
