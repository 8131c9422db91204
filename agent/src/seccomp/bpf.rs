//! From resolved ranges to instructions.

use libc::sock_filter;
use oci_spec::runtime::LinuxSeccompOperator as Op;

use super::profile::{Condition, ERRNO, KILL_PROCESS, Range, Rule, Table};

const LD_ABS: u16 = 0x20;
const AND: u16 = 0x54;
const JA: u16 = 0x05;
const JEQ: u16 = 0x15;
const JGT: u16 = 0x25;
const JGE: u16 = 0x35;
const RET: u16 = 0x06;

// Offsets in struct seccomp_data.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;

/// Numbers from here on are of the x32 ABI.
const X32_BIT: u32 = 0x4000_0000;

const fn insn(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// The whole filter. Every path ends with a return.
pub(super) fn program(table: &Table) -> Vec<sock_filter> {
    let mut code = vec![insn(LD_ABS, 0, 0, ARCH)];
    for (arch, ranges) in &table.arches {
        let mut section = vec![insn(LD_ABS, 0, 0, NUMBER)];
        if *arch == super::Arch::X86_64 {
            // Without x32 in the profile its calls are of a foreign architecture; with it they get what the kernel says.
            let x32 = if table.x32 {
                ERRNO | libc::ENOSYS as u32
            } else {
                KILL_PROCESS
            };
            section.push(insn(JGE, 0, 1, X32_BIT));
            section.push(insn(RET, 0, 0, x32));
        }
        section.extend(search(ranges));
        code.push(insn(JEQ, 1, 0, arch.audit()));
        code.push(insn(JA, 0, 0, section.len() as u32));
        code.extend(section);
    }
    code.push(insn(RET, 0, 0, KILL_PROCESS));
    code
}

/// Binary search for the accumulator among `ranges` (at least one; the first begins at or below any value).
fn search(ranges: &[Range]) -> Vec<sock_filter> {
    if let [range] = ranges {
        return leaf(range);
    }
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let (left, right) = (search(low), search(high));
    let pivot = high[0].first;
    let mut code = match u8::try_from(left.len()) {
        Ok(skip) => vec![insn(JGE, skip, 0, pivot)],
        Err(_) => vec![insn(JGE, 0, 1, pivot), insn(JA, 0, 0, left.len() as u32)],
    };
    code.extend(left);
    code.extend(right);
    code
}

fn leaf(range: &Range) -> Vec<sock_filter> {
    let mut code: Vec<_> = range.rules.iter().flat_map(rule).collect();
    code.push(insn(RET, 0, 0, range.otherwise));
    code
}

/// Jump targets within a rule, resolved once its length is known.
#[derive(Clone, Copy)]
enum To {
    /// The instruction after this one.
    Next,
    /// The condition holds: the next condition.
    Holds,
    /// The rule doesn't apply: the next rule.
    Fails,
}

fn rule(rule: &Rule) -> Vec<sock_filter> {
    let mut code: Vec<(sock_filter, To, To)> = Vec::new();
    let mut ends = Vec::new(); // for each instruction: where its condition ends
    for condition in &rule.conditions {
        code.extend(test(condition));
        ends.resize(code.len(), code.len());
    }
    let length = code.len() + 1; // with the return
    let target = |here: usize, to: To| match to {
        To::Next => 0,
        To::Holds => (ends[here] - here - 1) as u8,
        To::Fails => (length - here - 1) as u8,
    };
    let mut out: Vec<_> = code
        .iter()
        .enumerate()
        .map(|(here, (i, jt, jf))| insn(i.code, target(here, *jt), target(here, *jf), i.k))
        .collect();
    out.push(insn(RET, 0, 0, rule.returns));
    out
}

/// Arguments have 64 bits, the machine 32: the high half is compared first.
fn test(condition: &Condition) -> Vec<(sock_filter, To, To)> {
    use To::{Fails, Holds, Next};
    let offset = ARGS + 8 * u32::from(condition.index);
    let (low, high) = (condition.value as u32, (condition.value >> 32) as u32);
    let load = |offset| (insn(LD_ABS, 0, 0, offset), Next, Next);
    let jump = |code, k, jt, jf| (insn(code, 0, 0, k), jt, jf);
    let (load_low, load_high) = (load(offset), load(offset + 4));
    let equal = |yes, no| {
        vec![
            load_high,
            jump(JEQ, high, Next, no),
            load_low,
            jump(JEQ, low, yes, no),
        ]
    };
    let ordered = |low_half, above, below| {
        vec![
            load_high,
            jump(JGT, high, above, Next),
            jump(JEQ, high, Next, below),
            load_low,
            jump(low_half, low, above, below),
        ]
    };
    match condition.op {
        Op::ScmpCmpEq => equal(Holds, Fails),
        Op::ScmpCmpNe => equal(Fails, Holds),
        Op::ScmpCmpGt => ordered(JGT, Holds, Fails),
        Op::ScmpCmpGe => ordered(JGE, Holds, Fails),
        Op::ScmpCmpLt => ordered(JGE, Fails, Holds),
        Op::ScmpCmpLe => ordered(JGT, Fails, Holds),
        Op::ScmpCmpMaskedEq => {
            let want = condition.value_two;
            vec![
                load_high,
                (insn(AND, 0, 0, high), Next, Next),
                jump(JEQ, (want >> 32) as u32, Next, Fails),
                load_low,
                (insn(AND, 0, 0, low), Next, Next),
                jump(JEQ, want as u32, Holds, Fails),
            ]
        }
    }
}
