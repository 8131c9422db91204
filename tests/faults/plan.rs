//! Which faults, when: points spread evenly and reproducibly over the phases of a sandbox's life.

use std::fmt;

/// A part of a sandbox's life; all before it goes undisturbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Create,
    Start,
    Exec,
    CopyIn,
    CopyOut,
    Stop,
    Remove,
}

/// How the sandbox is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Net {
    None,
    Bridge,
    Passt,
}

/// A program of a sandbox on the host, killed with signal 9.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Victim {
    Cli,
    Shim,
    Vmm,
    Virtiofsd,
    Passt,
    /// All of them at once.
    All,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Kill(Victim),
    /// The guest's PID 1 dies, which its kernel answers with a panic.
    Agent,
    /// The guest's kernel panics for a reason of its own.
    Kernel,
    /// The host's disk is full from then on.
    DiskFull,
    /// A CNI plugin fails: its command and its name.
    Plugin(&'static str, &'static str),
    /// The shim is killed while a CNI plugin's own child still works, which goes on.
    Orphan(&'static str),
    /// passt doesn't start.
    NoPasst,
}

/// One fault at one time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Point {
    pub(crate) number: usize,
    pub(crate) phase: Phase,
    pub(crate) fault: Fault,
    pub(crate) net: Net,
    /// When, as a part of the time that the phase takes undisturbed.
    pub(crate) at: f64,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            number,
            phase,
            fault,
            net,
            at,
        } = self;
        write!(
            f,
            "point {number}: {fault:?} at {:.0}% of {phase:?}, network {net:?}",
            at * 100.0
        )
    }
}

/// What can go wrong where. The first dozen are a selection of their own: every kind of fault and every phase.
const CELLS: &[(Phase, Fault, Net)] = {
    use Fault::{Agent, DiskFull, Kernel, Kill, NoPasst, Orphan, Plugin};
    use Net::{Bridge, None, Passt};
    use Phase::{CopyIn, CopyOut, Create, Exec, Remove, Start, Stop};
    use Victim::{All, Cli, Shim, Virtiofsd, Vmm};
    &[
        (Create, Kill(Cli), None),
        (Start, Kill(Shim), Bridge),
        (Start, Agent, None),
        (Start, Plugin("ADD", "portmap"), Bridge),
        (Exec, Kill(Vmm), None),
        (Exec, Kernel, None),
        (CopyIn, Kill(Virtiofsd), None),
        (CopyOut, Kill(Shim), None),
        (Stop, Kill(All), Bridge),
        (Remove, Kill(Cli), Bridge),
        (Exec, DiskFull, None),
        (Start, Kill(Victim::Passt), Passt),
        // From here on the rest.
        (Start, Kill(Cli), None),
        (Start, Kill(Cli), Bridge),
        (Start, Kill(Shim), None),
        (Start, Kill(Vmm), None),
        (Start, Kill(Vmm), Bridge),
        (Start, Kill(Virtiofsd), None),
        (Start, Kill(All), None),
        (Start, Kill(All), Bridge),
        (Start, Kill(Shim), Passt),
        (Start, Kernel, None),
        (Start, DiskFull, None),
        (Start, Plugin("ADD", "bridge"), Bridge),
        (Start, Plugin("ADD", "host-local"), Bridge),
        (Start, NoPasst, Passt),
        (Start, Orphan("bridge"), Bridge),
        (Start, Orphan("portmap"), Bridge),
        (Create, DiskFull, None),
        (Exec, Kill(Cli), None),
        (Exec, Kill(Shim), Bridge),
        (Exec, Kill(Virtiofsd), None),
        (Exec, Kill(Victim::Passt), Passt),
        (Exec, Kill(All), None),
        (Exec, Agent, None),
        (CopyIn, Kill(Cli), None),
        (CopyIn, Kill(Shim), None),
        (CopyIn, Kill(Vmm), None),
        (CopyIn, Agent, None),
        (CopyIn, DiskFull, None),
        (CopyOut, Kill(Cli), None),
        (CopyOut, Kill(Vmm), None),
        (CopyOut, Kill(All), None),
        (CopyOut, Kernel, None),
        (Stop, Kill(Cli), None),
        (Stop, Kill(Shim), None),
        (Stop, Kill(Shim), Bridge),
        (Stop, Kill(Vmm), None),
        (Stop, Kill(Virtiofsd), None),
        (Stop, Kill(Victim::Passt), Passt),
        (Stop, Agent, None),
        (Stop, Kernel, None),
        (Stop, DiskFull, None),
        (Stop, Plugin("DEL", "bridge"), Bridge),
        (Remove, Kill(Cli), None),
        (Remove, Kill(Shim), None),
        (Remove, Kill(Shim), Bridge),
        (Remove, Kill(Vmm), None),
        (Remove, Kill(All), Bridge),
        (Remove, Kill(Cli), Passt),
        (Remove, Agent, None),
        (Remove, DiskFull, None),
        (Remove, Plugin("DEL", "portmap"), Bridge),
        (Remove, Plugin("DEL", "host-local"), Bridge),
    ]
};

/// The first `count` points of a seed. Each cell gets times from all of its phase.
pub(crate) fn points(seed: u64, count: usize) -> Vec<Point> {
    let mut random = seed;
    let rounds = count.div_ceil(CELLS.len());
    (0..count)
        .map(|number| {
            let (round, cell) = (number / CELLS.len(), number % CELLS.len());
            let (phase, fault, net) = CELLS[cell];
            // Cells begin at different parts of their phases, and go round.
            let part = (cell * 7 + round) % rounds.max(1);
            let at = (part as f64 + unit(&mut random)) / rounds.max(1) as f64;
            Point {
                number,
                phase,
                fault,
                net,
                at,
            }
        })
        .collect()
}

/// The next number below 1: splitmix64.
fn unit(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}
