//! Prepares what is measured and takes it to the KVM host.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail, ensure};
use casemate_tests::fixture::{self, Compression, Image, Layout};
use serde_json::json;
use tempfile::TempDir;

use crate::figures::Figure;
use crate::{parts, pods};

/// What a group of figures needs and how long it may take.
struct Group {
    /// Images of its store.
    images: &'static [&'static str],
    /// Programs of this machine that it starts, and their data; copied to a host that has no disk.
    tools: &'static [&'static str],
    /// Programs in the root of runc's container beside busybox; none: it has no container.
    bundle: Option<&'static [&'static str]>,
    /// By the instruction clock, where the host is an emulated one.
    clocked: bool,
    /// By that clock one sample is enough: it repeats, and takes minutes.
    once: bool,
    /// Seconds until it is given up, by the wall clock of a busy machine without KVM.
    limit: u32,
}

/// A directory of the bench's that lies on a disk of the host's own.
pub(crate) const SCRATCH: &str = "scratch";

const SCRATCH_TOOLS: &[&str] = &["/usr/sbin/mke2fs", "/etc/mke2fs.conf"];
const RUN_TOOLS: &[&str] = &["/usr/sbin/runc", "/usr/sbin/mke2fs", "/etc/mke2fs.conf"];
const FIO_TOOLS: &[&str] = &["/usr/bin/fio", "/usr/sbin/mke2fs", "/etc/mke2fs.conf"];
const NETWORK_TOOLS: &[&str] = &[
    "/usr/sbin/runc",
    "/usr/sbin/mke2fs",
    "/etc/mke2fs.conf",
    parts::IPERF,
    "/usr/lib/cni/bridge",
    "/usr/lib/cni/host-local",
    "/usr/lib/cni/firewall",
    "/usr/lib/cni/portmap",
    "/usr/lib/cni/tuning",
    "/usr/bin/ip",
    "/usr/sbin/iptables",
    "/usr/sbin/ip6tables",
    "/usr/sbin/iptables-restore",
    "/usr/sbin/ip6tables-restore",
    // What iptables loads.
    "/usr/lib/x86_64-linux-gnu/xtables",
];

const POD_TOOLS: &[&str] = &[
    "/usr/bin/containerd",
    "/usr/bin/containerd-shim-runc-v2",
    "/usr/bin/ctr",
    "/usr/sbin/runc",
    "/usr/lib/cni/bridge",
    "/usr/lib/cni/host-local",
    "/usr/lib/cni/loopback",
    // What containerd gives its pods.
    "/etc/hosts",
    "/etc/resolv.conf",
    "/usr/lib/cni/portmap",
    "/usr/sbin/iptables",
    "/usr/sbin/ip6tables",
    "/usr/sbin/iptables-restore",
    "/usr/sbin/ip6tables-restore",
    "/usr/lib/x86_64-linux-gnu/xtables",
];

fn group(name: &str) -> Result<Group> {
    let group = Group {
        images: &[],
        tools: &[],
        bundle: None,
        clocked: true,
        once: false,
        limit: 900,
    };
    Ok(match name {
        "boots" => Group {
            tools: &[QEMU, "/usr/share/qemu", "/usr/share/seabios"],
            ..group
        },
        "one-boot" | "memory" => group,
        "gate" => Group {
            images: &["busybox"],
            tools: SCRATCH_TOOLS,
            ..group
        },
        "runs" => Group {
            images: &["busybox"],
            tools: RUN_TOOLS,
            bundle: Some(&[]),
            ..group
        },
        "living" => Group {
            images: &["busybox"],
            tools: RUN_TOOLS,
            bundle: Some(&[]),
            limit: 3600,
            ..group
        },
        "block" => Group {
            images: &["fio"],
            tools: FIO_TOOLS,
            limit: 3600,
            ..group
        },
        "volumes" => Group {
            images: &["volumes"],
            tools: FIO_TOOLS,
            limit: 3600,
            ..group
        },
        "binds" => Group {
            images: &["binds"],
            tools: SCRATCH_TOOLS,
            once: true,
            limit: 10_800,
            ..group
        },
        "network" => Group {
            images: &["network"],
            tools: NETWORK_TOOLS,
            bundle: Some(&[parts::IPERF]),
            limit: 3600,
            ..group
        },
        "neighbours" => Group {
            images: &["busybox"],
            tools: NETWORK_TOOLS,
            once: true,
            limit: 7200,
            ..group
        },
        "pods" => Group {
            tools: POD_TOOLS,
            limit: 7200,
            ..group
        },
        // Gigabytes take too long by the slower clock, and nothing here is a time.
        "console" => Group {
            images: &["busybox"],
            clocked: false,
            limit: 7200,
            ..group
        },
        other => bail!("no group {other:?} is measured on a KVM host"),
    })
}

const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Everything ready to be measured.
pub(crate) struct Bench {
    root: PathBuf,
    prefix: PathBuf,
    dir: PathBuf,
    /// Normal guests run right here.
    here: bool,
    /// Removes `dir` in the end.
    _scratch: TempDir,
}

impl Bench {
    /// Finds the KVM host and what is to be measured.
    pub(crate) fn prepare(root: &Path) -> Result<Self> {
        let prefix = casemate_tests::paths::prefix();
        let casemate = prefix.join("bin/casemate");
        ensure!(
            casemate.exists(),
            "{} is missing: run make",
            casemate.display()
        );
        let scratch = tempfile::Builder::new()
            .prefix("casemate-bench-")
            .tempdir()?;
        let dir = scratch.path().to_path_buf();
        let here = match std::env::var("CASEMATE_KVM_HOST").as_deref() {
            Ok("here") => true,
            Ok("emulated") => false,
            _ => Command::new(&casemate)
                .args(["check", "--quiet"])
                .stdin(Stdio::null())
                .status()?
                .success(),
        };
        let bench = Self {
            root: root.to_path_buf(),
            prefix,
            dir,
            here,
            _scratch: scratch,
        };
        let init = fs::read(bench.static_program("casemate-bench-init")?)?;
        fs::write(bench.dir.join("sign.cpio"), fixture::initrd(&init, &[]))?;
        Ok(bench)
    }

    /// How the figures are clocked.
    pub(crate) fn clock(&self) -> &'static str {
        match self.here {
            true => "the wall clock of a host with KVM",
            false => {
                "instructions of an emulated host, 1 ms = 1 million (see \"The clock\" for what that leaves out)"
            }
        }
    }

    /// The CLI that is measured.
    pub(crate) fn casemate(&self) -> PathBuf {
        self.prefix.join("bin/casemate")
    }

    /// Measures a group on the KVM host; what was measured before a failure is kept.
    pub(crate) fn measure(
        &self,
        name: &str,
        samples: usize,
        figures: &mut Vec<Figure>,
    ) -> Result<()> {
        self.on_host(name, samples, self.here, None, figures)?;
        if name == "boots" && !self.here {
            let file = self.dir.join("exits.json");
            self.on_host("one-boot", 1, false, Some(&file), figures)?;
            let details: BTreeMap<String, f64> = serde_json::from_slice(&fs::read(&file)?)?;
            let mut exits = Figure::plain("boot_exits", "exits", vec![details.values().sum()]);
            exits.details = details;
            figures.push(exits);
        }
        Ok(())
    }

    /// The quick look at our side of all starts: by the instruction clock on any machine, as its figures repeat.
    pub(crate) fn starts(&self, samples: usize) -> Result<Vec<Figure>> {
        let mut figures = Vec::new();
        self.on_host("gate", samples, false, None, &mut figures)?;
        Ok(figures)
    }

    fn on_host(
        &self,
        name: &str,
        samples: usize,
        here: bool,
        exits: Option<&Path>,
        figures: &mut Vec<Figure>,
    ) -> Result<()> {
        let group = group(name)?;
        let samples = match group.clocked && group.once && !here {
            true => 1,
            false => samples,
        };
        let store = self.store(group.images)?;
        let bundle = self.dir.join(format!("bundle-{name}"));
        if let Some(programs) = group.bundle
            && !bundle.exists()
        {
            let tool = self.static_program("casemate-guest-tool")?;
            parts::write_bundle(&bundle, &tool, programs)?;
        }
        let scratch = self.dir.join(SCRATCH);
        fs::create_dir_all(&scratch)?;
        let mut more = Vec::new();
        if name == "pods" {
            more = vec![self.pods_archive()?, self.crictl()?];
        }
        let this = std::env::current_exe()?;
        let mut command = Command::new(self.root.join("tests/kvm-host/run"));
        command.args(["--timeout", &group.limit.to_string()]);
        if here {
            command.args(["--where", "here"]);
        } else if group.clocked {
            command.arg("--clock");
            let parts = [&this, &self.prefix, &self.dir.join("sign.cpio")];
            let tools = group.tools.iter().map(PathBuf::from);
            let firecracker = firecracker().filter(|_| name == "boots");
            let own = parts.into_iter().cloned().chain([bundle.clone()]);
            let copies = own.chain(store.clone()).chain(tools).chain(more.clone());
            for path in copies.chain(firecracker).filter(|path| path.exists()) {
                command.arg("--copy").arg(path);
            }
        } else {
            command
                .args(["--where", "emulated", "--scratch"])
                .arg(&scratch);
        }
        if let Some(file) = exits {
            command.arg("--exits").arg(file);
        }
        if let Some(firecracker) = firecracker() {
            command.args(["--env", &format!("FIRECRACKER={}", firecracker.display())]);
        }
        if let [_, crictl] = &more[..] {
            command.args(["--env", &format!("{}={}", pods::CRICTL, crictl.display())]);
        }
        command
            .arg("--")
            .arg(&this)
            .args(["inside", name, &samples.to_string()]);
        command.arg(&self.prefix).arg(&self.dir);
        command.arg(store.unwrap_or_default()).arg(bundle);
        let out = command
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()?;
        for line in String::from_utf8(out.stdout)?.lines() {
            let figure = serde_json::from_str(line);
            figures.push(figure.with_context(|| format!("{name} printed {line:?}"))?);
        }
        match out.status.code() {
            Some(0) => Ok(()),
            Some(124) => bail!("{name} was not over within {} s", group.limit),
            _ => bail!("{name} failed on the KVM host: {}", out.status),
        }
    }

    /// The image of pods, for `ctr image import`.
    fn pods_archive(&self) -> Result<PathBuf> {
        let archive = self.dir.join(pods::ARCHIVE);
        let tool = self.static_program("casemate-guest-tool")?;
        let base = fixture::busybox_layer(Path::new("/bin/busybox"), &tool)?;
        let image = Image::new("pods:latest", vec![base.build(Compression::Gzip)]);
        let image = image.configured(json!({"Cmd": ["/bin/busybox", "sleep", "1000000"]}));
        let mut layout = Layout::create(&self.dir.join("pods-layout"))?;
        layout.add(&image)?;
        layout.archive(&archive)?;
        Ok(archive)
    }

    /// The crictl that the conformance tests use.
    fn crictl(&self) -> Result<PathBuf> {
        let out = done(Command::new(self.root.join("tests/conformance/tools")).arg("crictl"))?;
        let dir = String::from_utf8(out.stdout)?;
        Ok(Path::new(dir.trim()).join("crictl"))
    }

    /// A store with these images, made once: a group's own, as every byte is copied to a clocked host.
    fn store(&self, images: &[&str]) -> Result<Option<PathBuf>> {
        if images.is_empty() {
            return Ok(None);
        }
        let store = self.dir.join(format!("store-of-{}", images.join("-")));
        if store.exists() {
            return Ok(Some(store));
        }
        let tool = self.static_program("casemate-guest-tool")?;
        let base =
            fixture::busybox_layer(Path::new("/bin/busybox"), &tool)?.build(Compression::Gzip);
        for name in images {
            let layers = std::iter::once(Ok(base.clone()))
                .chain(parts::layers(name))
                .collect::<Result<_>>()?;
            let archive = self.dir.join("image.tar");
            let layout = self.dir.join("layout");
            let mut layout_of_one = Layout::create(&layout)?;
            layout_of_one.add(&Image::new(&format!("{name}:latest"), layers))?;
            layout_of_one.archive(&archive)?;
            let mut load = Command::new(self.casemate());
            load.args(["load", "-i"]).arg(&archive);
            load.env("CASEMATE_DATA", &store)
                .env("CASEMATE_STATE", self.dir.join("state"));
            done(&mut load)?;
            fs::remove_file(archive)?;
            fs::remove_dir_all(layout)?;
        }
        Ok(Some(store))
    }

    /// Builds a program of this crate that needs no libraries.
    fn static_program(&self, name: &str) -> Result<PathBuf> {
        const TRIPLE: &str = "x86_64-unknown-linux-gnu";
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(&self.root);
        cargo.args([
            "rustc",
            "--quiet",
            "--package",
            "casemate-tests",
            "--bin",
            name,
        ]);
        cargo.args([
            "--profile",
            "agent",
            "--target",
            TRIPLE,
            "--",
            "-C",
            "target-feature=+crt-static",
        ]);
        done(&mut cargo)?;
        let target = std::env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| self.root.join("target"), PathBuf::from);
        Ok(target.join(TRIPLE).join("agent").join(name))
    }
}

/// The Firecracker to compare with, if one is named.
fn firecracker() -> Option<PathBuf> {
    let path = std::env::var_os("FIRECRACKER")?;
    Some(PathBuf::from(path)).filter(|path| !path.as_os_str().is_empty())
}

/// The output of a program that must succeed.
pub(crate) fn done(command: &mut Command) -> Result<Output> {
    let out = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {command:?}"))?;
    let words = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "{command:?}: {words}");
    Ok(out)
}
