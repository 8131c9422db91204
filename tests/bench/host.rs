//! Prepares what is measured and takes it to the KVM host.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use casemate_tests::fixture::{self, Compression, Image, Layer, Layout};

use crate::figures::Figure;
use crate::inside::FIO_BYTES;

/// How the figures below `boots`, `runs` and `block` are clocked.
pub(crate) const CLOCK: &str = "instructions of an emulated host, 1 ms = 1 million (docs/performance.md says what that leaves out)";

/// Everything ready to be measured.
pub(crate) struct Bench {
    root: PathBuf,
    prefix: PathBuf,
    dir: PathBuf,
}

impl Bench {
    /// Writes what the KVM host needs: an image store, a bundle for runc, the initrd of the boots.
    pub(crate) fn prepare(root: &Path) -> Result<Self> {
        let prefix = casemate_tests::paths::prefix();
        let dir = root.join("target/bench/host");
        let bench = Self {
            root: root.to_path_buf(),
            prefix,
            dir,
        };
        let casemate = bench.casemate();
        ensure!(
            casemate.exists(),
            "{} is missing: run make",
            casemate.display()
        );
        if bench.dir.exists() {
            fs::remove_dir_all(&bench.dir)?;
        }
        fs::create_dir_all(&bench.dir)?;
        let init = fs::read(bench.static_program("casemate-bench-init")?)?;
        fs::write(bench.dir.join("sign.cpio"), fixture::initrd(&init, &[]))?;
        bench.images()?;
        bench.bundle()?;
        Ok(bench)
    }

    /// The CLI that is measured.
    pub(crate) fn casemate(&self) -> PathBuf {
        self.prefix.join("bin/casemate")
    }

    /// Measures a group on the KVM host; what was measured before a failure is kept.
    pub(crate) fn measure(
        &self,
        group: &str,
        samples: usize,
        figures: &mut Vec<Figure>,
    ) -> Result<()> {
        self.on_host(group, samples, None, figures)?;
        if group == "boots" {
            let file = self.dir.join("exits.json");
            self.on_host("one-boot", 1, Some(&file), figures)?;
            let details: BTreeMap<String, f64> = serde_json::from_slice(&fs::read(&file)?)?;
            let mut exits = Figure::plain("boot_exits", "exits", vec![details.values().sum()]);
            exits.details = details;
            figures.push(exits);
        }
        Ok(())
    }

    fn on_host(
        &self,
        group: &str,
        samples: usize,
        exits: Option<&Path>,
        figures: &mut Vec<Figure>,
    ) -> Result<()> {
        let this = std::env::current_exe()?;
        let mut command = Command::new(self.root.join("tests/kvm-host/run"));
        command.args(["--timeout", "3000"]);
        if group == "console" {
            // A gigabyte takes too long by the slower clock, and nothing here is a time.
            command.args(["--scratch", "/var/tmp"]);
        } else {
            command.arg("--clock");
            for path in self.copies(group, &this)? {
                command.arg("--copy").arg(path);
            }
        }
        if let Some(file) = exits {
            command.arg("--exits").arg(file);
        }
        if let Some(firecracker) = std::env::var_os("FIRECRACKER") {
            let firecracker = firecracker.to_string_lossy();
            command.args(["--env", &format!("FIRECRACKER={firecracker}")]);
        }
        command
            .arg("--")
            .arg(&this)
            .args(["inside", group, &samples.to_string()]);
        command.arg(&self.prefix).arg(&self.dir);
        let out = command
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()?;
        for line in String::from_utf8(out.stdout)?.lines() {
            let figure = serde_json::from_str(line);
            figures.push(figure.with_context(|| format!("{group} printed {line:?}"))?);
        }
        ensure!(out.status.success(), "the KVM host: {}", out.status);
        Ok(())
    }

    /// What has to be copied to a host that has no disk.
    fn copies(&self, group: &str, this: &Path) -> Result<Vec<PathBuf>> {
        let mut paths = vec![this.to_path_buf(), self.prefix.clone()];
        for name in ["sign.cpio", "bundle"] {
            paths.push(self.dir.join(name));
        }
        let tools: &[&str] = match group {
            "boots" => &[
                "/usr/bin/qemu-system-x86_64",
                "/usr/share/qemu",
                "/usr/share/seabios",
            ],
            "runs" => &["/usr/sbin/runc", "/usr/sbin/mke2fs", "/etc/mke2fs.conf"],
            "block" => &["/usr/bin/fio", "/usr/sbin/mke2fs", "/etc/mke2fs.conf"],
            _ => &[],
        };
        paths.extend(tools.iter().map(PathBuf::from).filter(|path| path.exists()));
        if !matches!(group, "boots" | "one-boot" | "gate") {
            paths.push(self.dir.join("data"));
        }
        if let Some(firecracker) = std::env::var_os("FIRECRACKER").filter(|_| group == "boots") {
            paths.push(PathBuf::from(firecracker));
        }
        Ok(paths)
    }

    /// The store: busybox for runs, fio with a file to read for the disk.
    fn images(&self) -> Result<()> {
        let tool = self.static_program("casemate-guest-tool")?;
        let base =
            fixture::busybox_layer(Path::new("/bin/busybox"), &tool)?.build(Compression::Gzip);
        let mut images = vec![Image::new("busybox:latest", vec![base.clone()])];
        if Path::new("/usr/bin/fio").exists() {
            images.push(Image::new("fio:latest", vec![base, fio_layer()?]));
        }
        for image in images {
            let archive = self.dir.join("image.tar");
            let layout = self.dir.join("layout");
            let mut layout_of_one = Layout::create(&layout)?;
            layout_of_one.add(&image)?;
            layout_of_one.archive(&archive)?;
            let mut load = Command::new(self.casemate());
            load.args(["load", "-i"]).arg(&archive);
            load.env("CASEMATE_DATA", self.dir.join("data"))
                .env("CASEMATE_STATE", self.dir.join("state"));
            done(load)?;
            fs::remove_file(archive)?;
            fs::remove_dir_all(layout)?;
        }
        Ok(())
    }

    /// The same busybox unpacked, with the configuration that `runc spec` writes, for `/bin/true` without a terminal.
    fn bundle(&self) -> Result<()> {
        let bundle = self.dir.join("bundle");
        let bin = bundle.join("rootfs/bin");
        fs::create_dir_all(&bin)?;
        for dir in ["proc", "sys", "dev", "etc", "tmp"] {
            fs::create_dir_all(bundle.join("rootfs").join(dir))?;
        }
        fs::copy("/bin/busybox", bin.join("busybox"))?;
        std::os::unix::fs::symlink("busybox", bin.join("true"))?;
        let mut spec = Command::new("runc");
        spec.args(["spec", "--bundle"]).arg(&bundle);
        done(spec).context("runc (Debian package) is needed for run_vs_runc")?;
        let file = bundle.join("config.json");
        let mut document: serde_json::Value = serde_json::from_slice(&fs::read(&file)?)?;
        document["process"]["args"] = serde_json::json!(["/bin/true"]);
        document["process"]["terminal"] = serde_json::json!(false);
        Ok(fs::write(file, serde_json::to_vec_pretty(&document)?)?)
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
        done(cargo)?;
        let target = std::env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| self.root.join("target"), PathBuf::from);
        Ok(target.join(TRIPLE).join("agent").join(name))
    }
}

/// fio with its libraries, and the file that it reads.
fn fio_layer() -> Result<fixture::BuiltLayer> {
    let ldd = Command::new("ldd").arg("/usr/bin/fio").output()?;
    let mut layer = Layer::new()
        .dir("lib64", 0o755)
        .dir("lib", 0o755)
        .dir("usr", 0o755)
        .dir("usr/bin", 0o755);
    for path in String::from_utf8(ldd.stdout)?
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        layer = layer.file(path.trim_start_matches('/'), 0o755, fs::read(path)?);
    }
    layer = layer.file("bin/fio", 0o755, fs::read("/usr/bin/fio")?);
    let mut bytes = Vec::new();
    casemate_tests::stream::write(FIO_BYTES, &mut bytes)?;
    Ok(layer.file("fio", 0o644, bytes).build(Compression::None))
}

fn done(mut command: Command) -> Result<()> {
    let out = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {command:?}"))?;
    if !out.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
    Ok(())
}
