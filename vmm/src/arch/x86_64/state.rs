//! Saved state of vCPUs, interrupt controllers and clock.
