//! Signals by name and number (signal(7), x86-64).

use anyhow::bail;

const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
/// The real-time signals that programs may use, as the C library counts them.
const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

/// `TERM`, `SIGTERM`, `sigterm`, `15`, `RTMIN+3` or `RTMAX-1` as a number of 1 to 64.
pub(super) fn parse(text: &str) -> anyhow::Result<u32> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |rest: &str, sign: char| match rest {
        "" => Some(0),
        rest => rest.strip_prefix(sign)?.parse::<u32>().ok(),
    };
    let number = if let Ok(number) = upper.parse::<u32>() {
        Some(number).filter(|n| (1..=RTMAX).contains(n))
    } else if let Some(rest) = name.strip_prefix("RTMIN") {
        offset(rest, '+').and_then(|n| RTMIN.checked_add(n))
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        offset(rest, '-').and_then(|n| RTMAX.checked_sub(n))
    } else {
        let index = NAMES.iter().position(|n| *n == name);
        index.map(|index| index as u32 + 1)
    };
    let is_real_time = name.starts_with("RT");
    match number {
        Some(n) if !is_real_time || (RTMIN..=RTMAX).contains(&n) => Ok(n),
        _ => bail!("{text:?} is not a signal"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_takes_names_and_numbers() {
        for (text, number) in [
            ("KILL", 9),
            ("SIGKILL", 9),
            ("sigterm", 15),
            ("15", 15),
            ("SYS", 31),
            ("64", 64),
            ("RTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMAX-14", 50),
        ] {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
    }

    #[test]
    fn parse_of_what_is_no_signal_is_refused() {
        for text in [
            "", "0", "65", "-1", "SIG", "TERMS", "RTMIN+31", "RTMAX-31", "RTMIN-1", "SIG9",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn parse_of_anything_stays_in_bounds(text in "(SIG)?(RTM(IN|AX))?[+-]?[0-9A-Z]{0,12}") {
            if let Ok(number) = parse(&text) {
                proptest::prop_assert!((1..=64).contains(&number));
            }
        }
    }
}
