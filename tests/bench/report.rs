//! Summary, raw samples, and the table in the documentation.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::figures::{Figure, median};
use crate::rows::{Bar, DETAILS, ROWS};

const BEGIN: &str = "<!-- figures: written by make bench -->";
const END: &str = "<!-- end of figures -->";

/// Writes `summary.json` and `raw.json`; figures that were not measured this time stay as they were.
pub(crate) fn write(dir: &Path, figures: &[Figure]) -> Result<()> {
    fs::create_dir_all(dir)?;
    let mut summary = read_object(&dir.join("summary.json"))?;
    let mut raw = read_object(&dir.join("raw.json"))?;
    for figure in figures {
        let entry =
            json!({"median": figure.median(), "unit": figure.unit, "samples": figure.samples()});
        summary.insert(figure.key.clone(), entry);
        raw.insert(figure.key.clone(), serde_json::to_value(figure)?);
    }
    fs::write(
        dir.join("summary.json"),
        serde_json::to_string_pretty(&summary)? + "\n",
    )?;
    Ok(fs::write(
        dir.join("raw.json"),
        serde_json::to_string_pretty(&raw)? + "\n",
    )?)
}

fn read_object(file: &Path) -> Result<serde_json::Map<String, serde_json::Value>> {
    match fs::read(file) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).with_context(|| format!("read {}", file.display()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(serde_json::Map::new()),
        Err(error) => Err(error).with_context(|| format!("read {}", file.display())),
    }
}

/// Every figure measured so far.
pub(crate) fn measured(dir: &Path) -> Result<Vec<Figure>> {
    let raw = read_object(&dir.join("raw.json"))?;
    raw.into_values()
        .map(|value| Ok(serde_json::from_value(value)?))
        .collect()
}

/// Puts the table between the markers of the page.
pub(crate) fn refresh_page(page: &Path, figures: &[Figure], clock: &str) -> Result<()> {
    let text = fs::read_to_string(page).with_context(|| format!("read {}", page.display()))?;
    let (Some(begin), Some(end)) = (text.find(BEGIN), text.find(END)) else {
        bail!("{} has no line {BEGIN:?} and {END:?}", page.display());
    };
    let table = table(figures, clock);
    let fresh = format!("{}\n{table}{}", &text[..begin + BEGIN.len()], &text[end..]);
    if fresh != text {
        fs::write(page, fresh)?;
    }
    Ok(())
}

/// The table as Markdown.
pub(crate) fn table(figures: &[Figure], clock: &str) -> String {
    let mut text = format!(
        "Clock: {clock}.\n\n| key | what | bar | median | ours | theirs |\n|---|---|---|---|---|---|\n"
    );
    for (key, what, bar) in ROWS {
        let Some(figure) = figures.iter().find(|figure| figure.key == key) else {
            continue;
        };
        let bar = match bar {
            Bar::AtMost(bar) => format!("≤ {}", number(bar)),
            Bar::AtLeast(bar) => format!("≥ {}", number(bar)),
            Bar::Report => "report".to_owned(),
        };
        let side = |values: &[f64]| match values {
            [] => String::new(),
            values => format!("{} {}", number(median(values)), figure.side_unit),
        };
        let (ours, theirs) = match figure.theirs.as_slice() {
            [] => (String::new(), String::new()),
            theirs => (side(&figure.ours), side(theirs)),
        };
        let median = number(figure.median());
        let unit = if figure.unit == "ratio" {
            ""
        } else {
            &figure.unit
        };
        let _ = writeln!(
            text,
            "| `{key}` | {what} | {bar} | {median} {unit} | {ours} | {theirs} |"
        );
    }
    for (key, title) in DETAILS {
        let Some(figure) = figures
            .iter()
            .find(|figure| figure.key == key && !figure.details.is_empty())
        else {
            continue;
        };
        let mut details: Vec<_> = figure.details.iter().collect();
        details.sort_by(|one, two| two.1.total_cmp(one.1));
        let list: Vec<String> = details
            .iter()
            .map(|(name, value)| format!("{name} {}", number(**value)))
            .collect();
        let _ = writeln!(text, "\n{title}: {}.", list.join(", "));
    }
    text
}

pub(crate) fn number(value: f64) -> String {
    if value == value.trunc() && value.abs() < 1e12 {
        format!("{value}")
    } else if value.abs() < 10.0 {
        format!("{value:.3}")
    } else {
        format!("{value:.1}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_refreshed_keeps_what_is_around_the_markers() {
        let page = tempfile::NamedTempFile::new().unwrap();
        fs::write(page.path(), format!("before\n{BEGIN}\nold\n{END}\nafter\n")).unwrap();
        let figure = Figure::ratio("run_vs_runc", "ms", vec![(60.0, 50.0)]);

        refresh_page(page.path(), &[figure], "instructions").unwrap();

        let text = fs::read_to_string(page.path()).unwrap();
        assert!(
            text.starts_with("before\n") && text.ends_with(&format!("{END}\nafter\n")),
            "{text}"
        );
        assert!(
            text.contains("| ≤ 1.500 | 1.200  | 60 ms | 50 ms |") && !text.contains("old"),
            "{text}"
        );
    }

    #[test]
    fn summary_written_twice_keeps_the_other_figures() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &[Figure::plain("a", "ms", vec![1.0])]).unwrap();
        write(dir.path(), &[Figure::plain("b", "ms", vec![2.0])]).unwrap();

        let summary = read_object(&dir.path().join("summary.json")).unwrap();

        assert_eq!(summary["a"]["median"], 1.0);
        assert_eq!(summary["b"]["samples"][0], 2.0);
        assert_eq!(measured(dir.path()).unwrap().len(), 2);
    }
}
