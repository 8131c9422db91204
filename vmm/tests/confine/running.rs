//! A VMM that runs a guest, looked at from outside. Needs a host that can run one.

use crate::guest::{Guest, Launch};
use crate::start::Starter;
use crate::{assert_every_thread_is_filtered, assert_limits_are_lowered, assert_shows_nothing};
use casemate_vmm::exit_code;
use libtest_mimic::{Failed, Trial};
use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;

const STARTERS: [Starter; 4] = [
    Starter::Root,
    Starter::User,
    Starter::RootWithoutUnshare,
    Starter::UserWithoutUnshare,
];

pub(crate) fn trials() -> impl Iterator<Item = Trial> {
    STARTERS.into_iter().flat_map(|starter| {
        let trial = |name: &str, test: fn(Starter) -> Result<(), Failed>| {
            let name = format!("kvm::running::{}::{name}", starter.name());
            Trial::test(name, move || test(starter))
        };
        [
            trial(
                "a_running_vmm_is_confined_and_ends_with_the_shim",
                is_confined,
            ),
            trial("a_forbidden_call_kills_a_running_vmm", forbidden_call_kills),
        ]
    })
}

fn is_confined(starter: Starter) -> Result<(), Failed> {
    let mut guest = Guest::start(Launch::by(starter));

    let vmm = guest.vmm();

    assert_shows_nothing(starter, &vmm);
    assert_limits_are_lowered(&vmm);
    let threads = vmm.threads();
    let names: BTreeSet<_> = threads.iter().map(|thread| thread.status("Name")).collect();
    assert!(names.is_superset(&["casemate-vmm", "vcpu0", "vcpu1"].map(str::to_owned).into()));
    assert_every_thread_is_filtered(&threads);
    for (number, target) in vmm.descriptor_targets() {
        assert!(
            guest.may_have(&target),
            "descriptor {number} is {target}, none of those that the VMM was given or needs"
        );
    }

    guest.control = None;

    assert_eq!(guest.wait().code(), Some(exit_code::STOPPED.into()));
    vmm.wait_until_gone()
}

/// Makes a thread of the VMM attempt a call, as a guest that took the thread over would.
fn forbidden_call_kills(starter: Starter) -> Result<(), Failed> {
    // The filters are the same for all: each kind of thread once will do.
    let threads: &[&str] = match starter {
        Starter::Root => &["casemate-vmm", "vcpu1", "blk"],
        _ => &["vcpu0"],
    };
    for name in threads {
        let mut guest = Guest::start(Launch::by(starter));
        let all = guest.vmm().threads();
        let Some(thread) = all.iter().find(|thread| thread.status("Name") == *name) else {
            return Err(format!("no thread {name}").into());
        };

        thread.inject_call(libc::SYS_socket)?;

        assert_eq!(guest.wait().signal(), Some(libc::SIGSYS), "{name}");
    }
    Ok(())
}
