//! What depends on the processor's architecture: everything else in the crate
//! compiles anywhere. `cfg(target_arch)` appears only here.

#[cfg(target_arch = "x86_64")]
pub mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64 as current;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("casemate-vmm runs on x86_64 only so far");
