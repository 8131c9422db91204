//! From `linux.resources` of the spec (which speaks cgroup v1) to cgroup v2 files.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use casemate_protocol::weight_of_shares;

use crate::error::{Error, Result};

/// One write to one control file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) file: String,
    pub(super) value: String,
    /// A kernel without the file satisfies the setting anyway.
    pub(super) optional: bool,
}

fn set(file: impl Into<String>, value: impl ToString) -> Setting {
    Setting {
        file: file.into(),
        value: value.to_string(),
        optional: false,
    }
}

/// All settings, in an order in which the kernel takes them; `usage` is the memory in use.
pub(super) fn settings(
    resources: &LinuxResources,
    usage: impl Fn() -> u64,
) -> Result<Vec<Setting>> {
    let mut out = Vec::new();
    if let Some(cpu) = resources.cpu() {
        self::cpu(cpu, &mut out)?;
    }
    if let Some(memory) = resources.memory() {
        self::memory(memory, usage, &mut out)?;
    }
    if let Some(pids) = resources.pids() {
        // 0 and below mean none, as runc and Docker have it.
        let limit = if pids.limit() > 0 {
            pids.limit().to_string()
        } else {
            "max".into()
        };
        out.push(set("pids.max", limit));
    }
    if let Some(io) = resources.block_io() {
        block_io(io, &mut out)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let size = limit.page_size();
        if !size.bytes().all(|b| b.is_ascii_alphanumeric()) || size.is_empty() {
            return Err(Error::invalid(format!(
                "hugepageLimits: page size {size:?} is not like \"2MB\""
            )));
        }
        out.push(set(format!("hugetlb.{size}.max"), limit.limit()));
    }
    if let Some(network) = resources.network()
        && (network.class_id().is_some_and(|id| id != 0)
            || network.priorities().as_ref().is_some_and(|p| !p.is_empty()))
    {
        return Err(Error::unsupported(
            "linux.resources.network: cgroup v2 has no network classes",
        ));
    }
    if resources
        .rdma()
        .as_ref()
        .is_some_and(|rdma| !rdma.is_empty())
    {
        return Err(Error::unsupported(
            "linux.resources.rdma: the guest has no RDMA devices",
        ));
    }
    unified(resources, &mut out)?;
    Ok(out)
}

fn cpu(cpu: &LinuxCpu, out: &mut Vec<Setting>) -> Result<()> {
    if cpu.realtime_runtime().is_some_and(|v| v != 0)
        || cpu.realtime_period().is_some_and(|v| v != 0)
    {
        return Err(Error::unsupported(
            "linux.resources.cpu: cgroup v2 has no realtimeRuntime and realtimePeriod",
        ));
    }
    if let Some(shares @ 1..) = cpu.shares() {
        out.push(set("cpu.weight", weight_of_shares(shares)));
    }
    if let Some(idle) = cpu.idle() {
        out.push(set("cpu.idle", idle));
    }
    let period = cpu.period().filter(|period| *period > 0);
    match (cpu.quota(), period) {
        (None | Some(0), None) => {}
        (Some(quota @ 1..), period) => out.push(set(
            "cpu.max",
            format!("{quota} {}", period.unwrap_or(100_000)),
        )),
        (_, None) => out.push(set("cpu.max", "max")),
        (_, Some(period)) => out.push(set("cpu.max", format!("max {period}"))),
    }
    if let Some(burst) = cpu.burst() {
        out.push(set("cpu.max.burst", burst));
    }
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            out.push(set(file, list));
        }
    }
    Ok(())
}

fn memory(memory: &LinuxMemory, usage: impl Fn() -> u64, out: &mut Vec<Setting>) -> Result<()> {
    if memory.kernel_tcp().is_some_and(|v| v > 0) {
        return Err(Error::unsupported(
            "linux.resources.memory.kernelTCP: cgroup v2 has no such limit",
        ));
    }
    if memory.swappiness().is_some_and(|v| v != 60 && v != 0) {
        return Err(Error::unsupported(
            "linux.resources.memory.swappiness: cgroup v2 has none per cgroup",
        ));
    }
    if memory.disable_oom_killer() == Some(true) {
        return Err(Error::unsupported(
            "linux.resources.memory.disableOOMKiller: cgroup v2 can't",
        ));
    }
    let limit = memory.limit().filter(|limit| *limit != 0);
    if let Some(limit) = limit {
        let used = if memory.check_before_update() == Some(true) {
            usage()
        } else {
            0
        };
        if limit > 0 && (limit as u64) < used {
            return Err(Error::invalid(format!(
                "memory limit {limit} is below the {used} bytes in use, and checkBeforeUpdate is set"
            )));
        }
    }
    // The spec's swap is memory and swap together; v2's is swap alone.
    match (memory.swap().filter(|swap| *swap != 0), limit) {
        (None, _) => {}
        (Some(-1), _) => out.push(Setting {
            optional: true,
            ..set("memory.swap.max", "max")
        }),
        (Some(swap @ 1..), Some(limit @ 1..)) if swap >= limit => {
            // Without swap in the kernel no swap can be used: any limit holds.
            out.push(Setting {
                optional: true,
                ..set("memory.swap.max", swap - limit)
            });
        }
        (Some(swap), limit) => {
            return Err(Error::invalid(format!(
                "linux.resources.memory: swap {swap} must be -1 or at least the memory limit ({})",
                limit.map_or("none given".into(), |l| l.to_string())
            )));
        }
    }
    if let Some(limit) = limit {
        out.push(set("memory.max", bytes(limit)));
    }
    if let Some(reservation) = memory.reservation().filter(|r| *r != 0) {
        out.push(set("memory.low", bytes(reservation)));
    }
    Ok(())
}

fn bytes(value: i64) -> String {
    if value < 0 {
        "max".into()
    } else {
        value.to_string()
    }
}

fn block_io(io: &LinuxBlockIo, out: &mut Vec<Setting>) -> Result<()> {
    if io.leaf_weight().is_some_and(|w| w != 0) {
        return Err(Error::unsupported(
            "linux.resources.blockIO.leafWeight: cgroup v2 has none",
        ));
    }
    if let Some(weight) = io.weight().filter(|w| *w != 0) {
        out.push(set("io.weight", weight_of_block_io(weight)));
    }
    for device in io.weight_device().iter().flatten() {
        if device.leaf_weight().is_some_and(|w| w != 0) {
            return Err(Error::unsupported(
                "linux.resources.blockIO.weightDevice.leafWeight: cgroup v2 has none",
            ));
        }
        if let Some(weight) = device.weight() {
            let (major, minor) = (device.major(), device.minor());
            out.push(set(
                "io.weight",
                format!("{major}:{minor} {}", weight_of_block_io(weight)),
            ));
        }
    }
    let throttles: [(&str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ];
    for (key, devices) in throttles {
        for device in devices.iter().flatten() {
            let rate = if device.rate() == 0 {
                "max".into()
            } else {
                device.rate().to_string()
            };
            out.push(set(
                "io.max",
                format!("{}:{} {key}={rate}", device.major(), device.minor()),
            ));
        }
    }
    Ok(())
}

/// 10 ..= 1000 on 1 ..= 10000.
fn weight_of_block_io(weight: u16) -> u64 {
    (1 + (u64::from(weight).saturating_sub(10)) * 9999 / 990).clamp(1, 10_000)
}

fn unified(resources: &LinuxResources, out: &mut Vec<Setting>) -> Result<()> {
    let mut entries: Vec<_> = resources.unified().iter().flatten().collect();
    entries.sort(); // a map has no order of its own; the kernel's answers shall not depend on chance
    for (file, value) in entries {
        let plain = file.contains('.')
            && file
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if !plain || file.starts_with('.') || file.starts_with("cgroup.") {
            return Err(Error::invalid(format!(
                "linux.resources.unified: {file:?} is no control file of a controller"
            )));
        }
        // Several lines are several writes, as with io.max.
        out.extend(value.lines().map(|line| set(file, line)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn files(value: serde_json::Value) -> Result<Vec<(String, String)>> {
        let resources = serde_json::from_value(value).unwrap();
        Ok(settings(&resources, || 1000)?
            .into_iter()
            .map(|s| (s.file, s.value))
            .collect())
    }

    fn one(value: serde_json::Value) -> (String, String) {
        files(value).unwrap().pop().unwrap()
    }

    #[test]
    fn settings_cpu_shares_usual_maps_to_usual() {
        assert_eq!(
            one(json!({"cpu": {"shares": 1024}})),
            ("cpu.weight".into(), "100".into())
        );
    }

    #[test]
    fn settings_cpu_quota_and_period_are_one_file() {
        assert_eq!(one(json!({"cpu": {"quota": 50000}})).1, "50000 100000");
        assert_eq!(
            one(json!({"cpu": {"quota": 50000, "period": 20000}})).1,
            "50000 20000"
        );
        assert_eq!(one(json!({"cpu": {"quota": -1}})).1, "max");
        assert_eq!(one(json!({"cpu": {"period": 20000}})).1, "max 20000");
    }

    #[test]
    fn settings_swap_is_what_exceeds_memory() {
        let both = files(json!({"memory": {"limit": 1000, "swap": 3000}})).unwrap();
        assert_eq!(
            both,
            [
                ("memory.swap.max".into(), "2000".into()),
                ("memory.max".into(), "1000".into())
            ]
        );
        assert!(files(json!({"memory": {"limit": 3000, "swap": 1000}})).is_err());
        assert!(files(json!({"memory": {"swap": 1000}})).is_err());
    }

    #[test]
    fn settings_limit_below_usage_is_refused_only_when_asked_to_check() {
        assert!(files(json!({"memory": {"limit": 999, "checkBeforeUpdate": true}})).is_err());
        assert!(files(json!({"memory": {"limit": 999}})).is_ok());
    }

    #[test]
    fn settings_what_v2_lacks_is_refused() {
        for value in [
            json!({"memory": {"disableOOMKiller": true}}),
            json!({"memory": {"kernelTCP": 5}}),
            json!({"cpu": {"realtimeRuntime": 5}}),
            json!({"network": {"classID": 5}}),
            json!({"blockIO": {"leafWeight": 5}}),
            json!({"rdma": {"mlx5_0": {"hcaHandles": 1}}}),
        ] {
            assert!(files(value.clone()).is_err(), "{value}");
        }
    }

    #[test]
    fn settings_io_throttle_names_device_and_rate() {
        let value = json!({"blockIO": {"weight": 500, "throttleReadBpsDevice": [{"major": 254, "minor": 0, "rate": 1024}]}});
        let got = files(value).unwrap();
        assert_eq!(got[0], ("io.weight".into(), "4950".into()));
        assert_eq!(got[1], ("io.max".into(), "254:0 rbps=1024".into()));
    }

    #[test]
    fn settings_unified_path_out_of_the_cgroup_is_refused() {
        for file in [
            "../memory.max",
            "cgroup.procs",
            "a/b.c",
            "",
            ".x",
            "memory\u{0}.max",
        ] {
            assert!(files(json!({"unified": {file: "1"}})).is_err(), "{file:?}");
        }
        assert_eq!(
            one(json!({"unified": {"memory.high": "5"}})),
            ("memory.high".into(), "5".into())
        );
        assert_eq!(
            files(json!({"unified": {"io.max": "1:0 rbps=1\n2:0 rbps=1"}}))
                .unwrap()
                .len(),
            2
        );
    }

    #[test]
    fn settings_pids_zero_or_less_is_no_limit() {
        assert_eq!(one(json!({"pids": {"limit": -1}})).1, "max");
        assert_eq!(one(json!({"pids": {"limit": 7}})).1, "7");
    }

    #[test]
    fn settings_hugepage_size_with_a_path_is_refused() {
        assert!(files(json!({"hugepageLimits": [{"pageSize": "../2MB", "limit": 1}]})).is_err());
        assert_eq!(
            one(json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 9}]})).0,
            "hugetlb.2MB.max"
        );
    }
}
