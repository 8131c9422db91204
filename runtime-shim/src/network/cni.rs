//! CNI plugins: programs that put a network's interface into a namespace and take it out again (CNI spec 1.0).
//!
//! They are trusted as much as any program that root runs, and yet each is bounded in time and in what it says: one
//! that hangs must not hang a container. A plugin dies with the thread that waits for it; what it started, such as an
//! iptables, may go on for a moment, and the next plugin waits for that.

#![allow(unsafe_code)] // what a plugin does between fork and exec

use crate::fds;
use casemate_protocol::text::printable_lines;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// Plugins take milliseconds; iptables' lock or an emulated host may make it seconds.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// A result has a few addresses and routes.
const MAX_RESULT: u64 = 256 << 10;
/// What is told of a plugin's last words.
const MAX_WORDS: u64 = 4 << 10;
/// Beside the namespace: locked as long as a plugin runs, or anything that it started.
const LOCK: &str = "plugins.lock";
/// Spoken by plugins since 2021.
pub const VERSION: &str = "1.0.0";

/// Why a plugin failed.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// There is no such plugin.
    #[error(
        "network {network}: the CNI plugin {plugin:?} is not in {dir}; install Debian's containernetworking-plugins, or set cni_dir"
    )]
    Missing {
        /// The network.
        network: String,
        /// The plugin.
        plugin: String,
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// It can't be started or waited for.
    #[error("network {network}: can't run the CNI plugin {plugin}")]
    Run {
        /// The network.
        network: String,
        /// The plugin.
        plugin: String,
        /// The cause.
        source: io::Error,
    },
    /// It took too long.
    #[error("network {network}: the CNI plugin {plugin} did not end within {PATIENCE:?}")]
    Timeout {
        /// The network.
        network: String,
        /// The plugin.
        plugin: String,
    },
    /// It said no.
    #[error("network {network}: the CNI plugin {plugin} failed: {message}")]
    Failed {
        /// The network.
        network: String,
        /// The plugin.
        plugin: String,
        /// Its own words.
        message: String,
    },
    /// What it said is no result.
    #[error("network {network}: the CNI plugin {plugin} gave no valid result: {message}")]
    Result {
        /// The network.
        network: String,
        /// The plugin.
        plugin: String,
        /// Why.
        message: String,
    },
}

/// An interface in a namespace, as all of its life's calls name it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The container's id.
    pub container: String,
    /// The namespace.
    pub netns: PathBuf,
    /// What the interface is called there.
    pub interface: String,
    /// Where the plugins are.
    pub plugins: PathBuf,
    /// The network's configuration list.
    pub network: Map<String, Value>,
    /// By capability: what a plugin gets that says it has it.
    pub runtime: Map<String, Value>,
}

/// What a network's plugins made.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The interface's addresses.
    #[serde(default)]
    pub ips: Vec<Ip>,
    /// The resolver that the network offers.
    #[serde(default)]
    pub dns: Dns,
}

/// An address that a plugin gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ip {
    /// With its prefix.
    pub address: String,
    /// The way out.
    #[serde(default)]
    pub gateway: Option<IpAddr>,
}

impl Ip {
    /// The address and its prefix's length.
    pub fn parts(&self) -> Option<(IpAddr, u8)> {
        let (ip, prefix) = self.address.split_once('/')?;
        let ip: IpAddr = ip.parse().ok()?;
        let most = if ip.is_ipv4() { 32 } else { 128 };
        Some((ip, prefix.parse().ok().filter(|p| *p <= most)?))
    }
}

/// What a network says about names.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Dns {
    /// Addresses of resolvers.
    #[serde(default)]
    pub nameservers: Vec<String>,
    /// Domains to try.
    #[serde(default)]
    pub search: Vec<String>,
}

/// Whether there are plugins at all.
pub fn are_in(dir: &Path) -> bool {
    ["bridge", "host-local"]
        .iter()
        .all(|p| dir.join(p).exists())
}

impl Attachment {
    fn name(&self) -> String {
        let name = self.network.get("name").and_then(Value::as_str);
        name.unwrap_or_default().to_owned()
    }

    fn plugins(&self) -> impl DoubleEndedIterator<Item = &Map<String, Value>> {
        let list = self.network.get("plugins").and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_object)
    }

    /// Has all plugins add the interface; gives the last one's result.
    pub fn add(&self) -> Result<Value, CniError> {
        let mut result = None;
        for plugin in self.plugins() {
            let said = self.call("ADD", plugin, result.as_ref())?;
            let parsed: Value =
                serde_json::from_slice(&said).map_err(|e| self.no_result(plugin, e.to_string()))?;
            result = Some(parsed);
        }
        result.ok_or_else(|| CniError::Result {
            network: self.name(),
            plugin: String::new(),
            message: "the network has no plugins".to_owned(),
        })
    }

    /// Has all plugins give back what they took, the last one first. Those that fail don't keep the others from it;
    /// the first error is told.
    pub fn delete(&self, result: Option<&Value>) -> Result<(), CniError> {
        let mut first = Ok(());
        for plugin in self.plugins().rev() {
            let done = match self.call("DEL", plugin, result) {
                // Without it nothing can be done, now or later.
                Err(CniError::Missing { .. }) => Ok(()),
                done => done.map(drop),
            };
            first = first.and(done);
        }
        first
    }

    fn call(
        &self,
        command: &str,
        plugin: &Map<String, Value>,
        previous: Option<&Value>,
    ) -> Result<Vec<u8>, CniError> {
        let kind = type_of(plugin);
        let binary = self.plugins.join(&kind);
        // Its name becomes part of a path.
        if kind.is_empty() || kind.contains('/') || !binary.exists() {
            return Err(CniError::Missing {
                network: self.name(),
                plugin: kind,
                dir: self.plugins.clone(),
            });
        }
        let failed = |source| CniError::Run {
            network: self.name(),
            plugin: type_of(plugin),
            source,
        };
        let input = self.input(plugin, previous).to_string();
        let input = fds::memory_file("cni-config", input.as_bytes()).map_err(failed)?;
        let said = fds::bounded_file("cni-result", MAX_RESULT).map_err(failed)?;
        let words = fds::bounded_file("cni-words", MAX_WORDS).map_err(failed)?;
        let mut process = Command::new(&binary);
        process
            .env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.container)
            .env("CNI_NETNS", &self.netns)
            .env("CNI_IFNAME", &self.interface)
            .env("CNI_PATH", &self.plugins)
            .env("CNI_ARGS", "IgnoreUnknown=1")
            // For iptables.
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .current_dir("/")
            .process_group(0)
            .stdin(input)
            .stdout(said.try_clone().map_err(failed)?)
            .stderr(words.try_clone().map_err(failed)?);
        die_with_us(&mut process);
        let lock = self.lock().map_err(failed)?;
        let child = fds::spawn_with(&mut process, &[lock.as_fd()]).map_err(failed)?;
        let status = wait(child, PATIENCE).map_err(failed)?;
        let Some(status) = status else {
            return Err(CniError::Timeout {
                network: self.name(),
                plugin: kind,
            });
        };
        let said = written(&said, MAX_RESULT).map_err(failed)?;
        if status.success() {
            return Ok(said);
        }
        let words = written(&words, MAX_WORDS).map_err(failed)?;
        Err(CniError::Failed {
            network: self.name(),
            plugin: kind,
            message: complaint(&said, &words, status),
        })
    }

    /// The lock that a plugin gets, and with it whatever it starts. Waits for those of before: one of a shim that was
    /// killed might otherwise still take what we give back.
    fn lock(&self) -> io::Result<OwnedFd> {
        let path = self.netns.with_file_name(LOCK);
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let lock = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                // One that left something running for good must not keep its network from going.
                Ok(()) | Err(rustix::io::Errno::WOULDBLOCK) => return Ok(lock),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// A plugin's own configuration for one call.
    fn input(&self, plugin: &Map<String, Value>, previous: Option<&Value>) -> Value {
        let mut config = plugin.clone();
        let version = self.network.get("cniVersion").cloned();
        config.insert("cniVersion".into(), version.unwrap_or(json!(VERSION)));
        config.insert("name".into(), json!(self.name()));
        let capabilities = config.remove("capabilities").unwrap_or_default();
        let runtime: Map<String, Value> = self
            .runtime
            .iter()
            .filter(|(name, _)| capabilities[name.as_str()] == json!(true))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !runtime.is_empty() {
            config.insert("runtimeConfig".into(), runtime.into());
        }
        if let Some(previous) = previous {
            config.insert("prevResult".into(), previous.clone());
        }
        config.into()
    }

    fn no_result(&self, plugin: &Map<String, Value>, message: String) -> CniError {
        CniError::Result {
            network: self.name(),
            plugin: type_of(plugin),
            message,
        }
    }
}

fn type_of(plugin: &Map<String, Value>) -> String {
    let kind = plugin.get("type").and_then(Value::as_str);
    kind.unwrap_or_default().to_owned()
}

/// Has the process killed when the thread that starts it ends.
fn die_with_us(command: &mut Command) {
    let parent = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        match rustix::process::getppid() {
            Some(pid) if pid == parent => Ok(()),
            _ => Err(io::Error::other("its parent is gone")),
        }
    };
    // SAFETY: system calls only, which a forked child may make.
    unsafe { command.pre_exec(prepare) };
}

/// How a process ended; `None`: not in time, and was killed with all it started.
fn wait(mut child: Child, patience: Duration) -> io::Result<Option<ExitStatus>> {
    let pid = Pid::from_child(&child);
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = rustix::time::Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        match rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(0) => {
                // Whether all of them are still there, nobody knows.
                let _ = rustix::process::kill_process_group(pid, Signal::KILL);
                child.wait()?;
                return Ok(None);
            }
            Ok(_) => return child.wait().map(Some),
            Err(error) => {
                child.kill()?;
                child.wait()?;
                return Err(error.into());
            }
        }
    }
}

/// What was written to a file that is all zeros behind it.
fn written(file: &std::fs::File, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; limit as usize];
    file.read_exact_at(&mut bytes, 0)?;
    let end = bytes.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
    bytes.truncate(end);
    Ok(bytes)
}

/// A plugin tells its error as JSON on standard output; one that couldn't says it in its own way.
fn complaint(said: &[u8], words: &[u8], status: ExitStatus) -> String {
    let error: Value = serde_json::from_slice(said).unwrap_or_default();
    let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
    let told = match (text("msg"), text("details")) {
        (message, details) if details.is_empty() => message,
        (message, details) => format!("{message}: {details}"),
    };
    let told = match told.is_empty() {
        false => told,
        true => String::from_utf8_lossy(words).into_owned(),
    };
    let told = printable_lines(told.trim());
    let told: String = told.chars().take(MAX_WORDS as usize).collect();
    match told.is_empty() {
        false => told,
        true => status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An attachment to a network of one plugin, which is this shell script.
    fn attachment(dir: &Path, script: &str) -> Attachment {
        // Written by another process: a child of ours that another test forks must not hold it open.
        let text = fds::memory_file("script", format!("#!/bin/sh\n{script}\n").as_bytes());
        let mut install = Command::new("install");
        install
            .args(["-m", "755", "/dev/stdin"])
            .arg(dir.join("test"));
        assert!(install.stdin(text.unwrap()).status().unwrap().success());
        let network = json!({
            "cniVersion": "0.4.0", "name": "net", "plugins": [
                {"type": "test", "capabilities": {"mac": true}},
            ],
        });
        let runtime = json!({"mac": "02:00:00:00:00:01", "ips": ["10.0.0.9"]});
        Attachment {
            container: "abc".into(),
            netns: dir.join("netns"),
            interface: "eth0".into(),
            plugins: dir.to_owned(),
            network: network.as_object().unwrap().clone(),
            runtime: runtime.as_object().unwrap().clone(),
        }
    }

    #[test]
    fn add_passes_the_configuration_and_the_capabilities_it_names() {
        let dir = tempfile::tempdir().unwrap();
        let echo = attachment(dir.path(), "printf '{\"got\": %s}' \"$(cat)\"");
        let result = echo.add().unwrap();
        let expected = json!({
            "type": "test", "name": "net", "cniVersion": "0.4.0",
            "runtimeConfig": {"mac": "02:00:00:00:00:01"},
        });
        assert_eq!(result["got"], expected);
    }

    #[test]
    fn add_of_a_failing_plugin_tells_its_message() {
        let dir = tempfile::tempdir().unwrap();
        let fails = attachment(
            dir.path(),
            "echo '{\"code\": 7, \"msg\": \"no more addresses\", \"details\": \"in 10.0.0.0/30\"}'; exit 1",
        );
        let text = fails.add().unwrap_err().to_string();
        assert!(
            text.ends_with("no more addresses: in 10.0.0.0/30"),
            "{text}"
        );
        let dies = attachment(dir.path(), "echo oh >&2; exit 3");
        assert!(dies.add().unwrap_err().to_string().ends_with(": oh"));
        assert!(dies.delete(None).is_err());
    }

    #[test]
    fn add_of_an_endless_result_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let floods = attachment(dir.path(), "yes");
        assert!(floods.add().is_err());
        let silent = attachment(dir.path(), "true");
        assert!(matches!(silent.add(), Err(CniError::Result { .. })));
    }

    #[test]
    fn delete_waits_for_what_an_ended_plugin_started() {
        let dir = tempfile::tempdir().unwrap();
        let taken = dir.path().join("taken");
        let taken = taken.display();
        let script =
            format!("[ $CNI_COMMAND = DEL ] && exec rm {taken}; (sleep 1; touch {taken}) & exit 3");
        let leaves = attachment(dir.path(), &script);
        leaves.add().unwrap_err();
        leaves.delete(None).unwrap();
    }

    #[test]
    fn wait_for_one_that_hangs_kills_it() {
        let mut command = Command::new("sleep");
        command.arg("1000").process_group(0);
        let begun = Instant::now();
        let ended = wait(command.spawn().unwrap(), Duration::from_millis(20)).unwrap();
        assert!(ended.is_none() && begun.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn missing_plugin_names_the_package_and_is_no_obstacle_to_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let gone = attachment(dir.path(), "");
        std::fs::remove_file(dir.path().join("test")).unwrap();
        let text = gone.add().unwrap_err().to_string();
        assert!(text.contains("containernetworking-plugins"), "{text}");
        gone.delete(None).unwrap();
    }

    #[test]
    fn ip_parts_are_checked() {
        let parts = |address: &str| {
            let (address, gateway) = (address.to_owned(), None);
            Ip { address, gateway }.parts()
        };
        assert_eq!(
            parts("10.0.0.2/16"),
            Some(("10.0.0.2".parse().unwrap(), 16))
        );
        assert_eq!(parts("fd00::2/64"), Some(("fd00::2".parse().unwrap(), 64)));
        for bad in ["10.0.0.2", "10.0.0.2/33", "x/8", "10.0.0.2/-1", ""] {
            assert_eq!(parts(bad), None, "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn complaint_of_anything_is_bounded(said in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
            use std::os::unix::process::ExitStatusExt;
            let text = complaint(&said, &said, ExitStatus::from_raw(256));
            proptest::prop_assert!(!text.is_empty() && text.len() <= 4 * MAX_WORDS as usize);
        }

        #[test]
        fn outcome_of_anything_never_panics(said in ".{0,200}") {
            let _ = serde_json::from_str::<Outcome>(&said);
        }
    }
}
