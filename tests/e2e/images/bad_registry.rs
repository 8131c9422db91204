//! Registries that lie, stall or fall silent.

use std::time::{Duration, Instant};

use casemate_tests::registry::{BadRegistry, Fault, free_address};
use casemate_tests::{Finished, Host};

/// Impatient, so that what has to time out does so within the test's time.
const IMPATIENT: &str = "[image.limits]\nstall_seconds = 2\nconnect_seconds = 2\nattempts = 2\n";

fn pull(host: &Host, fault: Fault) -> Finished {
    let registry = BadRegistry::serve("museum", fault);
    host.casemate(["pull", &registry.name("museum")])
}

#[track_caller]
fn nothing_is_stored(host: &Host) {
    host.casemate(["images", "-q"]).succeeds().prints("");
    host.is_clean();
}

#[test]
fn digest_mismatch_is_told_with_both_digests() {
    for fault in [Fault::CorruptLayer, Fault::CorruptConfig] {
        let host = Host::new().configured(IMPATIENT);
        pull(&host, fault).fails().complains_of("sha256:");
        nothing_is_stored(&host);
    }
}

#[test]
fn manifest_of_another_digest_than_the_one_asked_for_is_refused() {
    let host = Host::new().configured(IMPATIENT);
    let registry = BadRegistry::serve("museum", Fault::CorruptManifest);
    host.casemate(["pull", &registry.pinned("museum")]).fails();
    nothing_is_stored(&host);
}

#[test]
fn layer_cut_off_in_the_middle_fails_and_the_next_pull_goes_on() {
    let host = Host::new().configured(IMPATIENT);
    let registry = BadRegistry::serve("museum", Fault::CutLayer);
    let name = registry.name("museum");
    host.casemate(["pull", &name]).fails();
    nothing_is_stored(&host);
    registry.recovers();
    host.casemate(["pull", &name]).succeeds();
}

#[test]
fn registry_that_stalls_is_given_up() {
    let host = Host::new().configured(IMPATIENT);
    let begun = Instant::now();
    pull(&host, Fault::StallLayer)
        .fails()
        .complains_of("no data");
    assert!(
        begun.elapsed() < Duration::from_secs(40),
        "{:?}",
        begun.elapsed()
    );
    nothing_is_stored(&host);
}

#[test]
fn registry_that_is_slow_is_waited_for() {
    let host = Host::new().configured(IMPATIENT);
    let registry = BadRegistry::serve("busybox", Fault::Slow(2));
    host.casemate(["pull", &registry.name("busybox")])
        .succeeds();
}

#[test]
fn registry_that_is_down_is_named() {
    let host = Host::new().configured(IMPATIENT);
    let address = free_address().unwrap();
    host.casemate(["pull", &format!("{address}/busybox")])
        .fails()
        .complains_of(&address);
    nothing_is_stored(&host);
}

#[test]
fn registry_that_is_broken_is_named_with_its_status() {
    for status in [500, 503, 401, 404] {
        let host = Host::new().configured(IMPATIENT);
        pull(&host, Fault::Status(status))
            .fails()
            .complains_of("127.0.0.1");
        nothing_is_stored(&host);
    }
}

#[test]
fn manifest_of_the_wrong_type_or_size_is_refused() {
    for fault in [Fault::Html, Fault::OldManifest, Fault::HugeManifest] {
        let host = Host::new().configured(IMPATIENT);
        pull(&host, fault).fails();
        nothing_is_stored(&host);
    }
}

#[test]
fn platform_that_the_image_has_not_is_refused_by_name() {
    let host = Host::new().configured(IMPATIENT);
    let registry = BadRegistry::serve("foreign", Fault::None);
    host.casemate(["pull", &registry.name("foreign")])
        .fails()
        .complains_of("amd64");
    nothing_is_stored(&host);
}
