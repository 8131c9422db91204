//! Confinement, looked at from outside: a process enters it, and `/proc/PID` must tell what is left.
//!
//! The program starts itself as that process (`subject`), so it has a `main`
//! of its own instead of the test harness: confinement needs a process with one thread.
//!
//! With the feature `kvm-tests` it looks at VMMs with guests as well (`kvm::…`): `vmm/tests/run` starts those.

#[cfg(feature = "kvm-tests")]
mod guest;
mod observe;
#[cfg(feature = "kvm-tests")]
mod rules;
#[cfg(feature = "kvm-tests")]
mod running;
mod start;
mod subject;

use libtest_mimic::{Arguments, Failed, Trial};
use observe::{Process, SETTINGS};
use start::{Starter, Subject};
use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;

fn main() {
    if let Some(order) = std::env::args()
        .nth(1)
        .and_then(|arg| arg.strip_prefix("subject:").map(str::to_owned))
    {
        subject::run(&order);
    }
    let args = Arguments::from_args();
    let mut trials = Vec::new();
    for starter in Starter::ALL {
        if let Some(reason) = starter.missing() {
            eprintln!("{}: can't be tested here, {reason}", starter.name());
            continue;
        }
        let mut add = |name: &str, test: fn(Starter) -> Result<(), Failed>| {
            let name = format!("{}::{name}", starter.name());
            trials.push(Trial::test(name, move || test(starter)));
        };
        add(
            "a_confined_process_shows_nothing_of_the_host",
            shows_nothing,
        );
        add("the_probe_of_confinement_passes", probe_passes);
        add("descriptors_not_listed_are_closed", only_listed_descriptors);
        add("every_thread_is_filtered", every_thread_is_filtered);
        add("limits_are_lowered", limits_are_lowered);
        add(
            "a_forbidden_call_kills_whatever_thread_made_it",
            forbidden_call_kills,
        );
        add("a_forbidden_argument_kills", forbidden_argument_kills);
        add("a_new_thread_after_the_filters_kills", new_thread_kills);
        add("an_abort_ends_the_process", abort_ends);
        add("the_exit_code_is_passed_on", exit_code_is_passed_on);
        add("the_deadly_signal_is_passed_on", signal_is_passed_on);
        add(
            "a_request_to_end_reaches_the_vmm",
            request_to_end_is_handed_on,
        );
        add(
            "the_end_of_the_started_process_ends_the_vmm",
            killed_with_the_started_process,
        );
        add(
            "a_directory_or_a_closed_descriptor_is_refused",
            unfit_descriptors_are_refused,
        );
        add(
            "too_few_open_files_is_an_error_that_says_so",
            too_few_open_files,
        );
        if starter.has_namespaces() {
            add("the_waiting_process_is_confined_too", waiter_is_confined);
        } else {
            add(
                "no_namespaces_and_no_landlock_is_an_error_that_says_what_to_change",
                nothing_available,
            );
        }
    }
    #[cfg(feature = "kvm-tests")]
    trials.extend(running::trials().chain([rules::trial()]));
    libtest_mimic::run(&args, trials).exit();
}

fn shows_nothing(starter: Starter) -> Result<(), Failed> {
    let subject = Subject::start(starter, "idle");
    let report = subject.ready()?;

    let vmm = subject.vmm();

    assert_eq!(report["isolation"], starter.isolation());
    assert_shows_nothing(starter, &vmm);
    if starter.has_namespaces() {
        assert_eq!(report["open"], "ENOENT");
        assert_eq!(report["write"], "EROFS");
    } else {
        for attempt in ["open", "list", "write"] {
            assert_eq!(report[attempt], "EACCES", "Landlock lets it {attempt}");
        }
    }
    Ok(())
}

fn probe_passes(starter: Starter) -> Result<(), Failed> {
    let output = start::probe(starter);

    assert!(output.status.success(), "{output:?}");
    Ok(())
}

/// No privilege, and no view of the host.
fn assert_shows_nothing(starter: Starter, vmm: &Process) {
    assert_eq!(vmm.status("NoNewPrivs"), "1");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(vmm.status(set), "0000000000000000", "{set}");
    }
    if starter.can_empty_bounding_set() {
        assert_eq!(vmm.status("CapBnd"), "0000000000000000");
    }
    assert_eq!(vmm.ids("Uid"), BTreeSet::from([starter.uid_within()]));
    assert_eq!(vmm.ids("Gid"), BTreeSet::from([starter.uid_within()]));
    assert_eq!(vmm.status("Groups"), "");
    assert_eq!(
        vmm.owner(),
        starter.root(),
        "the process is dumpable: its files in /proc belong to its user"
    );
    if starter.has_namespaces() {
        let own = Process::own();
        for kind in starter.namespaces() {
            assert_ne!(
                vmm.namespace(kind),
                own.namespace(kind),
                "{kind} namespace is shared with the host"
            );
        }
        assert_eq!(vmm.status("NSpid").split_whitespace().last(), Some("1"));
        assert_eq!(vmm.root_entries(), Vec::<String>::new());
        assert_eq!(vmm.mounts(), ["/ ro,nosuid,nodev,noexec,relatime tmpfs"]);
        assert_eq!(vmm.id_map("uid_map"), starter.id_map());
        assert_eq!(vmm.id_map("gid_map"), starter.id_map());
        assert_eq!(vmm.network_devices(), ["lo"]);
    }
}

fn only_listed_descriptors(starter: Starter) -> Result<(), Failed> {
    let subject = Subject::start(starter, "idle"); // which inherits and opens more than it keeps
    let report = subject.ready()?;

    let descriptors = subject.vmm().descriptors();

    let kept = ["0", "1", "2", &report["kept"]].map(str::to_owned);
    assert_eq!(descriptors, BTreeSet::from(kept));
    Ok(())
}

fn every_thread_is_filtered(starter: Starter) -> Result<(), Failed> {
    let subject = Subject::start(starter, "idle");
    subject.ready()?;

    let threads = subject.vmm().threads();

    let names: BTreeSet<_> = threads.iter().map(|thread| thread.status("Name")).collect();
    assert_eq!(threads.len(), 3, "{names:?}");
    assert!(names.contains("Vcpu") && names.contains("BlockWorker"));
    assert_every_thread_is_filtered(&threads);
    Ok(())
}

fn assert_every_thread_is_filtered(threads: &[Process]) {
    for thread in threads {
        assert_eq!(thread.status("Seccomp"), "2", "{}", thread.status("Name"));
        assert_eq!(thread.status("NoNewPrivs"), "1");
        assert_eq!(thread.status("CapEff"), "0000000000000000");
    }
}

fn limits_are_lowered(starter: Starter) -> Result<(), Failed> {
    let subject = Subject::start(starter, "idle");
    subject.ready()?;

    let vmm = subject.vmm();

    assert_eq!(vmm.limit("Max open files"), ["64", "64"]);
    assert_limits_are_lowered(&vmm);
    Ok(())
}

fn assert_limits_are_lowered(vmm: &Process) {
    for limit in [
        "Max core file size",
        "Max processes",
        "Max locked memory",
        "Max msgqueue size",
        "Max nice priority",
        "Max realtime priority",
    ] {
        assert_eq!(vmm.limit(limit), ["0", "0"], "{limit}");
    }
}

fn forbidden_call_kills(starter: Starter) -> Result<(), Failed> {
    for kind in ["EventLoop", "Vcpu", "BlockWorker"] {
        for call in ["socket", "openat", "kill"] {
            let end = Subject::start(starter, &format!("do {call} {kind}")).end();
            assert_eq!(end.signal(), Some(libc::SIGSYS), "{call} on {kind}: {end}");
        }
    }
    Ok(())
}

fn forbidden_argument_kills(starter: Starter) -> Result<(), Failed> {
    let cases = [
        "ioctl Vcpu",
        "ioctl EventLoop",
        "map-executable BlockWorker",
        "protect-executable EventLoop",
        "signal-another EventLoop",
    ];
    for case in cases {
        let end = Subject::start(starter, &format!("do {case}")).end();
        assert_eq!(end.signal(), Some(libc::SIGSYS), "{case}: {end}");
    }
    Ok(())
}

fn new_thread_kills(starter: Starter) -> Result<(), Failed> {
    let end = Subject::start(starter, "do thread EventLoop").end();
    assert_eq!(end.signal(), Some(libc::SIGSYS), "{end}");
    Ok(())
}

fn abort_ends(starter: Starter) -> Result<(), Failed> {
    for kind in ["EventLoop", "Vcpu", "BlockWorker"] {
        let end = Subject::start(starter, &format!("do abort {kind}")).end();
        // SIGABRT doesn't kill PID 1 of a namespace; abort() then dies of an illegal instruction.
        let deadly = if starter.has_namespaces() {
            libc::SIGSEGV
        } else {
            libc::SIGABRT
        };
        assert_eq!(end.signal(), Some(deadly), "{kind}: {end}");
    }
    Ok(())
}

fn exit_code_is_passed_on(starter: Starter) -> Result<(), Failed> {
    let subject = Subject::start(starter, "idle");
    subject.ready()?;

    let end = subject.end();

    assert_eq!(end.code(), Some(7), "{end}");
    Ok(())
}

fn signal_is_passed_on(starter: Starter) -> Result<(), Failed> {
    for signal in [libc::SIGKILL, libc::SIGUSR1] {
        if starter.has_namespaces() && signal != libc::SIGKILL {
            continue; // PID 1 takes no other deadly signal
        }
        let subject = Subject::start(starter, "idle");
        subject.ready()?;
        subject.vmm().kill(signal);
        assert_eq!(subject.wait().signal(), Some(signal));
    }
    Ok(())
}

fn killed_with_the_started_process(starter: Starter) -> Result<(), Failed> {
    for signal in [libc::SIGKILL, libc::SIGQUIT] {
        let subject = Subject::start(starter, "idle");
        subject.ready()?;
        let vmm = subject.vmm();

        subject.started().kill(signal);
        assert_eq!(subject.wait().signal(), Some(signal));

        vmm.wait_until_gone()?;
    }
    Ok(())
}

fn request_to_end_is_handed_on(starter: Starter) -> Result<(), Failed> {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let subject = Subject::start(starter, "idle");
        subject.ready()?;

        subject.started().kill(signal);

        assert_eq!(subject.wait().code(), Some(8), "the handler's exit code");
    }
    Ok(())
}

fn waiter_is_confined(starter: Starter) -> Result<(), Failed> {
    let subject = Subject::start(starter, "idle");
    subject.ready()?;

    let waiter = subject.started();

    assert_ne!(waiter, subject.vmm());
    assert_eq!(waiter.descriptors(), BTreeSet::new());
    assert_eq!(waiter.threads().len(), 1);
    assert_eq!(waiter.root_entries(), Vec::<String>::new());
    assert_eq!(waiter.ids("Uid"), BTreeSet::from([starter.uid_within()]));
    for (setting, value) in SETTINGS {
        assert_eq!(waiter.status(setting), value, "{setting}");
    }
    Ok(())
}

fn unfit_descriptors_are_refused(starter: Starter) -> Result<(), Failed> {
    for (order, complaint) in [
        ("keep directory", "is a directory"),
        (
            "keep closed",
            "descriptor 1000 of the configuration isn't open",
        ),
        (
            "keep negative",
            "descriptor -1 of the configuration is negative",
        ),
    ] {
        let error = Subject::start(starter, order).refusal();
        assert!(error.contains(complaint), "{order}: {error:?}");
    }
    Ok(())
}

fn too_few_open_files(starter: Starter) -> Result<(), Failed> {
    let error = Subject::start(starter, "open-files").refusal();
    assert!(
        error.contains("open files are allowed, 4294967295 are needed; raise the hard limit"),
        "{error:?}"
    );
    Ok(())
}

fn nothing_available(_: Starter) -> Result<(), Failed> {
    let error = Subject::start(Starter::UserWithNothing, "idle").refusal();
    let probed = start::probe(Starter::UserWithNothing);
    assert_eq!(probed.status.code(), Some(1), "{probed:?}");
    assert_eq!(String::from_utf8_lossy(&probed.stderr), error);
    assert!(
        error.contains("no namespaces (") && error.contains("unshare("),
        "{error:?}"
    );
    assert!(
        error.contains("kernel.unprivileged_userns_clone=1"),
        "{error:?}"
    );
    assert!(error.contains("CONFIG_SECURITY_LANDLOCK"), "{error:?}");
    Ok(())
}
