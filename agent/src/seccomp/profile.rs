//! From the OCI profile to, per architecture, ranges of system call numbers with the rules that apply.

use oci_spec::runtime::{
    Arch as SpecArch, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg,
    LinuxSeccompFilterFlag as Flag, LinuxSeccompOperator,
};

use super::MAX_CONDITIONS;
use crate::error::{Error, Result};

include!(concat!(env!("OUT_DIR"), "/syscall_tables.rs"));

/// An architecture whose calls a filter tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// The guest's own.
    X86_64,
    /// 32-bit programs.
    X86,
}

impl Arch {
    /// `AUDIT_ARCH_*`, as the kernel reports it.
    pub const fn audit(self) -> u32 {
        match self {
            Arch::X86_64 => 0xc000_003e,
            Arch::X86 => 0x4000_0003,
        }
    }

    /// The number of the call `name`.
    pub fn number(self, name: &str) -> Option<u32> {
        let table: &[(&str, u32)] = match self {
            Arch::X86_64 => &X86_64,
            Arch::X86 => &X86,
        };
        table
            .binary_search_by_key(&name, |row| row.0)
            .ok()
            .map(|index| table[index].1)
    }
}

/// One condition on an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) index: u8,
    pub(super) op: LinuxSeccompOperator,
    pub(super) value: u64,
    /// For a masked comparison: what the masked argument shall equal.
    pub(super) value_two: u64,
}

/// Conditions that must all hold, and what the filter returns then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) conditions: Vec<Condition>,
    pub(super) returns: u32,
}

/// From number `first` on: the rules, tried in order, and the return value if none holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) first: u32,
    pub(super) rules: Vec<Rule>,
    pub(super) otherwise: u32,
}

/// A profile, resolved.
#[derive(Debug)]
pub(super) struct Table {
    /// Per architecture its ranges, which begin at 0 and ascend.
    pub(super) arches: Vec<(Arch, Vec<Range>)>,
    /// Whether the profile names x32, an ABI the guest's kernel doesn't have.
    pub(super) x32: bool,
}

pub(super) const KILL_PROCESS: u32 = 0x8000_0000;
pub(super) const ERRNO: u32 = 0x0005_0000;
const KILL_THREAD: u32 = 0;
const TRAP: u32 = 0x0003_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;
pub(super) const ALLOW: u32 = 0x7fff_0000;

/// The kernel's MAX_ERRNO; it would cut larger values silently.
const MAX_ERRNO: u32 = 4095;

/// `SECCOMP_FILTER_FLAG_*` for loading.
pub(super) fn flags(profile: &LinuxSeccomp) -> Result<u64> {
    const TSYNC: u64 = 1;
    const LOG: u64 = 2;
    const SPEC_ALLOW: u64 = 4;
    let Some(flags) = profile.flags() else {
        return Ok(SPEC_ALLOW); // runc's default: no speculation barrier for every program
    };
    flags.iter().try_fold(0, |sum, flag| match flag {
        Flag::SeccompFilterFlagLog => Ok(sum | LOG),
        Flag::SeccompFilterFlagTsync => Ok(sum | TSYNC),
        Flag::SeccompFilterFlagSpecAllow => Ok(sum | SPEC_ALLOW),
        Flag::SeccompFilterFlagWaitKillableRecv => {
            Err(Error::unsupported("seccomp: flag SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV needs a listener, which a guest can't have"))
        }
    })
}

fn returns(action: Action, errno: Option<u32>) -> Result<u32> {
    let errno = errno.unwrap_or(libc::EPERM as u32);
    if errno > MAX_ERRNO {
        return Err(Error::invalid(format!(
            "seccomp: errnoRet {errno} is above {MAX_ERRNO}"
        )));
    }
    Ok(match action {
        Action::ScmpActKill | Action::ScmpActKillThread => KILL_THREAD,
        Action::ScmpActKillProcess => KILL_PROCESS,
        Action::ScmpActTrap => TRAP,
        Action::ScmpActErrno => ERRNO | errno,
        Action::ScmpActTrace => TRACE | errno,
        Action::ScmpActLog => LOG,
        Action::ScmpActAllow => ALLOW,
        Action::ScmpActNotify => {
            return Err(Error::unsupported(
                "seccomp: SCMP_ACT_NOTIFY needs a listener on the host, which a guest can't reach",
            ));
        }
    })
}

impl Table {
    pub(super) fn of(profile: &LinuxSeccomp) -> Result<Self> {
        if profile.listener_path().is_some() {
            return Err(Error::unsupported(
                "seccomp: listenerPath names a socket of the host, which a guest can't reach",
            ));
        }
        let default = returns(profile.default_action(), profile.default_errno_ret())?;
        let spec_arches = profile.architectures().as_deref().unwrap_or_default();
        // The guest's own is always meant; programs of architectures not here can't run.
        let mut arches = vec![Arch::X86_64];
        if spec_arches.contains(&SpecArch::ScmpArchX86) {
            arches.push(Arch::X86);
        }
        let rules = rules(profile)?;
        Ok(Self {
            arches: arches
                .into_iter()
                .map(|arch| (arch, ranges(arch, &rules, default)))
                .collect(),
            x32: spec_arches.contains(&SpecArch::ScmpArchX32),
        })
    }
}

/// The profile's rules in order, each with the names it is for.
fn rules(profile: &LinuxSeccomp) -> Result<Vec<(&str, Rule)>> {
    let mut rules = Vec::new();
    for syscall in profile.syscalls().iter().flatten() {
        let returns = returns(syscall.action(), syscall.errno_ret())?;
        let args = syscall.args().as_deref().unwrap_or_default();
        let conditions = args.iter().map(condition).collect::<Result<Vec<_>>>()?;
        if conditions.len() > MAX_CONDITIONS {
            return Err(Error::invalid(format!(
                "seccomp: a rule for {:?} has {} conditions, at most {MAX_CONDITIONS} are possible",
                syscall.names(),
                conditions.len()
            )));
        }
        let alternatives = has_twice(&conditions);
        for name in syscall.names() {
            if alternatives {
                rules.extend(conditions.iter().map(|c| {
                    (
                        name.as_str(),
                        Rule {
                            conditions: vec![*c],
                            returns,
                        },
                    )
                }));
            } else {
                rules.push((
                    name.as_str(),
                    Rule {
                        conditions: conditions.clone(),
                        returns,
                    },
                ));
            }
        }
    }
    Ok(rules)
}

fn condition(arg: &LinuxSeccompArg) -> Result<Condition> {
    match arg.index() {
        index @ 0..=5 => Ok(Condition {
            index: index as u8,
            op: arg.op(),
            value: arg.value(),
            value_two: arg.value_two().unwrap_or_default(),
        }),
        index => Err(Error::invalid(format!(
            "seccomp: argument index {index}: a system call has arguments 0 to 5"
        ))),
    }
}

fn has_twice(conditions: &[Condition]) -> bool {
    let seen = conditions
        .iter()
        .fold(0_u8, |seen, condition| seen | 1 << condition.index);
    (seen.count_ones() as usize) < conditions.len()
}

fn ranges(arch: Arch, rules: &[(&str, Rule)], default: u32) -> Vec<Range> {
    let mut by_number: Vec<(u32, &Rule)> = rules
        .iter()
        .filter_map(|(name, rule)| arch.number(name).map(|number| (number, rule)))
        .collect();
    by_number.sort_by_key(|(number, _)| *number); // stable: the profile's order stays

    let mut ranges = vec![Range {
        first: 0,
        rules: Vec::new(),
        otherwise: default,
    }];
    let mut next = 0; // first number not covered yet
    for group in by_number.chunk_by(|a, b| a.0 == b.0) {
        let number = group[0].0;
        if number > next {
            push(
                &mut ranges,
                Range {
                    first: next,
                    rules: Vec::new(),
                    otherwise: default,
                },
            );
        }
        let mut range = Range {
            first: number,
            rules: Vec::new(),
            otherwise: default,
        };
        for (_, rule) in group {
            if rule.conditions.is_empty() {
                range.otherwise = rule.returns; // nothing after it can match
                break;
            }
            range.rules.push((*rule).clone());
        }
        push(&mut ranges, range);
        next = number + 1;
    }
    let otherwise = if next > 0 && denies(default) {
        ERRNO | libc::ENOSYS as u32
    } else {
        default
    };
    push(
        &mut ranges,
        Range {
            first: next,
            rules: Vec::new(),
            otherwise,
        },
    );
    ranges
}

fn denies(returns: u32) -> bool {
    !matches!(returns & 0xffff_0000, ALLOW | LOG | TRACE)
}

/// Appends `range`, merged with its neighbour if both say the same.
fn push(ranges: &mut Vec<Range>, range: Range) {
    match ranges.last_mut() {
        Some(last) if last.rules == range.rules && last.otherwise == range.otherwise => {}
        Some(last) if last.first == range.first => *last = range,
        _ => ranges.push(range),
    }
}
