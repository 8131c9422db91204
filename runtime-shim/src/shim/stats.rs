//! The agent's counters as containerd's cgroup v2 metrics.

use casemate_protocol::agent::StatsResponse;
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

/// The type name under which containerd looks for them.
const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// Packs the counters.
pub(super) fn metrics(stats: &StatsResponse) -> protobuf::Result<Any> {
    let metrics = Metrics {
        pids: Some(PidsStat {
            current: stats.pids_current,
            limit: stats.pids_limit,
            ..Default::default()
        })
        .into(),
        cpu: Some(CPUStat {
            usage_usec: stats.cpu_usage_us,
            user_usec: stats.cpu_user_us,
            system_usec: stats.cpu_system_us,
            nr_periods: stats.cpu_nr_periods,
            nr_throttled: stats.cpu_nr_throttled,
            throttled_usec: stats.cpu_throttled_us,
            ..Default::default()
        })
        .into(),
        memory: Some(MemoryStat {
            usage: stats.memory_current,
            usage_limit: stats.memory_limit,
            inactive_file: stats.memory_inactive_file,
            swap_usage: stats.memory_swap_current,
            ..Default::default()
        })
        .into(),
        // The guest's disks are not the host's: one sum says all.
        io: Some(IOStat {
            usage: vec![IOEntry {
                rbytes: stats.io_read_bytes,
                wbytes: stats.io_write_bytes,
                ..Default::default()
            }],
            ..Default::default()
        })
        .into(),
        memory_events: Some(MemoryEvents {
            oom_kill: stats.oom_kills,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    Ok(Any {
        type_url: TYPE_URL.to_owned(),
        value: metrics.write_to_bytes()?,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_of_counters_decode_again() {
        let stats = StatsResponse {
            memory_current: 42,
            oom_kills: 1,
            ..Default::default()
        };
        let any = metrics(&stats).unwrap();
        let back = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((back.memory.usage, back.memory_events.oom_kill), (42, 1));
    }
}
