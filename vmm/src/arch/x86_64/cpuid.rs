//! The CPUID that a guest sees: what KVM supports, with the guest's own topology.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const FEATURES: u32 = 0x1;
const CACHES_INTEL: u32 = 0x4;
const POWER: u32 = 0x6;
const PMU_INTEL: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const FEATURES_AMD: u32 = 0x8000_0001;
const SIZES_AMD: u32 = 0x8000_0008;
const CACHES_AMD: u32 = 0x8000_001d;
const TOPOLOGY_AMD: u32 = 0x8000_001e;
const PMU_AMD: u32 = 0x8000_0022;
const TOPOLOGY_AMD_V2: u32 = 0x8000_0026;

const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const ECX_PDCM: u32 = 1 << 15;
const EDX_HTT: u32 = 1 << 28;
/// Always-running APIC timer: without it Linux wants a PIT beside the deadline timer.
const EAX_ARAT: u32 = 1 << 2;
const ECX_PERFCTR_CORE: u32 = 1 << 23;
const ECX_PERFCTR_NB: u32 = 1 << 24;

const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// CPUID of vCPU `index` of `count`: one package of `count` cores of one thread each.
pub fn for_vcpu(
    host: &[kvm_cpuid_entry2],
    index: u8,
    count: u8,
    deadline_timer: bool,
) -> Vec<kvm_cpuid_entry2> {
    let apic_id = u32::from(index);
    let count = u32::from(count);
    let mut entries: Vec<_> = host
        .iter()
        .filter(|e| !matches!(e.function, TOPOLOGY | TOPOLOGY_V2 | TOPOLOGY_AMD_V2))
        .copied()
        .collect();
    for entry in &mut entries {
        adjust(entry, apic_id, count, deadline_timer);
    }
    entries.extend(topology(apic_id, count));
    entries
}

fn adjust(entry: &mut kvm_cpuid_entry2, apic_id: u32, count: u32, deadline_timer: bool) {
    match entry.function {
        FEATURES => {
            // Bits 31:24 initial APIC id, 23:16 addressable ids in the package.
            entry.ebx = (entry.ebx & 0xffff) | apic_id << 24 | count << 16;
            entry.ecx |= ECX_HYPERVISOR | ECX_X2APIC;
            entry.ecx &= !ECX_PDCM;
            set(&mut entry.ecx, ECX_TSC_DEADLINE, deadline_timer);
            set(&mut entry.edx, EDX_HTT, count > 1);
        }
        CACHES_INTEL if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14 | (count - 1) << 26;
        }
        POWER => entry.eax = EAX_ARAT,
        // No PMU: neither probed by the guest nor exposed by the host.
        PMU_INTEL | PMU_AMD => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        FEATURES_AMD => entry.ecx &= !(ECX_PERFCTR_CORE | ECX_PERFCTR_NB),
        SIZES_AMD => entry.ecx = core_bits(count) << 12 | (count - 1),
        CACHES_AMD if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14;
        }
        // One thread a core, one node.
        TOPOLOGY_AMD => (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id, 0),
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on {
        *register | bit
    } else {
        *register & !bit
    };
}

/// Bits of the APIC id that number the cores.
fn core_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// Extended topology (x2APIC ids): threads, then cores.
fn topology(apic_id: u32, count: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, kind: u32, shift: u32, logical: u32| kvm_cpuid_entry2 {
        function: TOPOLOGY,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: logical,
        ecx: kind << 8 | index,
        edx: apic_id,
        ..Default::default()
    };
    [
        level(0, LEVEL_SMT, 0, 1),
        level(1, LEVEL_CORE, core_bits(count), count),
        level(2, 0, 0, 0), // the end
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found = entries
            .iter()
            .find(|e| e.function == function && e.index == index);
        *found.expect("leaf")
    }

    #[test]
    fn features_carry_apic_id_and_count() {
        let host = [entry(FEATURES, [0, 0xffff_0800, 0, 0])];

        let guest = for_vcpu(&host, 3, 4, true);

        let features = leaf(&guest, FEATURES, 0);
        assert_eq!(features.ebx, 0x0304_0800);
        assert_ne!(features.ecx & ECX_HYPERVISOR, 0);
        assert_ne!(features.ecx & ECX_TSC_DEADLINE, 0);
        assert_ne!(features.edx & EDX_HTT, 0);
    }

    #[test]
    fn features_without_deadline_timer_do_not_offer_it() {
        let host = [entry(FEATURES, [0, 0, ECX_TSC_DEADLINE, EDX_HTT])];

        let guest = for_vcpu(&host, 0, 1, false);

        let features = leaf(&guest, FEATURES, 0);
        assert_eq!(features.ecx & ECX_TSC_DEADLINE, 0);
        assert_eq!(features.edx & EDX_HTT, 0);
    }

    #[test]
    fn topology_of_host_is_replaced() {
        let host = [
            entry(TOPOLOGY, [9, 9, 9, 9]),
            entry(TOPOLOGY_V2, [9, 9, 9, 9]),
        ];

        let guest = for_vcpu(&host, 5, 6, true);

        assert_eq!(guest.len(), 3);
        let cores = leaf(&guest, TOPOLOGY, 1);
        assert_eq!(
            (cores.eax, cores.ebx, cores.ecx, cores.edx),
            (3, 6, 0x201, 5)
        );
    }

    #[test]
    fn pmu_is_hidden() {
        let host = [
            entry(PMU_INTEL, [2, 2, 2, 2]),
            entry(FEATURES_AMD, [0, 0, ECX_PERFCTR_CORE | 1, 0]),
        ];

        let guest = for_vcpu(&host, 0, 1, true);

        assert_eq!(leaf(&guest, PMU_INTEL, 0).eax, 0);
        assert_eq!(leaf(&guest, FEATURES_AMD, 0).ecx, 1);
    }

    #[test]
    fn amd_sizes_count_the_guests_cores() {
        let host = [entry(SIZES_AMD, [0x3030, 0, 0x703f, 0])];

        let guest = for_vcpu(&host, 0, 32, true);

        let sizes = leaf(&guest, SIZES_AMD, 0);
        assert_eq!((sizes.eax, sizes.ecx), (0x3030, 5 << 12 | 31));
    }
}
