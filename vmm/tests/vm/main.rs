//! Real guests under the real VMM. They need a KVM host, a kernel and a static
//! init: `vmm/tests/run` has all three. Without the feature `kvm-tests` this
//! target isn't built, so that a plain `cargo test` does not seem to pass it.

mod harness;

use casemate_vmm::config::Confinement;
use casemate_vmm::control::{Command, CpuLimit, Phase};
use casemate_vmm::exit_code;
use harness::{Machine, fd_of, file_of};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

#[test]
fn guest_that_powers_off_ends_with_shutdown() {
    let vm = Machine::new("off").start();

    let end = vm.end();

    assert_eq!(end.code, exit_code::SHUTDOWN, "{end:?}");
    assert_eq!(end.stderr, "");
}

#[test]
fn guest_that_resets_ends_with_reset() {
    let end = Machine::new("reset").start().end();

    assert_eq!(end.code, exit_code::RESET, "{end:?}");
}

#[test]
fn guest_that_panics_ends_with_its_last_words() {
    let end = Machine::new("panic").start().end();

    assert_eq!(end.code, exit_code::PANIC, "{end:?}");
    assert!(end.guest_log.contains("Attempted to kill init"), "{end:?}");
    assert_eq!(end.stderr.lines().count(), 1, "{end:?}");
}

#[test]
fn start_tells_its_phases_in_order() {
    let mut vm = Machine::new("hello,hang").console().start();

    vm.wait_for("hello");

    vm.statistics();
    let expected = [
        Phase::Main,
        Phase::Confined,
        Phase::KvmReady,
        Phase::KernelLoaded,
        Phase::FirstRun,
    ];
    assert_eq!(vm.phase_names(), expected);
    assert!(vm.phases.is_sorted_by_key(|(_, at)| *at), "{:?}", vm.phases);
}

#[test]
fn guest_sees_its_vcpus_once_they_are_brought_up() {
    for (vcpus, online) in [(1, "cpus 0\r\n"), (2, "cpus 0-1"), (5, "cpus 0-4")] {
        let machine = Machine::new("cpus,off").with(|config| config.vcpus = vcpus);

        machine.console().start().wait_for(online);
    }
}

#[test]
fn guest_sees_its_memory_above_the_hole() {
    let machine = Machine::new("memory,off").with(|config| config.memory_mib = 4400);

    let printed = machine.console().start().wait_for(" kB");

    let kib: u64 = printed
        .split_whitespace()
        .find_map(|word| word.parse().ok())
        .expect("a number");
    assert!((4200 << 10..4400 << 10).contains(&kib), "{printed}");
}

#[test]
fn guest_clock_is_kvms() {
    Machine::new("clock,off")
        .console()
        .start()
        .wait_for("clock kvm-clock");
}

#[test]
fn pause_stops_the_guest_until_resume() {
    let mut vm = Machine::new("count")
        .console()
        .with(|c| c.vcpus = 2)
        .start();
    vm.wait_for("count 3");

    vm.ask(Command::Pause).expect("paused");
    vm.ask(Command::Pause).expect("idempotent");
    vm.console_for(Duration::from_millis(100)); // what was on its way
    let while_paused = vm.console_for(Duration::from_millis(500));
    vm.ask(Command::Resume).expect("resumed");
    vm.ask(Command::Resume).expect("idempotent");

    assert_eq!(while_paused, "");
    vm.wait_for("count 20");
}

#[test]
fn limit_of_processor_time_holds_for_a_guest_that_takes_all() {
    let mut vm = Machine::new("cpus,work,count")
        .console()
        .with(|c| c.vcpus = 2)
        .start();
    vm.wait_for("count 1");
    let limit = |quota_us| Command::LimitCpu {
        limit: Some(CpuLimit {
            quota_us,
            period_us: 100_000,
        }),
    };

    let refused = vm.ask(limit(0)).expect_err("no quota at all");
    vm.ask(limit(20_000)).expect("limited");
    let (begun, before) = (Instant::now(), vm.statistics());
    std::thread::sleep(Duration::from_secs(2));
    // Most of the time it waits at the gate: a pause then is one, and its end no way out.
    for _ in 0..5 {
        vm.ask(Command::Pause).expect("paused");
        vm.ask(Command::Resume).expect("resumed");
    }
    std::thread::sleep(Duration::from_secs(2));
    let after = vm.statistics();
    let used = Duration::from_micros(after["cpu.used_us"] - before["cpu.used_us"]);
    let share = used.as_secs_f64() / begun.elapsed().as_secs_f64();

    assert!(refused.contains("quota"), "{refused}");
    assert!(share < 0.27, "{share} of a processor");
    assert!(after["cpu.throttled"] >= 5, "{after:?}");
    vm.ask(Command::Pause).expect("paused");
    vm.ask(Command::LimitCpu { limit: None }).expect("free");
    vm.console_for(Duration::from_millis(100));
    assert_eq!(vm.console_for(Duration::from_millis(300)), "");
    vm.ask(Command::Resume).expect("resumed");
    vm.wait_for("count 5");
    vm.ask(limit(1_000)).expect("limited");
    vm.ask(Command::Stop).expect("stops at once all the same");
    assert_eq!(vm.end().code, exit_code::STOPPED);
}

#[test]
fn statistics_count_exits_by_class() {
    let mut vm = Machine::new("hello,hang").console().start();
    vm.wait_for("hello");

    let counters = vm.statistics();

    assert!(counters["vcpu.exits.port_write"] > 0, "{counters:?}");
    assert!(counters["vcpu.exits.mmio_read"] > 0, "{counters:?}");
    assert!(counters["vcpu.exits"] >= counters["vcpu.exits.mmio_read"]);
}

#[test]
fn stop_ends_with_stopped() {
    let mut vm = Machine::new("hang").start();

    vm.ask(Command::Stop).expect("stops");

    assert_eq!(vm.end().code, exit_code::STOPPED);
}

#[test]
fn shim_that_goes_away_ends_with_stopped() {
    let mut vm = Machine::new("hang").start();

    vm.close_control();

    assert_eq!(vm.end().code, exit_code::STOPPED);
}

#[test]
fn unknown_request_is_answered() {
    let mut vm = Machine::new("hang").start();

    let error = vm
        .ask(Command::SwapDisk {
            disk: "none".into(),
        })
        .expect_err("no such disk");
    assert!(error.contains("none"), "{error}");
    assert!(vm.ask(Command::VsockListen { port: 1 }).is_err());
    assert!(vm.ask(Command::Balloon { mib: 1 }).is_err());
}

#[test]
fn disks_hold_their_segments_end_to_end() {
    let first = [1; 4096];
    let vm = Machine::new("disks,off")
        .disk("a", true, vec![file_of(&first), file_of(&[2; 8192])])
        .disk("b", true, vec![file_of(&[3; 4096])]);

    let printed = vm.console().start().wait_for("disk vdb 8 Ok(16) [3, 3");

    assert!(printed.contains("disk vda 24 Ok(16) [1, 1"), "{printed}");
}

#[test]
fn swapped_disk_shows_its_new_content_and_size() {
    let mut vm = Machine::new("disks,wait,disks,off")
        .disk("a", true, vec![file_of(&[1; 4096])])
        .console()
        .start();
    vm.wait_for("disk vda 8 Ok(16) [1, 1");

    let new = file_of(&[9; 16384]);
    let swap = Command::SwapDisk { disk: "a".into() };
    vm.ask_with(swap, &[fd_of(&new)]).expect("swapped");

    vm.wait_for("disk vda 32 Ok(16) [9, 9");
}

#[test]
fn guest_that_connects_is_the_agent() {
    let (mut ours, theirs) = UnixStream::pair().expect("socketpair");
    let mut vm = Machine::new("vsock,hang")
        .vsock(1024, theirs)
        .console()
        .start();

    ours.write_all(b"ping").expect("sent");
    vm.wait_for("vsock ping");

    let mut answer = [0; 4];
    std::io::Read::read_exact(&mut ours, &mut answer).expect("answered");
    assert_eq!(&answer, b"pong");
    vm.statistics();
    assert_eq!(vm.phase_names().last(), Some(&Phase::AgentConnected));
}

#[test]
fn kernel_that_is_none_fails_the_start() {
    for (content, word) in [
        (
            &b"MZ not a kernel, and long enough to hold an ELF header, they say"[..],
            "uncompressed",
        ),
        (b"\x7fELF", "truncated"),
        (b"", "truncated"),
    ] {
        let end = Machine::new("off").kernel(file_of(content)).start().end();

        assert_eq!(end.code, exit_code::START_FAILED, "{end:?}");
        assert!(end.stderr.contains(word), "{end:?}");
    }
}

#[test]
fn smallest_machine_boots() {
    let machine = Machine::new("off").with(|config| config.memory_mib = 32);

    assert_eq!(machine.start().end().code, exit_code::SHUTDOWN);
}

#[test]
fn memory_too_small_for_the_initrd_fails_the_start() {
    let initrd = file_of(b"");
    initrd.set_len(32 << 20).expect("a sparse file");
    let mut machine = Machine::new("off");
    let initrd = machine.hand(initrd);
    let machine = machine.with(|config| {
        config.memory_mib = 32;
        config.initrd = Some(initrd);
    });

    let end = machine.start().end();

    assert_eq!(end.code, exit_code::START_FAILED);
    assert!(end.reason.contains("more memory"), "{end:?}");
}

#[test]
fn largest_machine_boots() {
    let machine = Machine::new("hello,off").with(|config| config.vcpus = 32);

    machine.console().start().wait_for("hello");
}

#[test]
fn signal_ends_with_stopped() {
    let machine = Machine::new("hello,hang").with(|c| c.confinement = Confinement::Off);
    let mut vm = machine.console().start();
    vm.wait_for("hello");

    vm.signal(rustix::process::Signal::TERM);

    assert_eq!(vm.end().code, exit_code::STOPPED);
}
