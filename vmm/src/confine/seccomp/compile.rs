//! From a table of rules to the BPF program that the kernel runs, at compile time.
//!
//! Being `const`, it costs a start nothing but the installation, and that is shaped here. When a
//! filter is installed, the kernel translates every instruction (some 1,000 of its own each) and runs
//! the program for each system call number there is (some 10,000 for each instruction on the way). So
//! neighbouring numbers with one fate are one piece, pieces are found by binary search
//! weighted with the numbers in them, and all verdicts share two returns. A chain of
//! comparisons, the usual form, takes three times as long to install.

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
/// Each rule can make two pieces: itself and the gap behind it.
const MAX_PIECES: usize = 2 * MAX_RULES + 1;
/// Jumps reach no farther; the kernel's own limit is 4096.
const MAX_CODE: usize = 256;
/// One past the last system call number, roughly: only the balance of the search depends on it.
const NUMBERS: u32 = 470;

/// AUDIT_ARCH_X86_64: EM_X86_64 | __AUDIT_ARCH_64BIT | __AUDIT_ARCH_LE.
#[cfg(target_arch = "x86_64")]
pub(super) const AUDIT_ARCH: u32 = 62 | 0x8000_0000 | 0x4000_0000;
/// AUDIT_ARCH_AARCH64: EM_AARCH64 | __AUDIT_ARCH_64BIT | __AUDIT_ARCH_LE.
#[cfg(target_arch = "aarch64")]
pub(super) const AUDIT_ARCH: u32 = 183 | 0x8000_0000 | 0x4000_0000;

// struct seccomp_data: nr, arch, instruction_pointer (64 bits), six arguments of 64 bits.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

/// A filter: BPF instructions, `len` of them in use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Program {
    code: [sock_filter; MAX_CODE],
    len: usize,
}

impl Program {
    #[cfg(test)]
    pub(super) fn code(&self) -> &[sock_filter] {
        &self.code[..self.len]
    }

    pub(super) fn code_mut(&mut self) -> &mut [sock_filter] {
        &mut self.code[..self.len]
    }

    const fn push(&mut self, code: u16, jt: u8, jf: u8, k: u32) {
        self.code[self.len] = sock_filter { code, jt, jf, k };
        self.len += 1;
    }

    /// Loads a 32-bit word of `struct seccomp_data`.
    const fn load(&mut self, offset: u32) {
        self.push(0x20, 0, 0, offset);
    }

    const fn and(&mut self, mask: u32) {
        self.push(0x54, 0, 0, mask);
    }

    /// Goes to `yes` if the loaded word equals `value`, else to `no`: places in the program.
    const fn if_equal(&mut self, value: u32, yes: usize, no: usize) {
        let (jt, jf) = (self.distance(yes), self.distance(no));
        self.push(0x15, jt, jf, value);
    }

    const fn verdict(&mut self, action: u32) {
        self.push(0x06, 0, 0, action);
    }

    /// From the instruction that comes next to `place`, which lies behind it.
    const fn distance(&self, place: usize) -> u8 {
        let distance = place - self.len - 1;
        assert!(
            distance <= u8::MAX as usize,
            "the filter is too long for BPF's jumps"
        );
        distance as u8
    }
}

/// What becomes of the system call numbers from `from` on, up to the next piece.
#[derive(Clone, Copy)]
struct Piece {
    from: u32,
    fate: Fate,
}

#[derive(Clone, Copy)]
enum Fate {
    Kill,
    Allow,
    /// The rule of this index has conditions.
    Check(usize),
}

/// Where everything lies in the program.
struct Layout {
    pieces: [Piece; MAX_PIECES],
    count: usize,
    /// First instruction of the conditions of each rule.
    checks: [usize; MAX_RULES],
    allow: usize,
    kill: usize,
}

/// Compiles tables into one filter; any mistake in them is an error of the build.
pub(super) const fn compile(tables: &[&[Rule]]) -> Program {
    let (rules, count) = sorted(tables);
    let layout = lay_out(&rules, count);
    let mut program = Program {
        code: [sock_filter {
            code: 0,
            jt: 0,
            jf: 0,
            k: 0,
        }; MAX_CODE],
        len: 0,
    };
    program.load(ARCH);
    program.if_equal(AUDIT_ARCH, 2, layout.kill);
    program.load(NUMBER);
    search(&mut program, &layout, 0, layout.count);
    let mut i = 0;
    while i < count {
        if !rules[i].args.is_empty() {
            assert!(program.len == layout.checks[i]);
            check(&mut program, &layout, rules[i].args);
        }
        i += 1;
    }
    assert!(program.len == layout.allow);
    program.verdict(libc::SECCOMP_RET_ALLOW);
    program.verdict(libc::SECCOMP_RET_KILL_PROCESS);
    program
}

/// Emits the search among `pieces[from..to]`; returns where it starts.
const fn search(program: &mut Program, layout: &Layout, from: usize, to: usize) -> usize {
    if to - from == 1 {
        return match layout.pieces[from].fate {
            Fate::Kill => layout.kill,
            Fate::Allow => layout.allow,
            Fate::Check(rule) => layout.checks[rule],
        };
    }
    let middle = balanced(layout, from, to);
    let node = program.len;
    program.push(0, 0, 0, 0);
    let below = search(program, layout, from, middle);
    let above = search(program, layout, middle, to);
    let end = program.len;
    program.len = node;
    let (jt, jf) = (program.distance(above), program.distance(below));
    program.push(0x35, jt, jf, layout.pieces[middle].from);
    program.len = end;
    node
}

/// The piece that splits the numbers of `pieces[from..to]` most evenly.
const fn balanced(layout: &Layout, from: usize, to: usize) -> usize {
    let first = layout.pieces[from].from;
    let end = if to < layout.count {
        layout.pieces[to].from
    } else {
        NUMBERS
    };
    let mut best = from + 1;
    let mut least = u32::MAX;
    let mut i = from + 1;
    while i < to {
        let uneven = (layout.pieces[i].from - first).abs_diff(end - layout.pieces[i].from);
        if uneven < least {
            (best, least) = (i, uneven);
        }
        i += 1;
    }
    best
}

/// Emits the conditions of one rule: as many instructions as [`check_len`] says.
const fn check(program: &mut Program, layout: &Layout, args: &[Arg]) {
    let mut i = 0;
    while i < args.len() {
        let Arg {
            index,
            mask,
            any_of,
        } = args[i];
        assert!(index < 6 && !any_of.is_empty());
        let holds = match i + 1 < args.len() {
            true => program.len + arg_len(&args[i]),
            false => layout.allow,
        };
        program.load(ARGUMENTS + 8 * index as u32);
        if mask != u32::MAX {
            program.and(mask);
        }
        let mut j = 0;
        while j < any_of.len() {
            assert!(
                any_of[j] & !mask == 0,
                "a value that the mask never lets through"
            );
            let last = j + 1 == any_of.len();
            let otherwise = if last { layout.kill } else { program.len + 1 };
            program.if_equal(any_of[j], holds, otherwise);
            j += 1;
        }
        i += 1;
    }
}

const fn arg_len(arg: &Arg) -> usize {
    1 + (arg.mask != u32::MAX) as usize + arg.any_of.len()
}

const fn check_len(args: &[Arg]) -> usize {
    let mut len = 0;
    let mut i = 0;
    while i < args.len() {
        len += arg_len(&args[i]);
        i += 1;
    }
    len
}

const fn lay_out(rules: &[Rule; MAX_RULES], count: usize) -> Layout {
    let mut layout = Layout {
        pieces: [Piece {
            from: 0,
            fate: Fate::Kill,
        }; MAX_PIECES],
        count: 0,
        checks: [0; MAX_RULES],
        allow: 0,
        kill: 0,
    };
    let mut next = 0; // the lowest number without a fate
    let mut i = 0;
    while i < count {
        let number = rules[i].number as u32;
        if number > next {
            layout.add(next, Fate::Kill);
        }
        let fate = if rules[i].args.is_empty() {
            Fate::Allow
        } else {
            Fate::Check(i)
        };
        layout.add(number, fate);
        next = number + 1;
        i += 1;
    }
    layout.add(next, Fate::Kill);

    let mut place = 3 + layout.count - 1; // two loads, the comparison of the architecture, the search
    let mut i = 0;
    while i < count {
        layout.checks[i] = place;
        place += check_len(rules[i].args);
        i += 1;
    }
    layout.allow = place;
    layout.kill = place + 1;
    layout
}

impl Layout {
    /// Adds a piece, or lets the last one go on.
    const fn add(&mut self, from: u32, fate: Fate) {
        let goes_on = self.count > 0
            && matches!(
                (self.pieces[self.count - 1].fate, fate),
                (Fate::Allow, Fate::Allow)
            );
        if !goes_on {
            self.pieces[self.count] = Piece { from, fate };
            self.count += 1;
        }
    }
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
