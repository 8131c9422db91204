//! Compiled filters run in an interpreter of classic BPF and compared with a plain reading of the profile.

use oci_spec::runtime::LinuxSeccomp;
use proptest::prelude::*;
use serde_json::json;

use super::*;

struct Call {
    arch: u32,
    number: u32,
    args: [u64; 6],
}

fn run(program: &[sock_filter], call: &Call) -> u32 {
    let mut data = Vec::new();
    data.extend(call.number.to_le_bytes());
    data.extend(call.arch.to_le_bytes());
    data.extend([0; 8]);
    call.args
        .iter()
        .for_each(|arg| data.extend(arg.to_le_bytes()));
    let (mut pc, mut a) = (0, 0_u32);
    loop {
        let i = &program[pc];
        pc += 1;
        let mut branch = |taken: bool| pc += usize::from(if taken { i.jt } else { i.jf });
        match i.code {
            0x20 => a = u32::from_le_bytes(data[i.k as usize..][..4].try_into().unwrap()),
            0x54 => a &= i.k,
            0x05 => pc += i.k as usize,
            0x15 => branch(a == i.k),
            0x25 => branch(a > i.k),
            0x35 => branch(a >= i.k),
            0x06 => return i.k,
            code => panic!("unknown instruction {code:#x}"),
        }
    }
}

fn profile(value: serde_json::Value) -> LinuxSeccomp {
    serde_json::from_value(value).unwrap()
}

fn fate(profile: &LinuxSeccomp, name: &str, args: [u64; 6]) -> u32 {
    let filter = Filter::compile(profile).unwrap();
    run(
        filter.program(),
        &Call {
            arch: Arch::X86_64.audit(),
            number: Arch::X86_64.number(name).unwrap(),
            args,
        },
    )
}

const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 0x0005_0001;
const ENOSYS: u32 = 0x0005_0000 | 38;

#[test]
fn compile_default_and_named_calls_each_get_their_action() {
    let p = profile(json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
        {"names": ["read", "write", "nosuchcall", "clone3"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        {"names": ["reboot"], "action": "SCMP_ACT_KILL_PROCESS"}]}));
    assert_eq!(fate(&p, "read", [0; 6]), ALLOW);
    assert_eq!(fate(&p, "clone3", [0; 6]), ALLOW);
    assert_eq!(fate(&p, "open", [0; 6]), EPERM);
    assert_eq!(fate(&p, "mount", [0; 6]), ENOSYS);
    assert_eq!(fate(&p, "reboot", [0; 6]), 0x8000_0000);
}

#[test]
fn compile_denying_default_newer_calls_give_enosys() {
    let p = profile(
        json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read", "openat2"], "action": "SCMP_ACT_ALLOW"}]}),
    );
    assert_eq!(fate(&p, "faccessat2", [0; 6]), ENOSYS);
    assert_eq!(fate(&p, "openat", [0; 6]), EPERM);
}

#[test]
fn compile_foreign_architecture_kills() {
    let p = profile(json!({"defaultAction": "SCMP_ACT_ALLOW"}));
    let filter = Filter::compile(&p).unwrap();
    let aarch64 = Call {
        arch: 0xc000_00b7,
        number: 0,
        args: [0; 6],
    };
    let x32 = Call {
        arch: Arch::X86_64.audit(),
        number: 0x4000_0000,
        args: [0; 6],
    };
    let x86 = Call {
        arch: Arch::X86.audit(),
        number: 1,
        args: [0; 6],
    };
    for call in [aarch64, x32, x86] {
        assert_eq!(run(filter.program(), &call), 0x8000_0000);
    }
}

#[test]
fn compile_listed_x86_uses_its_own_numbers() {
    let p = profile(
        json!({"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_ARM"],
        "syscalls": [{"names": ["getpid", "write"], "action": "SCMP_ACT_ALLOW"}]}),
    );
    let filter = Filter::compile(&p).unwrap();
    let call = |arch, number| {
        run(
            filter.program(),
            &Call {
                arch,
                number,
                args: [0; 6],
            },
        )
    };
    assert_eq!(call(Arch::X86.audit(), 20), ALLOW);
    assert_eq!(call(Arch::X86.audit(), 39), ENOSYS);
    assert_eq!(call(Arch::X86.audit(), 5), EPERM);
    assert_eq!(call(Arch::X86_64.audit(), 39), ALLOW);
    assert_eq!(call(Arch::X86_64.audit(), 0x4000_0000 | 39), ENOSYS);
}

#[test]
fn compile_same_argument_twice_either_suffices() {
    let p = profile(
        json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [
        {"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]}]}),
    );
    assert_eq!(fate(&p, "personality", [0; 6]), ALLOW);
    assert_eq!(fate(&p, "personality", [8, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(fate(&p, "personality", [4, 0, 0, 0, 0, 0]), EPERM);
}

#[test]
fn compile_masked_compare_is_on_all_64_bits() {
    let p = profile(
        json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [
        {"index": 0, "value": 2114060288_u64, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]}]}),
    );
    assert_eq!(fate(&p, "clone", [0x11, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(fate(&p, "clone", [0x2000_0000, 0, 0, 0, 0, 0]), EPERM);
    assert_eq!(fate(&p, "clone", [0x1_0000_0000, 0, 0, 0, 0, 0]), ALLOW);
}

#[test]
fn compile_bad_profiles_are_refused_with_the_value() {
    let refused = |value| Filter::compile(&profile(value)).unwrap_err().text;
    let arg = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]});
    assert!(refused(arg).contains("index 6"));
    assert!(
        refused(json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 5000}))
            .contains("5000")
    );
    assert!(refused(json!({"defaultAction": "SCMP_ACT_NOTIFY"})).contains("NOTIFY"));
    assert!(
        refused(json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}))
            .contains("listenerPath")
    );
}

#[test]
fn compile_huge_profile_is_refused_not_cut() {
    let rules: Vec<_> = (0..3000_u64)
        .map(|value| json!({"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}]}))
        .collect();
    let error = Filter::compile(&profile(
        json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}),
    ))
    .unwrap_err();
    assert!(error.text.contains("4096"), "{error}");
}

const NAMES: [&str; 10] = [
    "read",
    "write",
    "open",
    "close",
    "clone",
    "socket",
    "personality",
    "mount",
    "nosuchcall",
    "openat2",
];
const ACTIONS: [&str; 6] = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_LOG",
    "SCMP_ACT_KILL_THREAD",
];
const OPS: [&str; 7] = [
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_MASKED_EQ",
];
/// Values whose halves collide often.
const VALUES: [u64; 8] = [
    0,
    1,
    2,
    0xffff_ffff,
    1 << 32,
    (1 << 32) + 1,
    u64::MAX,
    u64::MAX - 1,
];

fn arg() -> impl Strategy<Value = serde_json::Value> {
    (0..6_usize, prop::sample::select(&VALUES[..]), prop::sample::select(&VALUES[..]), prop::sample::select(&OPS[..]))
        .prop_map(|(index, value, two, op)| json!({"index": index, "value": value, "valueTwo": two, "op": op}))
}

fn any_rule() -> impl Strategy<Value = serde_json::Value> {
    let names = prop::collection::vec(prop::sample::select(&NAMES[..]), 1..4);
    let action = prop::sample::select(&ACTIONS[..]);
    (names, action, prop::option::of(0..4096_u32), prop::collection::vec(arg(), 0..4))
        .prop_map(|(names, action, errno, args)| json!({"names": names, "action": action, "errnoRet": errno, "args": args}))
}

/// The profile read as its documentation says, for calls that are not newer than all that are named.
fn expected(p: &LinuxSeccomp, call: &Call) -> u32 {
    use oci_spec::runtime::{LinuxSeccompAction as A, LinuxSeccompOperator as O};
    let value = |action: A, errno: Option<u32>| match action {
        A::ScmpActAllow => ALLOW,
        A::ScmpActErrno => 0x0005_0000 | errno.unwrap_or(1),
        A::ScmpActKillProcess => 0x8000_0000,
        A::ScmpActTrap => 0x0003_0000,
        A::ScmpActLog => 0x7ffc_0000,
        _ => 0,
    };
    let rules = p.syscalls().as_deref().unwrap_or_default();
    for rule in rules {
        if !rule
            .names()
            .iter()
            .any(|name| Arch::X86_64.number(name) == Some(call.number))
        {
            continue;
        }
        let args = rule.args().clone().unwrap_or_default();
        let holds = |arg: &oci_spec::runtime::LinuxSeccompArg| {
            let actual = call.args[arg.index()];
            match arg.op() {
                O::ScmpCmpNe => actual != arg.value(),
                O::ScmpCmpLt => actual < arg.value(),
                O::ScmpCmpLe => actual <= arg.value(),
                O::ScmpCmpEq => actual == arg.value(),
                O::ScmpCmpGe => actual >= arg.value(),
                O::ScmpCmpGt => actual > arg.value(),
                O::ScmpCmpMaskedEq => actual & arg.value() == arg.value_two().unwrap(),
            }
        };
        let mut indices: Vec<_> = args.iter().map(|arg| arg.index()).collect();
        indices.sort_unstable();
        indices.dedup();
        let matches = if indices.len() < args.len() {
            args.iter().any(holds)
        } else {
            args.iter().all(holds)
        };
        if matches {
            return value(rule.action(), rule.errno_ret());
        }
    }
    let known = rules
        .iter()
        .flat_map(|rule| rule.names())
        .filter_map(|name| Arch::X86_64.number(name))
        .max();
    let default = value(p.default_action(), p.default_errno_ret());
    match known {
        Some(last) if call.number > last && default != ALLOW && default != 0x7ffc_0000 => ENOSYS,
        _ => default,
    }
}

proptest! {
    #[test]
    fn compile_any_profile_filter_agrees_with_reading(
        rules in prop::collection::vec(any_rule(), 0..12),
        default in prop::sample::select(&ACTIONS[..]),
        calls in prop::collection::vec((0..500_u32, prop::array::uniform6(prop::sample::select(&VALUES[..]))), 1..20),
    ) {
        let p = profile(json!({"defaultAction": default, "syscalls": rules}));
        let filter = Filter::compile(&p).unwrap();
        let named = NAMES.iter().filter_map(|name| Arch::X86_64.number(name));
        for (number, args) in calls {
            for number in named.clone().chain([number]) {
                let call = Call { arch: Arch::X86_64.audit(), number, args };
                prop_assert_eq!(run(filter.program(), &call), expected(&p, &call), "call {} {:x?}", number, args);
            }
        }
    }
}
