//! Resource limits, those that hold whatever the guest does.
//!
//! Left alone: RLIMIT_FSIZE (a disk may be as large as its file system allows),
//! RLIMIT_AS (guest memory is mapped, and its size is the cgroup's affair), RLIMIT_SIGPENDING (vCPUs are
//! kicked by a queued signal). RLIMIT_NPROC follows with the event loop's filter.

use super::ConfineError;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Lowers the limits, soft and hard, for good.
pub(super) fn lower(max_open_files: u32) -> Result<(), ConfineError> {
    let open_files = u64::from(max_open_files);
    let allowed = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    if allowed < open_files {
        let why = format!("{allowed} open files are allowed, {open_files} are needed");
        return Err(ConfineError::advised(
            "setrlimit(RLIMIT_NOFILE)",
            std::io::Error::other(why),
            "; raise the hard limit (ulimit -Hn, LimitNOFILE=)",
        ));
    }
    for (resource, limit, step) in [
        (Resource::Nofile, open_files, "setrlimit(RLIMIT_NOFILE)"),
        (Resource::Core, 0, "setrlimit(RLIMIT_CORE, 0)"), // a core dump would hold the guest's memory
        (Resource::Memlock, 0, "setrlimit(RLIMIT_MEMLOCK, 0)"),
        (Resource::Msgqueue, 0, "setrlimit(RLIMIT_MSGQUEUE, 0)"),
        (Resource::Nice, 0, "setrlimit(RLIMIT_NICE, 0)"),
        (Resource::Rtprio, 0, "setrlimit(RLIMIT_RTPRIO, 0)"),
    ] {
        setrlimit(
            resource,
            Rlimit {
                current: Some(limit),
                maximum: Some(limit),
            },
        )
        .map_err(|e| ConfineError::step(step, e))?;
    }
    Ok(())
}
