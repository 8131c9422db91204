//! Files and directories of the host in a container.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use casemate_tests::{Finished, Host, list_tree, paths};
use rustix::process::{Signal, kill_process};

/// Runs a script in a container with these options.
fn run(host: &Host, options: &[&str], script: &str) -> Finished {
    let command = ["busybox", "sh", "-c", script];
    host.run(options.iter().chain(&command))
}

/// A directory of the host with a file in it.
fn shared(host: &Host) -> PathBuf {
    let dir = host.dir().join("shared");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), "of the host\n").unwrap();
    dir
}

/// `--volume` of a path.
fn volume(path: &Path, target: &str) -> String {
    format!("{}:{target}", path.display())
}

#[test]
fn directory_is_seen_and_changed_from_both_sides() {
    let host = Host::with_images();
    let dir = shared(&host);
    let bind = volume(&dir, "/data");
    let script = "cat /data/file; echo of the guest > /data/new; chown 7:8 /data/new; chmod 640 /data/new; \
                  mkdir /data/dir; mv /data/file /data/dir/; ln -s dir /data/link";
    run(&host, &["-v", &bind], script)
        .succeeds()
        .prints("of the host\n");
    let meta = fs::metadata(dir.join("new")).unwrap();
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o7777),
        (7, 8, 0o640)
    );
    assert_eq!(
        fs::read_to_string(dir.join("new")).unwrap(),
        "of the guest\n"
    );
    assert_eq!(
        fs::read_to_string(dir.join("link/file")).unwrap(),
        "of the host\n"
    );

    // While it runs, too.
    let command = [
        "-i",
        "-v",
        &bind,
        "busybox",
        "sh",
        "-c",
        "echo up; read go; cat /data/late",
    ];
    let mut running = host.start_run(command);
    running.prints("up");
    fs::write(dir.join("late"), "later\n").unwrap();
    running.says("go\n").prints("later");
    running.ends().succeeds();
    host.is_clean();
}

#[test]
fn read_only_bind_refuses_every_change() {
    let host = Host::with_images();
    let dir = shared(&host);
    let mount = format!("type=bind,source={},target=/data,readonly", dir.display());
    let script = "cat /data/file; echo x > /data/file; rm /data/file; touch /data/x; chmod 777 /data; \
                  mount -o remount,rw /data; mount -t virtiofs share0 /mnt && echo x > /mnt/file; ls /data";
    let options = [
        "--cap-add",
        "SYS_ADMIN",
        "--tmpfs",
        "/mnt",
        "--mount",
        &mount,
    ];
    run(&host, &options, script)
        .succeeds()
        .prints("of the host\nfile\n")
        .complains_of("read-only file system");
    assert_eq!(
        fs::read_to_string(dir.join("file")).unwrap(),
        "of the host\n"
    );
    host.is_clean();
}

#[test]
fn single_file_shows_that_file_and_nothing_else() {
    let host = Host::with_images();
    let dir = shared(&host);
    fs::write(dir.join("secret"), "secret\n").unwrap();
    let bind = volume(&dir.join("file"), "/etc/one");
    // A guest that owns its kernel sees no more: the share is mounted anew from within.
    let script = "cat /etc/one; echo changed > /etc/one; mount -t virtiofs share0 /mnt; ls -A /mnt; touch /mnt/x; \
                  cat /mnt/../secret /mnt/file/../secret; rm /mnt/file";
    let options = ["--cap-add", "SYS_ADMIN", "--tmpfs", "/mnt", "-v", &bind];
    run(&host, &options, script).fails();
    let out = run(&host, &options, script);
    assert_eq!(out.text(), "changed\nfile\n");
    assert!(
        !out.stderr_text().contains("secret\n--"),
        "{}",
        out.stderr_text()
    );
    assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), "changed\n");
    assert_eq!(fs::read_to_string(dir.join("secret")).unwrap(), "secret\n");
    // Over a file that every container has.
    let hosts = volume(&dir.join("file"), "/etc/hosts:ro");
    run(&host, &["-v", &hosts], "cat /etc/hosts")
        .succeeds()
        .prints("changed\n");
    host.is_clean();
}

#[test]
fn missing_path_is_made_for_volume_and_refused_for_mount() {
    let host = Host::with_images();
    let missing = host.dir().join("a/b");
    let mount = format!("type=bind,source={},target=/data", missing.display());
    run(&host, &["--mount", &mount], "true")
        .ends_with(125)
        .complains_of("does not exist");
    assert!(!missing.exists());
    run(&host, &["-v", "./a/b:/data"], "touch /data/here").succeeds();
    assert!(missing.join("here").exists());
    // Gone before a later start.
    let bind = volume(&missing, "/data");
    host.casemate(["create", "--name", "box", "-v", &bind, "busybox", "true"])
        .succeeds();
    fs::remove_dir_all(&missing).unwrap();
    host.casemate(["start", "box"])
        .fails()
        .complains_of("does not exist");
    host.casemate(["rm", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn names_of_all_kinds_are_possible() {
    let host = Host::with_images();
    for name in [
        "with:colon",
        "new\nline",
        "spa ce,comma \"quote\"",
        "gr\u{fc}n",
        "-dash",
    ] {
        let dir = host.dir().join(name);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("file"), name).unwrap();
        let source = dir.display().to_string().replace('"', "\"\"");
        let mount = format!("type=bind,\"source={source}\",target=/data");
        run(&host, &["--mount", &mount], "cat /data/file")
            .succeeds()
            .prints(name);
    }
    run(&host, &["-v", "with:colon:/data:x"], "true")
        .ends_with(125)
        .complains_of("colons");
    host.is_clean();
}

/// A tree with one of each thing that a directory of the host may hold.
fn exhibits(dir: &Path) {
    fs::create_dir(dir).unwrap();
    fs::write(dir.join("plain"), "plain\n").unwrap();
    fs::hard_link(dir.join("plain"), dir.join("twin")).unwrap();
    std::os::unix::fs::symlink("/nowhere", dir.join("link")).unwrap();
    let sparse = fs::File::create(dir.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    sparse.write_all_at(b"middle", 32 << 20).unwrap();
    fs::create_dir(dir.join("sticky")).unwrap();
    for (name, mode) in [("sticky", 0o1777), ("plain", 0o4750)] {
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    std::os::unix::fs::lchown(dir.join("link"), Some(5), Some(6)).unwrap();
    fs::write(dir.join("n".repeat(255)), "long\n").unwrap();
    let deep = dir.join("d/".repeat(40));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("bottom"), "deep\n").unwrap();
    let set = Command::new("setfattr")
        .args(["-n", "user.comment", "-v", "hello"])
        .arg(dir.join("sparse"))
        .status();
    assert!(set.is_ok_and(|status| status.success()), "setfattr");
}

#[test]
fn everything_about_files_passes_through() {
    let host = Host::with_images();
    let dir = host.dir().join("exhibits");
    exhibits(&dir);
    let bind = volume(&dir, "/data");
    let seen = host.run(["-v", &bind, "busybox", "guest-tool", "tree", "/data"]);
    assert_eq!(seen.succeeds().text(), list_tree(&dir, &[]).unwrap());

    // And back: what the guest makes is what the host sees.
    let script = "cd /data && mkdir made && cd made && echo a > a && ln a b && truncate -s 10737418240 huge && \
                  echo end | dd of=huge bs=1 seek=10737418235 conv=notrunc 2>/dev/null && mkfifo pipe && chmod 2755 . && \
                  touch -d @1000000000 a && mv a c && stat -c '%h %s' c && chown -h 9:9 pipe && guest-tool tree /data/made huge";
    let out = run(&host, &["-v", &bind], script);
    out.succeeds();
    let (first, listing) = out
        .text()
        .split_once('\n')
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .unwrap();
    assert_eq!(first, "2 2");
    let made = dir.join("made");
    let huge = fs::metadata(made.join("huge")).unwrap();
    assert_eq!(huge.len(), 10 << 30);
    assert!(huge.blocks() < 64, "{}", huge.blocks());
    let skip = [PathBuf::from("huge")];
    assert_eq!(listing, list_tree(&made, &skip).unwrap());
    host.is_clean();
}

/// A few of the cases of `make posix`: a suite of file system tests that was written by others.
const CASES: [&str; 16] = [
    "rename::to_multiply_linked::regular",
    "rename::updates_link_parent",
    "rename::eexist_enotempty_to_non_empty::dir",
    "rename::preserve_metadata_symlink",
    "rename::exdev_target",
    "unlink::open_file_not_freed",
    "rmdir::eexist_enotempty_dotdot",
    "open::uid_gid_eq_euid_egid",
    "open::open_nofollow",
    "open::eloop_comp",
    "mkdir::permission_bits_from_mode",
    "chmod::clear_isgid_bit",
    "truncate::extend_file_shrink_sparse",
    "utimensat::subsecond",
    "utimensat::nobody",
    "link::enametoolong_component",
];

#[test]
fn cases_of_others_pass() {
    let host = Host::with_images();
    let dir = shared(&host);
    fs::copy(paths::fixtures().join("pjdfstest"), dir.join("pjdfstest")).unwrap();
    let config = "[features]\nutimensat = {}\nutime_now = {}\n[settings]\nnaptime = 0.02\n\
                  [dummy_auth]\nentries = [[\"nobody\", \"nobody\"], [\"tests\", \"tests\"]]\n";
    fs::write(dir.join("config.toml"), config).unwrap();
    let script = "echo tests:x:1001:1001::/: >> /etc/passwd; printf '%s\\n' nobody:x:65534: tests:x:1001: > /etc/group; \
                  printf '%s\\n' 'passwd: files' 'group: files' > /etc/nsswitch.conf; \
                  /data/pjdfstest -c /data/config.toml -p /data -s /second --exact";
    // By their whole names, which it shortens when it tells of them.
    let names = CASES
        .map(|case| format!("pjdfstest::tests::{case}"))
        .join(" ");
    let script = format!("{script} {names}");
    let options = ["--tmpfs", "/second", "-v", &volume(&dir, "/data")];
    run(&host, &options, &script).succeeds().mentions(&format!(
        "Summary: 0 failed, 0 skipped, {} passed",
        CASES.len()
    ));
    host.is_clean();
}

#[test]
fn sparse_file_of_ten_gib_stays_sparse() {
    let host = Host::with_images();
    let dir = shared(&host);
    // Data at both ends.
    let script = "cd /data && dd if=/dev/zero of=huge bs=64k count=4 2> /dev/null && truncate -s 10737418240 huge && \
                  echo -n end | dd of=huge bs=1 seek=10737418237 conv=notrunc 2> /dev/null && guest-tool data huge && \
                  tail -c 3 huge; echo; stat -c %s huge";
    let out = run(&host, &["-v", &volume(&dir, "/data")], script);
    let text = "0 262144\n10737414144 10737418240\nend\n10737418240\n";
    out.succeeds().prints(text);
    let huge = fs::File::open(dir.join("huge")).unwrap();
    assert!(huge.metadata().unwrap().blocks() <= 1024);
    let mut last = [0; 4];
    huge.read_exact_at(&mut last, (10 << 30) - 4).unwrap();
    assert_eq!(&last, b"\0end");
    // The host's hole is the guest's, too.
    drop(huge);
    let other = fs::File::create(dir.join("other")).unwrap();
    other.set_len(1 << 40).unwrap();
    other.write_all_at(b"x", 1 << 39).unwrap();
    run(
        &host,
        &["-v", &volume(&dir, "/data:ro")],
        "guest-tool data /data/other; stat -c %s /data/other",
    )
    .succeeds()
    .prints("549755813888 549755817984\n1099511627776\n");
    host.is_clean();
}

#[test]
fn mappings_locks_and_direct_access_work() {
    let host = Host::with_images();
    let dir = shared(&host);
    fs::write(dir.join("mapped"), "x".repeat(8192)).unwrap();
    let script = "guest-tool map /data/mapped changed && head -c 9 /data/mapped; echo; \
                  guest-tool lock /data/lock 4 & sleep 1; guest-tool lock /data/lock 0; wait; guest-tool lock /data/lock 0; \
                  dd if=/dev/zero of=/data/direct bs=4096 count=4 oflag=direct 2>/dev/null && dd if=/data/direct bs=4096 iflag=direct 2>/dev/null | wc -c";
    run(&host, &["-v", &volume(&dir, "/data")], script)
        .succeeds()
        .prints("changedxx\nlocked\nbusy\nlocked\n16384\n");
    assert!(
        fs::read(dir.join("mapped"))
            .unwrap()
            .starts_with(b"changedxx")
    );
    host.is_clean();
}

#[test]
fn thousands_of_files_are_made_and_removed() {
    let host = Host::with_images();
    let dir = shared(&host);
    let script = "mkdir /data/m && cd /data/m && i=0; while [ $i -lt 1000 ]; do : > f$i; i=$((i+1)); done; ls | wc -l";
    run(&host, &["-v", &volume(&dir, "/data")], script)
        .succeeds()
        .prints("1000\n");
    assert_eq!(fs::read_dir(dir.join("m")).unwrap().count(), 1000);
    let script = "rm -r /data/m && ls /data";
    run(&host, &["-v", &volume(&dir, "/data")], script)
        .succeeds()
        .prints("file\n");
    host.is_clean();
}

#[test]
fn server_of_a_share_that_dies_ends_the_container_with_an_error() {
    let host = Host::with_images();
    let dir = shared(&host);
    let bind = volume(&dir, "/data");
    let script = "echo up; while :; do cat /data/file > /dev/null; done";
    for which in [0, 1] {
        let mut running = host.start_run(["-v", &bind, "busybox", "sh", "-c", script]);
        running.prints("up");
        // One waits outside of the process namespace, one works in it.
        let servers = host.processes("virtiofsd");
        assert_eq!(servers.len(), 2);
        kill_process(servers[which], Signal::KILL).unwrap();
        let begun = Instant::now();
        running
            .ends()
            .fails()
            .complains_of(&format!("serves {}", dir.display()));
        assert!(begun.elapsed() < Duration::from_secs(30));
        host.is_clean();
    }
}

#[test]
fn server_of_a_share_is_confined() {
    let host = Host::with_images();
    let dir = shared(&host);
    let mut running = host.start_run([
        "-i",
        "-v",
        &volume(&dir, "/data"),
        "busybox",
        "sh",
        "-c",
        "echo up; cat",
    ]);
    running.prints("up");
    let servers = host.processes("virtiofsd");
    // The one in a process namespace of its own.
    let inner = servers
        .iter()
        .map(|pid| format!("/proc/{}", pid.as_raw_nonzero()))
        .find(|process| {
            fs::read_link(format!("{process}/ns/pid")).unwrap()
                != fs::read_link("/proc/self/ns/pid").unwrap()
        });
    let process = inner.expect("a server in its own process namespace");
    let status = fs::read_to_string(format!("{process}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(field("Seccomp:"), "2", "{status}");
    let capabilities = u64::from_str_radix(&field("CapBnd:"), 16).unwrap();
    // CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_MKNOD
    for capability in [2, 21, 12, 19, 27] {
        assert_eq!(
            u64::from_str_radix(&field("CapEff:"), 16).unwrap() >> capability & 1,
            0,
            "{capabilities:x}"
        );
    }
    for kind in ["mnt", "net", "pid"] {
        let namespace = |process: &str| fs::read_link(format!("{process}/ns/{kind}")).unwrap();
        assert_ne!(namespace(&process), namespace("/proc/self"), "{kind}");
    }
    // Its root is the share.
    let names: Vec<_> = fs::read_dir(format!("{process}/root"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(names, ["file"]);
    running.ends().succeeds();
    host.is_clean();
}

#[test]
fn container_starts_again_with_its_binds() {
    let host = Host::with_images();
    let dir = shared(&host);
    let bind = volume(&dir, "/data");
    let script = "echo $((1 + $(cat /data/n 2> /dev/null || echo 0))) > /data/n; cat /data/n";
    host.casemate([
        "create", "--name", "box", "-v", &bind, "busybox", "sh", "-c", script,
    ])
    .succeeds();
    for count in ["1\n", "2\n", "3\n"] {
        host.casemate(["start", "-a", "box"])
            .succeeds()
            .prints(count);
    }
    let format = "{{json .Mounts}}";
    host.casemate(["inspect", "--format", format, "box"])
        .mentions("\"Type\":\"bind\"")
        .mentions(&dir.display().to_string());
    // Another has the same, and a volume below it.
    run(
        &host,
        &["--volumes-from", "box", "-v", "vol:/data/vol"],
        "cat /data/n; echo x > /data/vol/x; ls /data/vol",
    )
    .succeeds()
    .prints("3\nx\n");
    assert_eq!(fs::read_dir(dir.join("vol")).unwrap().count(), 0);
    host.casemate(["rm", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn too_many_binds_are_refused() {
    let host = Host::with_images();
    let dirs: Vec<String> = (0..9)
        .flat_map(|n| ["-v".to_owned(), format!("./d{n}:/d{n}")])
        .collect();
    let some: Vec<&str> = dirs[..16].iter().map(String::as_str).collect();
    run(&host, &some, "ls -d /d? | wc -l")
        .succeeds()
        .prints("8\n");
    let all: Vec<&str> = dirs.iter().map(String::as_str).collect();
    run(&host, &all, "true")
        .ends_with(125)
        .complains_of("at most 8");
    host.is_clean();
}

#[test]
fn unprivileged_users_files_are_roots_in_the_guest_and_the_users_on_the_host() {
    const SOMEBODY: u32 = 61_234;
    let host = Host::with_images();
    let dir = shared(&host);
    fs::write(dir.join("roots"), "root's\n").unwrap();
    let host = host.of_user(SOMEBODY);
    std::os::unix::fs::chown(dir.join("roots"), Some(0), Some(0)).unwrap();
    fs::set_permissions(dir.join("roots"), fs::Permissions::from_mode(0o600)).unwrap();
    let script = "stat -c %u:%g /data/file; cat /data/file; echo x > /data/new; cat /data/roots; \
                  chown 7:8 /data/new; rm /data/file; ls /data";
    run(&host, &["-v", &volume(&dir, "/data")], script)
        .mentions("0:0\nof the host\n")
        .complains_of("/data/roots");
    let meta = fs::metadata(dir.join("new")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (SOMEBODY, SOMEBODY));
    assert!(!dir.join("file").exists());
    assert_eq!(fs::read_to_string(dir.join("roots")).unwrap(), "root's\n");
    let file = volume(&dir.join("new"), "/one:ro");
    run(&host, &["-v", &file], "cat /one")
        .succeeds()
        .prints("x\n");
    host.is_clean();
}
