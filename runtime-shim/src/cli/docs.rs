//! Shell completions and man pages, generated from the grammar.

use super::args::Cli;
use super::output;
use anyhow::Context;
use clap::CommandFactory;
use std::path::Path;

/// `casemate completion`
pub(super) fn completion(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "casemate", &mut script);
    output::write(&String::from_utf8(script)?)
}

/// `casemate man`
pub(super) fn man(dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("can't make {}", dir.display()))?;
    clap_mangen::generate_to(Cli::command(), dir)
        .with_context(|| format!("can't write man pages to {}", dir.display()))
}
