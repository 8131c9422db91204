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
    let (mut private, mut guests) = (0, 0);
    for pid in family(pid)? {
        let file = format!("/proc/{pid}/smaps");
        let smaps = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
        let mappings = Mapping::all(&smaps).with_context(|| file)?;
        private += mappings.iter().map(|of| of.private_kib).sum::<u64>();
        if let Some(guest) = guest_memory(&mappings, u64::from(MEMORY_MIB) << 20) {
            guests += 1;
            private -= guest.iter().map(|of| of.private_kib).sum::<u64>();
            // A neighbour that the kernel merged with it can't be told apart: all of it counts as private.
            private +=
                (guest.iter().map(Mapping::size).sum::<u64>() >> 10) - u64::from(MEMORY_MIB) * 1024;
        }
    }
    ensure!(
        guests == 1,
        "{guests} of the VMM's processes have mappings that look like {MEMORY_MIB} MiB of guest memory"
    );
    Ok(private as f64)
}

/// A process and all below it.
pub(crate) fn family(root: u32) -> Result<Vec<u32>> {
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

/// The share of the host's memory that a process has, that of its guest included.
pub(crate) fn pss_kib(pid: u32) -> Result<u64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let lines = smaps.lines().filter_map(|line| line.strip_prefix("Pss:"));
    let sizes = lines.filter_map(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(sizes.sum())
}

/// The parent in a line of /proc/PID/stat: the second word after the name, which may hold anything.
pub(crate) fn parent(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// A mapping of a process, as far as it matters here.
#[derive(Debug, Default, PartialEq)]
struct Mapping {
    start: u64,
    end: u64,
    /// Of no file.
    anonymous: bool,
    private_kib: u64,
}

impl Mapping {
    /// Those of an smaps file.
    fn all(smaps: &str) -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let (Some(key), Some(value)) = (words.next(), words.next()) else {
                continue;
            };
            if !key.ends_with(':') {
                // ADDRESS-ADDRESS PERMISSIONS OFFSET DEVICE INODE [PATH]
                let (start, end) = key.split_once('-').with_context(|| line.to_owned())?;
                let address = |text| u64::from_str_radix(text, 16).with_context(|| line.to_owned());
                all.push(Self {
                    start: address(start)?,
                    end: address(end)?,
                    anonymous: words.nth(3).is_none(),
                    private_kib: 0,
                });
            } else if key.starts_with("Private_") {
                let kib = value.parse::<u64>().with_context(|| line.to_owned())?;
                all.last_mut().with_context(|| line.to_owned())?.private_kib += kib;
            }
        }
        Ok(all)
    }

    fn size(&self) -> u64 {
        self.end - self.start
    }
}

/// The mappings of guest memory: neighbours that are `size` together, as parts of it may be treated differently, or
/// else the ones that are just larger, with what the kernel merged with them.
fn guest_memory(mappings: &[Mapping], size: u64) -> Option<&[Mapping]> {
    /// The largest stranger that may have been merged.
    const MERGED: u64 = 2 << 20;
    let mut best: Option<&[Mapping]> = None;
    for first in 0..mappings.len() {
        let mut end = first;
        while let Some(next) = mappings.get(end) {
            if !next.anonymous || end > first && mappings[end - 1].end != next.start {
                break;
            }
            end += 1;
            let run = next.end - mappings[first].start;
            let smaller = |best: &[Mapping]| run < best.iter().map(Mapping::size).sum();
            if (size..=size + MERGED).contains(&run) && best.is_none_or(smaller) {
                best = Some(&mappings[first..end]);
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
00400000-00500000 r-xp 00000000 00:01 7    /casemate-vmm
Size:               1024 kB
Private_Clean:       100 kB
Private_Dirty:        20 kB
7f0000000000-7f0001000000 rw-p 00000000 00:00 0
Size:              16384 kB
Private_Clean:         0 kB
Private_Dirty:     10000 kB
7f0001000000-7f0008000000 rw-p 00000000 00:00 0
Size:             114688 kB
Private_Clean:         0 kB
Private_Dirty:     20000 kB
7f0008000000-7f0008001000 rw-p 00000000 00:00 0
Size:                  4 kB
Private_Dirty:         4 kB
VmFlags: rd wr mr mw me ac
";
    const MIB: u64 = 1 << 20;

    #[test]
    fn guest_memory_in_two_mappings_is_found_without_its_neighbour() {
        let mappings = Mapping::all(SMAPS).unwrap();

        let guest = guest_memory(&mappings, 128 * MIB).unwrap();

        assert_eq!(guest, &mappings[1..3]);
        assert_eq!(mappings[0].private_kib, 120);
        assert!(!mappings[0].anonymous && mappings[1].anonymous);
    }

    #[test]
    fn guest_memory_merged_with_a_neighbour_is_found_with_it() {
        let mappings = Mapping::all(SMAPS).unwrap();

        let guest = guest_memory(&mappings, 127 * MIB).unwrap();

        assert_eq!(guest, &mappings[1..3]);
    }

    #[test]
    fn guest_memory_of_another_size_is_none() {
        let mappings = Mapping::all(SMAPS).unwrap();

        assert_eq!(guest_memory(&mappings, 100 * MIB), None);
        assert_eq!(guest_memory(&mappings, 256 * MIB), None);
        assert_eq!(guest_memory(&[], MIB), None);
    }

    #[test]
    fn mappings_of_a_broken_file_name_the_line() {
        for line in ["Private_Dirty: many kB", "zz-1 rw-p 0 0 0", "nonsense 1"] {
            let smaps = format!("0-1000 rw-p 0 0 0\n{line}\n");
            let error = Mapping::all(&smaps).unwrap_err();

            assert!(format!("{error:#}").contains(line), "{error:#}");
        }
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
