//! Device rules of the spec as the eBPF program that cgroup v2 wants.
//!
//! The spec's rules are v1's: a later one overrides an earlier one, per access (read, write, mknod). So the
//! program goes from the last rule to the first and keeps the accesses of the request that no rule has
//! decided yet: an allowing rule takes its own away, a denying one that meets any of them refuses.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::error::{Error, Result};
use crate::sys::BpfInsn;

const READ: u8 = 2;
const WRITE: u8 = 4;
const MKNOD: u8 = 1;
const ALL: u8 = READ | WRITE | MKNOD;
const BLOCK: i32 = 1;
const CHAR: i32 = 2;

/// Most rules: a program has at most 4096 instructions, a rule needs up to eight.
const MAX_RULES: usize = 450;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: u8,
}

/// Devices that any container may use, and nodes that it may make but not open: runc's defaults.
const DEFAULTS: [(i32, Option<i32>, Option<i32>, u8); 10] = [
    (CHAR, None, None, MKNOD),
    (BLOCK, None, None, MKNOD),
    (CHAR, Some(1), Some(3), ALL), // null
    (CHAR, Some(1), Some(5), ALL), // zero
    (CHAR, Some(1), Some(7), ALL), // full
    (CHAR, Some(1), Some(8), ALL), // random
    (CHAR, Some(1), Some(9), ALL), // urandom
    (CHAR, Some(5), Some(0), ALL), // tty
    (CHAR, Some(5), Some(2), ALL), // ptmx
    (CHAR, Some(136), None, ALL),  // pts
];

/// The program for `rules` and the defaults; none if everything is allowed and nothing is to be replaced.
pub(super) fn program(
    rules: &[LinuxDeviceCgroup],
    replacing: bool,
) -> Result<Option<Vec<BpfInsn>>> {
    if rules.len() > MAX_RULES {
        return Err(Error::invalid(format!(
            "linux.resources.devices: {} rules, at most {MAX_RULES} fit a program",
            rules.len()
        )));
    }
    let mut all = rules.iter().map(Rule::of).collect::<Result<Vec<_>>>()?;
    let everything = Rule {
        allow: true,
        kind: None,
        major: None,
        minor: None,
        access: ALL,
    };
    if all.last() == Some(&everything) && !replacing {
        return Ok(None);
    }
    all.extend(DEFAULTS.map(|(kind, major, minor, access)| Rule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    }));
    Ok(Some(compile(&all)))
}

impl Rule {
    fn of(rule: &LinuxDeviceCgroup) -> Result<Self> {
        let kind = match rule.typ() {
            None | Some(LinuxDeviceType::A) => None,
            Some(LinuxDeviceType::B) => Some(BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHAR),
            Some(LinuxDeviceType::P) => {
                return Err(Error::invalid(
                    "linux.resources.devices: a FIFO (type \"p\") is no device",
                ));
            }
        };
        // -1 and absent mean any, as in the spec's examples.
        let number = |value: Option<i64>, what| match value {
            None | Some(-1) => Ok(None),
            Some(n) => i32::try_from(n)
                .ok()
                .filter(|n| *n >= 0)
                .map(Some)
                .ok_or_else(|| {
                    Error::invalid(format!(
                        "linux.resources.devices: {what} {n} is out of range"
                    ))
                }),
        };
        let mut access = 0;
        for c in rule.access().as_deref().unwrap_or("rwm").chars() {
            access |= match c {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                other => {
                    return Err(Error::invalid(format!(
                        "linux.resources.devices: access {other:?} is none of r, w, m"
                    )));
                }
            };
        }
        Ok(Self {
            allow: rule.allow(),
            kind,
            major: number(rule.major(), "major")?,
            minor: number(rule.minor(), "minor")?,
            access,
        })
    }
}

// Registers: r0 result, r1 the context, r2 type, r3 accesses not decided yet, r4 major, r5 minor, r6 scratch.
const LDX_W: u8 = 0x61;
const MOV_K: u8 = 0xb7;
const MOV_X: u8 = 0xbf;
const AND_K: u8 = 0x57;
const RSH_K: u8 = 0x77;
const JEQ_K: u8 = 0x15;
const JNE_K: u8 = 0x55;
const EXIT: u8 = 0x95;

const fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> BpfInsn {
    BpfInsn {
        code,
        regs: dst | src << 4,
        off,
        imm,
    }
}

fn compile(rules: &[Rule]) -> Vec<BpfInsn> {
    let mut code = vec![
        insn(LDX_W, 2, 1, 0, 0), // access << 16 | type
        insn(LDX_W, 4, 1, 4, 0),
        insn(LDX_W, 5, 1, 8, 0),
        insn(MOV_X, 3, 2, 0, 0),
        insn(AND_K, 2, 0, 0, 0xffff),
        insn(RSH_K, 3, 0, 0, 16),
    ];
    for rule in rules.iter().rev() {
        let action = if rule.allow {
            vec![
                insn(AND_K, 3, 0, 0, i32::from(!rule.access & ALL)),
                insn(JNE_K, 3, 0, 2, 0),
                insn(MOV_K, 0, 0, 0, 1),
                insn(EXIT, 0, 0, 0, 0),
            ]
        } else {
            vec![
                insn(MOV_X, 6, 3, 0, 0),
                insn(AND_K, 6, 0, 0, i32::from(rule.access)),
                insn(JEQ_K, 6, 0, 2, 0),
                insn(MOV_K, 0, 0, 0, 0),
                insn(EXIT, 0, 0, 0, 0),
            ]
        };
        let tests: Vec<(u8, i32)> = [(2, rule.kind), (4, rule.major), (5, rule.minor)]
            .into_iter()
            .filter_map(|(register, value)| Some((register, value?)))
            .collect();
        for (index, (register, value)) in tests.iter().enumerate() {
            let skip = tests.len() - index - 1 + action.len();
            code.push(insn(JNE_K, *register, 0, skip as i16, *value));
        }
        let last = !rule.allow && tests.is_empty() && rule.access == ALL;
        code.extend(action);
        if last {
            break; // nothing before a rule that denies all can matter
        }
    }
    code.push(insn(MOV_K, 0, 0, 0, 0));
    code.push(insn(EXIT, 0, 0, 0, 0));
    code
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// Runs the program for a request, checking that it ends.
    fn allowed(program: &[BpfInsn], kind: i32, access: u8, major: i32, minor: i32) -> bool {
        let mut r = [0_i64; 7];
        let mut pc = 0;
        loop {
            let i = program[pc];
            let (dst, src) = (usize::from(i.regs & 15), usize::from(i.regs >> 4));
            pc += 1;
            match i.code {
                LDX_W => {
                    r[dst] = [
                        i64::from(access) << 16 | i64::from(kind),
                        major.into(),
                        minor.into(),
                    ][i.off as usize / 4]
                }
                MOV_K => r[dst] = i.imm.into(),
                MOV_X => r[dst] = r[src],
                AND_K => r[dst] &= i64::from(i.imm),
                RSH_K => r[dst] >>= i.imm,
                JEQ_K if r[dst] == i64::from(i.imm) => pc += i.off as usize,
                JNE_K if r[dst] != i64::from(i.imm) => pc += i.off as usize,
                JEQ_K | JNE_K => {}
                EXIT => return r[0] == 1,
                code => panic!("unknown instruction {code:#x}"),
            }
        }
    }

    fn rules(value: serde_json::Value) -> Vec<LinuxDeviceCgroup> {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn program_deny_all_keeps_the_defaults() {
        let p = program(&rules(json!([{"allow": false, "access": "rwm"}])), false)
            .unwrap()
            .unwrap();
        assert!(allowed(&p, CHAR, READ | WRITE, 1, 3));
        assert!(allowed(&p, CHAR, READ, 136, 7));
        assert!(allowed(&p, BLOCK, MKNOD, 8, 0));
        assert!(!allowed(&p, BLOCK, READ, 8, 0));
        assert!(!allowed(&p, CHAR, READ, 1, 1));
    }

    #[test]
    fn program_two_rules_together_allow_both_accesses() {
        let p = program(
            &rules(
                json!([{"allow": false}, {"allow": true, "type": "c", "major": 10, "minor": 200, "access": "r"},
                {"allow": true, "type": "c", "major": 10, "minor": 200, "access": "w"}]),
            ),
            false,
        );
        assert!(allowed(&p.unwrap().unwrap(), CHAR, READ | WRITE, 10, 200));
    }

    #[test]
    fn program_allow_all_needs_none_unless_one_is_replaced() {
        let all = rules(json!([{"allow": true, "type": "a", "access": "rwm"}]));
        assert_eq!(program(&all, false).unwrap(), None);
        assert!(allowed(
            &program(&all, true).unwrap().unwrap(),
            BLOCK,
            ALL,
            8,
            0
        ));
    }

    #[test]
    fn program_bad_rule_is_refused_with_the_value() {
        for (rule, word) in [
            (json!([{"allow": true, "access": "rx"}]), "'x'"),
            (json!([{"allow": true, "major": -2}]), "-2"),
            (json!([{"allow": true, "type": "p"}]), "FIFO"),
        ] {
            assert!(
                program(&rules(rule), false)
                    .unwrap_err()
                    .text
                    .contains(word)
            );
        }
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let number = || prop::option::of(0..3_i32);
        (
            any::<bool>(),
            prop::option::of(1..3_i32),
            number(),
            number(),
            1..8_u8,
        )
            .prop_map(|(allow, kind, major, minor, access)| Rule {
                allow,
                kind,
                major,
                minor,
                access,
            })
    }

    proptest! {
        #[test]
        fn compile_any_rules_last_match_decides_each_access(
            rules in prop::collection::vec(any_rule(), 0..12),
            kind in 1..3_i32, access in 1..8_u8, major in 0..3_i32, minor in 0..3_i32,
        ) {
            let matches = |rule: &&Rule, bit: u8| {
                rule.access & bit != 0
                    && rule.kind.is_none_or(|k| k == kind)
                    && rule.major.is_none_or(|m| m == major)
                    && rule.minor.is_none_or(|m| m == minor)
            };
            let bits = [READ, WRITE, MKNOD].into_iter().filter(|bit| access & bit != 0);
            let want = bits.into_iter().all(|bit| rules.iter().rev().find(|r| matches(r, bit)).is_some_and(|r| r.allow));
            prop_assert_eq!(allowed(&compile(&rules), kind, access, major, minor), want);
        }
    }
}
