//! Our own terminal: raw while the container uses it, restored whatever happens.

use super::args::ProcessArgs;
use anyhow::{Context, bail};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::io::{self, IsTerminal};

/// Whether the process gets our terminal as its own.
fn is_handed_on(args: &ProcessArgs) -> bool {
    args.tty && args.interactive
}

/// Refuses `-it` where there is no terminal.
pub(super) fn check(args: &ProcessArgs) -> anyhow::Result<()> {
    if is_handed_on(args) && !io::stdin().is_terminal() {
        bail!("the input device is not a terminal; leave out -t");
    }
    Ok(())
}

/// Raw mode, for as long as it lives.
pub(super) struct Raw {
    before: Termios,
}

impl Raw {
    /// Puts standard input into raw mode if the process gets it as its terminal.
    pub(super) fn enter_for(args: &ProcessArgs) -> anyhow::Result<Option<Self>> {
        match is_handed_on(args) {
            true => Self::enter(),
            false => Ok(None),
        }
    }

    /// Puts standard input into raw mode if it is a terminal.
    pub(super) fn enter() -> anyhow::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let enter = || {
            let before = tcgetattr(&stdin)?;
            let mut raw = before.clone();
            raw.make_raw();
            tcsetattr(&stdin, OptionalActions::Drain, &raw)?;
            Ok::<_, io::Error>(Some(Self { before }))
        };
        enter().context("can't put the terminal into raw mode")
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

/// Rows and columns of the terminal that standard output is, if it is one.
pub(super) fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdout())
        .or_else(|_| tcgetwinsize(io::stdin()))
        .ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}
