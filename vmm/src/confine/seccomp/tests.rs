//! The compiled filters say what the tables say.

use super::*;
use libc::sock_filter;
use proptest::prelude::*;
use std::collections::BTreeSet;

fn kinds() -> impl Iterator<Item = (Vec<&'static Rule>, &'static Program)> {
    ThreadKind::ALL
        .into_iter()
        .map(|kind| (kind.rules().collect(), kind.program()))
}

/// What the table says of a call.
fn table_allows(rules: &[&Rule], number: u32, args: &[u64; 6]) -> bool {
    rules.iter().any(|rule| {
        rule.number as u32 == number
            && rule.args.iter().all(|arg| {
                arg.any_of
                    .contains(&(args[arg.index as usize] as u32 & arg.mask))
            })
    })
}

/// What the filter says of it: a BPF machine with the instructions that the compiler emits.
fn filter_allows(code: &[sock_filter], arch: u32, number: u32, args: &[u64; 6]) -> bool {
    let mut data = Vec::new();
    data.extend(number.to_ne_bytes());
    data.extend(arch.to_ne_bytes());
    data.extend(0u64.to_ne_bytes());
    args.iter().for_each(|arg| data.extend(arg.to_ne_bytes()));
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let sock_filter {
            code: operation,
            jt,
            jf,
            k,
        } = code[at];
        at += 1;
        let mut jump = |taken| at += usize::from(if taken { jt } else { jf });
        match operation {
            0x20 => accumulator = u32::from_ne_bytes(data[k as usize..][..4].try_into().unwrap()),
            0x54 => accumulator &= k,
            0x15 => jump(accumulator == k),
            0x35 => jump(accumulator >= k),
            0x06 => {
                assert!([libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_KILL_PROCESS].contains(&k));
                return k == libc::SECCOMP_RET_ALLOW;
            }
            other => panic!("instruction {other:#x} at {}", at - 1),
        }
    }
}

#[test]
fn every_rule_has_a_reason_and_conditions_that_can_hold() {
    for rule in ThreadKind::ALL
        .into_iter()
        .flat_map(ThreadKind::rules)
        .chain(tables::WAITER)
    {
        assert!(rule.name.starts_with("SYS_"));
        assert!(
            rule.why.len() >= 10,
            "{}: {:?} is no reason",
            rule.name,
            rule.why
        );
        for arg in rule.args {
            let distinct: BTreeSet<_> = arg.any_of.iter().collect();
            assert_eq!(
                distinct.len(),
                arg.any_of.len(),
                "{}: a value twice",
                rule.name
            );
        }
    }
}

#[test]
fn no_filter_allows_what_would_open_create_or_execute() {
    let never = [
        libc::SYS_open,
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_creat,
        libc::SYS_socket,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_accept4,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_ptrace,
        libc::SYS_process_vm_writev,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_mount,
        libc::SYS_fsopen,
        libc::SYS_io_uring_setup,
        libc::SYS_bpf,
        libc::SYS_userfaultfd,
        libc::SYS_perf_event_open,
        libc::SYS_keyctl,
        libc::SYS_setuid,
        libc::SYS_capset,
        libc::SYS_prctl,
        libc::SYS_memfd_create,
        libc::SYS_pidfd_getfd,
        libc::SYS_modify_ldt,
    ];
    for (rules, _) in kinds() {
        assert!(rules.iter().all(|rule| !never.contains(&rule.number)));
    }
}

#[test]
fn every_filter_is_small() {
    // Its size is paid at each start: the kernel runs it once per system call number and compiles it.
    for (_, program) in kinds() {
        assert!(
            program.code().len() <= 256,
            "{} instructions",
            program.code().len()
        );
    }
}

#[test]
fn every_system_call_number_with_plain_arguments_is_judged_as_the_table_says() {
    for (rules, program) in kinds() {
        for number in (0..1024).chain([1 << 30, (1 << 30) + 1, u32::MAX]) {
            for value in [0, 1, 2, 4, 9, 34, u64::from(u32::MAX), 1 << 32, u64::MAX] {
                let args = [value; 6];
                assert_eq!(
                    filter_allows(program.code(), compile::AUDIT_ARCH, number, &args),
                    table_allows(&rules, number, &args),
                    "call {number} with {value:#x}"
                );
            }
        }
    }
}

#[test]
fn another_architecture_is_killed() {
    const AUDIT_ARCH_I386: u32 = 3 | 0x4000_0000;
    for (_, program) in kinds() {
        for number in 0..512 {
            assert!(!filter_allows(
                program.code(),
                AUDIT_ARCH_I386,
                number,
                &[0; 6]
            ));
        }
    }
}

#[test]
fn the_x32_calls_are_killed() {
    const X32: u32 = 0x4000_0000;
    for (_, program) in kinds() {
        for number in 0..512 {
            assert!(!filter_allows(
                program.code(),
                compile::AUDIT_ARCH,
                X32 | number,
                &[0; 6]
            ));
        }
    }
}

#[test]
fn memory_can_never_become_executable() {
    let exec = libc::PROT_EXEC as u64;
    for (_, program) in kinds() {
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            for prot in [exec, exec | 1, exec | 3] {
                assert!(!filter_allows(
                    program.code(),
                    compile::AUDIT_ARCH,
                    call as u32,
                    &[0, 0, prot, 0, 0, 0]
                ));
            }
        }
    }
}

proptest! {
    #[test]
    fn any_call_is_judged_as_the_table_says(
        pick in any::<prop::sample::Index>(),
        number in prop_oneof![0u32..512, any::<u32>()],
        mut args in prop::array::uniform6(prop_oneof![0u64..64, any::<u64>()]),
        value in any::<prop::sample::Index>(),
        garbage in any::<u32>(),
        known in any::<bool>(),
    ) {
        for (rules, program) in kinds() {
            let rule = rules[pick.index(rules.len())];
            let number = if known { rule.number as u32 } else { number };
            if known {
                // Values that pass, so that the far ends of the program are reached too.
                for arg in rule.args {
                    let allowed = arg.any_of[value.index(arg.any_of.len())] | (garbage & !arg.mask);
                    args[arg.index as usize] = u64::from(allowed) | (u64::from(garbage) << 32);
                }
            }
            prop_assert_eq!(
                filter_allows(program.code(), compile::AUDIT_ARCH, number, &args),
                table_allows(&rules, number, &args)
            );
        }
    }
}
