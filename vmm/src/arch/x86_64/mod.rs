//! x86_64: direct 64-bit boot of an uncompressed Linux kernel, no firmware.
//!
//! The guest finds the memory map in `boot_params`, its processors and
//! interrupt lines in an MP table, and nothing else: no ACPI, no PCI, no PIT.

pub mod boot_params;
pub mod cpuid;
pub mod ioapic;
pub mod layout;
pub mod mptable;
pub mod registers;

use crate::bus::Bus;
use crate::ending::{Ending, Outcome};
use crate::exit_code;
use crate::memory::GuestMemory;
use ioapic::{IoApic, Route};
use kvm_bindings::{
    CpuId, KVM_IRQ_ROUTING_MSI, KVM_MAX_CPUID_ENTRIES, KvmIrqRouting, kvm_enable_cap,
    kvm_irq_routing_entry, kvm_irq_routing_msi,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use layout::{BOOT_PARAMS, CMDLINE, GDT, IDENTITY_MAP, MP_TABLE, PAGE_TABLES, TSS};
use std::sync::Arc;

/// What went wrong while the machine was put together.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A KVM request failed.
    #[error("KVM: {what}")]
    Kvm {
        /// The request in words.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A boot structure didn't fit into guest memory: the layout is wrong.
    #[error("guest memory at {address:#x}")]
    Memory {
        /// Guest physical address.
        address: u64,
        /// The bounds check that failed.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// The command line is longer than its place.
    #[error("kernel command line of {0} bytes: at most {max}", max = layout::CMDLINE_MAX)]
    CmdlineTooLong(usize),
}

/// Names the KVM request in an error.
pub(crate) fn kvm_error(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Kvm { what, source }
}

/// Gives the VM its interrupt controllers: local APICs in KVM, the IO-APIC
/// here, no PIC. No PIT: the guest's clock is kvmclock, its timer the TSC deadline.
pub fn create_irqchip(vm: &VmFd) -> Result<(), Error> {
    vm.set_identity_map_address(IDENTITY_MAP)
        .map_err(kvm_error("set the identity map's address"))?;
    vm.set_tss_address(TSS as usize)
        .map_err(kvm_error("set the TSS address"))?;
    // Without a virtual PMU the guest's kernel doesn't probe one, and the host exposes less.
    let pmu = kvm_enable_cap {
        cap: kvm_bindings::KVM_CAP_PMU_CAPABILITY,
        args: [u64::from(kvm_bindings::KVM_PMU_CAP_DISABLE), 0, 0, 0],
        ..Default::default()
    };
    // Linux before 5.18 lacks the capability; the CPUID leaves are cleared either way.
    let _ = vm.enable_cap(&pmu);
    let split = kvm_enable_cap {
        cap: kvm_bindings::KVM_CAP_SPLIT_IRQCHIP,
        args: [layout::IO_APIC_PINS as u64, 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&split)
        .map_err(kvm_error("create the interrupt controllers"))
}

/// Puts an IO-APIC with so many lines on the bus: Linux saves and restores each at boot,
/// and every access is a VM exit.
pub fn attach_ioapic(vm: &Arc<VmFd>, ending: &Arc<Ending>, lines: usize, mmio: &mut Bus) {
    let (vm, ending) = (vm.clone(), ending.clone());
    let set = move |routes: &[Route]| {
        if let Err(error) = set_routes(&vm, routes) {
            let reason = format!("KVM refused interrupt routes: {error}");
            ending.end(Outcome::new(exit_code::VMM_FAILED, reason));
        }
    };
    let ioapic = Arc::new(IoApic::new(lines, Box::new(set)));
    mmio.insert(layout::IO_APIC.into(), ioapic::SIZE, ioapic);
}

/// All routes in one go.
fn set_routes(vm: &VmFd, routes: &[Route]) -> Result<(), kvm_ioctls::Error> {
    let entry = |route: &Route| {
        let mut entry = kvm_irq_routing_entry {
            gsi: route.pin.into(),
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        entry.u.msi = kvm_irq_routing_msi {
            address_lo: route.address,
            address_hi: 0,
            data: route.data,
            ..Default::default()
        };
        entry
    };
    let entries: Vec<_> = routes.iter().map(entry).collect();
    let table =
        KvmIrqRouting::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
    vm.set_gsi_routing(&table)
}

/// The CPUID that every vCPU's own is derived from.
pub fn host_cpuid(kvm: &Kvm) -> Result<CpuId, Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm_error("get the supported CPUID"))
}

/// Gives a vCPU its CPUID: the identity that the MP table announces.
pub fn configure_vcpu(
    kvm: &Kvm,
    vcpu: &VcpuFd,
    host: &CpuId,
    index: u8,
    count: u8,
) -> Result<(), Error> {
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let entries = cpuid::for_vcpu(host.as_slice(), index, count, deadline);
    let cpuid = CpuId::from_entries(&entries).map_err(|_| Error::Kvm {
        what: "build a CPUID table",
        source: kvm_ioctls::Error::new(libc::E2BIG),
    })?;
    vcpu.set_cpuid2(&cpuid).map_err(kvm_error("set CPUID"))?;
    registers::set_msrs(vcpu)
}

/// A loaded kernel, ready to be entered.
#[derive(Debug, Clone, Copy)]
pub struct BootInfo<'a> {
    /// Physical address of `startup_64`.
    pub entry: u64,
    /// The whole command line.
    pub cmdline: &'a str,
    /// Address and size of the initrd.
    pub initrd: Option<(u64, u64)>,
    /// Possible processors.
    pub vcpus: u8,
    /// Interrupt lines that devices use.
    pub irqs: &'a [u8],
}

/// Writes all that Linux's 64-bit entry expects and points the first vCPU at it.
pub fn prepare_boot(memory: &GuestMemory, vcpu: &VcpuFd, boot: &BootInfo<'_>) -> Result<(), Error> {
    if boot.cmdline.len() >= layout::CMDLINE_MAX {
        return Err(Error::CmdlineTooLong(boot.cmdline.len()));
    }
    let params = boot_params::build(memory.map(), boot);
    memory.write(BOOT_PARAMS, boot_params::bytes(&params))?;
    memory.write(CMDLINE, boot.cmdline.as_bytes())?; // memory is zero: the string is terminated
    memory.write(MP_TABLE, &mptable::build(boot.vcpus, boot.irqs))?;
    memory.write(GDT, &registers::gdt_bytes())?;
    memory.write(PAGE_TABLES, &registers::page_tables())?;
    registers::set_long_mode(vcpu, boot.entry)
}
