//! Health checks: of the image, of the command line, and what `ps`, `inspect` and `events` say of them.

use casemate_tests::Host;
use std::time::{Duration, Instant};

fn health(host: &Host) -> String {
    let format = "{{.State.Health.Status}} {{.State.Health.FailingStreak}}";
    let shown = host.casemate(["inspect", "--format", format, "box"]);
    shown.succeeds().text().trim().to_owned()
}

fn becomes(host: &Host, expected: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while health(host) != expected {
        assert!(
            Instant::now() < deadline,
            "{} instead of {expected}",
            health(host)
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn check_follows_the_container_from_healthy_to_unhealthy_and_back() {
    let host = Host::with_images();
    let options = [
        "--health-cmd",
        "echo looked; test -e /well",
        "--health-interval",
        "300ms",
        "--health-retries",
        "2",
    ];
    let mut args = vec!["run", "-d", "--name", "box"];
    args.extend(options);
    args.extend(["busybox", "sh", "-c", "touch /well; exec sleep 100000"]);
    host.casemate(args).succeeds();
    becomes(&host, "healthy 0");
    host.casemate(["ps"]).succeeds().mentions("(healthy)");
    host.casemate(["exec", "box", "rm", "/well"]).succeeds();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !health(&host).starts_with("unhealthy") {
        assert!(Instant::now() < deadline, "{}", health(&host));
    }
    host.casemate(["ps", "-q", "--filter", "health=unhealthy"])
        .succeeds()
        .mentions("");
    let log = host.casemate(["inspect", "--format", "{{json .State.Health.Log}}", "box"]);
    log.succeeds().mentions("\"ExitCode\":1").mentions("looked");
    host.casemate(["exec", "box", "touch", "/well"]).succeeds();
    becomes(&host, "healthy 0");
    host.casemate([
        "events",
        "--since",
        "10m",
        "--until",
        "0s",
        "--filter",
        "container=box",
    ])
    .succeeds()
    .mentions("health_status: unhealthy");
    host.casemate(["rm", "-f", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn check_that_hangs_or_floods_counts_as_failed_and_harms_nothing() {
    let host = Host::with_images();
    for command in ["sleep 1000", "yes"] {
        host.casemate([
            "run",
            "-d",
            "--name",
            "box",
            "--health-cmd",
            command,
            "--health-interval",
            "100ms",
            "--health-timeout",
            "1s",
            "--health-retries",
            "1",
            "busybox",
            "sleep",
            "100000",
        ])
        .succeeds();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !health(&host).starts_with("unhealthy") {
            assert!(Instant::now() < deadline, "{}", health(&host));
            std::thread::sleep(Duration::from_millis(200));
        }
        let log = host.casemate(["inspect", "--format", "{{json .State.Health.Log}}", "box"]);
        assert!(log.succeeds().text().len() < 30_000);
        log.mentions("took longer than 1s");
        host.casemate(["rm", "-f", "box"]).succeeds();
    }
    host.is_clean();
}

#[test]
fn options_that_make_no_check_are_refused() {
    let host = Host::with_images();
    for (options, why) in [
        (&["--health-interval", "often"][..], "often"),
        (&["--health-cmd", ""], "nothing to run"),
        (
            &["--no-healthcheck", "--health-cmd", "true"],
            "--no-healthcheck",
        ),
    ] {
        let mut args = vec!["create"];
        args.extend(options);
        args.push("busybox");
        host.casemate(args).ends_with(125).complains_of(why);
    }
    host.is_clean();
}
