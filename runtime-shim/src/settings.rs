//! The configuration file: `/etc/casemate/config.toml`, then the user's own.
//!
//! Every key is optional; the user's keys win; an unknown key is an error.
//! `CASEMATE_STATE`, `CASEMATE_DATA` and `CASEMATE_START_TIMEOUT` win over both.

use crate::plan::MAX_VCPUS;
use crate::{files, paths, size};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why the configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file is there but can't be read.
    #[error("can't read the configuration file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The file isn't what it should be.
    #[error("configuration file {path}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line and reason.
        message: String,
    },
    /// A value is out of its bounds.
    #[error("{origin}: {message}")]
    Value {
        /// The key or variable.
        origin: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// The installation could not be found.
    #[error("can't find where casemate is installed")]
    Install(#[source] std::io::Error),
}

/// What a configuration file may hold.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    vmm: Option<PathBuf>,
    virtiofsd: Option<PathBuf>,
    kvm: Option<PathBuf>,
    shim: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    data_dir: Option<PathBuf>,
    /// Seconds.
    start_timeout: Option<u64>,
    memory: Option<String>,
    cpus: Option<u32>,
    storage_size: Option<String>,
    network: Option<String>,
    cni_dir: Option<PathBuf>,
    passt: Option<PathBuf>,
    /// Registries, for the image store.
    registries: Option<toml::Table>,
    /// Limits, for the image store.
    image: Option<toml::Table>,
}

/// Everything configurable, complete and checked.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initrd.
    pub initrd: PathBuf,
    /// The VMM's binary.
    pub vmm: PathBuf,
    /// The program that serves the host's directories to guests.
    pub virtiofsd: PathBuf,
    /// KVM's device.
    pub kvm: PathBuf,
    /// The shim's binary.
    pub shim: PathBuf,
    /// State of running sandboxes.
    pub state_dir: PathBuf,
    /// Images, templates, scratch disks.
    pub data_dir: PathBuf,
    /// How long a guest may take until its agent answers.
    pub start_timeout: Duration,
    /// Guest memory in bytes when `--memory` isn't given.
    pub memory: u64,
    /// CPUs when `--cpus` isn't given.
    pub cpus: u32,
    /// Bytes of a container's writable layer when `--storage-size` isn't given.
    pub storage_size: u64,
    /// The network of a container without `--network`; `None`: what the host can do.
    pub network: Option<String>,
    /// Where CNI plugins are; `None`: at a usual place.
    pub cni_dir: Option<PathBuf>,
    /// passt's binary; `None`: where Debian has it.
    pub passt: Option<PathBuf>,
    /// The `[registries]` table, for the image store.
    pub registries: Option<toml::Table>,
    /// The `[image]` table, for the image store.
    pub image: Option<toml::Table>,
}

/// A guest boots in well under a second; a loaded or emulated host gets the benefit of the doubt.
const DEFAULT_START_TIMEOUT: Duration = Duration::from_secs(30);
/// Pages are backed only when touched: enough for a language runtime, small enough to boot fast.
const DEFAULT_MEMORY: u64 = 512 * size::MIB;
const DEFAULT_STORAGE: u64 = 10 << 30;
/// No configuration of a person is larger.
const MAX_FILE: u64 = 1 << 20;

impl Settings {
    /// Reads the files that exist; absent files cost one failed open each.
    pub fn load() -> Result<Self, SettingsError> {
        Self::from_file(of_the_host()?)
    }

    /// The same with a file of keys for some sandboxes only: `text` is its content, `path` what it is called. Where the state is
    /// can't be among them, as whoever tidies up doesn't know them.
    pub fn load_with(path: &Path, text: &str) -> Result<Self, SettingsError> {
        let over = parse(path, text)?;
        if over.state_dir.is_some() {
            return Err(SettingsError::Parse {
                path: path.to_owned(),
                message: "state_dir can be set for all sandboxes only".to_owned(),
            });
        }
        Self::from_file(merge(of_the_host()?, over))
    }

    /// Where CNI plugins are.
    pub fn cni_dir(&self) -> PathBuf {
        self.cni_dir.clone().unwrap_or_else(paths::cni_dir)
    }

    /// passt's binary.
    pub fn passt(&self) -> PathBuf {
        self.passt
            .clone()
            .unwrap_or_else(|| "/usr/bin/passt".into())
    }

    fn from_file(file: File) -> Result<Self, SettingsError> {
        let install = paths::Install::of_current_exe().map_err(SettingsError::Install)?;
        let env = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
        Ok(Self {
            kernel: file.kernel.unwrap_or_else(|| install.kernel()),
            initrd: file.initrd.unwrap_or_else(|| install.initrd()),
            vmm: file.vmm.unwrap_or_else(|| install.vmm()),
            virtiofsd: file.virtiofsd.unwrap_or_else(|| install.virtiofsd()),
            kvm: file
                .kvm
                .unwrap_or_else(|| casemate_vmm::probe::DEVICE.into()),
            shim: file.shim.unwrap_or_else(|| install.shim()),
            state_dir: env("CASEMATE_STATE")
                .map(PathBuf::from)
                .or(file.state_dir)
                .unwrap_or_else(paths::default_state_dir),
            data_dir: env("CASEMATE_DATA")
                .map(PathBuf::from)
                .or(file.data_dir)
                .unwrap_or_else(paths::default_data_dir),
            start_timeout: start_timeout(env("CASEMATE_START_TIMEOUT"), file.start_timeout)?,
            memory: bytes("memory", file.memory, DEFAULT_MEMORY)?,
            cpus: cpus(file.cpus)?,
            storage_size: bytes("storage_size", file.storage_size, DEFAULT_STORAGE)?,
            network: file.network,
            cni_dir: file.cni_dir,
            passt: file.passt,
            registries: file.registries,
            image: file.image,
        })
    }
}

/// What all files say that are for the whole host, or for the whole of a user.
fn of_the_host() -> Result<File, SettingsError> {
    let mut file = File::default();
    for path in paths::config_files() {
        if let Some(text) = read_if_there(&path)? {
            file = merge(file, parse(&path, &text)?);
        }
    }
    Ok(file)
}

fn read_if_there(path: &Path) -> Result<Option<String>, SettingsError> {
    match files::read_text(path, MAX_FILE) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SettingsError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

fn parse(path: &Path, text: &str) -> Result<File, SettingsError> {
    toml::from_str(text).map_err(|e| SettingsError::Parse {
        path: path.to_owned(),
        message: e.to_string().trim_end().to_owned(),
    })
}

fn merge(base: File, over: File) -> File {
    File {
        kernel: over.kernel.or(base.kernel),
        initrd: over.initrd.or(base.initrd),
        vmm: over.vmm.or(base.vmm),
        virtiofsd: over.virtiofsd.or(base.virtiofsd),
        kvm: over.kvm.or(base.kvm),
        shim: over.shim.or(base.shim),
        state_dir: over.state_dir.or(base.state_dir),
        data_dir: over.data_dir.or(base.data_dir),
        start_timeout: over.start_timeout.or(base.start_timeout),
        memory: over.memory.or(base.memory),
        cpus: over.cpus.or(base.cpus),
        storage_size: over.storage_size.or(base.storage_size),
        network: over.network.or(base.network),
        cni_dir: over.cni_dir.or(base.cni_dir),
        passt: over.passt.or(base.passt),
        registries: over.registries.or(base.registries),
        image: over.image.or(base.image),
    }
}

fn start_timeout(
    env: Option<std::ffi::OsString>,
    file: Option<u64>,
) -> Result<Duration, SettingsError> {
    let seconds = match env {
        Some(text) => Some(text.to_str().and_then(|t| t.parse().ok()).ok_or_else(|| {
            SettingsError::Value {
                origin: "CASEMATE_START_TIMEOUT",
                message: format!("{text:?} is not a number of seconds"),
            }
        })?),
        None => file,
    };
    match seconds {
        None => Ok(DEFAULT_START_TIMEOUT),
        Some(0) | Some(86_401..) => Err(SettingsError::Value {
            origin: "start_timeout",
            message: "must be 1 to 86400 seconds".into(),
        }),
        Some(s) => Ok(Duration::from_secs(s)),
    }
}

fn cpus(number: Option<u32>) -> Result<u32, SettingsError> {
    match number {
        None => Ok(1),
        Some(n) if (1..=MAX_VCPUS).contains(&n) => Ok(n),
        Some(n) => Err(SettingsError::Value {
            origin: "cpus",
            message: format!("must be 1 to {MAX_VCPUS}, not {n}"),
        }),
    }
}

fn bytes(origin: &'static str, text: Option<String>, default: u64) -> Result<u64, SettingsError> {
    match text {
        None => Ok(default),
        Some(t) => size::parse(&t).map_err(|e| SettingsError::Value {
            origin,
            message: e.to_string(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_with_unknown_key_names_it() {
        let error = parse(Path::new("/x/config.toml"), "kernle = \"/k\"").unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("kernle") && text.contains("/x/config.toml"),
            "{text}"
        );
    }

    #[test]
    fn load_with_more_keys_lets_them_win_and_leaves_the_state_where_it_is() {
        let path = Path::new("/x/pods.toml");
        assert_eq!(Settings::load_with(path, "cpus = 2").unwrap().cpus, 2);
        let error = Settings::load_with(path, "state_dir = \"/x\"").unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("state_dir") && text.contains("/x/pods.toml"),
            "{text}"
        );
    }

    #[test]
    fn cpus_out_of_bounds_are_refused() {
        assert_eq!(cpus(None).unwrap(), 1);
        assert_eq!(cpus(Some(MAX_VCPUS)).unwrap(), MAX_VCPUS);
        for number in [0, MAX_VCPUS + 1] {
            let text = cpus(Some(number)).unwrap_err().to_string();
            assert!(text.contains(&number.to_string()), "{text}");
        }
    }

    #[test]
    fn read_if_there_of_an_endless_file_is_refused() {
        assert!(read_if_there(Path::new("/dev/zero")).is_err());
        assert!(read_if_there(Path::new("/no/such")).unwrap().is_none());
    }

    #[test]
    fn merge_with_both_files_lets_the_users_keys_win() {
        let system = parse(Path::new("a"), "memory = \"1g\"\ncpus = 2").unwrap();
        let user = parse(Path::new("b"), "memory = \"2g\"").unwrap();
        let settings = Settings::from_file(merge(system, user)).unwrap();
        assert_eq!((settings.memory, settings.cpus), (2 << 30, 2));
    }

    #[test]
    fn start_timeout_of_nonsense_is_refused() {
        assert!(start_timeout(Some("soon".into()), None).is_err());
        assert!(start_timeout(None, Some(0)).is_err());
        assert_eq!(
            start_timeout(Some("5".into()), Some(9)).unwrap(),
            Duration::from_secs(5)
        );
    }
}
