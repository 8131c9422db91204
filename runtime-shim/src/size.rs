//! Sizes as people write them: `512m`, `2g`, `10GiB`.

use std::fmt;

/// One mebibyte.
pub const MIB: u64 = 1 << 20;

/// Why a text is no size.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not a number followed by an optional unit.
    #[error("{0:?} is not a size; write a number and b, k, m, g or t, like 512m or 2g")]
    Syntax(String),
    /// More bytes than 63 bits hold.
    #[error("{0:?} is too large")]
    TooLarge(String),
}

/// Parses a size in bytes. Units are powers of 1024, as Docker reads them.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let syntax = || SizeError::Syntax(text.to_owned());
    let lower = text.trim().to_ascii_lowercase();
    let digits_end = lower
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits_end);
    let shift = match unit.trim() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(syntax()),
    };
    let bytes = match number.parse::<u64>() {
        Ok(n) => n.checked_mul(1 << shift),
        Err(_) if number.contains('.') => {
            let n: f64 = number.parse().map_err(|_| syntax())?;
            Some((n * (1u64 << shift) as f64) as u64)
        }
        Err(e) if *e.kind() == std::num::IntErrorKind::PosOverflow => None,
        Err(_) => return Err(syntax()),
    };
    bytes
        .filter(|n| *n <= i64::MAX as u64)
        .ok_or_else(|| SizeError::TooLarge(text.to_owned()))
}

/// Shows a number of bytes in the unit that a person would pick.
pub struct Human(pub u64);

impl fmt::Display for Human {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1000.0 && unit + 1 < UNITS.len() {
            value /= 1000.0;
            unit += 1;
        }
        if unit == 0 {
            write!(f, "{}B", self.0)
        } else if value < 10.0 {
            write!(f, "{value:.2}{}", UNITS[unit])
        } else if value < 100.0 {
            write!(f, "{value:.1}{}", UNITS[unit])
        } else {
            write!(f, "{value:.0}{}", UNITS[unit])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_with_each_unit_gives_bytes() {
        for (text, bytes) in [
            ("0", 0),
            ("77b", 77),
            ("4k", 4096),
            ("512m", 512 << 20),
            ("512M", 512 << 20),
            ("1.5g", 3 << 29),
            ("10GiB", 10 << 30),
            ("1t", 1 << 40),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn parse_of_nonsense_names_the_value() {
        for text in ["", "m", "-1", "12x", "1.2.3g", "NaN", "0x10", "1e3"] {
            assert!(
                matches!(parse(text), Err(SizeError::Syntax(t)) if t == text),
                "{text}"
            );
        }
        for text in ["99999999999999999999", "9999999999g"] {
            assert_eq!(parse(text), Err(SizeError::TooLarge(text.into())));
        }
    }

    #[test]
    fn human_picks_the_unit_as_docker_does() {
        let shown: Vec<String> = [0, 999, 4_260_000, 77_800_000, 117_000_000]
            .iter()
            .map(|n| Human(*n).to_string())
            .collect();
        assert_eq!(shown, ["0B", "999B", "4.26MB", "77.8MB", "117MB"]);
    }

    proptest::proptest! {
        #[test]
        fn parse_of_anything_never_panics(text in ".{0,40}") {
            let _ = parse(&text);
        }
    }
}
