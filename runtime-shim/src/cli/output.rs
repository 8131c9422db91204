//! Tables, JSON lines and templates on standard output; ages as people read them.

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
    write_raw(&printable_lines(text))
}

/// Writes to standard output as it is; a reader that left is no error.
pub(super) fn write_raw(text: &str) -> anyhow::Result<()> {
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

/// "3 hours ago", as Docker says it; both in nanoseconds since the epoch.
pub(super) fn ago(then: u64, now: u64) -> String {
    let seconds = now.saturating_sub(then) / 1_000_000_000;
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

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
            assert_eq!(ago(1000, 1000 + seconds * 1_000_000_000), text);
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
}
