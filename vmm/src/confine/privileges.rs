//! Identity and capabilities: root becomes nobody, every capability goes.

use super::{ConfineError, UNPRIVILEGED_ID};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, geteuid, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_keep_capabilities, set_no_new_privs,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

/// Root becomes [`UNPRIVILEGED_ID`], so that the host's root owns neither the
/// process nor its namespaces, and keeps its capabilities for the namespaces to come.
pub(super) fn become_unprivileged() -> Result<(), ConfineError> {
    if !geteuid().is_root() {
        return Ok(());
    }
    // Where root itself lives in a user namespace without this id, or may not change its own, it
    // is no more than a user already, and stays what it is.
    let forbidden = |e: Errno| e == Errno::PERM || e == Errno::INVAL;
    let (uid, gid) = (
        Uid::from_raw(UNPRIVILEGED_ID),
        Gid::from_raw(UNPRIVILEGED_ID),
    );
    match set_thread_groups(&[]).and_then(|()| set_thread_res_gid(gid, gid, gid)) {
        Ok(()) => {}
        Err(e) if forbidden(e) => return Ok(()),
        Err(e) => return Err(ConfineError::step("setresgid", e)),
    }
    set_keep_capabilities(true).map_err(|e| ConfineError::step("prctl(PR_SET_KEEPCAPS)", e))?;
    match set_thread_res_uid(uid, uid, uid) {
        Ok(()) => {}
        Err(e) if forbidden(e) => return Ok(()),
        Err(e) => return Err(ConfineError::step("setresuid", e)),
    }
    let kept = capabilities(None).map_err(|e| ConfineError::step("capget", e))?;
    set_capabilities(
        None,
        CapabilitySets {
            effective: kept.permitted,
            ..kept
        },
    )
    .map_err(|e| ConfineError::step("capset", e))
}

/// Empties all five capability sets, for good; nobody may trace the process or dump its memory.
pub(super) fn drop_all() -> Result<(), ConfineError> {
    set_no_new_privs(true).map_err(|e| ConfineError::step("prctl(PR_SET_NO_NEW_PRIVS)", e))?;
    drop_bounding_set()?;
    clear_ambient_capability_set()
        .map_err(|e| ConfineError::step("prctl(PR_CAP_AMBIENT_CLEAR_ALL)", e))?;
    let none = CapabilitySet::empty();
    set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )
    .map_err(|e| ConfineError::step("capset", e))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|e| ConfineError::step("prctl(PR_SET_DUMPABLE, 0)", e))
}

/// Needs CAP_SETPCAP, which a user without a user namespace of his own lacks;
/// no_new_privs makes the set meaningless there.
fn drop_bounding_set() -> Result<(), ConfineError> {
    for capability in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << capability))
        {
            Ok(()) => {}
            Err(Errno::INVAL) => break, // past the kernel's last
            Err(Errno::PERM) if capability == 0 => break,
            Err(e) => return Err(ConfineError::step("prctl(PR_CAPBSET_DROP)", e)),
        }
    }
    Ok(())
}
