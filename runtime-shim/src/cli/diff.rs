//! `casemate diff`: what a container changed of its image.

use super::tools::Workshop;
use super::{containers, output};
use crate::settings::Settings;
use casemate_protocol::tool::Tool;
use clap::Args;

/// The names of a million files.
const MAX_CHANGES: u64 = 256 << 20;

/// `casemate diff`
#[derive(Debug, Args)]
pub(super) struct DiffArgs {
    /// Name or id
    container: String,
}

/// `casemate diff`
pub(super) async fn diff(settings: &Settings, args: &DiffArgs) -> anyhow::Result<()> {
    let root = containers::state(settings)?;
    let workshop = Workshop::open(settings, &root, &args.container).await?;
    let changes = changes(&workshop).await;
    workshop.close().await?;
    output::write(&lines(&changes?))
}

async fn changes(workshop: &Workshop) -> anyhow::Result<Vec<u8>> {
    let mount_points = workshop.mount_points()?;
    let tool = Tool::Changes { mount_points };
    workshop.ask(&tool, MAX_CHANGES).await
}

/// Of the agent's list, as Docker shows it: one of `A`, `C` and `D`, and the path from the root.
fn lines(changes: &[u8]) -> String {
    let mut text = String::new();
    for change in changes.split(|byte| *byte == 0).filter(|c| !c.is_empty()) {
        let change = String::from_utf8_lossy(change);
        let (kind, path) = change.split_once(' ').unwrap_or((&change, ""));
        // A name may hold a newline, and must not pass for two.
        text.push_str(&format!("{kind} /{}\n", path.replace('\n', "\\n")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_show_each_change_as_docker_does() {
        let text = lines(b"C etc\0A etc/a b\0D gone\0A two\nlines\0");
        assert_eq!(text, "C /etc\nA /etc/a b\nD /gone\nA /two\\nlines\n");
        assert_eq!(lines(b""), "");
    }
}
