//! What PID 1 does to the guest besides containers: mounts, clock, processors, the end.

use std::io::Write as _;
use std::path::Path;
use std::sync::OnceLock;

use casemate_protocol::GUEST_RUN_DIR;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};
use rustix::system::RebootCommand;

use crate::error::{Attempt, Error, Result};
use crate::{arch, cgroup, sys};

/// Most processors of a guest.
const MAX_CPUS: u32 = 32;

/// Makes a panic leave its reason in the guest's log, which the VMM reads after an abnormal end.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|info| log(2, &format!("panic: {info}"))));
}

/// Writes one line to the kernel's log, with the priority of printk (3 error, 6 information).
pub fn log(priority: u8, text: &str) {
    // devtmpfs may not be mounted yet, so the initramfs has the node too. Nobody hears of a failure here.
    if let Ok(mut kmsg) = std::fs::File::options().write(true).open("/dev/kmsg") {
        let _ = kmsg.write_all(format!("<{priority}>casemate-agent: {text}\n").as_bytes());
    }
}

/// Mounts what containers need, once. Nothing of it is needed to answer the first call.
pub(crate) fn prepare() -> Result<()> {
    static DONE: OnceLock<Result<()>> = OnceLock::new();
    DONE.get_or_init(|| {
        if std::process::id() == 1 && !Path::new("/proc/self").exists() {
            mount_all()
        } else {
            adopt()
        }
    })
    .clone()
}

/// The guest's root is the initramfs, which can't be pivoted away from: it is the root of all mounts. A bind mount
/// of it, moved over it, can.
fn make_root_pivotable() -> Result<()> {
    let what = || "make the root pivotable".to_string();
    std::fs::create_dir_all("/run").attempt(what)?;
    mount_bind("/", "/run").attempt(what)?;
    rustix::process::chdir("/run").attempt(what)?;
    mount_move(".", "/").attempt(what)?;
    rustix::process::chroot(".").attempt(what)
}

fn mount_all() -> Result<()> {
    make_root_pivotable()?;
    let usual = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    for (kind, target, flags) in [
        ("proc", "/proc", usual),
        ("sysfs", "/sys", usual),
        ("devtmpfs", "/dev", MountFlags::NOSUID | MountFlags::NOEXEC),
        ("cgroup2", cgroup::ROOT, usual),
    ] {
        std::fs::create_dir_all(target).attempt(|| format!("create {target}"))?;
        mount(kind, target, kind, flags, None).attempt(|| format!("mount {kind} at {target}"))?;
    }
    // A container without a network namespace of its own has the guest's.
    sys::loopback_up().attempt(|| "bring the loopback interface up".into())?;
    hurry_rcu();
    adopt()
}

/// Grace periods that take microseconds instead of ticks: enabling the cgroup controllers alone waits for one, idle.
/// A kernel without the switch is only slower.
fn hurry_rcu() {
    let _ = std::fs::write("/sys/kernel/rcu_expedited", "1");
}

/// The rest, where the mounts are there already.
fn adopt() -> Result<()> {
    std::fs::create_dir_all(GUEST_RUN_DIR).attempt(|| format!("create {GUEST_RUN_DIR}"))?;
    cgroup::enable_controllers()
}

/// Sets the clock and adds to the entropy pool, as far as the host sent something.
pub(crate) fn synchronize(realtime_ns: i64, entropy: &[u8]) -> Result<()> {
    const MAX_ENTROPY: usize = 64;
    if realtime_ns < 0 || entropy.len() > MAX_ENTROPY {
        return Err(Error::invalid(format!(
            "realtime {realtime_ns} must not be negative, entropy of {} bytes is at most {MAX_ENTROPY}",
            entropy.len()
        )));
    }
    if realtime_ns > 0 {
        sys::set_realtime(realtime_ns).attempt(|| format!("set the clock to {realtime_ns} ns"))?;
    }
    if !entropy.is_empty() {
        let mut bytes = [0; MAX_ENTROPY];
        bytes[..entropy.len()].copy_from_slice(entropy);
        let random = rustix::fs::open(
            "/dev/urandom",
            OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .attempt(|| "open /dev/urandom".into())?;
        sys::add_entropy(std::os::fd::AsFd::as_fd(&random), &bytes, entropy.len())
            .attempt(|| "add entropy".into())?;
    }
    Ok(())
}

/// Brings processors online until `wanted` are.
pub(crate) fn online_cpus(wanted: u32) -> Result<()> {
    if !(1..=MAX_CPUS).contains(&wanted) {
        return Err(Error::invalid(format!(
            "{wanted} vCPUs: 1 to {MAX_CPUS} are possible"
        )));
    }
    prepare()?;
    for cpu in 1..wanted {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        let now = std::fs::read_to_string(&path)
            .attempt(|| format!("read {path} (has the VM {wanted} vCPUs?)"))?;
        if now.trim() != "1" {
            std::fs::write(&path, "1").attempt(|| format!("bring processor {cpu} online"))?;
        }
    }
    Ok(())
}

/// Kills every process but the agent, writes everything to disk.
pub(crate) fn quiesce() {
    let _ = sys::kill(-1, libc::SIGKILL);
    rustix::fs::sync();
}

/// Ends the guest with everything on its disks; `how` is one of [`power`]. As PID 1 it doesn't return.
pub fn end_guest(how: u8) {
    if std::process::id() != 1 {
        return; // not a guest: a test
    }
    quiesce();
    let error = arch::write_power_port(how);
    log(3, &format!("end by way of the VMM's port: {error}"));
    let _ = rustix::system::reboot(RebootCommand::PowerOff);
    // Without ACPI that only halts; a reset ends the VM as well.
    let _ = rustix::system::reboot(RebootCommand::Restart);
}
