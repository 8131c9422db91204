//! Limits that were changed after a container was made. What the VM was booted with stands in `config.json`; what the
//! next boot is to have stands in `update.json` until then.

use crate::files;
use serde_json::{Value, json};
use std::io;
use std::path::{Path, PathBuf};

/// As large as a `config.json` may be.
const MAX_BYTES: u64 = 2 << 20;

fn file(dir: &Path) -> PathBuf {
    dir.join("update.json")
}

fn spec_file(dir: &Path) -> PathBuf {
    dir.join("config.json")
}

fn read(path: &Path) -> io::Result<Value> {
    Ok(serde_json::from_slice(&files::read(path, MAX_BYTES)?)?)
}

fn replace(path: &Path, value: &Value) -> io::Result<()> {
    files::replace(path, &serde_json::to_vec(value)?)
}

/// The resources (`linux.resources`) that the container in `dir` was booted with.
pub fn booted(dir: &Path) -> io::Result<Value> {
    Ok(read(&spec_file(dir))?["linux"]["resources"].take())
}

/// The resources that its next boot is to have.
pub fn wanted(dir: &Path) -> io::Result<Value> {
    match read(&file(dir)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => booted(dir),
        read => read,
    }
}

/// `resources` with those of `change` in their place.
pub fn changed(resources: &Value, change: &Value) -> Value {
    let mut merged = match resources {
        Value::Object(_) => resources.clone(),
        _ => json!({}),
    };
    for (controller, values) in change.as_object().into_iter().flatten() {
        for (name, value) in values.as_object().into_iter().flatten() {
            merged[controller][name] = value.clone();
        }
    }
    merged
}

/// Writes down what the next boot is to have.
pub fn want(dir: &Path, resources: &Value) -> io::Result<()> {
    replace(&file(dir), resources)
}

/// Before a boot: the container gets what is wanted.
pub fn settle(dir: &Path) -> io::Result<()> {
    let wanted = match read(&file(dir)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        read => read?,
    };
    let mut spec = read(&spec_file(dir))?;
    spec["linux"]["resources"] = wanted;
    replace(&spec_file(dir), &spec)?;
    files::gone_is_fine(std::fs::remove_file(file(dir)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settle_gives_the_next_boot_what_was_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let spec =
            json!({"process": {}, "linux": {"resources": {"memory": {"limit": 1, "swap": 2}}}});
        replace(&spec_file(dir), &spec).unwrap();
        settle(dir).unwrap();
        assert_eq!(read(&spec_file(dir)).unwrap(), spec);

        for change in [
            json!({"memory": {"limit": 5}}),
            json!({"cpu": {"quota": 7}}),
        ] {
            want(dir, &changed(&wanted(dir).unwrap(), &change)).unwrap();
        }
        assert_eq!(booted(dir).unwrap()["memory"]["limit"], 1);
        settle(dir).unwrap();
        let expected = json!({"memory": {"limit": 5, "swap": 2}, "cpu": {"quota": 7}});
        assert_eq!(booted(dir).unwrap(), expected);
        assert_eq!(wanted(dir).unwrap(), expected);
        assert!(!file(dir).exists());
    }
}
