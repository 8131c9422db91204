//! Pulling from Debian's docker-registry.

use std::time::Duration;

use casemate_tests::registry::{BadRegistry, Fault};
use casemate_tests::{Host, Registry};
use rustix::process::Signal;

fn names(host: &Host) -> String {
    host.casemate(["images", "--format", "{{.Repository}}:{{.Tag}}"])
        .succeeds()
        .text()
}

#[test]
fn image_pulled_is_in_the_store_and_told_without_escape_codes() {
    let host = Host::new();
    let registry = Registry::of_fixtures();
    let out = host.casemate(["pull", &registry.name("museum")]);
    out.succeeds();
    assert!(
        !out.text().contains('\x1b') && !out.stderr_text().contains('\x1b'),
        "{}",
        out.stderr_text()
    );
    assert_eq!(
        names(&host),
        format!("{}:latest\n", registry.name("museum"))
    );
}

#[test]
fn image_pulled_by_digest_is_that_image() {
    let host = Host::new();
    let registry = BadRegistry::serve("busybox", Fault::None);
    let pinned = registry.pinned("busybox");
    host.casemate(["pull", &pinned]).succeeds();
    host.casemate(["inspect", &pinned]).succeeds();
}

#[test]
fn unknown_image_and_unknown_tag_are_named() {
    let host = Host::new();
    let registry = Registry::of_fixtures();
    for name in ["nosuch:latest", "busybox:nosuch"] {
        host.casemate(["pull", &registry.name(name)])
            .fails()
            .complains_of(name);
    }
    assert_eq!(names(&host), "");
    host.is_clean();
}

#[test]
fn layers_in_the_store_are_not_fetched_again() {
    let host = Host::new();
    let museum = BadRegistry::serve("museum", Fault::None);
    let registry = Registry::of_fixtures();
    host.casemate(["pull", &registry.name("busybox")])
        .succeeds();
    host.casemate(["pull", &museum.name("museum")]).succeeds();
    // Four layers of its own, its manifest and configuration; busybox's layer was there already.
    let fetched: usize = museum.served().values().sum();
    assert!(fetched <= 6, "{:?}", museum.served());
}

#[test]
fn two_pulls_of_the_same_image_at_once_both_succeed() {
    let host = Host::new();
    let registry = BadRegistry::serve("museum", Fault::Slow(1));
    let name = registry.name("museum");
    let (one, two) = (host.start(["pull", &name]), host.start(["pull", &name]));
    one.ends().succeeds();
    two.ends().succeeds();
    host.casemate(["inspect", &name]).succeeds();
    let most = registry.served().values().copied().max();
    assert!(most <= Some(2), "{:?}", registry.served());
}

#[test]
fn pull_killed_at_any_point_is_taken_up_by_the_next_one() {
    let host = Host::new();
    let registry = BadRegistry::serve("museum", Fault::Slow(1));
    let name = registry.name("museum");
    for moment in [10, 60, 150, 400, 900] {
        let mut pull = host.start(["pull", &name]);
        std::thread::sleep(Duration::from_millis(moment));
        pull.gets(Signal::KILL);
        pull.ends().ends_with(137);
        host.casemate(["images"]).succeeds();
    }
    registry.recovers();
    host.casemate(["pull", &name]).succeeds();
    host.casemate(["inspect", &name]).succeeds();
}

#[test]
fn image_pulled_again_costs_its_documents_and_no_layer() {
    let host = Host::new();
    let registry = BadRegistry::serve("museum", Fault::None);
    host.casemate(["pull", &registry.name("museum")]).succeeds();
    let before = registry.served();
    host.casemate(["pull", &registry.name("museum")]).succeeds();
    let again = registry.served();
    let repeated = again
        .iter()
        .filter(|(blob, count)| before.get(*blob) != Some(count));
    assert!(repeated.count() <= 2, "before {before:?}, after {again:?}");
}

#[test]
fn mirror_of_the_configuration_file_is_asked_first() {
    let mirror = Registry::of_fixtures();
    let host = Host::new().configured(&format!(
        "[registries.\"registry.invalid\"]\nmirrors = [\"http://{}\"]\n",
        mirror.address()
    ));
    host.casemate(["pull", "registry.invalid/busybox:latest"])
        .succeeds();
    assert_eq!(names(&host), "registry.invalid/busybox:latest\n");
}

#[test]
fn platform_asked_for_is_the_one_stored() {
    let registry = Registry::of_fixtures();
    for (platform, architecture) in [
        (None, "amd64"),
        (Some("linux/s390x"), "s390x"),
        (Some("linux/arm64"), "arm64"),
    ] {
        let host = Host::new();
        let image = registry.name("platforms");
        let option = platform.map(|platform| ["--platform", platform]);
        let words = ["pull"]
            .into_iter()
            .chain(option.into_iter().flatten())
            .chain([image.as_str()]);
        host.casemate(words).succeeds();
        host.casemate(["inspect", "--format", "{{.Architecture}}", &image])
            .succeeds()
            .prints(&format!("{architecture}\n"));
    }
    let host = Host::new();
    host.casemate([
        "pull",
        "--platform",
        "linux/riscv64",
        &registry.name("platforms"),
    ])
    .fails()
    .complains_of("riscv64");
    host.casemate([
        "pull",
        "--platform",
        "amiga/68k/fast/more",
        &registry.name("platforms"),
    ])
    .fails()
    .complains_of("amiga");
}
