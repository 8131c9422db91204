//! Options that cannot be had are refused with their value, and nothing is left behind.

use casemate_tests::Host;

#[test]
fn option_that_cannot_be_had_is_refused_with_its_value() {
    let host = Host::with_images();
    for (option, value) in [
        ("--memory", "1m"),
        ("--memory", "64t"),
        ("--memory", "lots"),
        ("--memory", "-1"),
        ("--memory", "18446744073709551616"),
        ("--cpus", "0"),
        ("--cpus", "NaN"),
        ("--cpus", "-1"),
        ("--cpus", "inf"),
        ("--cpus", "1000"),
        ("--cpus", "two"),
        ("--tmpfs", "relative/path"),
        ("--cap-add", "CAP_FLY"),
        ("--pull", "sometimes"),
        ("--platform", "amiga"),
        ("--name", "../escape"),
        ("--name", "a/b"),
        ("--hostname", "spaced out"),
        ("--env-file", "/no/such/file"),
        ("-w", "not/absolute"),
        ("-e", "=value"),
        ("--label", "=value"),
    ] {
        let out = host.run([option, value, "busybox", "true"]);
        assert_eq!(out.code(), 125, "{option} {value}: {}", out.stderr_text());
        // Sizes and shares may be named in bytes and microseconds, which is what they were read as.
        let named = match (option, value) {
            ("--memory", "1m") => "1048576",
            ("--memory", "64t") => "70368744177664",
            (_, value) => value,
        };
        out.complains_of(named);
    }
    host.is_clean();
}

#[test]
fn image_of_another_platform_is_refused_by_name() {
    let host = Host::new();
    let archive = casemate_tests::paths::fixtures().join("foreign.tar");
    let loaded = host.casemate(["load", "-i", &archive.to_string_lossy()]);
    if loaded.code() == 0 {
        host.run(["foreign", "true"]).fails().complains_of("s390x");
    } else {
        loaded.fails().complains_of("s390x");
    }
    host.is_clean();
}

#[test]
fn configuration_file_with_an_unknown_key_is_refused() {
    let host = Host::with_images().configured("memroy = \"1g\"\n");
    host.run(["busybox", "true"])
        .ends_with(125)
        .complains_of("memroy")
        .complains_of("config.toml");
}

#[test]
fn name_of_an_image_that_is_no_name_is_refused() {
    let host = Host::with_images();
    for name in [
        "UPPER/Case",
        "a b",
        "../busybox",
        "busybox:",
        "busybox@sha256:12",
        "",
    ] {
        let out = host.run(["--pull", "never", name, "true"]);
        assert_eq!(out.code(), 125, "{name:?}: {}", out.stderr_text());
        out.fails();
    }
    host.is_clean();
}
