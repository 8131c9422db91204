//! `casemate check`: can this host run microVMs, and if not, what is missing?

use super::args::CheckArgs;
use super::output;
use crate::settings::Settings;
use casemate_vmm::probe::{self, HostFacts};
use serde_json::{Value, json};
use std::path::Path;

/// One thing looked at.
#[derive(Debug)]
struct Finding {
    what: &'static str,
    problem: Option<String>,
    mend: String,
}

fn fine(what: &'static str) -> Finding {
    Finding {
        what,
        problem: None,
        mend: String::new(),
    }
}

fn file(what: &'static str, path: &Path) -> Finding {
    match std::fs::File::open(path).and_then(|f| f.metadata()) {
        Ok(meta) if meta.is_file() && meta.len() > 0 => fine(what),
        Ok(_) => Finding {
            what,
            problem: Some(format!("{} is no file with content", path.display())),
            mend: "install casemate again".into(),
        },
        Err(e) => Finding {
            what,
            problem: Some(format!("can't read {}: {e}", path.display())),
            mend: "install casemate again, or correct the path in the configuration".into(),
        },
    }
}

fn directory(what: &'static str, path: &Path, variable: &str) -> Finding {
    let probe = path.join(format!(".check-{}", std::process::id()));
    let tried = std::fs::create_dir_all(path)
        .and_then(|()| std::fs::write(&probe, b"x"))
        .and_then(|()| std::fs::remove_file(&probe));
    match tried {
        Ok(()) => fine(what),
        Err(e) => Finding {
            what,
            problem: Some(format!("can't write in {}: {e}", path.display())),
            mend: format!("set {variable} to a directory of yours"),
        },
    }
}

/// Does `/dev/kvm` run a guest as every kernel is? That it opens says little.
fn kvm() -> Finding {
    match probe::check() {
        Ok(()) => fine("KVM"),
        Err(error) => {
            let diagnosis = probe::diagnose(&error, &HostFacts::read());
            Finding {
                what: "KVM",
                problem: Some(diagnosis.problem),
                mend: diagnosis.mend,
            }
        }
    }
}

/// Everything that a run needs, in the order in which it needs it.
fn findings(settings: &Settings) -> Vec<Finding> {
    vec![
        kvm(),
        file("VMM", &settings.vmm),
        file("shim", &settings.shim),
        file("guest kernel", &settings.kernel),
        file("guest agent", &settings.initrd),
        directory("state directory", &settings.state_dir, "CASEMATE_STATE"),
        directory("data directory", &settings.data_dir, "CASEMATE_DATA"),
    ]
}

/// `casemate check`; true: all is well.
pub(super) fn check(settings: &Settings, args: &CheckArgs) -> anyhow::Result<bool> {
    let findings = findings(settings);
    let well = findings.iter().all(|f| f.problem.is_none());
    if args.quiet {
        return Ok(well);
    }
    let rows: Vec<Value> = findings
        .iter()
        .map(|f| {
            json!({
                "Check": f.what,
                "Ok": f.problem.is_none(),
                "Result": f.problem.as_deref().unwrap_or("ok"),
                "Mend": f.mend,
            })
        })
        .collect();
    match args.format.format.as_deref() {
        None => {
            for finding in &findings {
                let result = finding.problem.as_deref().unwrap_or("ok");
                output::write(&format!("{:<17} {result}\n", finding.what))?;
                if !finding.mend.is_empty() {
                    output::write(&format!("{:<17} -> {}\n", "", finding.mend))?;
                }
            }
        }
        Some("json") => output::write(&format!("{}\n", json!({"Ok": well, "Checks": rows})))?,
        format => output::print(format, "", &["Check", "Result", "Mend"], &rows)?,
    }
    Ok(well)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_that_is_missing_or_empty_is_a_problem() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty");
        std::fs::write(&empty, "").unwrap();
        assert!(file("x", &empty).problem.is_some());
        assert!(file("x", &dir.path().join("missing")).problem.is_some());
        std::fs::write(&empty, "x").unwrap();
        assert!(file("x", &empty).problem.is_none());
    }
}
