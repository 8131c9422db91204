//! From a table of rules to the BPF program that the kernel runs, at compile time.
//!
//! Being `const`, it costs a start nothing, and the order of comparisons is
//! ours: a binary search over the system call number. That matters twice. The
//! kernel evaluates a new filter once for every system call number, so a linear
//! chain makes installing it slow; and the calls whose arguments are looked at
//! (KVM_RUN's ioctl above all) run the program each time.

use libc::sock_filter;

/// One system call that a kind of thread may make, and why.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// The `SYS_` constant's name.
    pub name: &'static str,
    /// The system call's number.
    pub number: libc::c_long,
    /// Conditions on its arguments, all of which must hold.
    pub args: &'static [Arg],
    /// Who needs it, for the reader who wants to take it away.
    pub why: &'static str,
}

/// A condition on one argument: `argument & mask` is one of `any_of`.
///
/// Only the low 32 bits are looked at. That is the whole argument wherever the
/// kernel takes an `int` (ioctl, fcntl, futex, madvise, fallocate …), and the
/// half that holds PROT_EXEC of mmap and mprotect.
#[derive(Debug, Clone, Copy)]
pub struct Arg {
    /// Position, 0 ..= 5.
    pub index: u8,
    /// The bits that count.
    pub mask: u32,
    /// What they may be; the likeliest first.
    pub any_of: &'static [u32],
}

/// More rules than any kind of thread has.
const MAX_RULES: usize = 128;
/// More instructions than any filter has; the kernel's own limit is 4096.
const MAX_CODE: usize = 512;

const ALLOW: sock_filter = instruction(0x06, 0, 0, libc::SECCOMP_RET_ALLOW);
const KILL: sock_filter = instruction(0x06, 0, 0, libc::SECCOMP_RET_KILL_PROCESS);
/// AUDIT_ARCH_X86_64: EM_X86_64 | __AUDIT_ARCH_64BIT | __AUDIT_ARCH_LE.
#[cfg(target_arch = "x86_64")]
pub(super) const AUDIT_ARCH: u32 = 62 | 0x8000_0000 | 0x4000_0000;
/// AUDIT_ARCH_AARCH64: EM_AARCH64 | __AUDIT_ARCH_64BIT | __AUDIT_ARCH_LE.
#[cfg(target_arch = "aarch64")]
pub(super) const AUDIT_ARCH: u32 = 183 | 0x8000_0000 | 0x4000_0000;

/// A filter: BPF instructions, `len` of them in use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Program {
    code: [sock_filter; MAX_CODE],
    len: usize,
}

impl Program {
    pub(super) fn code(&self) -> &[sock_filter] {
        &self.code[..self.len]
    }

    pub(super) fn code_mut(&mut self) -> &mut [sock_filter] {
        &mut self.code[..self.len]
    }

    const fn push(&mut self, instruction: sock_filter) {
        self.code[self.len] = instruction;
        self.len += 1;
    }

    /// Loads a 32-bit word of `struct seccomp_data`.
    const fn load(&mut self, offset: u32) {
        self.push(instruction(0x20, 0, 0, offset));
    }

    /// Skips the next `count` instructions if the loaded word equals `value`.
    const fn skip_if_equal(&mut self, value: u32, count: usize) {
        self.push(instruction(0x15, jump(count), 0, value));
    }
}

/// Compiles tables into one filter; any mistake in them is an error of the build.
pub(super) const fn compile(tables: &[&[Rule]]) -> Program {
    let (rules, count) = sorted(tables);
    let mut program = Program {
        code: [KILL; MAX_CODE],
        len: 0,
    };
    // struct seccomp_data: nr, arch, instruction_pointer (64 bits), six arguments of 64 bits.
    program.load(4);
    program.skip_if_equal(AUDIT_ARCH, 1);
    program.push(KILL);
    program.load(0);
    search(&mut program, &rules, 0, count);
    program
}

/// Binary search in `rules[from..to]`, which is sorted.
const fn search(program: &mut Program, rules: &[Rule; MAX_RULES], from: usize, to: usize) {
    if to - from == 1 {
        return leaf(program, &rules[from]);
    }
    let middle = from + (to - from) / 2;
    let branch = program.len;
    program.push(KILL);
    search(program, rules, from, middle);
    let lower = program.len - branch - 1;
    program.code[branch] = instruction(0x35, jump(lower), 0, rules[middle].number as u32);
    search(program, rules, middle, to);
}

const fn leaf(program: &mut Program, rule: &Rule) {
    program.skip_if_equal(rule.number as u32, 1);
    program.push(KILL);
    let mut i = 0;
    while i < rule.args.len() {
        let arg = &rule.args[i];
        assert!(arg.index < 6 && !arg.any_of.is_empty());
        program.load(16 + 8 * arg.index as u32);
        if arg.mask != u32::MAX {
            program.push(instruction(0x54, 0, 0, arg.mask));
        }
        let mut j = 0;
        while j < arg.any_of.len() {
            assert!(
                arg.any_of[j] & !arg.mask == 0,
                "a value that the mask can never let through"
            );
            program.skip_if_equal(arg.any_of[j], arg.any_of.len() - j);
            j += 1;
        }
        program.push(KILL);
        i += 1;
    }
    program.push(ALLOW);
}

/// All rules, by number; a number twice is an error.
const fn sorted(tables: &[&[Rule]]) -> ([Rule; MAX_RULES], usize) {
    let mut rules = [Rule {
        name: "",
        number: 0,
        args: &[],
        why: "",
    }; MAX_RULES];
    let mut count = 0;
    let mut t = 0;
    while t < tables.len() {
        let mut r = 0;
        while r < tables[t].len() {
            let rule = tables[t][r];
            let mut at = count;
            while at > 0 && rules[at - 1].number >= rule.number {
                assert!(
                    rules[at - 1].number != rule.number,
                    "a system call has two rules"
                );
                rules[at] = rules[at - 1];
                at -= 1;
            }
            rules[at] = rule;
            count += 1;
            r += 1;
        }
        t += 1;
    }
    assert!(count > 0);
    (rules, count)
}

/// BPF's conditional jumps are 8 bits wide.
const fn jump(count: usize) -> u8 {
    assert!(
        count <= u8::MAX as usize,
        "the filter is too long for one jump"
    );
    count as u8
}

const fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}
