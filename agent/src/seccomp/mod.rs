//! OCI seccomp profiles as classic BPF.
//!
//! A filter runs on every system call, and the kernel runs it once per number when it is loaded, so it
//! is a binary search over ranges of numbers with equal fate rather than a list.
//!
//! Meaning of a profile (as runc and libseccomp have it, where they agree): the first rule that matches
//! decides; conditions of a rule must all hold, unless two name the same argument: then any one suffices;
//! names that the architecture doesn't have are skipped. Where the default denies, calls newer than every
//! one named give ENOSYS, so that programs fall back to an older call.

mod bpf;
mod profile;

use libc::sock_filter;
use oci_spec::runtime::LinuxSeccomp;

pub use profile::Arch;

use crate::error::{Error, Result};

/// Most instructions that a filter may have (the kernel's BPF_MAXINSNS).
pub const MAX_INSTRUCTIONS: usize = 4096;

/// Most conditions of one rule: each needs up to five instructions, and a jump spans 255.
const MAX_CONDITIONS: usize = 16;

/// A compiled filter with the flags to load it with.
#[derive(Debug, Clone)]
pub struct Filter {
    flags: u64,
    program: Vec<sock_filter>,
}

impl Filter {
    /// Compiles `profile`.
    pub fn compile(profile: &LinuxSeccomp) -> Result<Self> {
        let flags = profile::flags(profile)?;
        let program = bpf::program(&profile::Table::of(profile)?);
        match program.len() {
            0..=MAX_INSTRUCTIONS => Ok(Self { flags, program }),
            length => Err(Error::invalid(format!(
                "seccomp: the profile needs {length} BPF instructions, the kernel takes {MAX_INSTRUCTIONS}: merge its conditional rules"
            ))),
        }
    }

    /// The instructions.
    pub fn program(&self) -> &[sock_filter] {
        &self.program
    }

    /// Loads the filter for the calling thread.
    pub(crate) fn load(&self) -> std::io::Result<()> {
        crate::sys::seccomp(self.flags, &self.program)
    }
}

#[cfg(test)]
mod tests;
