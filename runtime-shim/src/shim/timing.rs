//! When each step of a start happened: written by the shim when asked, read by `--timing`.

use casemate_vmm::control::Phase;
use serde::{Deserialize, Serialize};

/// Name of the file in the bundle.
pub const FILE_NAME: &str = "timing.json";
/// The annotation that asks for it.
pub const ANNOTATION: &str = "io.casemate.timing";

/// The annotation's value that asks for the kernel's initcalls too, on its console.
pub const INITCALLS: &str = "initcalls";

/// Host CLOCK_MONOTONIC in ns, but for the `guest_` ones, which are the guest's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// The shim's first line.
    pub shim_main: u64,
    /// Create was called.
    pub create: u64,
    /// What the VMM told.
    pub vmm: Vec<(Phase, u64)>,
    /// The agent had answered.
    pub hello: u64,
    /// The guest's clock at the agent's first instruction.
    pub guest_agent_main: u64,
    /// The guest's clock when the agent served.
    pub guest_agent_serving: u64,
    /// The agent had created the container.
    pub created: u64,
    /// Start was called.
    pub start: u64,
    /// The agent had started it.
    pub started: u64,
    /// The guest's clock when the workload's execve had succeeded.
    pub guest_exec: u64,
}
