//! Where faults happen: a host, a neighbour that must not notice, and the sandbox that it happens to.

use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use casemate_tests::{Finished, Host, Running, SmallDisk, paths};
use rustix::process::{Pid, Signal, kill_process};

use crate::guest::{self, Dies};
use crate::plan::{Net, Phase};

/// The sandbox's name.
pub(crate) const BOX: &str = "box";
/// The neighbour's.
const NEIGHBOUR: &str = "neighbour";
/// No command takes longer, even on an emulated host under load.
const BOUND: Duration = Duration::from_secs(100);

/// Syncs a file after the other to the volume and tells each; a process that reads the bind keeps virtiofsd busy.
const WORK: &str = "trap 'exit 0' TERM; cd /data; i=1
while :; do
  until seq $i $((i+200)) | dd of=$i conv=fsync 2>/dev/null; do sleep 0.2; done; echo done $i
  cat /bind/file > /dev/null; i=$((i+1)); sleep 0.2
done";
/// Every file that was told must be there, whole; then makes room for the next sandbox.
const CHECK: &str = "cd /data; i=1
while [ $i -le LAST ]; do seq $i $((i+200)) | cmp - $i || exit 1; i=$((i+1)); done; rm -f [0-9]*; echo whole";
const COUNT: &str = "trap 'exit 0' TERM; i=0
while :; do i=$((i+1)); echo $i > /data/new; sync; mv /data/new /data/count; sleep 0.3; done";

/// A host with what faults need.
pub(crate) struct Scene {
    // Before the host, whose directory it is mounted in.
    small: Option<SmallDisk>,
    pub(crate) host: Host,
    neighbour: Option<Neighbour>,
}

/// A container that goes on throughout.
struct Neighbour {
    pids: Vec<String>,
    shown: String,
    address: String,
    count: u64,
}

/// What a long-lived process has.
#[derive(Debug)]
pub(crate) struct Vitals {
    pub(crate) process: String,
    pub(crate) descriptors: usize,
    /// KiB of its own.
    pub(crate) memory: u64,
}

impl Scene {
    /// A host on an ordinary disk, with a neighbour.
    pub(crate) fn new() -> Self {
        let host = Host::with_images();
        let scene = Self {
            small: None,
            host,
            neighbour: None,
        };
        scene.prepare();
        scene
    }

    /// A host on a disk that can be filled up.
    pub(crate) fn small() -> Self {
        let host = Host::new();
        let small = SmallDisk::on(&host.data(), "160m");
        let archive = paths::fixtures().join("busybox.tar");
        host.casemate(["load", "-i", &archive.to_string_lossy()])
            .succeeds();
        let scene = Self {
            small: Some(small),
            host,
            neighbour: None,
        };
        scene.prepare();
        // The first life's traces are the host's: templates, directories.
        scene.volume_has(0);
        scene
    }

    fn prepare(&self) {
        let bind = self.host.dir().join("bind");
        for dir in [&bind, &self.out(), &self.input()] {
            fs::create_dir_all(dir).unwrap();
        }
        fs::write(bind.join("file"), "of the host\n").unwrap();
        for number in 0..20 {
            let content = vec![b'x'; 40 << 10];
            fs::write(self.input().join(format!("file{number}")), content).unwrap();
        }
        self.wrap_helpers();
        self.configure("");
        self.host.casemate(["volume", "create", "kept"]).succeeds();
    }

    /// Plugins and passt that fail when told so.
    fn wrap_helpers(&self) {
        let dir = self.host.dir().join("helpers");
        fs::create_dir_all(&dir).unwrap();
        let fail = self.fail_file();
        let fail = fail.display();
        let slow = self.slow_file();
        let slow = slow.display();
        let wrap = |name: &str, program: &Path, call: &str| {
            let program = program.display();
            let text = format!(
                "#!/bin/sh\nread -r fails 2> /dev/null < {fail}\n\
                 if [ \"$fails\" = \"{call}\" ]; then\n\
                 echo '{{\"code\": 100, \"msg\": \"made to fail\"}}'; echo 'made to fail' >&2; exit 1\nfi\n\
                 if [ \"$fails $CNI_COMMAND\" = \"slow {name} ADD\" ]; then\n\
                 : > {slow}; (sleep 2; exec {program} \"$@\") <&0 & wait $!; exit $?\nfi\n\
                 exec {program} \"$@\"\n"
            );
            let path = dir.join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        for plugin in fs::read_dir("/usr/lib/cni").expect("CNI plugins").flatten() {
            let name = plugin.file_name().to_string_lossy().into_owned();
            wrap(&name, &plugin.path(), &format!("$CNI_COMMAND {name}"));
        }
        wrap("passt", Path::new("/usr/bin/passt"), "passt");
    }

    fn fail_file(&self) -> PathBuf {
        self.host.dir().join("failing")
    }

    /// Is there once a plugin that was made slow works.
    pub(crate) fn slow_file(&self) -> PathBuf {
        self.host.dir().join("slow")
    }

    /// Has a helper fail from now on: `ADD bridge`, `passt`; or makes a plugin slow that has a child do its work:
    /// `slow bridge`. `None`: all work again.
    pub(crate) fn fail(&self, call: Option<&str>) {
        match call {
            Some(call) => fs::write(self.fail_file(), format!("{call}\n")).unwrap(),
            None => {
                let _ = fs::remove_file(self.fail_file());
                let _ = fs::remove_file(self.slow_file());
            }
        }
    }

    fn configure(&self, more: &str) {
        let helpers = self.host.dir().join("helpers");
        let helpers = helpers.display();
        self.host.configure(&format!(
            "cni_dir = \"{helpers}\"\npasst = \"{helpers}/passt\"\n{more}"
        ));
    }

    /// Guests that start from now on die at that time; `None`: they don't.
    pub(crate) fn guests_die(&self, death: Option<(Dies, SystemTime)>) {
        let _ = fs::remove_file(guest::initrd_in(self.host.dir()));
        let more = death.map(|(what, when)| {
            let initrd = guest::initrd(self.host.dir(), what, when);
            format!("initrd = \"{}\"\n", initrd.display())
        });
        self.configure(&more.unwrap_or_default());
    }

    /// Fills the disk; what is returned gives the room back when removed.
    pub(crate) fn fill_disk(&self) -> PathBuf {
        let small = self.small.as_ref();
        small.expect("a disk that can be filled up").fills_up()
    }

    fn input(&self) -> PathBuf {
        self.host.dir().join("input")
    }

    fn out(&self) -> PathBuf {
        self.host.dir().join("out")
    }

    /// Starts a command that must end within bounds.
    pub(crate) fn start<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Running {
        self.host.start(args).within(BOUND)
    }

    /// Starts what a phase consists of.
    pub(crate) fn begin(&self, phase: Phase, net: Net) -> Running {
        let bind = format!("{}:/bind", self.host.dir().join("bind").display());
        match phase {
            Phase::Create => {
                let mut args = vec!["create", "--name", BOX, "--memory", "128m"];
                args.extend(match net {
                    Net::None => ["--network", "none", "--label", "net=none"],
                    Net::Bridge => ["--network", "bridge", "-p", "18080:8080"],
                    Net::Passt => ["--network", "passt", "--label", "net=passt"],
                });
                args.extend(["-v", "kept:/data", "-v", &bind]);
                args.extend(["busybox", "sh", "-c", WORK]);
                self.start(args)
            }
            Phase::Start => self.start(["start", BOX]),
            Phase::Exec => {
                let script = "for i in 1 2 3; do cat /bind/file; sleep 0.1; done; \
                              dd if=/dev/zero of=/tmp/x bs=1M count=4 conv=fsync 2>/dev/null; sha256sum /tmp/x";
                self.start(["exec", BOX, "sh", "-c", script])
            }
            Phase::CopyIn => {
                let to = format!("{BOX}:/copied");
                self.start(["cp", &self.input().to_string_lossy(), &to])
            }
            Phase::CopyOut => {
                let from = format!("{BOX}:/bin");
                self.start(["cp", &from, &self.out().to_string_lossy()])
            }
            Phase::Stop => self.start(["stop", BOX]),
            Phase::Remove => self.start(["rm", "-f", BOX]),
        }
    }

    /// Waits until the sandbox has synced something to its volume.
    pub(crate) fn works(&self) {
        let deadline = Instant::now() + BOUND;
        while self.told() == 0 {
            assert!(Instant::now() < deadline, "{BOX} does no work");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The last file that the sandbox told it had synced.
    pub(crate) fn told(&self) -> u64 {
        let logs = self.start(["logs", BOX]).ends().text();
        let last = logs
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix("done "));
        last.and_then(|number| number.parse().ok()).unwrap_or(0)
    }

    /// Everything that the sandbox told it had synced is in its volume.
    pub(crate) fn volume_has(&self, last: u64) {
        let script = CHECK.replace("LAST", &last.to_string());
        let args = [
            "run",
            "--rm",
            "-v",
            "kept:/data",
            "busybox",
            "sh",
            "-c",
            &script,
        ];
        let check = self.start(args).ends();
        check.succeeds().prints("whole\n");
    }

    /// The sandbox's own processes of a program: not the neighbour's.
    pub(crate) fn processes(&self, program: &str) -> Vec<Pid> {
        let theirs = self.neighbour.as_ref().map(|n| n.pids.as_slice());
        let name = |pid: &Pid| format!("process {} {program}", pid.as_raw_nonzero());
        let mut found = self.host.processes(program);
        found.retain(|pid| !theirs.unwrap_or_default().contains(&name(pid)));
        found
    }

    /// What `ps` says of the sandbox; `None`: it isn't there.
    pub(crate) fn state(&self) -> Option<String> {
        let ps = self
            .start(["ps", "-a", "--format", "{{.Names}} {{.State}}"])
            .ends();
        ps.succeeds();
        let text = ps.text();
        let line = text.lines().find_map(|line| line.strip_prefix("box "));
        line.map(str::to_owned)
    }

    /// Runs a command of which nothing but its end is expected.
    pub(crate) fn command<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Finished {
        self.start(args).ends()
    }

    /// What the host got from a copy.
    pub(crate) fn forget_copies(&self) {
        let _ = fs::remove_dir_all(self.out());
        fs::create_dir_all(self.out()).unwrap();
    }

    /// Starts the neighbour.
    pub(crate) fn settle_neighbour(&mut self) {
        let mut args = vec!["run", "-d", "--name", NEIGHBOUR, "--memory", "128m"];
        args.extend(["--network", "bridge", "-p", "18090:8080"]);
        args.extend(["-v", "neighbours:/data", "busybox", "sh", "-c", COUNT]);
        self.command(args).succeeds();
        let shown = self.command(["exec", NEIGHBOUR, "ip", "-4", "-o", "addr", "show", "eth0"]);
        let text = shown.succeeds().text();
        let address = text.split_whitespace().nth(3).expect("an address");
        let address = address.split('/').next().unwrap_or_default();
        self.neighbour = Some(Neighbour {
            pids: self.host.all_processes(),
            shown: self.neighbour_shown(),
            address: format!("{address}:1"),
            count: 0,
        });
        // It counts from the first second on.
        let deadline = Instant::now() + BOUND;
        while self
            .command(["exec", NEIGHBOUR, "cat", "/data/count"])
            .code()
            != 0
        {
            assert!(Instant::now() < deadline, "the neighbour does not count");
        }
        self.neighbour_goes_on();
    }

    fn neighbour_shown(&self) -> String {
        let format = "{{.State.Status}} {{.State.Pid}} {{.State.StartedAt}} {{.RestartCount}}";
        let shown = self.command(["inspect", "--format", format, NEIGHBOUR]);
        shown.succeeds().text()
    }

    /// The neighbour is the same as ever: it counts, its volume takes what it writes, its network answers.
    pub(crate) fn neighbour_goes_on(&mut self) {
        let Some(before) = &self.neighbour else {
            return;
        };
        assert_eq!(
            self.neighbour_shown(),
            before.shown,
            "the neighbour changed"
        );
        let deadline = Instant::now() + BOUND;
        let count = loop {
            let cat = self.command(["exec", NEIGHBOUR, "cat", "/data/count"]);
            let count: u64 = cat.succeeds().word().parse().expect("a number");
            if count > before.count {
                break count;
            }
            assert!(Instant::now() < deadline, "the neighbour stopped counting");
        };
        let address: SocketAddr = before.address.parse().expect("an address");
        // Nobody listens there, and its kernel says so.
        match TcpStream::connect_timeout(&address, Duration::from_secs(20)) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            other => panic!("the neighbour's network does not answer: {other:?}"),
        }
        if let Some(neighbour) = &mut self.neighbour {
            neighbour.count = count;
        }
    }

    /// What the neighbour's processes have, which must not grow.
    pub(crate) fn vitals(&self) -> Vec<Vitals> {
        let pids = self.neighbour.iter().flat_map(|neighbour| &neighbour.pids);
        pids.filter_map(|process| {
            let pid = process.split(' ').nth(1)?;
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let anonymous = status
                .lines()
                .find_map(|line| line.strip_prefix("RssAnon:"));
            let memory = anonymous.and_then(|text| text.split_whitespace().next()?.parse().ok());
            let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
            Some(Vitals {
                process: process.clone(),
                descriptors,
                memory: memory.unwrap_or(0),
            })
        })
        .collect()
    }

    /// Ends it all; nothing may be left.
    pub(crate) fn ends(mut self) {
        if self.neighbour.take().is_some() {
            self.command(["rm", "-f", NEIGHBOUR]).succeeds();
        }
        self.host.is_clean();
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // After a point that failed: its leftovers must not be those of the next one.
        self.fail(None);
        let _ = self.host.command(["rm", "-f", BOX, NEIGHBOUR]).output();
        for line in self.host.all_processes() {
            let pid = line.split(' ').nth(1).and_then(|pid| pid.parse().ok());
            if let Some(pid) = pid.and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}
