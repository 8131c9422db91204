//! What the host keeps a sandbox to, whatever its guest does: from the spec's resources, of which the guest is told
//! only those that it can apply itself.

use super::{Host, PlanError, annotation, guest_mib};
use crate::size::MIB;
use casemate_vmm::config::{DiskLimits, RateLimit};
use oci_spec::runtime::{LinuxBlockIo, LinuxResources, LinuxThrottleDevice, Spec};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// Holds the bytes per second that a container's network devices pass in each direction.
pub const NETWORK_RATE: &str = "io.casemate.network-rate";
/// What a sandbox's processes take beside the guest's memory, pages of the host's cache included.
const PROCESSES: u64 = 64 * MIB;
/// The host's page tables of a guest, its own and the processor's, take 16 bytes for each page of 4 KiB, and its index of shared memory 8 more.
const PAGE_TABLES_SHARE: u64 = 128;
/// The kernel's highest number of a processor is below.
const MAX_CPUS: u32 = 8192;

/// Limits on the host's side.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Limits {
    /// Processors that the sandbox's threads may run on; empty: any.
    pub cpus: Vec<u32>,
    /// Microseconds of processor time in each period of so many.
    pub quota: Option<(u64, u64)>,
    /// The spec's CPU shares, 2 to 262144.
    pub shares: Option<u64>,
    /// Bytes of all its processes together.
    pub memory: Option<u64>,
    /// Of its disks, by the device that they lie on: major and minor number.
    pub disks: BTreeMap<(u32, u32), DiskLimits>,
    /// Bytes per second of a network device in each direction.
    pub network: Option<u64>,
}

impl Limits {
    /// Whether a control group is needed to keep them.
    pub fn need_group(&self) -> bool {
        self.quota.is_some() || self.shares.is_some() || self.memory.is_some()
    }
}

/// Reads the limits of a spec.
pub(super) fn limits(spec: &Spec) -> Result<Limits, PlanError> {
    let mut limits = Limits {
        network: network(spec)?,
        ..Limits::default()
    };
    if let Some(resources) = resources(spec) {
        limits.add(resources)?;
    }
    Ok(limits)
}

impl Limits {
    /// Puts those that `resources` names in place of what was there.
    pub fn add(&mut self, resources: &LinuxResources) -> Result<(), PlanError> {
        if let Some(cpu) = resources.cpu() {
            if let Some(list) = cpu.cpus() {
                self.cpus = cpus(list)?;
            }
            self.quota = match (cpu.quota(), cpu.period().unwrap_or(100_000)) {
                (Some(quota @ 1..), period @ 1..) => Some((quota as u64, period)),
                (Some(..=-1), _) => None,
                // 0 says nothing.
                _ => self.quota,
            };
            self.shares = cpu.shares().filter(|shares| *shares > 0).or(self.shares);
        }
        if let Some(memory) = resources.memory() {
            let positive = |bytes: i64| u64::try_from(bytes).ok().filter(|bytes| *bytes > 0);
            if let Some(limit) = memory.limit() {
                self.memory = positive(limit).map(of_processes);
            }
        }
        if let Some(io) = resources.block_io() {
            for (devices, pick) in throttles(io) {
                for device in devices.iter().flatten() {
                    *pick(self.disks.entry(number(device)?).or_default()) = device.rate();
                }
            }
        }
        Ok(())
    }
}

/// One of a disk's four limits.
type Pick = fn(&mut DiskLimits) -> &mut u64;

/// Bytes of all processes of a sandbox whose container may use `limit` bytes.
fn of_processes(limit: u64) -> u64 {
    let guest = guest_mib(limit) * MIB;
    guest + guest / PAGE_TABLES_SHARE + PROCESSES
}

/// Whether a change of resources asks for what a sandbox has from its start: processors, and limits of disks.
pub fn asks_for_fixed(change: &LinuxResources) -> bool {
    let cpus = change.cpu().as_ref().and_then(|cpu| cpu.cpus().as_ref());
    let disks = change.block_io().as_ref().is_some_and(|io| {
        let lists = throttles(io).map(|(devices, _)| devices);
        lists
            .iter()
            .any(|devices| devices.as_ref().is_some_and(|d| !d.is_empty()))
    });
    disks || cpus.is_some_and(|list| !list.is_empty())
}

/// A device's major and minor number.
fn number(device: &LinuxThrottleDevice) -> Result<(u32, u32), PlanError> {
    let (major, minor) = (device.major(), device.minor());
    let number = |n: i64| u32::try_from(n).ok();
    let both = number(major).zip(number(minor));
    both.ok_or(PlanError::Device { major, minor })
}

/// A spec's lists of limits by device, and which of a disk's limits each is.
fn throttles(io: &LinuxBlockIo) -> [(&Option<Vec<LinuxThrottleDevice>>, Pick); 4] {
    [
        (io.throttle_read_bps_device(), |l| {
            &mut l.read.bytes_per_second
        }),
        (io.throttle_write_bps_device(), |l| {
            &mut l.write.bytes_per_second
        }),
        (io.throttle_read_iops_device(), |l| {
            &mut l.read.ops_per_second
        }),
        (io.throttle_write_iops_device(), |l| {
            &mut l.write.ops_per_second
        }),
    ]
}

/// The processors that a spec leaves to a sandbox.
pub(super) fn processors(spec: &Spec, host: Host) -> Result<u32, PlanError> {
    let list = resources(spec).and_then(|r| r.cpu().as_ref()?.cpus().clone());
    match cpus(list.as_deref().unwrap_or_default())?.len() as u32 {
        0 => Ok(host.cpus),
        named => Ok(named.min(host.cpus)),
    }
}

/// Takes out of the guest's spec what only the host can keep: its processors and devices have other numbers in there.
pub(super) fn without_hosts(spec: &mut Spec) {
    let linux = spec.linux_mut().as_mut();
    let Some(resources) = linux.and_then(|linux| linux.resources_mut().as_mut()) else {
        return;
    };
    if let Some(mut cpu) = resources.cpu().clone() {
        cpu.set_cpus(None).set_mems(None);
        resources.set_cpu(Some(cpu));
    }
    if let Some(mut io) = resources.block_io().clone() {
        io.set_throttle_read_bps_device(None)
            .set_throttle_write_bps_device(None)
            .set_throttle_read_iops_device(None)
            .set_throttle_write_iops_device(None)
            .set_weight_device(None);
        resources.set_block_io(Some(io));
    }
}

fn resources(spec: &Spec) -> Option<&LinuxResources> {
    spec.linux().as_ref()?.resources().as_ref()
}

fn network(spec: &Spec) -> Result<Option<u64>, PlanError> {
    let Some(text) = annotation(spec, NETWORK_RATE) else {
        return Ok(None);
    };
    match text.parse() {
        Ok(0) | Err(_) => Err(PlanError::NetworkRate(text.to_owned())),
        Ok(rate) => Ok(Some(rate)),
    }
}

/// The limit of a network device.
pub fn rate(bytes_per_second: u64) -> RateLimit {
    RateLimit {
        bytes_per_second,
        ops_per_second: 0,
    }
}

/// A list of processors as cpuset(7) has it, such as `0-2,7`, in order and each once.
pub fn cpus(list: &str) -> Result<Vec<u32>, PlanError> {
    let bad = || PlanError::Cpuset(list.to_owned());
    let mut all = Vec::new();
    for part in list.split(',').filter(|_| !list.trim().is_empty()) {
        all.extend(range(part.trim()).ok_or_else(bad)?);
        if all.len() > MAX_CPUS as usize {
            return Err(bad());
        }
    }
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

fn range(text: &str) -> Option<RangeInclusive<u32>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let number = |text: &str| text.parse().ok().filter(|n| *n < MAX_CPUS);
    let (first, last) = (number(first)?, number(last)?);
    (first <= last).then_some(first..=last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn spec(resources: serde_json::Value) -> Spec {
        let spec = json!({"ociVersion": "1.2.0", "linux": {"resources": resources}});
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn limits_are_the_specs_and_the_guest_is_told_what_it_can_keep() {
        let device = |rate: u64| json!([{"major": 254, "minor": 1, "rate": rate}]);
        let mut spec = spec(json!({
            "cpu": {"quota": 50_000, "period": 100_000, "cpus": "1,0-1", "mems": "0"},
            "memory": {"limit": 64 << 20, "reservation": 32 << 20},
            "blockIO": {"throttleReadBpsDevice": device(5), "throttleWriteIOPSDevice": device(7)},
        }));
        let limits = limits(&spec).unwrap();
        assert_eq!(limits.cpus, [0, 1]);
        assert_eq!(limits.quota, Some((50_000, 100_000)));
        assert_eq!(limits.memory, Some(of_processes(64 << 20)));
        let disk = limits.disks[&(254, 1)];
        assert_eq!(
            (disk.read.bytes_per_second, disk.write.ops_per_second),
            (5, 7)
        );
        assert!(limits.need_group());

        without_hosts(&mut spec);
        let resources = resources(&spec).unwrap();
        let cpu = resources.cpu().as_ref().unwrap();
        assert_eq!(
            (cpu.cpus(), cpu.mems(), cpu.quota()),
            (&None, &None, Some(50_000))
        );
        let io = resources.block_io().as_ref().unwrap();
        assert_eq!(io.throttle_read_bps_device(), &None);
        assert!(resources.memory().is_some());
    }

    #[test]
    fn limits_of_nonsense_are_refused() {
        for resources in [
            json!({"cpu": {"cpus": "0-"}}),
            json!({"blockIO": {"throttleReadBpsDevice": [{"major": -1, "minor": 0, "rate": 1}]}}),
        ] {
            assert!(limits(&spec(resources.clone())).is_err(), "{resources}");
        }
        assert_eq!(limits(&spec(json!({}))).unwrap(), Limits::default());
        assert!(!Limits::default().need_group());
    }

    #[test]
    fn cpus_of_lists_and_of_what_is_none() {
        assert!(cpus("").unwrap().is_empty());
        assert_eq!(cpus("3, 0-2,2").unwrap(), [0, 1, 2, 3]);
        for list in ["a", "1-", "-1", "2-1", "1,,2", "9999", "0-4294967295"] {
            assert!(cpus(list).is_err(), "{list}");
        }
    }

    proptest! {
        #[test]
        fn cpus_of_any_text_are_bounded(list in "[0-9,-]{0,40}") {
            if let Ok(all) = cpus(&list) {
                prop_assert!(all.iter().all(|cpu| *cpu < MAX_CPUS));
            }
        }
    }
}
