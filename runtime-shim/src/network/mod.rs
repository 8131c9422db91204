//! A sandbox's network on the host.
//!
//! A container on a network has a network namespace that CNI plugins put interfaces into. Beside each of them is a tap,
//! joined with it, that the VMM holds: the guest's device is the interface, so to speak, and gets its addresses. What
//! was taken stands in the sandbox's journal before it is taken, with all that is needed to give it back.
//!
//! | module | role |
//! |---|---|
//! | `networks` | the networks on disk |
//! | `wish` | what a container is to get, as the command line wrote it down |
//! | `cni` | plugins: run, bounded |
//! | `netns` | namespaces |
//! | `look` | what is in one |
//! | `tap` | taps, and what joins them with interfaces |
//! | `egress` | where a guest may send to |
//! | `named` | names there |
//! | `loopback` | a pod's, for port-forward |
//! | `user` | an ordinary user's: passt |
//! | `handshake` | a fault of passt's, mended |

pub mod cni;
pub mod egress;
mod handshake;
pub mod look;
pub mod loopback;
pub mod named;
pub mod netns;
pub mod networks;
pub mod tap;
pub mod user;
pub mod wish;

use crate::files;
use crate::journal::{Journal, Taken};
use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};

/// The namespace of a sandbox on networks, in its directory.
pub const NETNS: &str = "netns";
/// No result of a plugin is larger.
const MAX_RESULT: u64 = 1 << 20;

/// Why a network can't be given back.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// A plugin failed.
    #[error(transparent)]
    Cni(#[from] cni::CniError),
    /// The namespace can't be removed.
    #[error("can't remove the network namespace {path}")]
    Netns {
        /// Where it is mounted.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The journal can't be written.
    #[error("can't write the sandbox's journal")]
    Journal(#[source] io::Error),
}

/// Where an interface's result is kept, in the sandbox's directory.
pub fn result_file(dir: &Path, interface: &str) -> PathBuf {
    dir.join(format!("{interface}.result"))
}

/// Reads the result that an interface's plugins gave.
pub fn result(dir: &Path, interface: &str) -> Option<Value> {
    let bytes = files::read(&result_file(dir, interface), MAX_RESULT).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// Gives back what a sandbox has of the network and takes it off the journal. What is gone already is fine.
pub fn release(journal: &Journal) -> Result<(), ReleaseError> {
    let taken = journal.read().map_err(ReleaseError::Journal)?;
    if !taken.iter().any(Taken::is_network) {
        return Ok(());
    }
    let mut first = Ok(());
    for item in taken.iter().rev() {
        let done = match item {
            Taken::Attachment { attachment } => {
                let kept = journal.dir().map(|dir| (dir, &attachment.interface));
                let result = kept.and_then(|(dir, interface)| result(dir, interface));
                let done = attachment.delete(result.as_ref());
                if let (Ok(()), Some((dir, interface))) = (&done, kept) {
                    let _ = std::fs::remove_file(result_file(dir, interface));
                }
                done.map_err(ReleaseError::from)
            }
            // Last: plugins look into it, also when they are asked again.
            Taken::Netns { .. } if first.is_err() => Ok(()),
            Taken::Netns { path } => netns::remove(path).map_err(|source| ReleaseError::Netns {
                path: path.clone(),
                source,
            }),
            _ => Ok(()),
        };
        first = first.and(done);
    }
    // What failed is tried again by the next command.
    first?;
    journal
        .forget(Taken::is_network)
        .map_err(ReleaseError::Journal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn release_that_a_plugin_refuses_keeps_the_namespace_for_the_next_try() {
        let dir = tempfile::tempdir().unwrap();
        let netns = dir.path().join(NETNS);
        std::fs::write(&netns, "").unwrap();
        let network = json!({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "false"}]});
        let attachment = cni::Attachment {
            container: "abc".into(),
            netns: netns.clone(),
            interface: "eth0".into(),
            plugins: "/bin".into(),
            network: network.as_object().unwrap().clone(),
            runtime: serde_json::Map::new(),
        };
        let journal = Journal::in_dir(dir.path());
        let path = netns.clone();
        journal.record(&Taken::Netns { path }).unwrap();
        let attachment = Box::new(attachment);
        journal.record(&Taken::Attachment { attachment }).unwrap();

        release(&journal).unwrap_err();

        assert!(netns.exists());
        assert_eq!(journal.read().unwrap().len(), 2);
    }
}
