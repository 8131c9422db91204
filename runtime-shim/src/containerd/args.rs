//! containerd's command line: `-namespace NS -address SOCKET -publish-binary PATH -id ID [-bundle DIR] [-debug] ACTION`.

use crate::rpc::{MAX_ID, is_identifier};
use anyhow::{Context, bail};

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Start,
    Delete,
    /// What the runtime can do.
    Info,
    Version,
}

/// A parsed command line.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Args {
    pub(super) namespace: String,
    /// The container's id: that of a sandbox, or of a container that joins one.
    pub(super) id: String,
    pub(super) action: Action,
}

impl Args {
    /// Reads flags as Go's flag package does: one dash or two, `-flag value` or `-flag=value`.
    pub(super) fn parse(mut args: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        let (mut namespace, mut id, mut action) = (String::new(), String::new(), None);
        while let Some(arg) = args.next() {
            let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
                action = Some(match arg.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    other => bail!("{other:?} is neither start nor delete"),
                });
                break;
            };
            let (flag, given) = match flag.split_once('=') {
                Some((flag, value)) => (flag, Some(value.to_owned())),
                None => (flag, None),
            };
            let mut value = || {
                given
                    .clone()
                    .or_else(|| args.next())
                    .with_context(|| format!("{arg} needs a value"))
            };
            match flag {
                "namespace" => namespace = value()?,
                "id" => id = value()?,
                "address" | "publish-binary" | "bundle" | "socket" => drop(value()?),
                "debug" => {}
                "info" => action = Some(Action::Info),
                "v" | "version" => action = Some(Action::Version),
                _ => bail!(
                    "unknown argument {arg:?}; this program is started by containerd and casemate"
                ),
            }
        }
        let action = action.context("this program is started by containerd and casemate")?;
        if matches!(action, Action::Start | Action::Delete) {
            check("-namespace", &namespace)?;
            check("-id", &id)?;
        }
        Ok(Self {
            namespace,
            id,
            action,
        })
    }
}

fn check(flag: &str, value: &str) -> anyhow::Result<()> {
    if !is_identifier(value) {
        bail!(
            "{flag}: {value:?} is not a name of at most {MAX_ID} letters, digits, '_', '.' and '-'"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> anyhow::Result<Args> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn command_lines_of_containerd_are_understood() {
        let args = parse("-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id abc -bundle /b -debug delete").unwrap();
        assert_eq!(
            (args.namespace.as_str(), args.id.as_str(), args.action),
            ("k8s.io", "abc", Action::Delete)
        );
        let args = parse("--namespace=default --id=x start").unwrap();
        assert_eq!((args.id.as_str(), args.action), ("x", Action::Start));
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
    }

    #[test]
    fn odd_command_lines_are_refused_with_the_word() {
        for (line, word) in [
            ("", "started by"),
            ("-id x -namespace n", "started by"),
            ("-id x -namespace n run", "\"run\""),
            ("-id ../x -namespace n start", "../x"),
            ("-id x -namespace a/b start", "a/b"),
            ("-id x start", "-namespace"),
            ("-what x start", "-what"),
            ("-id", "needs a value"),
        ] {
            let text = parse(line).unwrap_err().to_string();
            assert!(text.contains(word), "{line}: {text}");
        }
    }
}
