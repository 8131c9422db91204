//! A container that runs while something is measured.

use std::process::Command;

use anyhow::{Context, Result};

use crate::host::done;
use crate::inside::Installed;

/// One that was started with `run -d`.
pub(crate) struct Container<'a> {
    at: &'a Installed,
    name: String,
}

impl<'a> Container<'a> {
    /// Starts it: options, image and command.
    pub(crate) fn start(at: &'a Installed, name: &str, args: &[&str]) -> Result<Self> {
        let mut run = at.casemate(&["run", "-d", "--name", name]);
        done(run.args(args))?;
        let name = name.to_owned();
        Ok(Self { at, name })
    }

    /// `casemate exec` in it.
    pub(crate) fn exec(&self, args: &[&str]) -> Command {
        let mut exec = self.at.casemate(&["exec", &self.name]);
        exec.args(args);
        exec
    }

    /// A field that `inspect` shows.
    pub(crate) fn inspect(&self, format: &str) -> Result<String> {
        let mut inspect = self
            .at
            .casemate(&["inspect", "--format", format, &self.name]);
        let out = done(&mut inspect)?;
        let text = String::from_utf8(out.stdout).with_context(|| format!("{format} as text"))?;
        Ok(text.trim().to_owned())
    }

    /// Ends and removes it.
    pub(crate) fn end(self) -> Result<()> {
        done(&mut self.at.casemate(&["rm", "-f", &self.name])).map(drop)
    }
}
