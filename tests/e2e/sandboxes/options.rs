//! Options of `casemate run` that the other tests do not come by.

use casemate_tests::registry::{BadRegistry, Fault};
use casemate_tests::{Host, Registry};
use serde_json::Value;

/// Phases that every start has, as `--timing=json` names them.
const PHASES: [&str; 11] = [
    "command_line",
    "shim",
    "vmm_exec",
    "confinement",
    "kvm_setup",
    "kernel_load",
    "filters",
    "kernel_boot",
    "agent",
    "container",
    "first_instruction",
];

#[test]
fn timing_tells_every_phase_and_their_sum() {
    let host = Host::with_images();
    let out = host.run(["--timing=json", "busybox", "echo", "out"]);
    out.succeeds().prints("out\n");
    let document: Value = serde_json::from_str(&out.stderr_text()).unwrap();
    let phases = document["casemate_timing_ms"].as_object().unwrap();
    let ms = |name: &str| {
        phases
            .get(name)
            .and_then(Value::as_f64)
            .unwrap_or_else(|| panic!("no {name} in {document}"))
    };
    let sum: f64 = PHASES.iter().map(|name| ms(name)).sum();
    assert!((sum - ms("total")).abs() < 0.01, "{sum} of {document}");
    assert!(
        ms("kernel_boot") > 0.0 && ms("vmm_exec") > 0.0,
        "{document}"
    );
    assert_eq!(phases.len(), PHASES.len() + 1, "{document}");

    let table = host.run(["--timing", "busybox", "true"]);
    table
        .succeeds()
        .complains_of("PHASE")
        .complains_of("kernel boot")
        .complains_of("total");
    host.is_clean();
}

#[test]
fn kernel_log_goes_to_stderr_or_to_a_file_and_not_among_the_output() {
    let host = Host::with_images();
    host.run(["--kernel-log", "busybox", "echo", "out"])
        .succeeds()
        .prints("out\n")
        .complains_of("Linux version 6.12");
    let file = host.dir().join("kernel.log");
    let option = format!("--kernel-log={}", file.display());
    host.run([&option, "busybox", "echo", "out"])
        .succeeds()
        .prints("out\n")
        .is_silent();
    let log = std::fs::read_to_string(file).unwrap();
    assert!(
        log.contains("Linux version 6.12") && log.contains("Run /init"),
        "{log}"
    );
    host.run(["--kernel-log=/no/such/dir/log", "busybox", "true"])
        .ends_with(125)
        .complains_of("/no/such/dir/log");
    host.is_clean();
}

#[test]
fn registry_is_asked_always_if_missing_or_never() {
    let host = Host::new();
    let registry = BadRegistry::serve("busybox", Fault::None);
    let image = registry.name("busybox");
    let asked = || registry.served().values().sum::<usize>();

    host.run(["--pull", "never", &image, "true"])
        .ends_with(125)
        .complains_of(&image);
    assert_eq!(asked(), 0);
    host.run([&image, "echo", "pulled"])
        .succeeds()
        .prints("pulled\n");
    let first = asked();
    assert!(first >= 3, "manifest, configuration and layer: {first}");
    host.run(["--pull", "missing", &image, "true"]).succeeds();
    host.run(["--pull", "never", &image, "true"]).succeeds();
    assert_eq!(asked(), first, "the image was there");
    host.run(["--pull", "always", &image, "true"]).succeeds();
    assert!(asked() > first, "--pull always did not ask");
    host.is_clean();
}

#[test]
fn image_that_the_registry_has_not_is_named_and_nothing_runs() {
    let host = Host::new();
    let registry = Registry::of_fixtures();
    for name in ["nosuch:latest", "busybox:nosuch"] {
        let name = registry.name(name);
        host.run([&name, "true"]).ends_with(125).complains_of(&name);
    }
    host.is_clean();
}

#[test]
fn platform_is_chosen_from_an_index() {
    let host = Host::new();
    let registry = Registry::of_fixtures();
    let image = registry.name("platforms");
    host.run([&image, "echo", "default"])
        .succeeds()
        .prints("default\n");
    host.run(["--platform", "linux/amd64", &image, "uname", "-m"])
        .succeeds()
        .prints("x86_64\n");
    host.run(["--platform", "linux/s390x", &image, "true"])
        .ends_with(125)
        .complains_of("s390x")
        .complains_of("amd64");
    host.run(["--platform", "linux/riscv64", &image, "true"])
        .ends_with(125)
        .complains_of("riscv64");
    host.is_clean();
}

#[test]
fn smallest_memory_runs_or_says_what_it_takes() {
    let host = Host::with_images();
    host.run(["--memory", "6m", "busybox", "echo", "small"])
        .succeeds()
        .prints("small\n");
    host.run(["--memory", "5m", "busybox", "true"])
        .ends_with(125)
        .complains_of("5242880")
        .complains_of("6 MiB");
    host.is_clean();
}
