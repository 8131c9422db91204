//! Numbers in archives: octal text, GNU's base 256, decimal in pax records.

/// A header field: octal digits among spaces and NULs, or base 256 if the first bit is set. Empty is zero.
pub(super) fn header_number(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => base_256(field),
        _ => octal(field),
    }
}

fn base_256(field: &[u8]) -> Option<i64> {
    // Two's complement, most significant byte first; bit 7 is the mark, bit 6 the sign.
    let negative = field[0] & 0x40 != 0;
    let fill = if negative { -1 } else { 0 };
    let first = if negative { field[0] } else { field[0] & 0x7f };
    let mut value = i128::from(fill);
    for (place, byte) in std::iter::once(&first).chain(&field[1..]).enumerate() {
        let byte = if place == 0 && negative {
            field[0] | 0x80
        } else {
            *byte
        };
        value = (value << 8) | i128::from(byte);
        // More than 64 significant bits can't be any field's value.
        if value > i128::from(i64::MAX) || value < i128::from(i64::MIN) {
            return None;
        }
    }
    i64::try_from(value).ok()
}

fn octal(field: &[u8]) -> Option<i64> {
    let is_space = |b: &u8| *b == b' ' || *b == 0;
    let start = field
        .iter()
        .position(|b| !is_space(b))
        .unwrap_or(field.len());
    let digits = &field[start..];
    let end = digits.iter().position(is_space).unwrap_or(digits.len());
    digits[..end]
        .iter()
        .try_fold(0i64, |value, digit| match digit {
            b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
            _ => None,
        })
}

/// A decimal number of a pax record.
pub(super) fn decimal(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.trim().parse().ok()
}

/// Seconds since 1970 with a decimal fraction, rounded towards the past as the kernel keeps it.
pub(super) fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = fraction
        .chars()
        .chain(std::iter::repeat('0'))
        .take(9)
        .collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    match (whole.starts_with('-'), nanoseconds) {
        (true, 1..) => Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds)),
        _ => Some((seconds, nanoseconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_number_octal_and_padding() {
        assert_eq!(header_number(b"0000644\0"), Some(0o644));
        assert_eq!(header_number(b"   755 \0"), Some(0o755));
        assert_eq!(header_number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(header_number(b"77777777777"), Some(0o77777777777));
        assert_eq!(header_number(b"12x4"), None);
        assert_eq!(header_number(b"8"), None);
    }

    #[test]
    fn header_number_base_256() {
        assert_eq!(header_number(b"\x80\0\0\0\0\0\0\0\0\0\x01\0"), Some(256));
        assert_eq!(header_number(&[0xff; 12]), Some(-1));
        let mut minimum = [0xff; 12];
        minimum[4..].fill(0);
        minimum[4] = 0x80;
        assert_eq!(header_number(&minimum), Some(i64::MIN));
        assert_eq!(header_number(b"\x80\0\0\x01\0\0\0\0\0\0\0\0"), None);
    }

    #[test]
    fn time_fractions_and_sign() {
        assert_eq!(
            time(b"1350244992.023960108"),
            Some((1_350_244_992, 23_960_108))
        );
        assert_eq!(time(b"5"), Some((5, 0)));
        assert_eq!(time(b"-1.5"), Some((-2, 500_000_000)));
        assert_eq!(time(b"-0.25"), Some((-1, 750_000_000)));
        assert_eq!(time(b"1.0000000019"), Some((1, 1)));
        for text in [&b""[..], b".5", b"1.x", b"1e5", b"99999999999999999999"] {
            assert_eq!(time(text), None);
        }
    }
}
