//! Guests whose agent or kernel dies at a time that was set before they booted.
//!
//! Nothing kills PID 1 from within, but its code can be written over: it then dies of an exception, as it would of a
//! fault of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use casemate_tests::{fixture, paths};

/// What dies.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Dies {
    Agent,
    Kernel,
}

/// Starts what waits for the time, then becomes the agent. The agent moves the root, so /proc is mounted apart.
const INIT: &str = "#!/bin/busybox sh
busybox=/bin/busybox
$busybox mkdir /watched
$busybox mount -t proc proc /watched
GUEST-TOOL < /dev/null > /dev/null 2>&1 &
exec /bin/agent
";

/// Where it is, if there is one.
pub(crate) fn initrd_in(dir: &Path) -> PathBuf {
    dir.join("mortal.cpio")
}

/// Writes an initrd of the installed one and a death.
pub(crate) fn initrd(dir: &Path, what: Dies, when: SystemTime) -> PathBuf {
    let installed = fs::read(paths::prefix().join("share/casemate/initrd.cpio"));
    let installed = installed.expect("an installed initrd");
    let agent = fixture::entry(&installed, "init").expect("an agent in the initrd");
    let busybox = fs::read("/bin/busybox").expect("busybox");
    let tool = fs::read(paths::fixtures().join("guest-tool")).expect("the guest tool");
    let since = when.duration_since(SystemTime::UNIX_EPOCH);
    let when = since.unwrap_or(Duration::ZERO).as_millis();
    let verb = match what {
        Dies::Agent => "end-agent",
        Dies::Kernel => "end-kernel",
    };
    let init = INIT.replace("GUEST-TOOL", &format!("/bin/guest-tool {verb} {when}"));
    let files = [
        ("bin/agent", agent),
        ("bin/busybox", &busybox),
        ("bin/guest-tool", &tool),
    ];
    // The kernel unpacks one archive after the other; later files replace earlier ones.
    let archive = [&installed[..], &fixture::initrd(init.as_bytes(), &files)].concat();
    let path = initrd_in(dir);
    fs::write(&path, archive).expect("the scratch directory is writable");
    path
}
