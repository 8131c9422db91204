//! `--timing=initcalls`: the guest kernel's boot, call by call.

use casemate_tests::Host;

#[test]
fn initcalls_are_listed_by_name_with_what_they_took() {
    let host = Host::with_images();
    let out = host.run(["--timing=initcalls", "busybox", "echo", "out"]);
    out.succeeds().prints("out\n");
    let told = out.stderr_text();
    let (phases, calls) = told.split_once("INITCALL").expect("a second table");
    assert!(phases.contains("kernel boot"), "{told}");
    let rows: Vec<(String, f64)> = calls
        .lines()
        .skip(1)
        .filter_map(|line| {
            let (name, ms) = line.rsplit_once(' ')?;
            Some((name.trim().to_owned(), ms.parse().ok()?))
        })
        .collect();
    let (all, listed) = rows.split_last().expect("rows");
    assert!(all.0.starts_with("all "), "{told}");
    assert!(listed.len() >= 10, "{told}");
    assert!(listed.windows(2).all(|w| w[0].1 >= w[1].1), "{told}");
    // Names, not addresses: the symbols of this very kernel are beside it.
    assert!(
        listed.iter().all(|(name, _)| !name.starts_with("0x")),
        "{told}"
    );
    host.is_clean();
}

#[test]
fn initcalls_and_the_kernel_log_at_once_are_refused() {
    let host = Host::with_images();
    host.run(["--timing=initcalls", "--kernel-log", "busybox", "true"])
        .ends_with(125)
        .complains_of("--kernel-log");
    host.is_clean();
}
