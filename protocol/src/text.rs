//! Text from outside (guests, registries, images) made fit to be shown.

use std::borrow::Cow;
use std::fmt::Write as _;

/// The text on one line, with whatever could steer a terminal, forge a line or hide other text written as `\u001b`.
///
/// The escapes are JSON's, so that a JSON text stays one with the same meaning. What this gives comes through it unchanged.
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(text, |_| false)
}

/// The same, but lines and tabs stay.
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| matches!(c, '\n' | '\t'))
}

/// The last `limit` bytes of a text, or a few less: never a part of a character.
pub fn tail(text: &str, limit: usize) -> &str {
    let mut start = text.len().saturating_sub(limit);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

fn escaped(text: &str, stays: impl Fn(char) -> bool) -> Cow<'_, str> {
    let unfit = |c: char| deceives(c) && !stays(c);
    if !text.contains(unfit) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if !unfit(c) {
            out.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            // Writing to a string can't fail.
            let _ = write!(out, "\\u{unit:04x}");
        }
    }
    Cow::Owned(out)
}

/// Control characters (C0, DEL, C1) and what is invisible or turns the order of others round.
fn deceives(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{61c}' | '\u{200b}' | '\u{200e}' | '\u{200f}' // marks of direction, a space of no width
            | '\u{2028}'..='\u{202e}' // separators of lines and paragraphs, embeddings and overrides
            | '\u{2060}'..='\u{206f}' // invisible operators, isolates, deprecated format characters
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' // byte order mark, interlinear annotations
            | '\u{e0000}'..='\u{e0fff}') // tags: a text of their own that nobody sees
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printable_of_escapes_and_overrides_shows_them() {
        for (text, shown) in [
            ("\x1b]0;x\x07", r"\u001b]0;x\u0007"),
            ("a\r\nb\tc", r"a\u000d\u000ab\u0009c"),
            ("\u{9b}2J\u{7f}", r"\u009b2J\u007f"),
            ("ev\u{202e}gpj.exe\u{2069}", r"ev\u202egpj.exe\u2069"),
            ("\u{e0041}", r"\udb40\udc41"),
            ("äöü 漢字 👩‍👧", "äöü 漢字 👩‍👧"),
        ] {
            assert_eq!(printable(text), shown);
            assert_eq!(printable(shown), shown, "once is enough");
        }
    }

    #[test]
    fn printable_lines_keeps_lines_and_tabs_alone() {
        assert_eq!(printable_lines("a\n\tb\r\x1b"), "a\n\tb\\u000d\\u001b");
    }

    #[test]
    fn tail_cuts_between_characters() {
        assert_eq!(tail("äöü", 3), "ü");
        assert_eq!(tail("abc", 9), "abc");
    }
}
