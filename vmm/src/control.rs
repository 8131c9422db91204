//! The control socket: what the shim may ask of a running VMM.
//!
//! An inherited `SOCK_SEQPACKET` pair; one JSON message a packet, at most
//! [`MAX_MESSAGE`] bytes, descriptors as SCM_RIGHTS. Each [`Request`] gets one
//! [`Reply`] with its `id`; an [`Event`] comes unasked.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Largest packet either side sends, in bytes.
pub const MAX_MESSAGE: usize = 64 << 10;

/// A request with the number that its reply repeats.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the caller.
    pub id: u64,
    /// What is asked.
    #[serde(flatten)]
    pub command: Command,
}

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Command {
    /// Stops all vCPUs and device workers; idempotent.
    Pause,
    /// Undoes `Pause`; idempotent.
    Resume,
    /// Counters of the VM and each device.
    Statistics,
    /// Replaces a disk's backing files by the descriptors in this packet; the guest sees the new capacity.
    SwapDisk {
        /// `DiskConfig::id`.
        disk: String,
    },
    /// Accepts one more connection from the guest; the packet carries the one descriptor.
    VsockListen {
        /// Host port.
        port: u32,
    },
    /// Sets the balloon's target size in MiB.
    Balloon {
        /// Pages the guest should give up, in MiB.
        mib: u32,
    },
    /// Keeps the process to a share of processor time from now on, by letting its vCPUs wait; `None`: to none.
    LimitCpu {
        /// At most so much.
        limit: Option<CpuLimit>,
    },
    /// Ends the process with `exit_code::STOPPED`, disks flushed.
    Stop,
}

/// Processor time of the whole process, as the host's `cpu.max` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuLimit {
    /// Microseconds in each period, 1,000 or more.
    pub quota_us: u64,
    /// Microseconds of a period, 1,000 to 1,000,000.
    pub period_us: u64,
}

impl CpuLimit {
    /// What the kernel accepts of a group.
    const PERIODS_US: std::ops::RangeInclusive<u64> = 1_000..=1_000_000;
    /// No fewer than the kernel's; no more than a thousand processors could use.
    const QUOTAS_US: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000;

    /// Checks both values.
    pub fn validate(self) -> Result<Self, String> {
        let Self {
            quota_us,
            period_us,
        } = self;
        if Self::PERIODS_US.contains(&period_us) && Self::QUOTAS_US.contains(&quota_us) {
            return Ok(self);
        }
        Err(format!(
            "a limit of {quota_us} \u{b5}s of each {period_us} \u{b5}s is none: a period has {} to {} \u{b5}s, a quota {} to {}",
            Self::PERIODS_US.start(),
            Self::PERIODS_US.end(),
            Self::QUOTAS_US.start(),
            Self::QUOTAS_US.end(),
        ))
    }
}

/// What the VMM says, a packet each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Message {
    /// Answer to the request of the same `id`.
    Reply {
        /// The request's number.
        id: u64,
        /// `Err` holds the reason, for a person.
        result: Result<Answer, String>,
    },
    /// A start phase was reached.
    Phase {
        /// Which.
        phase: Phase,
        /// Host CLOCK_MONOTONIC in ns.
        at_ns: u64,
    },
    /// The guest is gone; the process exits right after this.
    Ended {
        /// One of [`crate::exit_code`].
        code: u8,
        /// What happened, for a person.
        reason: String,
        /// Last lines of the guest's kernel log, at most 16 KiB, lossy UTF-8, control characters escaped.
        guest_log: String,
    },
}

/// What a request returns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Done,
    /// Counters by name, e.g. `vcpu.exits`, `blk.vda.read_bytes`.
    Statistics(BTreeMap<String, u64>),
}

/// Phases of a start, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// First line of `main`.
    Main,
    /// Confined, but for the filters that come right before the first instruction.
    Confined,
    /// VM, irqchip, vCPUs and devices exist.
    KvmReady,
    /// Kernel, initrd and boot structures are in guest memory.
    KernelLoaded,
    /// About to enter the guest for the first time.
    FirstRun,
    /// The guest connected to its first vsock port: the agent serves.
    AgentConnected,
}
