//! Summary, raw samples, and the table in the documentation.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::figures::{Figure, median};

const BEGIN: &str = "<!-- figures: written by make bench -->";
const END: &str = "<!-- end of figures -->";

/// A row of the table: key, what it is, the bar and whether less than it is good.
const ROWS: [(&str, &str, Option<f64>); 15] = [
    (
        "boot_vs_firecracker",
        "boot to init's first word, against Firecracker",
        Some(0.9),
    ),
    (
        "boot_vs_qemu_microvm",
        "the same against QEMU's microvm machine",
        Some(0.4),
    ),
    (
        "guest_boot_ms",
        "exec of the VMM to the agent's first answer",
        Some(50.0),
    ),
    (
        "run_vs_runc",
        "`casemate run --rm busybox /bin/true` against `runc run`",
        Some(1.5),
    ),
    (
        "exec_vs_runc_exec",
        "`casemate exec` of /bin/true against `runc exec`",
        Some(1.0),
    ),
    (
        "start_20_parallel",
        "20 runs at once against 20 of runc",
        None,
    ),
    (
        "per_container_mib",
        "the host's memory that one more idle container takes",
        Some(48.0),
    ),
    (
        "idle_cpu",
        "processor time of 20 idle containers",
        Some(1.0),
    ),
    (
        "boot_exits",
        "VM exits until the agent's first answer",
        None,
    ),
    (
        "vmm_private_kib",
        "private memory of the VMM's processes, guest memory left out",
        Some(4096.0),
    ),
    (
        "guest_used_kib",
        "guest memory in use once the agent is ready",
        Some(24576.0),
    ),
    (
        "erofs_vs_unpack",
        "pull of a 300 MB image against skopeo and umoci",
        Some(0.6),
    ),
    ("blk_vs_host", "4 KiB random read, guest against host", None),
    (
        "blk_vs_host_sequential",
        "1 MiB sequential read, guest against host",
        None,
    ),
    (
        "console_lost_bytes",
        "bytes lost of 1 GiB past a slow reader",
        Some(0.0),
    ),
];

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
        let bar = bar.map_or("report".to_owned(), |bar| format!("≤ {}", number(bar)));
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
    for (key, title) in [
        ("boot_exits", "VM exits of a boot by reason"),
        ("run_vs_runc", "Phases of a run, ms, the longest first"),
    ] {
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
