//! Volumes: private disks that outlive containers, with one writer at a time.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use casemate_tests::{Host, Running, paths};
use rustix::process::{Signal, kill_process};

/// Runs a script in a container with these options.
fn run(host: &Host, options: &[&str], script: &str) -> casemate_tests::Finished {
    let command = ["busybox", "sh", "-c", script];
    host.run(options.iter().chain(&command))
}

/// A container that has these options and goes on until it is told to end.
fn holder(host: &Host, options: &[&str]) -> Running {
    let command = ["-i", "busybox", "sh", "-c", "echo up; cat"];
    let mut running = host.start_run(options.iter().chain(&command));
    running.prints("up");
    running
}

fn volume_names(host: &Host) -> String {
    host.casemate(["volume", "ls", "-q"]).succeeds().text()
}

#[test]
fn volume_keeps_what_one_container_wrote_for_the_next() {
    let host = Host::with_images();
    // Not synced by the workload: an orderly end keeps it all the same.
    let script = "echo kept > /data/file; chown 7:8 /data/file; mkdir /data/dir; ls -a /data";
    run(&host, &["-v", "cache:/data"], script)
        .succeeds()
        .prints(".\n..\ndir\nfile\n");
    run(
        &host,
        &["--mount", "source=cache,target=/other"],
        "cat /other/file; stat -c %u:%g /other/file",
    )
    .succeeds()
    .prints("kept\n7:8\n");
    assert_eq!(volume_names(&host), "cache\n");
    host.is_clean();
    host.casemate(["volume", "rm", "cache"])
        .succeeds()
        .prints("cache\n");
    assert_eq!(volume_names(&host), "");
    run(&host, &["-v", "cache:/data"], "ls -A /data")
        .succeeds()
        .prints("");
}

#[test]
fn volume_has_one_writer_or_many_readers() {
    let host = Host::with_images();
    run(&host, &["-v", "cache:/data"], "echo there > /data/file").succeeds();
    let writer = holder(&host, &["--name", "writer", "-v", "cache:/data"]);
    for options in [["-v", "cache:/data"], ["-v", "cache:/data:ro"]] {
        run(&host, &options, "true")
            .ends_with(125)
            .complains_of("volume cache is in use by container writer");
    }
    host.casemate(["volume", "rm", "-f", "cache"])
        .fails()
        .complains_of("in use by container writer");
    host.casemate(["volume", "create", "--from", "cache", "copy"])
        .fails()
        .complains_of("in use");
    writer.ends().succeeds();

    let reader = holder(&host, &["--name", "reader", "-v", "cache:/data:ro"]);
    let script = "cat /data/file; echo x > /data/file; echo $?";
    run(&host, &["-v", "cache:/data:ro"], script)
        .succeeds()
        .prints("there\n1\n")
        .complains_of("read-only file system");
    run(&host, &["-v", "cache:/data"], "true")
        .ends_with(125)
        .complains_of("in use by container reader");
    reader.ends().succeeds();
    run(&host, &["-v", "cache:/data"], "true").succeeds();
    host.is_clean();
}

#[test]
fn fresh_volume_gets_what_the_image_has_there() {
    let host = Host::with_images();
    let list = |options: &[&str]| {
        let command = ["museum", "guest-tool", "tree", "/museum"];
        host.run(options.iter().chain(&command)).succeeds().text()
    };
    let image = list(&[]);
    assert_eq!(list(&["-v", "copy:/museum"]), image);
    // From then on it is the volume's.
    let remove = ["-v", "copy:/museum", "museum", "rm", "/museum/plain"];
    host.run(remove).succeeds();
    let later = list(&["-v", "copy:/museum"]);
    assert!(!later.contains("museum/plain ") && later.lines().count() + 1 == image.lines().count());
    assert_eq!(list(&["-v", "bare:/museum:nocopy"]).lines().count(), 1);
    // A directory's owner and mode are copied even if nothing is in it.
    run(
        &host,
        &["-v", "home:/home/alice"],
        "stat -c '%u %a' /home/alice",
    )
    .succeeds()
    .prints("1000 750\n");
    host.is_clean();
}

#[test]
fn copy_up_that_was_killed_is_begun_anew() {
    let host = Host::with_images();
    let list = |options: &[&str]| {
        let command = ["museum", "guest-tool", "tree", "/museum"];
        host.run(options.iter().chain(&command)).succeeds().text()
    };
    let image = list(&[]);
    let begun = std::time::Instant::now();
    list(&["-v", "timed:/museum"]);
    let whole = begun.elapsed();
    for step in 1..6 {
        let name = format!("killed{step}:/museum");
        let running = host.start_run(["-v", &name, "museum", "true"]);
        std::thread::sleep(whole * step / 6);
        for pid in host.processes("casemate-vmm") {
            let _ = kill_process(pid, Signal::KILL);
        }
        drop(running.ends());
        assert_eq!(list(&["-v", &name]), image, "step {step}");
    }
    host.is_clean();
}

#[test]
fn volume_that_is_full_says_so() {
    let host = Host::with_images();
    let small = "source=small,target=/data,volume-opt=size=32m";
    let script = "dd if=/dev/zero of=/data/fill bs=1M count=100; echo dd $?; rm /data/fill; echo x > /data/y && cat /data/y; read go";
    let mut container = host.start_run(["-i", "--mount", small, "busybox", "sh", "-c", script]);
    container.prints("dd 1\nx\n");
    // What was deleted is the host's again, soon after the guest's kernel has it in its journal.
    let disk = host.data().join("volumes/small/disk.img");
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let meta = fs::metadata(&disk).unwrap();
        assert_eq!(meta.len(), 32 << 20);
        if meta.blocks() * 512 < 12 << 20 {
            break;
        }
        assert!(Instant::now() < deadline, "{}", meta.blocks() * 512);
        std::thread::sleep(Duration::from_millis(100));
    }
    container.says("go\n");
    container.ends().succeeds().complains_of("no space left");
    let tiny = "source=tiny,target=/museum,volume-opt=size=16m";
    host.run(["--mount", tiny, "museum", "true"]).succeeds();
    for size in ["1", "1k", "lots"] {
        host.casemate(["volume", "create", "--opt", &format!("size={size}"), "bad"])
            .fails()
            .complains_of("size");
    }
    host.is_clean();
}

#[test]
fn deleted_in_the_last_moment_is_the_hosts_again() {
    let host = Host::with_images();
    let used = || {
        let disk = host.data().join("volumes/small/disk.img");
        fs::metadata(disk).unwrap().blocks() * 512
    };
    let small = "source=small,target=/data,volume-opt=size=64m";
    run(&host, &["--mount", small], "true").succeeds();
    let empty = used();
    for _ in 0..5 {
        // Held open by a process that is killed with the container: its end comes after the file's.
        let script = "dd if=/dev/zero of=/data/fill bs=1M count=32 conv=fsync 2>/dev/null; \
            sleep 1000 < /data/fill & rm /data/fill";
        run(&host, &["--mount", small], script).succeeds();
        // Its journal has 4 MiB.
        assert!(used() < empty + (6 << 20), "{empty}, then {}", used());
    }
    host.is_clean();
}

#[test]
fn volume_with_anything_in_it_gets_no_copy() {
    let host = Host::with_images();
    run(&host, &["-v", "mine:/x"], "touch /x/.hidden").succeeds();
    host.run(["-v", "mine:/museum", "museum", "ls", "-A", "/museum"])
        .succeeds()
        .prints(".hidden\n");
    host.is_clean();
}

/// Writes and syncs a file after the other, telling each, until a process of the sandbox is killed.
fn survives_a_kill_of(executable: &str) {
    let host = Host::with_images();
    let script = "i=0; while :; do seq $i $((i+500)) | dd of=/data/$i conv=fsync 2>/dev/null; echo done $i; i=$((i+1)); done";
    let command = ["-v", "db:/data", "busybox", "sh", "-c", script];
    let mut run = host.start(["run", "--name", "box"].iter().chain(&command));
    run.prints("done 20\n");
    for pid in host.processes(executable) {
        let _ = kill_process(pid, Signal::KILL);
    }
    let ended = run.ends();
    let last = ended.text();
    let last: u32 = last.lines().last().unwrap()["done ".len()..]
        .parse()
        .unwrap();
    let script = format!(
        "i=0; while [ $i -le {last} ]; do seq $i $((i+500)) | cmp - /data/$i || exit 1; i=$((i+1)); done; echo whole"
    );
    // A reader first: the journal is played back for it all the same.
    for mode in [":ro", ""] {
        let volume = format!("db:/data{mode}");
        host.run(["-v", &volume, "busybox", "sh", "-c", &script])
            .succeeds()
            .prints("whole\n");
    }
    host.casemate(["rm", "-f", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn vmm_killed_keeps_every_byte_that_was_synced() {
    survives_a_kill_of("casemate-vmm");
}

#[test]
fn shim_killed_keeps_every_byte_that_was_synced() {
    survives_a_kill_of("containerd-shim-casemate-v2");
}

#[test]
fn container_that_starts_again_has_its_volume_again() {
    let host = Host::with_images();
    let script = "echo $((1 + $(cat /data/n 2> /dev/null || echo 0))) > /data/n; cat /data/n";
    let command = [
        "--name",
        "box",
        "-v",
        "count:/data",
        "busybox",
        "sh",
        "-c",
        script,
    ];
    host.casemate(["create"].iter().chain(&command)).succeeds();
    for count in ["1\n", "2\n"] {
        host.casemate(["start", "-a", "box"])
            .succeeds()
            .prints(count);
    }
    // A stopped container keeps it, and says so.
    host.casemate(["volume", "rm", "count"])
        .fails()
        .complains_of("in use by container box");
    host.casemate(["volume", "prune", "-a", "-f"]).succeeds();
    host.casemate(["volume", "ls", "-q", "--filter", "dangling=true"])
        .prints("");
    let shown = host.casemate(["inspect", "box"]).succeeds().text();
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown[0]["Mounts"][0]["Name"], "count");
    assert_eq!(shown[0]["Mounts"][0]["Destination"], "/data");
    assert_eq!(shown[0]["Mounts"][0]["RW"], true);
    host.casemate(["rm", "-v", "box"]).succeeds();
    assert_eq!(volume_names(&host), "count\n");
    host.is_clean();
}

fn with_volumes_image() -> Host {
    let host = Host::with_images();
    let archive = paths::fixtures().join("volumes.tar");
    host.casemate(["load", "-i", &archive.to_string_lossy()])
        .succeeds();
    host
}

#[test]
fn volumes_of_the_image_live_as_long_as_they_are_needed() {
    let host = with_volumes_image();
    let list = [
        "volumes",
        "sh",
        "-c",
        "cat /data/seed; stat -c %u /data /data/seed; df /data | tail -1 | cut -d' ' -f1; ls -A /empty",
    ];
    host.run(list)
        .succeeds()
        .prints("seed\n1000\n1000\n/dev/vdc\n");
    assert_eq!(volume_names(&host), "");
    // Kept without --rm, until they are asked to go too.
    host.casemate([
        "run",
        "--name",
        "box",
        "volumes",
        "sh",
        "-c",
        "echo mine > /data/file",
    ])
    .succeeds();
    assert_eq!(volume_names(&host).lines().count(), 2);
    let from = [
        "--volumes-from",
        "box:ro",
        "busybox",
        "cat",
        "/data/file",
        "/data/seed",
    ];
    host.run(from).succeeds().prints("mine\nseed\n");
    let write = ["--volumes-from", "box:ro", "busybox", "touch", "/data/x"];
    host.run(write).fails().complains_of("read-only");
    assert_eq!(volume_names(&host).lines().count(), 2);
    host.casemate(["rm", "-v", "box"]).succeeds();
    assert_eq!(volume_names(&host), "");
    // Without -v they stay, and go with the next prune; a volume with a name doesn't.
    host.casemate([
        "create",
        "--name",
        "box",
        "-v",
        "named:/data",
        "-v",
        "/more",
        "volumes",
    ])
    .succeeds();
    host.casemate(["rm", "box"]).succeeds();
    assert_eq!(volume_names(&host).lines().count(), 3);
    host.casemate(["volume", "prune", "-f"])
        .succeeds()
        .mentions("Deleted Volumes:");
    assert_eq!(volume_names(&host), "named\n");
    host.is_clean();
}

#[test]
fn create_that_fails_leaves_no_volume_without_a_name() {
    let host = with_volumes_image();
    host.casemate(["create", "--name", "box", "busybox"])
        .succeeds();
    host.casemate(["create", "--name", "box", "volumes", "true"])
        .fails()
        .complains_of("\"box\"");
    host.run(["volumes", "no-such-command"]).ends_with(127);
    assert_eq!(volume_names(&host), "");
    host.casemate(["rm", "box"]).succeeds();
    host.is_clean();
}

#[test]
fn clone_begins_with_the_content_and_goes_its_own_way() {
    let host = Host::with_images();
    run(&host, &["-v", "base:/data"], "echo base > /data/file").succeeds();
    host.casemate([
        "volume", "create", "--from", "base", "--label", "job=7", "job",
    ])
    .succeeds()
    .prints("job\n");
    run(
        &host,
        &["-v", "job:/data"],
        "cat /data/file; echo job > /data/file",
    )
    .succeeds()
    .prints("base\n");
    run(
        &host,
        &["-v", "base:/data", "-v", "job:/job"],
        "cat /data/file /job/file",
    )
    .succeeds()
    .prints("base\njob\n");
    host.casemate(["volume", "ls", "-q", "-f", "label=job=7"])
        .prints("job\n");
    host.casemate(["volume", "create", "--from", "base", "job"])
        .fails()
        .complains_of("exists already");
    host.casemate(["volume", "create", "--from", "nothing", "x1"])
        .fails()
        .complains_of("no such volume: nothing");
    host.is_clean();
}

#[test]
fn volume_commands_speak_as_dockers() {
    let host = Host::with_images();
    host.casemate([
        "volume", "create", "--opt", "size=64m", "--label", "a=b", "one",
    ])
    .succeeds()
    .prints("one\n");
    host.casemate(["volume", "create", "one"])
        .succeeds()
        .prints("one\n");
    host.casemate(["volume", "create", "--size", "32m", "one"])
        .fails()
        .complains_of("67108864");
    let anonymous = host.casemate(["volume", "create"]).succeeds().word();
    assert_eq!(anonymous.len(), 64);
    host.casemate(["volume", "ls", "--filter", "name=one"])
        .prints("DRIVER   VOLUME NAME\nlocal    one\n");
    host.casemate([
        "volume",
        "inspect",
        "--format",
        "{{.Name}} {{.Driver}} {{.Labels.a}} {{.Options.size}}",
        "one",
    ])
    .prints("one local b 67108864\n");
    host.casemate(["volume", "inspect", "none"])
        .fails()
        .complains_of("no such volume: none");
    host.casemate(["volume", "rm", "none"])
        .fails()
        .complains_of("no such volume: none");
    host.casemate(["volume", "rm", "-f", "none"])
        .succeeds()
        .prints("");
    host.casemate(["volume", "prune", "-f"])
        .succeeds()
        .mentions(&anonymous);
    host.casemate(["volume", "rm", "one"]).succeeds();
    assert_eq!(volume_names(&host), "");
}

#[test]
fn hostile_names_and_places_are_refused_and_named() {
    let host = Host::with_images();
    let long = format!("{}:/data", "x".repeat(5000));
    for volume in [
        "a/../../x:/d",
        ".hidden/x:d",
        "c1:data",
        "c1:/",
        "c1:/d:suid,rshared",
        "a\nb:/d",
        &long,
    ] {
        host.run(["-v", volume, "busybox", "true"])
            .ends_with(125)
            .complains_of("--volume");
    }
    for name in ["../x", "/etc", "a/b", ".lock", ".new-x", "x"] {
        for command in ["create", "inspect", "rm"] {
            host.casemate(["volume", command, "--", name])
                .fails()
                .complains_of("is not a volume name");
        }
    }
    host.run(["-v", "c1:/d", "--tmpfs", "/d", "busybox", "true"])
        .ends_with(125)
        .complains_of("/d");
    // A link in a volume's place leads nowhere.
    host.casemate(["volume", "create", "real"]).succeeds();
    std::os::unix::fs::symlink(
        host.data().join("volumes/real"),
        host.data().join("volumes/link"),
    )
    .unwrap();
    run(&host, &["-v", "link:/data"], "true")
        .ends_with(125)
        .complains_of("link");
    fs::remove_file(host.data().join("volumes/link")).unwrap();
    // A link of the image's in the mount's place stays in the container.
    let script = "echo y > /museum/dangling/x/f && cat /no/such/thing/x/f";
    host.run([
        "-v",
        "real:/museum/dangling/x",
        "museum",
        "sh",
        "-c",
        script,
    ])
    .succeeds()
    .prints("y\n");
    host.is_clean();
}

#[test]
fn options_of_mounts_are_kept() {
    let host = Host::with_images();
    let script = "grep -E ' /(a|b|t|c) ' /proc/mounts | sort | cut -d' ' -f2-4; echo x > /etc/hosts; cat /c/hosts 2>/dev/null; cat /etc/hosts";
    let options = [
        "-v",
        "one:/a:nosuid,noexec",
        "-v",
        "one:/b:ro",
        "--mount",
        "type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=711",
        "-v",
        "etc:/etc",
    ];
    let out = run(&host, &options, script);
    out.succeeds()
        .mentions("/a ext4 rw,nosuid,noexec")
        .mentions("/b ext4 ro")
        .mentions("size=1024k,mode=711");
    // The small files that every container has are on top of it, as with Docker.
    run(
        &host,
        &["-v", "etc:/e"],
        "test -s /e/hosts || echo not in the volume; cat /e/passwd | head -1",
    )
    .succeeds()
    .mentions("root:x:0:0");
    host.is_clean();
}

#[test]
fn kills_at_any_moment_leave_whole_volumes() {
    let host = with_volumes_image();
    host.run(["-v", "keep:/keep", "volumes", "true"]).succeeds();
    let begun = std::time::Instant::now();
    host.run(["-v", "keep:/keep", "-v", "/anonymous", "volumes", "true"])
        .succeeds();
    let whole = begun.elapsed();
    for step in 0..8 {
        let running = host.start_run(["-v", "keep:/keep", "-v", "/anonymous", "volumes", "true"]);
        std::thread::sleep(whole * step / 8);
        for name in ["casemate", "containerd-shim-casemate-v2", "casemate-vmm"] {
            for pid in host.processes(name) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        drop(running);
    }
    host.casemate(["ps", "-aq"]).succeeds().prints("");
    assert_eq!(volume_names(&host), "keep\n");
    host.run(["-v", "keep:/keep", "volumes", "touch", "/keep/x"])
        .succeeds();
    let left: Vec<_> = fs::read_dir(host.data().join("volumes"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != ".lock" && name != "keep")
        .collect();
    assert!(left.is_empty(), "{left:?}");
    host.is_clean();
}

#[test]
fn unprivileged_user_has_volumes() {
    let host = Host::with_images().of_user(61_234);
    let script = "chown 7:8 /data; echo x > /data/file; stat -c %u:%g /data";
    run(&host, &["-v", "cache:/data"], script)
        .succeeds()
        .prints("7:8\n");
    run(&host, &["-v", "cache:/data:ro"], "cat /data/file")
        .succeeds()
        .prints("x\n");
    let meta = fs::metadata(host.data().join("volumes/cache")).unwrap();
    assert_eq!((meta.uid(), meta.mode() & 0o777), (61_234, 0o700));
    host.is_clean();
}
