//! Exit codes of `casemate-vmm`, each distinct: the shim tells from them how a guest ended.

/// The guest powered off.
pub const SHUTDOWN: u8 = 0;
/// A configuration or host error before the guest ran.
pub const START_FAILED: u8 = 1;
/// The command line was wrong.
pub const USAGE: u8 = 2;
/// The guest reset itself.
pub const RESET: u8 = 10;
/// The guest's kernel panicked.
pub const PANIC: u8 = 11;
/// KVM could not run the guest on (internal error, failed entry).
pub const KVM_FAILED: u8 = 12;
/// The shim asked for the stop, or its end of the control socket closed.
pub const STOPPED: u8 = 13;
/// A device or the VMM itself failed while the guest ran.
pub const VMM_FAILED: u8 = 14;
