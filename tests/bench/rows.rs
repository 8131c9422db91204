//! The rows of the table in docs/performance.md.

/// What a figure's median has to be.
pub(crate) enum Bar {
    /// A time or a size, or a ratio of two.
    AtMost(f64),
    /// A ratio of throughputs.
    AtLeast(f64),
    /// It is only told.
    Report,
}

/// A row of the table: key, what it is, and its bar.
pub(crate) const ROWS: [(&str, &str, Bar); 31] = [
    (
        "boot_vs_firecracker",
        "boot to init's first word, against Firecracker",
        Bar::AtMost(0.9),
    ),
    (
        "boot_vs_qemu_microvm",
        "the same against QEMU's microvm machine",
        Bar::AtMost(0.4),
    ),
    (
        "guest_boot_ms",
        "exec of the VMM to the agent's first answer",
        Bar::AtMost(50.0),
    ),
    (
        "run_vs_runc",
        "`casemate run --rm busybox /bin/true` against `runc run`",
        Bar::AtMost(1.5),
    ),
    (
        "exec_vs_runc_exec",
        "`casemate exec` of /bin/true against `runc exec`",
        Bar::AtMost(1.0),
    ),
    (
        "start_20_parallel",
        "20 runs at once against 20 of runc",
        Bar::Report,
    ),
    (
        "per_container_mib",
        "the host's memory that one more idle container takes",
        Bar::AtMost(48.0),
    ),
    (
        "idle_cpu",
        "processor time of 20 idle containers",
        Bar::AtMost(1.0),
    ),
    (
        "boot_exits",
        "VM exits until the agent's first answer",
        Bar::Report,
    ),
    (
        "vmm_private_kib",
        "private memory of the VMM's processes, guest memory left out",
        Bar::AtMost(4096.0),
    ),
    (
        "guest_used_kib",
        "guest memory in use once the agent is ready",
        Bar::AtMost(24576.0),
    ),
    (
        "erofs_vs_unpack",
        "pull of a 300 MB image against skopeo and umoci",
        Bar::AtMost(0.6),
    ),
    (
        "blk_vs_host",
        "4 KiB random read, guest against host",
        Bar::Report,
    ),
    (
        "blk_vs_host_sequential",
        "1 MiB sequential read, guest against host",
        Bar::Report,
    ),
    (
        "vols_write_vs_host",
        "1 MiB sequential write of a new file to a volume, synced, against the host's ext4",
        Bar::AtLeast(0.5),
    ),
    (
        "vols_read_vs_host",
        "1 MiB sequential read of it, nothing cached, against the host's ext4",
        Bar::AtLeast(0.5),
    ),
    (
        "bind_small_files",
        "unpack and stat of 20,000 small files, on a bind against a volume",
        Bar::Report,
    ),
    (
        "net_tcp_vs_veth",
        "one TCP stream, guest to host, against runc over veth",
        Bar::Report,
    ),
    (
        "net_tcp_in_vs_veth",
        "one TCP stream, host to guest, against runc over veth",
        Bar::Report,
    ),
    (
        "net_latency_vs_veth",
        "a UDP round trip host to guest, against runc over veth",
        Bar::Report,
    ),
    (
        "neighbour_beside_cpu_hog",
        "a container's work beside a CPU hog, against alone",
        Bar::Report,
    ),
    (
        "neighbour_beside_memory_hog",
        "the same beside a memory hog",
        Bar::Report,
    ),
    (
        "neighbour_beside_fork_bomb",
        "the same beside a fork bomb",
        Bar::Report,
    ),
    (
        "neighbour_beside_disk_filler",
        "the same beside a disk filler",
        Bar::Report,
    ),
    (
        "neighbour_beside_packet_flood",
        "the same beside a packet flood",
        Bar::Report,
    ),
    (
        "pod_start_vs_runc",
        "`crictl runp`, `create` and `start` of a one-container pod against runc's in the same containerd",
        Bar::AtMost(3.0),
    ),
    (
        "pod_overhead_mib",
        "the host's memory that an idle one-container pod takes",
        Bar::AtMost(64.0),
    ),
    ("shim_pss_mib", "of this, the shim", Bar::AtMost(8.0)),
    (
        "exec_sync_vs_runc",
        "`crictl exec --sync` of /bin/true against runc's",
        Bar::AtMost(1.5),
    ),
    (
        "pods_parallel_20",
        "20 pods at once against 20 of runc",
        Bar::Report,
    ),
    (
        "console_lost_bytes",
        "bytes lost of 1 GiB past a slow reader",
        Bar::AtMost(0.0),
    ),
];

/// Figures whose details are told below the table, and what they are called there.
pub(crate) const DETAILS: [(&str, &str); 8] = [
    ("boot_exits", "VM exits of a boot by reason"),
    ("run_vs_runc", "Phases of a run, ms, the longest first"),
    ("bind_small_files", "20,000 small files, ms"),
    (
        "neighbour_beside_cpu_hog",
        "Each part of the work beside a CPU hog, against alone",
    ),
    ("neighbour_beside_memory_hog", "Beside a memory hog"),
    ("neighbour_beside_fork_bomb", "Beside a fork bomb"),
    ("neighbour_beside_disk_filler", "Beside a disk filler"),
    ("neighbour_beside_packet_flood", "Beside a packet flood"),
];
