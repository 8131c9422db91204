//! Landlock, where an empty root can't be had: every file is out of reach.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus,
    Scope,
};

/// Denies all that Landlock can deny, as far as the kernel knows it; files at least.
pub(super) fn deny_all() -> Result<(), String> {
    const NEWEST: ABI = ABI::V6;
    let restrict = || {
        Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?
            .restrict_self()
    };
    match restrict() {
        Ok(status) if status.ruleset == RulesetStatus::NotEnforced => {
            Err("the kernel has none: Linux 5.13 with CONFIG_SECURITY_LANDLOCK and landlock in its list lsm=".into())
        }
        Ok(_) => Ok(()),
        Err(e) => Err(e.to_string()),
    }
}
