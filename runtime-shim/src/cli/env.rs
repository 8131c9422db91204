//! Environment variables for a container: `-e`, `--env-file`, the image's own.

use super::args::ProcessArgs;
use crate::files;
use anyhow::{Context, bail};
use std::path::Path;

/// A file of variables beyond this is none.
const MAX_FILE: u64 = 1 << 20;

/// The variables of `--env-file` and `-e`, later ones winning.
pub(super) fn of(args: &ProcessArgs) -> anyhow::Result<Vec<String>> {
    from_user(&args.env_file, &args.env, |name| std::env::var(name).ok())
}

/// `here` looks up our own.
fn from_user(
    files: &[impl AsRef<Path>],
    given: &[String],
    here: impl Fn(&str) -> Option<String>,
) -> anyhow::Result<Vec<String>> {
    let mut all = Vec::new();
    for file in files {
        let path = file.as_ref();
        let text = files::read_text(path, MAX_FILE)
            .with_context(|| format!("can't read the environment file {}", path.display()))?;
        let parsed = parse_file(&text, &here)
            .with_context(|| format!("environment file {}", path.display()))?;
        set_all(&mut all, parsed);
    }
    for item in given {
        if let Some(variable) = resolve(item, &here).with_context(|| format!("--env {item:?}"))? {
            set(&mut all, variable);
        }
    }
    Ok(all)
}

fn parse_file(text: &str, here: &impl Fn(&str) -> Option<String>) -> anyhow::Result<Vec<String>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut all = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let variable =
            resolve(line, here).with_context(|| format!("line {}: {line:?}", number + 1))?;
        all.extend(variable);
    }
    Ok(all)
}

/// `NAME=VALUE` as it is; `NAME` with its value here, or nothing if it has none.
fn resolve(item: &str, here: &impl Fn(&str) -> Option<String>) -> anyhow::Result<Option<String>> {
    let name = item.split('=').next().unwrap_or_default();
    if name.is_empty() {
        bail!("the variable has no name");
    }
    if name.contains(char::is_whitespace) {
        bail!("the variable {name:?} contains white space");
    }
    if item.contains('\0') {
        bail!("the variable {name:?} contains a NUL byte");
    }
    if item.contains('=') {
        return Ok(Some(item.to_owned()));
    }
    Ok(here(name).map(|value| format!("{name}={value}")))
}

/// Sets `variable` ("NAME=VALUE"), replacing an earlier one of its name.
pub(super) fn set(all: &mut Vec<String>, variable: String) {
    let name_of = |v: &str| v.split('=').next().unwrap_or_default().to_owned();
    let name = name_of(&variable);
    match all.iter_mut().find(|v| name_of(v) == name) {
        Some(old) => *old = variable,
        None => all.push(variable),
    }
}

/// Sets all of `variables`.
pub(super) fn set_all(all: &mut Vec<String>, variables: impl IntoIterator<Item = String>) {
    for variable in variables {
        set(all, variable);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here(name: &str) -> Option<String> {
        (name == "HOME").then(|| "/me".to_owned())
    }

    #[test]
    fn from_user_with_file_and_flags_lets_the_flags_win() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("env");
        std::fs::write(&file, "# comment\n\nA=1\nB=x=y \nHOME\nNOT_SET\n").unwrap();
        let given = ["A=2".to_owned(), "EMPTY=".to_owned()];
        let all = from_user(&[file], &given, here).unwrap();
        assert_eq!(all, ["A=2", "B=x=y ", "HOME=/me", "EMPTY="]);
    }

    #[test]
    fn from_user_with_bad_lines_names_them() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("env");
        std::fs::write(&file, "A=1\nno good=1\n").unwrap();
        let error = from_user(&[file], &[], here).unwrap_err();
        assert!(format!("{error:#}").contains("line 2"), "{error:#}");
        let none: [&str; 0] = [];
        assert!(from_user(&none, &["=x".to_owned()], here).is_err());
    }

    #[test]
    fn from_user_with_an_endless_file_is_refused() {
        let error = from_user(&["/dev/zero"], &[], here).unwrap_err();
        assert!(format!("{error:#}").contains("/dev/zero"), "{error:#}");
    }

    proptest::proptest! {
        #[test]
        fn parse_file_of_anything_never_panics(text in ".{0,200}") {
            let _ = parse_file(&text, &here);
        }
    }
}
