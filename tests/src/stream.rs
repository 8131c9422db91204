//! A stream of bytes that both ends can make: nothing in it repeats soon enough to hide a loss.

use std::io::{self, Write};

/// Writes the stream's first `length` bytes.
pub fn write(length: u64, out: &mut impl Write) -> io::Result<()> {
    let mut block = vec![0_u8; 64 << 10];
    let mut counter = 0_u64;
    let mut left = length;
    while left > 0 {
        for word in block.chunks_exact_mut(8) {
            // Odd multiplier: each counter gives another word.
            word.copy_from_slice(&counter.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
            counter += 1;
        }
        let take = left.min(block.len() as u64) as usize;
        out.write_all(&block[..take])?;
        left -= take as u64;
    }
    out.flush()
}
