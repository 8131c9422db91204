//! Where things are: the installed tree and the directories used at run time.

use std::path::{Path, PathBuf};

/// The files of one installation, found relative to the running program.
///
/// `PREFIX/bin/casemate` finds `PREFIX/libexec/casemate` and `PREFIX/share/casemate`.
#[derive(Debug, Clone)]
pub struct Install {
    prefix: PathBuf,
}

impl Install {
    /// The installation that the running program belongs to.
    pub fn of_current_exe() -> std::io::Result<Self> {
        let exe = std::fs::read_link("/proc/self/exe")?;
        let prefix = exe
            .parent()
            .and_then(Path::parent)
            .unwrap_or(Path::new("/"));
        Ok(Self {
            prefix: prefix.to_owned(),
        })
    }

    /// The VMM's binary.
    pub fn vmm(&self) -> PathBuf {
        self.prefix.join("libexec/casemate/casemate-vmm")
    }

    /// The program that serves the host's directories to guests.
    pub fn virtiofsd(&self) -> PathBuf {
        self.prefix.join("libexec/casemate/virtiofsd")
    }

    /// The shim's binary.
    pub fn shim(&self) -> PathBuf {
        self.prefix.join("bin/containerd-shim-casemate-v2")
    }

    /// The guest's kernel.
    pub fn kernel(&self) -> PathBuf {
        self.prefix.join("share/casemate/vmlinux")
    }

    /// The guest's initrd: the agent.
    pub fn initrd(&self) -> PathBuf {
        self.prefix.join("share/casemate/initrd.cpio")
    }
}

/// Whether we run as root: decides the default directories.
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn env_path(name: &str) -> Option<PathBuf> {
    std::env::var_os(name)
        .filter(|v| !v.is_empty())
        .map(PathBuf::from)
}

/// State of running sandboxes; gone after a reboot.
pub fn default_state_dir() -> PathBuf {
    if is_root() {
        return "/run/casemate".into();
    }
    match env_path("XDG_RUNTIME_DIR") {
        Some(dir) => dir.join("casemate"),
        None => format!("/tmp/casemate-{}", rustix::process::geteuid().as_raw()).into(),
    }
}

/// Images, templates and scratch disks.
pub fn default_data_dir() -> PathBuf {
    if is_root() {
        return "/var/lib/casemate".into();
    }
    match (env_path("XDG_DATA_HOME"), env_path("HOME")) {
        (Some(dir), _) => dir.join("casemate"),
        (None, Some(home)) => home.join(".local/share/casemate"),
        (None, None) => default_state_dir().join("data"),
    }
}

/// CNI plugins: where Debian has them, or where the plugins' own releases go.
pub fn cni_dir() -> PathBuf {
    let places = ["/usr/lib/cni", "/opt/cni/bin"].map(PathBuf::from);
    let [debian, _] = &places;
    let found = places.iter().find(|dir| dir.join("bridge").exists());
    found.unwrap_or(debian).clone()
}

/// Configuration files, the later one's keys win.
pub fn config_files() -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from("/etc/casemate/config.toml")];
    match (env_path("XDG_CONFIG_HOME"), env_path("HOME")) {
        (Some(dir), _) => files.push(dir.join("casemate/config.toml")),
        (None, Some(home)) => files.push(home.join(".config/casemate/config.toml")),
        (None, None) => {}
    }
    files
}
