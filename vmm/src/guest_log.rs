//! The guest's kernel log without a console: the guest writes its printk ring
//! into a ramoops zone (plain memory, no VM exit), the VMM reads it after the end.
//!
//! The guest owns those bytes: nothing in them is believed.

use crate::memory::{GuestMemory, LOG_SIZE};
use vm_memory::{Bytes, GuestAddress};

/// Most that is passed on.
pub const MAX_TAIL: usize = 16 << 10;
/// Signature of a zone of Linux's persistent_ram, "CGBD".
const SIGNATURE: u32 = 0x4347_4244;
/// Signature, start, size.
const HEADER: usize = 12;
const PANIC: &str = "Kernel panic";
/// How the kernel's and the agent's last words begin.
const FAREWELLS: [&str; 2] = ["reboot: ", "casemate-agent: "];

/// Kernel parameters that put the log there; cached, as it is ordinary memory.
pub fn parameters(memory: &GuestMemory) -> String {
    let start = memory.map().log_start();
    format!(
        "ramoops.mem_address={start:#x} ramoops.mem_size={LOG_SIZE:#x} ramoops.console_size={LOG_SIZE:#x} ramoops.record_size=0 ramoops.pmsg_size=0 ramoops.ftrace_size=0 ramoops.mem_type=2"
    )
}

/// The log's last lines, at most [`MAX_TAIL`] bytes; empty if there is none.
pub fn tail(memory: &GuestMemory) -> String {
    let start = GuestAddress(memory.map().log_start());
    let read = |length: usize| {
        let mut bytes = vec![0; length];
        let read = memory.mmap().read_slice(&mut bytes, start);
        read.is_ok().then_some(bytes)
    };
    // Only what was written: a quiet guest's log costs next to nothing.
    let zone = read(HEADER).and_then(|header| read(HEADER + used(&header)));
    zone.map_or_else(String::new, |zone| escape(&ring(&zone)))
}

/// Bytes that the header says are written, as far as the zone goes.
fn used(header: &[u8]) -> usize {
    word(header, 8).min(LOG_SIZE as usize - HEADER)
}

/// The header's number at `at`.
fn word(header: &[u8], at: usize) -> usize {
    u32::from_le_bytes([0, 1, 2, 3].map(|i| header[at + i])) as usize
}

/// Whether the kernel itself said that it gave up.
pub fn has_panic(log: &str) -> bool {
    log.contains(PANIC)
}

/// Whether the guest said why, or at least that, it ends.
pub fn has_farewell(log: &str) -> bool {
    FAREWELLS.iter().any(|words| log.contains(words))
}

/// The ring's bytes in the order they were written.
fn ring(zone: &[u8]) -> Vec<u8> {
    let Some((header, data)) = zone.split_at_checked(HEADER) else {
        return Vec::new();
    };
    let (start, size) = (word(header, 4), word(header, 8));
    if word(header, 0) != SIGNATURE as usize || start > size || size > data.len() {
        return Vec::new();
    }
    [&data[start..size], &data[..start]].concat()
}

/// Lossy UTF-8 without control characters but line ends, cut to whole lines at the front.
fn escape(bytes: &[u8]) -> String {
    let cut = bytes.len().saturating_sub(MAX_TAIL);
    let mut text = String::new();
    for c in String::from_utf8_lossy(&bytes[cut..]).chars() {
        match c {
            '\n' => text.push('\n'),
            '\t' => text.push(' '),
            c if c.is_control() => text.extend(c.escape_default()),
            c => text.push(c),
        }
    }
    // Escapes and replacement characters are longer than what they stand for.
    let excess = text.len().saturating_sub(MAX_TAIL);
    if cut > 0 || excess > 0 {
        let from = (excess..=text.len())
            .find(|&at| text.is_char_boundary(at))
            .unwrap_or(text.len());
        let line = text[from..].find('\n').map_or(from, |at| from + at + 1);
        text.drain(..line);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn zone(start: u32, size: u32, data: &[u8]) -> Vec<u8> {
        let mut zone = SIGNATURE.to_le_bytes().to_vec();
        zone.extend(start.to_le_bytes());
        zone.extend(size.to_le_bytes());
        zone.extend(data);
        zone
    }

    #[test]
    fn ring_not_yet_wrapped_is_its_beginning() {
        // As persistent_ram has it before the first wrap: start follows size.
        assert_eq!(ring(&zone(5, 5, b"hello\0\0\0")), b"hello");
    }

    #[test]
    fn ring_wrapped_starts_at_the_oldest_byte() {
        assert_eq!(ring(&zone(3, 8, b"fghabcde")), b"abcdefgh");
    }

    #[test]
    fn ring_with_hostile_header_is_empty() {
        for bad in [
            zone(9, 8, b"abcdefgh"),
            zone(0, 9, b"abcdefgh"),
            zone(u32::MAX, u32::MAX, b"abcdefgh"),
            b"short".to_vec(),
            vec![0; 64],
        ] {
            assert_eq!(ring(&bad), b"");
        }
    }

    #[test]
    fn escape_control_characters_cannot_reach_a_terminal() {
        assert_eq!(escape(b"a\x1b[31mb\x07\r\nc"), "a\\u{1b}[31mb\\u{7}\\r\nc");
    }

    #[test]
    fn escape_long_log_keeps_the_last_whole_lines() {
        let log = "0123456789\n".repeat(5000);

        let tail = escape(log.as_bytes());

        assert!(tail.len() <= MAX_TAIL && tail.starts_with("0123456789\n"));
    }

    #[test]
    fn tail_is_what_was_written_and_no_more() {
        let memory = GuestMemory::allocate(32).expect("memory");
        let start = GuestAddress(memory.map().log_start());
        let write = |bytes: &[u8]| memory.mmap().write_slice(bytes, start).expect("the zone");

        write(&zone(9, 9, b"last wordand more"));
        assert_eq!(tail(&memory), "last word");
        write(&zone(0, u32::MAX, b""));
        assert_eq!(tail(&memory), "");
    }

    #[test]
    fn tail_of_untouched_memory_is_empty() {
        let memory = GuestMemory::allocate(32).expect("memory");

        assert_eq!(tail(&memory), "");
    }

    proptest! {
        #[test]
        fn tail_of_anything_is_bounded_and_printable(
            start in 0u32..20_000, size in 0u32..20_000, data in proptest::collection::vec(any::<u8>(), 0..20_000)
        ) {
            let text = escape(&ring(&zone(start, size, &data)));

            prop_assert!(text.len() <= MAX_TAIL);
            prop_assert!(text.chars().all(|c| c == '\n' || !c.is_control()));
        }
    }
}
