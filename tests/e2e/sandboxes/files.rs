//! What goes into a container and comes out of it: `cp`, `diff`, `commit`, and the processes that `top` shows.

use casemate_tests::{Finished, Host, Running, paths};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

const TREE: &str = "mkdir -p /t/d; echo one > /t/one; chmod 640 /t/one; ln -s one /t/link; \
    ln /t/one /t/d/same; truncate -s 100M /t/sparse; echo two > /t/d/two; ";

fn running(host: &Host, script: &str) {
    let script = format!("{script} echo ready; exec sleep 100000");
    let args = ["run", "-d", "--name", "box", "busybox", "sh", "-c", &script];
    host.casemate(args).succeeds();
    let until_ready = "until casemate logs box | grep -q ready; do sleep 0.1; done";
    on_host(host, until_ready).succeeds();
}

/// Runs a script on the host, in the test's directory.
fn on_host(host: &Host, script: &str) -> Finished {
    let mut command = Command::new("sh");
    host.prepare(&mut command);
    let casemate = paths::casemate();
    let path = format!(
        "{}:{}",
        path(casemate.parent().unwrap()),
        std::env::var("PATH").unwrap()
    );
    command.env("PATH", path).current_dir(host.dir());
    Running::start({
        command.args(["-euc", script]);
        command
    })
    .ends()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn tree_comes_out_as_it_is_from_running_and_ended_containers() {
    let host = Host::with_images();
    running(&host, TREE);
    for (name, ended) in [("live", false), ("ended", true)] {
        if ended {
            host.casemate(["stop", "-t", "0", "box"]).succeeds();
        }
        let out = host.dir().join(name);
        host.casemate(["cp", "box:/t", path(&out)]).succeeds();
        assert_eq!(fs::read_to_string(out.join("one")).unwrap(), "one\n");
        let one = fs::metadata(out.join("one")).unwrap();
        assert_eq!(one.permissions().mode() & 0o777, 0o640);
        assert_eq!(one.ino(), fs::metadata(out.join("d/same")).unwrap().ino());
        assert_eq!(fs::read_link(out.join("link")).unwrap(), Path::new("one"));
        let sparse = fs::metadata(out.join("sparse")).unwrap();
        assert_eq!((sparse.len(), sparse.blocks()), (100 << 20, 0));
        // Into a directory that is there, and only what is in one.
        host.casemate(["cp", "box:/t/d", path(&out)]).succeeds();
        host.casemate(["cp", "box:/t/d/.", path(&out)]).succeeds();
        assert_eq!(fs::read_to_string(out.join("two")).unwrap(), "two\n");
    }
    host.casemate(["inspect", "--format", "{{.State.Status}}", "box"])
        .prints("exited\n");
    host.casemate(["rm", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn files_go_in_and_the_container_finds_them() {
    let host = Host::with_images();
    let tree = host.dir().join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/file"), "from the host\n").unwrap();
    fs::set_permissions(tree.join("sub/file"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("sub/file", tree.join("link")).unwrap();
    host.casemate([
        "create",
        "--name",
        "box",
        "busybox",
        "sh",
        "-c",
        "cat /in/link /new; ls -ln /in/sub/file",
    ])
    .succeeds();
    host.casemate(["cp", path(&tree), "box:/in"]).succeeds();
    host.casemate(["cp", path(&tree.join("sub/file")), "box:new"])
        .succeeds();
    let ran = host.casemate(["start", "-a", "box"]);
    ran.succeeds()
        .mentions("from the host\nfrom the host\n-rwxr-xr-x    1 0        0 ");

    for (from, to, why) in [
        (path(&tree), "box:/new", "/new is a file"),
        (path(&tree), "box:/no/where/at", "no directory /no/where"),
        ("/no/such/file", "box:/tmp", "there is no /no/such/file"),
        ("box:/no/such", "/tmp", "there is no /no/such"),
        ("box:/new", "/no/such/dir/", "no directory"),
        ("box:/new", "box:/other", "between containers"),
        ("a", "b", "CONTAINER:PATH"),
        ("nobody:/x", "y", "nobody"),
    ] {
        host.casemate(["cp", from, to]).fails().complains_of(why);
    }
    host.casemate(["rm", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn streams_of_tar_go_both_ways_whole() {
    let host = Host::with_images();
    running(&host, "mkdir /in; head -c 20000000 /dev/urandom > /big;");
    let script = "casemate cp box:/big - | tar -xO | sha256sum > out.sum
        casemate exec box sh -c 'sha256sum < /big' > in.sum
        cmp out.sum in.sum
        mkdir tree; head -c 10000000 /dev/urandom > tree/file
        tar -c tree | casemate cp - box:/in
        test \"$(casemate exec box sh -c 'sha256sum < /in/tree/file')\" = \"$(sha256sum < tree/file)\"
        casemate pause box; echo frozen > frozen; casemate cp frozen box:/in; casemate unpause box
        casemate exec box cat /in/frozen";
    on_host(&host, script)
        .succeeds()
        .prints("box\nbox\nfrozen\n");
    // What is no archive leaves a word about it and nothing else.
    on_host(&host, "! echo no archive | casemate cp - box:/in").succeeds();
    host.casemate(["rm", "-f", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn link_in_a_container_leads_nowhere_on_the_host() {
    let host = Host::with_images();
    let secret = host.dir().join("secret");
    fs::write(&secret, "secret").unwrap();
    let script = format!(
        "ln -s {0} /link; mkdir /t; ln -s {1} /t/dir; ",
        path(&secret),
        path(host.dir())
    );
    running(&host, &script);
    let out = host.dir().join("out");
    fs::create_dir(&out).unwrap();
    host.casemate(["cp", "box:/link", path(&out)]).succeeds();
    host.casemate(["cp", "box:/t", path(&out)]).succeeds();
    assert!(fs::symlink_metadata(out.join("link")).unwrap().is_symlink());
    host.casemate(["cp", "-L", "box:/link", path(&out)]).fails();
    // Into the container's own, whatever is called so here.
    let file = host.dir().join("file");
    fs::write(&file, "mine").unwrap();
    host.casemate(["cp", path(&file), "box:/t/dir/"]).fails();
    assert_eq!(fs::read_to_string(&secret).unwrap(), "secret");
    host.casemate(["rm", "-f", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn diff_tells_what_changed() {
    let host = Host::with_images();
    running(
        &host,
        "echo x > /etc/new; rm /bin/vi; rm -r /home; mkdir /home; touch /home/mine;",
    );
    for _ in 0..2 {
        let diff = host.casemate(["diff", "box"]).succeeds().text();
        for line in ["C /etc", "A /etc/new", "D /bin/vi", "A /home/mine"] {
            assert!(diff.lines().any(|l| l == line), "{line}: {diff}");
        }
        for absent in ["/etc/hosts", "/proc", "/bin/sh", "/dev"] {
            assert!(!diff.contains(absent), "{absent}: {diff}");
        }
        host.casemate(["stop", "-t", "0", "box"]).succeeds();
    }
    host.casemate(["rm", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn commit_makes_an_image_that_runs_with_the_changes() {
    let host = Host::with_images();
    running(
        &host,
        "echo kept > /kept; rm /bin/vi; chown 7:8 /kept; mkdir -p /d; ln /kept /d/same;",
    );
    let id = host
        .casemate([
            "commit",
            "-m",
            "why",
            "-c",
            "ENV GREETING=hello",
            "-c",
            "CMD [\"sh\", \"-c\", \"echo $GREETING; cat /kept\"]",
            "box",
            "mine:1",
        ])
        .succeeds()
        .word();
    assert!(id.starts_with("sha256:"), "{id}");
    host.casemate(["exec", "box", "true"]).succeeds();
    host.casemate(["rm", "-f", "box"]).succeeds();
    host.casemate(["run", "--rm", "mine:1"])
        .succeeds()
        .prints("hello\nkept\n");
    host.casemate([
        "run",
        "--rm",
        "mine:1",
        "sh",
        "-c",
        "test ! -e /bin/vi; stat -c '%u %g %h' /kept",
    ])
    .succeeds()
    .prints("7 8 2\n");
    // Others can use it as well.
    let script = "casemate save mine:1 -o mine.tar; casemate rmi mine:1; casemate load -i mine.tar; casemate run --rm mine:1";
    on_host(&host, script).succeeds().mentions("hello\nkept\n");
    host.casemate(["commit", "-c", "FROM x", "box"]).fails();
    host.is_clean();
}

#[test]
fn top_shows_the_processes_of_the_container() {
    let host = Host::with_images();
    running(&host, "sleep 4321 &");
    let top = host.casemate(["top", "box"]).succeeds().text();
    let header: Vec<&str> = top.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(
        header,
        ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]
    );
    assert_eq!(top.lines().count(), 3, "{top}");
    assert!(
        top.contains("sleep 4321") && top.contains("sleep 100000"),
        "{top}"
    );
    host.casemate(["top", "box", "-o", "pid,args"])
        .succeeds()
        .mentions("sleep 4321");
    host.casemate(["stop", "-t", "0", "box"]).succeeds();
    host.casemate(["top", "box"])
        .fails()
        .complains_of("not running");
    host.casemate(["rm", "box"]).succeeds();
    host.is_clean();
}
