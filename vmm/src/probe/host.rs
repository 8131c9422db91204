//! What is missing on a host that can't run guests, and how to mend it.

use super::ProbeError;
use crate::ending::chain;
use std::fs;
use std::path::Path;

/// Who made the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vendor {
    /// VT-x, `kvm_intel`.
    Intel,
    /// AMD-V, `kvm_amd`.
    Amd,
    /// Anything else.
    Other,
}

impl Vendor {
    fn module(self) -> &'static str {
        match self {
            Self::Intel => "kvm_intel",
            Self::Amd => "kvm_amd",
            Self::Other => "kvm",
        }
    }

    fn technique(self) -> &'static str {
        match self {
            Self::Intel => "Intel VT-x",
            Self::Amd => "AMD-V (also called SVM)",
            Self::Other => "hardware virtualization",
        }
    }
}

/// What the host says about its virtualization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostFacts {
    /// Who made the processor.
    pub vendor: Vendor,
    /// The processor offers vmx or svm.
    pub virtualization: bool,
    /// The host is itself a virtual machine.
    pub in_vm: bool,
    /// KVM's module for this processor is loaded or built in.
    pub module: bool,
}

impl HostFacts {
    /// Looks at /proc/cpuinfo and /sys/module.
    pub fn read() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let mut facts = Self::from_cpuinfo(&cpuinfo);
        facts.module = Path::new("/sys/module")
            .join(facts.vendor.module())
            .exists();
        facts
    }

    fn from_cpuinfo(cpuinfo: &str) -> Self {
        let value = |key: &str| {
            let mut lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
            let found = lines.find(|(name, _)| name.trim() == key);
            found.map_or("", |(_, value)| value.trim())
        };
        let flags: Vec<&str> = value("flags").split_whitespace().collect();
        Self {
            vendor: match value("vendor_id") {
                "GenuineIntel" => Vendor::Intel,
                "AuthenticAMD" | "HygonGenuine" => Vendor::Amd,
                _ => Vendor::Other,
            },
            virtualization: flags.contains(&"vmx") || flags.contains(&"svm"),
            in_vm: flags.contains(&"hypervisor"),
            module: false,
        }
    }
}

/// A problem in a sentence and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnosis {
    /// What is missing.
    pub problem: String,
    /// How to mend it.
    pub mend: String,
}

impl std::fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}\n{}", self.problem, self.mend)
    }
}

/// Names what stands behind a failed probe on this kind of host.
pub fn diagnose(error: &ProbeError, host: &HostFacts) -> Diagnosis {
    let (problem, mend) = match error {
        ProbeError::Permission(_) => (
            error.to_string(),
            "Add the user to the group that owns it and log in again: sudo usermod -aG kvm \"$USER\"".into(),
        ),
        ProbeError::UnknownTsc => (
            error.to_string(),
            "Boot the host's kernel with tsc_early_khz= set to the processor's nominal frequency in kHz.".into(),
        ),
        ProbeError::Version { .. } | ProbeError::Capability(_) => (
            error.to_string(),
            "Update the host's kernel: Linux 5.15 or later is needed.".into(),
        ),
        ProbeError::Absent(device) if host.virtualization && host.module => (
            format!("{error}, though KVM is loaded"),
            format!(
                "In a container, hand it in (docker run --device {0}); else: sudo mknod {0} c 10 232",
                device.display()
            ),
        ),
        ProbeError::Absent(_) if host.virtualization => (
            format!("{error}: KVM is not loaded"),
            format!(
                "Load it: sudo modprobe {}. Should that fail, virtualization is locked in the firmware (BIOS): turn on {} there.",
                host.vendor.module(),
                host.vendor.technique()
            ),
        ),
        _ if !host.virtualization => without_virtualization(error, host),
        _ => (
            chain(error),
            format!(
                "{} is there, but does not run a normal guest. {}",
                host.vendor.technique(),
                if host.in_vm {
                    "This machine is a virtual one: update its host's kernel and check nested virtualization there."
                } else {
                    "Update the host's kernel and the firmware, and look at `dmesg | grep kvm`."
                }
            ),
        ),
    };
    Diagnosis { problem, mend }
}

/// The processor offers neither vmx nor svm.
fn without_virtualization(error: &ProbeError, host: &HostFacts) -> (String, String) {
    let technique = host.vendor.technique();
    if host.in_vm {
        let module = host.vendor.module();
        return (
            format!(
                "{}: this machine is a virtual one without nested virtualization",
                chain(error)
            ),
            format!(
                "On its host, set {module}.nested=1 (see /sys/module/{module}/parameters/nested) and give this machine the host's CPU model; in a cloud, choose a kind of machine with nested virtualization, or bare metal."
            ),
        );
    }
    (
        format!("{}: the processor offers no virtualization", chain(error)),
        format!("Turn on {technique} in the firmware (BIOS). Some processors don't have it."),
    )
}

#[cfg(test)]
mod tests {
    use super::super::DEVICE;
    use super::*;

    const HEALTHY: HostFacts = HostFacts {
        vendor: Vendor::Intel,
        virtualization: true,
        in_vm: false,
        module: true,
    };

    #[test]
    fn cpuinfo_of_amd_vm_without_svm_is_understood() {
        let cpuinfo = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu sse2 hypervisor\n\nprocessor\t: 1\n";

        let facts = HostFacts::from_cpuinfo(cpuinfo);

        assert_eq!(
            (facts.vendor, facts.virtualization, facts.in_vm),
            (Vendor::Amd, false, true)
        );
    }

    #[test]
    fn cpuinfo_that_is_empty_gives_no_virtualization() {
        assert!(!HostFacts::from_cpuinfo("").virtualization);
    }

    #[test]
    fn diagnose_permission_names_the_group() {
        let diagnosis = diagnose(&ProbeError::Permission(DEVICE.into()), &HEALTHY);

        assert!(diagnosis.mend.contains("usermod -aG kvm"), "{diagnosis}");
    }

    #[test]
    fn diagnose_absent_with_flag_but_no_module_names_modprobe() {
        let host = HostFacts {
            module: false,
            ..HEALTHY
        };

        let diagnosis = diagnose(&ProbeError::Absent(DEVICE.into()), &host);

        assert!(diagnosis.mend.contains("modprobe kvm_intel"), "{diagnosis}");
    }

    #[test]
    fn diagnose_absent_with_module_names_the_container() {
        let diagnosis = diagnose(&ProbeError::Absent(DEVICE.into()), &HEALTHY);

        assert!(diagnosis.mend.contains("--device /dev/kvm"), "{diagnosis}");
    }

    #[test]
    fn diagnose_without_flag_on_metal_names_the_firmware() {
        let host = HostFacts {
            virtualization: false,
            vendor: Vendor::Amd,
            ..HEALTHY
        };

        let diagnosis = diagnose(&ProbeError::Absent(DEVICE.into()), &host);

        assert!(diagnosis.mend.contains("AMD-V"), "{diagnosis}");
        assert!(diagnosis.mend.contains("BIOS"), "{diagnosis}");
    }

    #[test]
    fn diagnose_failing_guest_in_vm_names_nested_virtualization() {
        let host = HostFacts {
            virtualization: false,
            in_vm: true,
            ..HEALTHY
        };
        let error = ProbeError::Failed("internal error 1".into());

        let diagnosis = diagnose(&error, &host);

        assert!(
            diagnosis.problem.contains("without nested virtualization"),
            "{diagnosis}"
        );
        assert!(diagnosis.mend.contains("kvm_intel.nested=1"), "{diagnosis}");
    }

    #[test]
    fn diagnose_failing_guest_with_flag_keeps_the_reason() {
        let diagnosis = diagnose(&ProbeError::TimedOut, &HEALTHY);

        assert!(diagnosis.problem.contains("no answer"), "{diagnosis}");
    }
}
