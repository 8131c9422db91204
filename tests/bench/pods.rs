//! Pods of containerd's CRI: ours against those of runc in the same containerd, asked for by crictl.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::figures::Figure;
use crate::host::done;
use crate::inside::{Installed, STATE, emit, in_turn, milliseconds};
use crate::memory::{family, parent, pss_kib};

/// Of the image that pods and containers are made of, in an archive beside the bundle.
pub(crate) const IMAGE: &str = "docker.io/library/pods:latest";
/// The archive's name.
pub(crate) const ARCHIVE: &str = "pods.tar";
/// Where crictl is, in the environment.
pub(crate) const CRICTL: &str = "CRICTL";
const OURS: &str = "casemate";
const THEIRS: &str = "runc";
const AT_ONCE: usize = 20;
/// Nothing here waits longer, even on a slow emulated host: its clock stands still while it works.
const PATIENCE: Duration = Duration::from_secs(120);

/// All figures of this group.
pub(crate) fn figures(at: &Installed, samples: usize, archive: &Path) -> Result<()> {
    let engine = Engine::start(at, archive)?;
    // What comes first makes what all later ones find.
    for handler in [OURS, THEIRS] {
        Pod::start(&engine, handler, 0)?.end()?;
    }
    start(&engine, samples)?;
    let (ours, theirs) = (
        Pod::start(&engine, OURS, 1)?,
        Pod::start(&engine, THEIRS, 2)?,
    );
    emit(&in_turn(
        "exec_sync_vs_runc",
        samples,
        || milliseconds(ours.exec()),
        || milliseconds(theirs.exec()),
    )?)?;
    memory(&ours)?;
    ours.end()?;
    theirs.end()?;
    emit(&in_turn(
        "pods_parallel_20",
        samples.min(1),
        || at_once(&engine, OURS),
        || at_once(&engine, THEIRS),
    )?)
}

/// A pod of one container, from nothing until that runs; with our phases.
fn start(engine: &Engine, samples: usize) -> Result<()> {
    let mut phases: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut pairs = Vec::new();
    for _ in 0..samples {
        let ours = Pod::start(engine, OURS, 1)?;
        let theirs = Pod::start(engine, THEIRS, 2)?;
        pairs.push((ours.took(), theirs.took()));
        for (side, pod) in [("", &ours), ("runc's ", &theirs)] {
            for (phase, took) in &pod.phases {
                phases
                    .entry(format!("{side}{phase}"))
                    .or_default()
                    .push(*took);
            }
        }
        ours.end()?;
        theirs.end()?;
    }
    let mut figure = Figure::ratio("pod_start_vs_runc", "ms", pairs);
    let mean = |all: Vec<f64>| all.iter().sum::<f64>() / all.len().max(1) as f64;
    figure.details = phases
        .into_iter()
        .map(|(name, all)| (name, mean(all)))
        .collect();
    emit(&figure)
}

/// What an idle pod of one container takes of the host.
fn memory(pod: &Pod<'_>) -> Result<()> {
    if !fs::exists("/proc/self/smaps")? {
        eprintln!(
            "bench: pod_overhead_mib and shim_pss_mib are left out: the host's kernel has no /proc/PID/smaps"
        );
        return Ok(());
    }
    // What follows a start has had its time.
    std::thread::sleep(Duration::from_secs(5));
    let vmm = pod.pid()?;
    let stat = fs::read_to_string(format!("/proc/{vmm}/stat"))?;
    let shim = parent(&stat).with_context(|| stat.clone())?;
    let all = family(shim)?
        .into_iter()
        .map(pss_kib)
        .sum::<Result<u64>>()?;
    let mib = |kib: u64| vec![kib as f64 / 1024.0];
    emit(&Figure::plain("pod_overhead_mib", "MiB", mib(all)))?;
    emit(&Figure::plain("shim_pss_mib", "MiB", mib(pss_kib(shim)?)))
}

/// Milliseconds until twenty pods that are begun at the same time run.
fn at_once(engine: &Engine, handler: &str) -> Result<f64> {
    let begun = Instant::now();
    let pods: Vec<Result<Pod<'_>>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_ONCE)
            .map(|number| scope.spawn(move || Pod::start(engine, handler, 100 + number)))
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|_| bail!("a thread panicked"))
        };
        threads.into_iter().map(join).collect()
    });
    let took = begun.elapsed().as_secs_f64() * 1000.0;
    for pod in pods {
        pod?.end()?;
    }
    Ok(took)
}

/// A containerd with its CRI, both runtimes and a network of its own.
struct Engine {
    dir: PathBuf,
    crictl: PathBuf,
    daemon: Child,
}

impl Engine {
    fn start(at: &Installed, archive: &Path) -> Result<Self> {
        let crictl = std::env::var_os(CRICTL).context("where is crictl?")?;
        let dir = std::env::temp_dir().join("casemate-bench-pods");
        fs::create_dir_all(dir.join("cni"))?;
        let network = json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
            {"type": "bridge", "bridge": "pods0", "isGateway": true, "ipMasq": true,
             "ipam": {"type": "host-local", "dataDir": dir.join("addresses"), "routes": [{"dst": "0.0.0.0/0"}],
                      "ranges": [[{"subnet": "10.98.0.0/24"}]]}},
            {"type": "portmap", "capabilities": {"portMappings": true}}]});
        fs::write(dir.join("cni/10-pods.conflist"), network.to_string())?;
        fs::write(dir.join("config.toml"), config(&dir))?;
        let mut command = Command::new("containerd");
        command
            .arg("--config")
            .arg(dir.join("config.toml"))
            .env("PATH", path(at))
            .env("CASEMATE_STATE", STATE)
            // An emulated host on a busy machine may take its time, which is no failure.
            .env("CASEMATE_START_TIMEOUT", "300")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(dir.join("containerd.log"))?);
        let engine = Self {
            daemon: command.spawn().context("containerd (Debian package)")?,
            crictl: crictl.into(),
            dir,
        };
        let deadline = Instant::now() + PATIENCE;
        while !engine.crictl(&["info"]).output()?.status.success() {
            ensure!(
                Instant::now() < deadline,
                "containerd doesn't answer: {}",
                engine.log()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
        let mut import = Command::new("ctr");
        import.arg("--address").arg(engine.socket());
        import
            .args(["-n", "k8s.io", "image", "import"])
            .arg(archive);
        done(&mut import)?;
        Ok(engine)
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("c.sock")
    }

    fn crictl(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.crictl);
        let endpoint = format!("unix://{}", self.socket().display());
        command.args(["--timeout", "300s", "--runtime-endpoint", &endpoint]);
        command.args(["--image-endpoint", &endpoint]);
        command.args(args).stdin(Stdio::null());
        command
    }

    /// What crictl prints in one word.
    fn word(&self, args: &[&str]) -> Result<String> {
        let out = done(&mut self.crictl(args)).with_context(|| self.log())?;
        Ok(String::from_utf8(out.stdout)?.trim().to_owned())
    }

    /// The last that containerd said.
    fn log(&self) -> String {
        let text = fs::read_to_string(self.dir.join("containerd.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.crictl(&["rmp", "-fa"]).output();
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn path(at: &Installed) -> String {
    let own = at.prefix.join("bin");
    format!(
        "{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        own.display()
    )
}

/// As containerd 1.6 reads it.
fn config(dir: &Path) -> String {
    let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
    let at = |name: &str| dir.join(name);
    format!(
        "version = 2\nroot = {:?}\nstate = {:?}\n[grpc]\naddress = {:?}\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n\
         [{cri}]\nsandbox_image = {IMAGE:?}\n\
         [{cri}.cni]\nbin_dir = \"/usr/lib/cni\"\nconf_dir = {:?}\n\
         [{cri}.containerd.runtimes.{OURS}]\nruntime_type = \"io.containerd.casemate.v2\"\n\
         [{cri}.containerd.runtimes.{THEIRS}]\nruntime_type = \"io.containerd.runc.v2\"\n",
        at("root"),
        at("state"),
        at("c.sock"),
        at("opt"),
        at("cni"),
    )
}

/// A pod with one container that sleeps.
struct Pod<'a> {
    engine: &'a Engine,
    id: String,
    container: String,
    /// Milliseconds of each step.
    phases: Vec<(&'static str, f64)>,
}

impl<'a> Pod<'a> {
    fn start(engine: &'a Engine, handler: &str, number: usize) -> Result<Self> {
        let name = format!("{handler}-{number}");
        let write = |what: &str, value: Value| -> Result<String> {
            let path = engine.dir.join(format!("{name}-{what}.json"));
            fs::write(&path, value.to_string())?;
            Ok(path.display().to_string())
        };
        let pod = write(
            "pod",
            json!({"metadata": {"name": name, "namespace": "bench", "uid": name, "attempt": 0},
                "log_directory": engine.dir, "linux": {}}),
        )?;
        let container = write(
            "container",
            json!({"metadata": {"name": "one"}, "image": {"image": IMAGE},
                "command": ["/bin/busybox", "sleep", "1000000"], "log_path": format!("{name}.log"), "linux": {}}),
        )?;
        let mut phases = Vec::new();
        let mut step = |phase: &'static str, args: &[&str]| -> Result<String> {
            let begun = Instant::now();
            let word = engine.word(args)?;
            phases.push((phase, begun.elapsed().as_secs_f64() * 1000.0));
            Ok(word)
        };
        let id = step("runp", &["runp", "--runtime", handler, &pod])?;
        let container = step("create", &["create", &id, &container, &pod])?;
        step("start", &["start", &container])?;
        Ok(Self {
            engine,
            id,
            container,
            phases,
        })
    }

    fn took(&self) -> f64 {
        self.phases.iter().map(|(_, took)| took).sum()
    }

    /// /bin/true in its container.
    fn exec(&self) -> Command {
        self.engine
            .crictl(&["exec", "--sync", &self.container, "/bin/busybox", "true"])
    }

    /// Its first process, as containerd knows it: ours is the VMM.
    fn pid(&self) -> Result<u32> {
        let template = "{{.info.pid}}";
        let args = [
            "inspectp",
            "-o",
            "go-template",
            "--template",
            template,
            &self.id,
        ];
        let text = self.engine.word(&args)?;
        text.parse().with_context(|| format!("pid {text:?}"))
    }

    fn end(self) -> Result<()> {
        self.engine.word(&["rmp", "-f", &self.id]).map(drop)
    }
}
