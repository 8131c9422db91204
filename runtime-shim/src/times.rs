//! Times as text: RFC 3339, in nanoseconds since the epoch.

use jiff::{SignedDuration, Timestamp};

/// The time in UTC with nine decimals, as Docker and the CRI write it.
pub fn rfc3339(ns: u64) -> String {
    let time = Timestamp::from_nanosecond(ns.into()).unwrap_or(Timestamp::MAX);
    format!("{time:.9}")
}

/// An RFC 3339 time with its zone; `None` for anything else, and for times before the epoch.
pub fn parse(text: &str) -> Option<u64> {
    let time: Timestamp = text.parse().ok()?;
    u64::try_from(time.as_nanosecond()).ok()
}

/// A duration such as `1h30m` or `10s`, in nanoseconds; `None` for anything else, and for negative ones.
pub fn parse_duration(text: &str) -> Option<u64> {
    let duration: SignedDuration = text.parse().ok()?;
    u64::try_from(duration.as_nanos()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc3339_has_nine_decimals() {
        let leap_day = 951_827_696_000_000_000;
        assert_eq!(rfc3339(leap_day), "2000-02-29T12:34:56.000000000Z");
    }

    #[test]
    fn parse_knows_zones_and_refuses_the_rest() {
        let in_zone = parse("2024-05-01T10:00:00.5+02:00");
        assert_eq!(in_zone, parse("2024-05-01T08:00:00.5Z"));
        assert!(in_zone.is_some());
        for text in [
            "",
            "yesterday",
            "2024-13-01T00:00:00Z",
            "1969-12-31T23:59:59Z",
            "2024-05-01",
            "0-0-0T00:00:00é",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn parse_of_anything_never_panics(text in ".{0,40}") {
            let _ = parse(&text);
        }

        #[test]
        fn rfc3339_of_any_time_is_read_back(ns: u64) {
            proptest::prop_assert_eq!(parse(&rfc3339(ns)), Some(ns));
        }
    }
}
