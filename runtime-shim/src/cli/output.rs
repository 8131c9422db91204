//! Tables, JSON lines and templates on standard output; times as people read them.

use super::template::Template;
use casemate_protocol::text::printable_lines;
use serde_json::Value;
use std::io::{self, Write};

/// Prints `rows` as `format` says; `columns` are the fields of the default table, an "ID" the id of a `kind`.
pub(super) fn print(
    format: Option<&str>,
    kind: &str,
    columns: &[&str],
    rows: &[Value],
) -> anyhow::Result<()> {
    let text = match format {
        None | Some("table") => {
            let cells: Vec<String> = columns.iter().map(|c| format!("{{{{.{c}}}}}")).collect();
            table(&Template::parse(&cells.join("\t"))?, kind, rows)?
        }
        Some("json") => lines(rows.iter().map(|row| Ok(row.to_string())))?,
        Some(other) => match other.strip_prefix("table ") {
            Some(template) => table(&Template::parse(template)?, kind, rows)?,
            None => {
                let template = Template::parse(other)?;
                lines(rows.iter().map(|row| template.render(row)))?
            }
        },
    };
    write(&text)
}

/// Writes to standard output, without anything that could steer a terminal (JSON stays the same JSON); a reader that left is no error.
pub(super) fn write(text: &str) -> anyhow::Result<()> {
    let text = printable_lines(text);
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(()),
    }
}

fn lines(rows: impl Iterator<Item = anyhow::Result<String>>) -> anyhow::Result<String> {
    let mut out = String::new();
    for row in rows {
        out.push_str(&row?);
        out.push('\n');
    }
    Ok(out)
}

fn table(template: &Template, kind: &str, rows: &[Value]) -> anyhow::Result<String> {
    let mut all = vec![template.header(kind)];
    for row in rows {
        all.push(template.render(row)?);
    }
    let cells: Vec<Vec<&str>> = all.iter().map(|line| line.split('\t').collect()).collect();
    let columns = cells.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let lengths = cells.iter().filter_map(|row| row.get(column));
        lengths.map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in &cells {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}   "));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    Ok(out)
}

/// "3 hours ago", as Docker says it.
pub(super) fn ago(then_s: i64, now_s: i64) -> String {
    let seconds = (now_s - then_s).max(0);
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    let (days, weeks) = (hours / 24, hours / 24 / 7);
    let text = match (seconds, minutes, hours, days, weeks) {
        (0..=1, ..) => "Less than a second".to_owned(),
        (2..=59, ..) => format!("{seconds} seconds"),
        (_, 1, ..) => "About a minute".to_owned(),
        (_, 2..=59, ..) => format!("{minutes} minutes"),
        (_, _, 1, ..) => "About an hour".to_owned(),
        (_, _, 2..=47, ..) => format!("{hours} hours"),
        (_, _, _, 2..=13, _) => format!("{days} days"),
        (_, _, _, 14..=60, _) => format!("{weeks} weeks"),
        (_, _, _, 61..=729, _) => format!("{} months", days / 30),
        _ => format!("{} years", days / 365),
    };
    format!("{text} ago")
}

/// Seconds since the epoch of an RFC 3339 time; `None` for anything else.
pub(super) fn parse_time(text: &str) -> Option<i64> {
    let (date, rest) = text.split_once(['T', 't', ' '])?;
    let mut parts = date.split('-').map(|p| p.parse::<i64>().ok());
    let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
    let clock = rest.get(..8)?;
    let mut parts = clock.split(':').map(|p| p.parse::<i64>().ok());
    let (hour, minute, second) = (parts.next()??, parts.next()??, parts.next()??);
    if !(1..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let zone = rest[8..].trim_start_matches(|c: char| c == '.' || c.is_ascii_digit());
    let offset = match zone.as_bytes() {
        [] | [b'Z' | b'z', ..] => 0,
        [sign @ (b'+' | b'-'), ..] => {
            let (h, m) = zone.get(1..)?.split_once(':')?;
            let seconds = h.parse::<i64>().ok()? * 3600 + m.parse::<i64>().ok()? * 60;
            if *sign == b'+' { seconds } else { -seconds }
        }
        _ => return None,
    };
    let days = days_from_civil(year, month, day);
    Some(days * 86_400 + hour * 3600 + minute * 60 + second - offset)
}

/// RFC 3339 in UTC.
pub(super) fn format_time(ns: u64) -> String {
    let (seconds, nanoseconds) = (ns / 1_000_000_000, ns % 1_000_000_000);
    let (days, of_day) = ((seconds / 86_400) as i64, seconds % 86_400);
    let (year, month, day) = civil_from_days(days);
    let (h, m, s) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{nanoseconds:09}Z")
}

/// Days since 1970-01-01 of a Gregorian date: years are counted from March, so that leap days come last.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let year_of_era = y.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn times_survive_the_round_trip() {
        for (text, seconds) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2024-02-29T12:34:56.789Z", 1_709_210_096),
            ("2024-02-29T14:34:56+02:00", 1_709_210_096),
            ("2000-03-01T00:00:00Z", 951_868_800),
        ] {
            assert_eq!(parse_time(text), Some(seconds), "{text}");
            let back = format_time(seconds as u64 * 1_000_000_000);
            assert_eq!(parse_time(&back), Some(seconds));
        }
        for text in [
            "",
            "yesterday",
            "2024-13-01T00:00:00Z",
            "2024-01-01",
            "T",
            "0-0-0T00:00:00é",
        ] {
            assert_eq!(parse_time(text), None, "{text}");
        }
    }

    #[test]
    fn ago_speaks_as_docker_does() {
        let cases = [
            (0, "Less than a second ago"),
            (30, "30 seconds ago"),
            (61, "About a minute ago"),
            (7200, "2 hours ago"),
            (86_400 * 3, "3 days ago"),
            (86_400 * 21, "3 weeks ago"),
            (86_400 * 100, "3 months ago"),
        ];
        for (seconds, text) in cases {
            assert_eq!(ago(1000, 1000 + seconds), text);
        }
    }

    #[test]
    fn table_aligns_its_columns() {
        let rows = [
            json!({"A": "long value", "B": 1}),
            json!({"A": "x", "B": 22}),
        ];
        let template = Template::parse("{{.A}}\t{{.B}}").unwrap();
        let text = table(&template, "", &rows).unwrap();
        assert_eq!(text, "A            B\nlong value   1\nx            22\n");
    }

    proptest::proptest! {
        #[test]
        fn parse_time_of_anything_never_panics(text in ".{0,40}") {
            let _ = parse_time(&text);
        }
    }
}
