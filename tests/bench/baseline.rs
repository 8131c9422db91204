//! The committed figures of starts, and whether new ones are worse.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::figures::{Figure, mean};
use crate::report::number;

/// A start that takes this much more than the committed figure is a regression.
const TOLERANCE: f64 = 1.03;
/// What to do about a baseline that is no use.
const MEND: &str =
    "`git checkout` brings the committed one back, `tests/bench/run baseline` measures a new one";

/// Milliseconds of starts, with the versions that they hold for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Baseline {
    /// Version of the kernel's source and of the compilers.
    pub versions: BTreeMap<String, String>,
    /// Our side of each start's figure.
    pub figures: BTreeMap<String, f64>,
}

/// The outcome of a comparison.
#[derive(Debug)]
pub(crate) struct Verdict {
    /// What to print.
    pub lines: Vec<String>,
    /// A start got worse, or was not measured at all.
    pub fails: bool,
}

impl Baseline {
    /// What these figures would be as a baseline.
    pub(crate) fn of(figures: &[Figure]) -> Self {
        Self {
            versions: versions(),
            figures: figures
                .iter()
                .map(|figure| (figure.key.clone(), mean(&figure.ours)))
                .collect(),
        }
    }

    /// The committed one.
    pub(crate) fn read(file: &Path) -> Result<Self> {
        let name = file.display();
        let bytes =
            fs::read(file).with_context(|| format!("can't read the baseline {name}; {MEND}"))?;
        let baseline: Self = serde_json::from_slice(&bytes)
            .with_context(|| format!("{name} is no baseline; {MEND}"))?;
        ensure!(
            !baseline.figures.is_empty(),
            "{name} holds no figures; {MEND}"
        );
        for (key, value) in &baseline.figures {
            // JSON has no NaN.
            ensure!(
                *value > 0.0,
                "{name}: {key} can't have taken {value} ms; {MEND}"
            );
        }
        Ok(baseline)
    }

    /// Makes this the one to commit.
    pub(crate) fn write(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(file, text).with_context(|| format!("write {}", file.display()))
    }

    /// Compares new figures with these. Other versions make a difference that nobody is to blame for.
    pub(crate) fn judge(&self, now: &Self) -> Verdict {
        let comparable = self.versions == now.versions;
        let mut lines = Vec::new();
        if !comparable {
            lines.push(format!(
                "only a report, as versions differ: {:?} against the baseline's {:?}",
                now.versions, self.versions
            ));
        }
        let (mut worse, mut missing) = (false, false);
        for (key, old) in &self.figures {
            let Some(new) = now.figures.get(key) else {
                missing = true;
                lines.push(format!("{key}: not measured"));
                continue;
            };
            let ratio = new / old;
            let verdict = if ratio < 1.0 / TOLERANCE {
                "better; make it the new baseline"
            } else if ratio <= TOLERANCE {
                "as committed"
            } else {
                worse = true;
                "WORSE by more than 3%"
            };
            lines.push(format!(
                "{key}: {} ms against {} ms, {:+.1}%: {verdict}",
                number(*new),
                number(*old),
                (ratio - 1.0) * 100.0
            ));
        }
        for (key, new) in &now.figures {
            if !self.figures.contains_key(key) {
                lines.push(format!("{key}: {} ms, not in the baseline", number(*new)));
            }
        }
        Verdict {
            lines,
            fails: missing || worse && comparable,
        }
    }
}

fn versions() -> BTreeMap<String, String> {
    let first_line = |command: &str, args: &[&str]| {
        let out = Command::new(command).args(args).output().ok()?;
        let text = String::from_utf8(out.stdout).ok()?;
        text.lines().next().map(str::to_owned)
    };
    let kernel = first_line(
        "dpkg-query",
        &["-W", "-f", "${Version}", "linux-source-6.12"],
    );
    [
        ("linux-source-6.12", kernel),
        ("rustc", first_line("rustc", &["-V"])),
        ("gcc", first_line("gcc", &["--version"])),
    ]
    .into_iter()
    .map(|(name, version)| (name.to_owned(), version.unwrap_or_else(|| "unknown".into())))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn baseline(version: &str, value: f64) -> Baseline {
        Baseline {
            versions: [("rustc".to_owned(), version.to_owned())].into(),
            figures: [("guest_boot_ms".to_owned(), value)].into(),
        }
    }

    fn read(text: &str) -> Result<Baseline> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        Baseline::read(file.path())
    }

    #[test]
    fn start_four_percent_worse_with_the_same_versions_fails() {
        let verdict = baseline("1", 50.0).judge(&baseline("1", 52.0));

        assert!(verdict.fails);
        let text = verdict.lines.join("\n");
        assert!(
            text.contains("guest_boot_ms") && text.contains("+4.0%") && text.contains("WORSE"),
            "{text}"
        );
    }

    #[test]
    fn start_within_three_percent_or_better_passes() {
        assert!(!baseline("1", 100.0).judge(&baseline("1", 102.9)).fails);
        assert!(!baseline("1", 100.0).judge(&baseline("1", 50.0)).fails);
        assert!(baseline("1", 100.0).judge(&baseline("1", 103.1)).fails);
    }

    #[test]
    fn start_worse_with_other_versions_is_only_reported() {
        let verdict = baseline("1", 100.0).judge(&baseline("2", 200.0));

        assert!(!verdict.fails);
        let text = verdict.lines.join("\n");
        assert!(
            text.contains("only a report") && text.contains("WORSE"),
            "{text}"
        );
    }

    #[test]
    fn start_that_was_not_measured_fails() {
        let nothing = Baseline {
            figures: BTreeMap::new(),
            ..baseline("1", 1.0)
        };

        let verdict = baseline("1", 100.0).judge(&nothing);

        assert!(verdict.fails);
        assert_eq!(verdict.lines, ["guest_boot_ms: not measured"]);
    }

    #[test]
    fn figure_that_is_not_a_number_fails() {
        let none = Figure::plain("guest_boot_ms", "ms", Vec::new());
        let now = Baseline {
            versions: baseline("1", 1.0).versions,
            ..Baseline::of(&[none])
        };

        assert!(baseline("1", 100.0).judge(&now).fails);
    }

    #[test]
    fn new_start_is_reported_and_passes() {
        let mut now = baseline("1", 100.0);
        now.figures.insert("run".into(), 80.0);

        let verdict = baseline("1", 100.0).judge(&now);

        assert!(!verdict.fails);
        assert!(
            verdict
                .lines
                .contains(&"run: 80 ms, not in the baseline".to_owned())
        );
    }

    #[test]
    fn read_of_what_is_missing_or_broken_says_how_to_mend_it() {
        let missing = Baseline::read(Path::new("/nonexistent/baseline.json"));
        let broken = [
            missing,
            read("{"),
            read(r#"{"versions": {}, "figures": {}}"#),
            read(r#"{"versions": {}, "figures": {"boot": 0}}"#),
            read(r#"{"versions": {}, "figures": {"boot": "fast"}}"#),
            read(r#"{"versions": {}, "figures": {"boot": 1}, "boot": 1}"#),
        ];

        for result in broken {
            let error = format!("{:#}", result.unwrap_err());
            assert!(error.contains("tests/bench/run baseline"), "{error}");
        }
    }

    #[test]
    fn write_then_read_gives_the_same() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let written = baseline("1", 57.25);

        written.write(file.path()).unwrap();

        assert_eq!(Baseline::read(file.path()).unwrap(), written);
    }

    #[test]
    fn committed_baseline_can_be_read() {
        let file = casemate_tests::paths::repository().join("tests/bench/baseline.json");

        Baseline::read(&file).unwrap();
    }
}
