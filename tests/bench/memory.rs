//! What a sandbox costs in memory: the VMM's own, and what kernel and agent use of the guest's.

use std::fs;
use std::io;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::figures::Figure;
use crate::inside::{Installed, emit};
use crate::vmm::{self, MEMORY_MIB};

/// Both figures; the first only where the host's kernel tells it.
pub(crate) fn figures(at: &Installed, samples: usize) -> Result<()> {
    let files = at.files();
    let told = fs::exists("/proc/self/smaps")?;
    let (mut private, mut used) = (Vec::new(), Vec::new());
    for _ in 0..samples.min(3) {
        let (vmm, agent, _) = vmm::boot_agent(&files)?;
        // Idle: everything that still runs after the first answer has had its time.
        std::thread::sleep(Duration::from_millis(500));
        if told {
            private.push(vmm_private_kib(vmm.pid())?);
        }
        let free = vmm::free_memory(&agent)?;
        used.push((u64::from(MEMORY_MIB) << 20).saturating_sub(free) as f64 / 1024.0);
    }
    if told {
        emit(&Figure::plain("vmm_private_kib", "KiB", private))?;
    } else {
        eprintln!(
            "bench: vmm_private_kib is left out: the host's kernel has no /proc/PID/smaps (CONFIG_PROC_PAGE_MONITOR)"
        );
    }
    emit(&Figure::plain("guest_used_kib", "KiB", used))
}

/// Private memory of the VMM, the waiter outside of its namespaces included, guest memory left out.
fn vmm_private_kib(pid: u32) -> Result<f64> {
    let (mut private, mut guest) = (0, 0);
    for pid in family(pid)? {
        let file = format!("/proc/{pid}/smaps");
        let smaps = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
        let usage = Usage::of(&smaps).with_context(|| file)?;
        private += usage.private_kib;
        guest += usage.guest_kib;
    }
    let expected = u64::from(MEMORY_MIB) * 1024;
    ensure!(
        guest >= expected * 9 / 10,
        "only {guest} KiB of the VMM's mappings look like guest memory, which has {expected} KiB"
    );
    Ok(private as f64)
}

/// A process and all below it.
fn family(root: u32) -> Result<Vec<u32>> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => parents.push((pid, parent(&stat).with_context(|| stat.clone())?)),
            // It ended meanwhile.
            Err(error)
                if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(3) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut family = vec![root];
    let mut next = 0;
    while let Some(&of) = family.get(next) {
        next += 1;
        let children = parents.iter().filter(|(_, parent)| *parent == of);
        family.extend(children.map(|(pid, _)| *pid));
    }
    Ok(family)
}

/// The parent in a line of /proc/PID/stat: the second word after the name, which may hold anything.
fn parent(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// What a process's smaps add up to.
#[derive(Debug, Default, PartialEq)]
struct Usage {
    /// Private pages of what is not guest memory.
    private_kib: u64,
    /// Size of guest memory.
    guest_kib: u64,
}

impl Usage {
    /// A mapping of half a guest's memory or more is guest memory: nothing else of a VMM is as large.
    fn of(smaps: &str) -> Result<Self> {
        let (mut usage, mut guest) = (Self::default(), false);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let (Some(key), Some(value)) = (words.next(), words.next()) else {
                continue;
            };
            let kib = || value.parse::<u64>().with_context(|| line.to_owned());
            match key {
                "Size:" => {
                    let size = kib()?;
                    guest = size >= u64::from(MEMORY_MIB) * 1024 / 2;
                    usage.guest_kib += if guest { size } else { 0 };
                }
                "Private_Clean:" | "Private_Dirty:" | "Private_Hugetlb:" if !guest => {
                    usage.private_kib += kib()?;
                }
                _ => {}
            }
        }
        Ok(usage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
00400000-00500000 r-xp 00000000 00:01 7    /casemate-vmm
Size:               1024 kB
Private_Clean:       100 kB
Private_Dirty:        20 kB
7f0000000000-7f0008000000 rw-p 00000000 00:00 0
Size:             131072 kB
Private_Clean:         0 kB
Private_Dirty:     30000 kB
7f0008000000-7f0008001000 rw-p 00000000 00:00 0
Size:                  4 kB
Private_Dirty:         4 kB
VmFlags: rd wr mr mw me ac
";

    #[test]
    fn usage_leaves_out_guest_memory_and_nothing_else() {
        let usage = Usage::of(SMAPS).unwrap();

        let expected = Usage {
            private_kib: 124,
            guest_kib: 131_072,
        };
        assert_eq!(usage, expected);
    }

    #[test]
    fn usage_of_a_line_without_a_number_names_it() {
        let error = Usage::of("Size: many kB").unwrap_err();

        assert!(format!("{error:#}").contains("Size: many kB"), "{error:#}");
    }

    #[test]
    fn parent_of_a_name_with_brackets_and_blanks_is_found() {
        assert_eq!(parent("12 (a) b (c) S 7 12 12 0"), Some(7));
        assert_eq!(parent("12 (a"), None);
    }

    #[test]
    fn family_holds_children() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();

        let family = family(std::process::id()).unwrap();

        child.kill().unwrap();
        child.wait().unwrap();
        assert!(family.contains(&child.id()), "{family:?}");
    }
}
