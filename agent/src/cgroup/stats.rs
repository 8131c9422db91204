//! Figures from a cgroup's files.

/// What a container uses; a figure whose controller the kernel lacks is 0.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Stats {
    pub(crate) cpu_usage_us: u64,
    pub(crate) cpu_user_us: u64,
    pub(crate) cpu_system_us: u64,
    pub(crate) cpu_throttled_us: u64,
    pub(crate) cpu_nr_periods: u64,
    pub(crate) cpu_nr_throttled: u64,
    pub(crate) memory_current: u64,
    pub(crate) memory_limit: u64,
    pub(crate) memory_inactive_file: u64,
    pub(crate) memory_swap_current: u64,
    pub(crate) pids_current: u64,
    pub(crate) pids_limit: u64,
    pub(crate) io_read_bytes: u64,
    pub(crate) io_write_bytes: u64,
    pub(crate) oom_kills: u64,
}

impl Stats {
    /// Reads all files through `read`.
    pub(super) fn read(read: impl Fn(&str) -> String) -> Self {
        let cpu = read("cpu.stat");
        let io = read("io.stat");
        let named = |text: &str, key| field(text, key).unwrap_or_default();
        let single = |file| read(file).trim().parse().unwrap_or_default();
        // "max" is no number: no limit.
        let limit = |file| read(file).trim().parse().unwrap_or(u64::MAX);
        Self {
            cpu_usage_us: named(&cpu, "usage_usec"),
            cpu_user_us: named(&cpu, "user_usec"),
            cpu_system_us: named(&cpu, "system_usec"),
            cpu_throttled_us: named(&cpu, "throttled_usec"),
            cpu_nr_periods: named(&cpu, "nr_periods"),
            cpu_nr_throttled: named(&cpu, "nr_throttled"),
            memory_current: single("memory.current"),
            memory_limit: limit("memory.max"),
            memory_inactive_file: named(&read("memory.stat"), "inactive_file"),
            memory_swap_current: single("memory.swap.current"),
            pids_current: single("pids.current"),
            pids_limit: limit("pids.max"),
            io_read_bytes: sum(&io, "rbytes="),
            io_write_bytes: sum(&io, "wbytes="),
            oom_kills: named(&read("memory.events"), "oom_kill"),
        }
    }
}

/// The value of line `key value`.
pub(super) fn field(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok())
}

/// The sum of all `key` + number words.
fn sum(text: &str, key: &str) -> u64 {
    text.split_whitespace()
        .filter_map(|word| word.strip_prefix(key)?.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_kernel_files_gives_figures() {
        let stats = Stats::read(|file| {
            match file {
                "cpu.stat" => "usage_usec 7\nuser_usec 3\nsystem_usec 4\nnr_periods 2\nnr_throttled 1\nthrottled_usec 9\n",
                "memory.current" => "4096\n",
                "memory.max" => "max\n",
                "memory.stat" => "anon 1\ninactive_file 12\n",
                "memory.events" => "low 0\noom 3\noom_kill 2\n",
                "pids.max" => "10\n",
                "io.stat" => "254:0 rbytes=100 wbytes=1 rios=5\n254:16 rbytes=11 wbytes=2 rios=1\n",
                _ => "",
            }
            .into()
        });
        assert_eq!((stats.cpu_usage_us, stats.cpu_throttled_us), (7, 9));
        assert_eq!(
            (
                stats.memory_current,
                stats.memory_limit,
                stats.memory_inactive_file
            ),
            (4096, u64::MAX, 12)
        );
        assert_eq!(
            (
                stats.pids_limit,
                stats.io_read_bytes,
                stats.io_write_bytes,
                stats.oom_kills
            ),
            (10, 111, 3, 2)
        );
    }
}
