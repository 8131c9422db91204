//! From `casemate run`'s arguments and an image's configuration to an OCI spec.
//!
//! A pure function: what it needs of the host comes in [`Given`].

use super::args::{CreateArgs, TimingFormat};
use super::data::Data;
use super::env;
use super::security::Security;
use crate::network::NETNS;
use crate::plan::USER_ANNOTATION;
use crate::shim::timing;
use anyhow::{Context, bail};
use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::Spec;
use serde_json::{Value, json};
use std::path::Path;

/// Docker's, for an image that names none.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the arguments don't say.
#[derive(Debug)]
pub(super) struct Given<'a> {
    /// The container's id.
    pub(super) id: &'a str,
    /// The bundle, where hosts, hostname and resolv.conf are.
    pub(super) bundle: &'a Path,
    /// Variables of `-e` and `--env-file`.
    pub(super) env: Vec<String>,
    /// Rows and columns of our terminal.
    pub(super) console: Option<(u16, u16)>,
    /// The times of the start are wanted.
    pub(super) timing: Option<TimingFormat>,
    /// It is on networks.
    pub(super) network: bool,
    /// Volumes and the like.
    pub(super) data: &'a Data,
    /// What the security options come to.
    pub(super) security: &'a Security,
}

/// A spec with nothing but resources, to check them before anything is fetched.
pub(super) fn only_resources(resources: &Value) -> anyhow::Result<Spec> {
    let spec = json!({"ociVersion": "1.2.0", "linux": {"resources": resources}});
    serde_json::from_value(spec).context("the limits make no valid spec")
}

/// The command line inside: `--entrypoint` drops the image's command.
fn command_line(args: &CreateArgs, image: &ImageConfiguration) -> anyhow::Result<Vec<String>> {
    let config = image.config().as_ref();
    let image_entrypoint = config
        .and_then(|c| c.entrypoint().clone())
        .unwrap_or_default();
    let image_command = config.and_then(|c| c.cmd().clone()).unwrap_or_default();
    let (mut line, command) = match &args.entrypoint {
        Some(given) if given.is_empty() => (Vec::new(), Vec::new()),
        Some(given) => (vec![given.clone()], Vec::new()),
        None => (image_entrypoint, image_command),
    };
    line.extend(if args.command().is_empty() {
        command
    } else {
        args.command().to_vec()
    });
    if line.is_empty() {
        bail!(
            "image {} names no command; give one after the image",
            args.image()
        );
    }
    Ok(line)
}

fn environment(args: &CreateArgs, image: &ImageConfiguration, given: &Given<'_>) -> Vec<String> {
    let mut all = vec![DEFAULT_PATH.to_owned()];
    env::set(&mut all, format!("HOSTNAME={}", hostname(args, given)));
    if args.process.tty {
        env::set(&mut all, "TERM=xterm".to_owned());
    }
    let of_image = image.config().as_ref().and_then(|c| c.env().clone());
    env::set_all(&mut all, of_image.unwrap_or_default());
    env::set_all(&mut all, given.env.iter().cloned());
    all
}

/// The container's host name.
pub(super) fn hostname<'a>(args: &'a CreateArgs, given: &Given<'a>) -> &'a str {
    match &args.hostname {
        Some(name) => name,
        None => &given.id[..given.id.len().min(12)],
    }
}

/// The capabilities object for a user: a plain one gets them through file capabilities only.
pub(super) fn capabilities(caps: &[&str], user: &str) -> Value {
    let name = user.split(':').next().unwrap_or_default();
    match name {
        "" | "0" | "root" => json!({"bounding": caps, "effective": caps, "permitted": caps}),
        _ => json!({"bounding": caps}),
    }
}

fn mount(kind: &str, target: &str, options: &[&str]) -> Value {
    json!({"destination": target, "type": kind, "source": kind, "options": options})
}

fn mounts(args: &CreateArgs, given: &Given<'_>) -> anyhow::Result<Vec<Value>> {
    let privileged = given.security.privileged;
    let write = if privileged { "rw" } else { "ro" };
    let dev = match privileged {
        // The guest's own, with all that its kernel finds.
        true => mount("devtmpfs", "/dev", &["nosuid", "noexec"]),
        false => mount(
            "tmpfs",
            "/dev",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
    };
    let mut all = vec![
        mount("proc", "/proc", &["nosuid", "noexec", "nodev"]),
        dev,
        mount(
            "devpts",
            "/dev/pts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount("sysfs", "/sys", &["nosuid", "noexec", "nodev", write]),
        mount(
            "cgroup",
            "/sys/fs/cgroup",
            &[write, "nosuid", "noexec", "nodev"],
        ),
        mount("mqueue", "/dev/mqueue", &["nosuid", "noexec", "nodev"]),
        mount(
            "tmpfs",
            "/dev/shm",
            &[
                "nosuid",
                "noexec",
                "nodev",
                "mode=1777",
                &args.resources.shm()?,
            ],
        ),
    ];
    for name in ["resolv.conf", "hostname", "hosts"] {
        let source = given.bundle.join(name);
        all.push(json!({
            "destination": format!("/etc/{name}"),
            "type": "bind",
            "source": source,
            "options": ["rbind", "rprivate"],
        }));
    }
    for wish in &args.tmpfs {
        all.push(tmpfs(wish)?);
    }
    given.data.mount(&mut all);
    Ok(all)
}

fn tmpfs(wish: &str) -> anyhow::Result<Value> {
    let (target, options) = wish.split_once(':').unwrap_or((wish, ""));
    if !target.starts_with('/') || target == "/" {
        bail!("--tmpfs: {target:?} is not an absolute path below /");
    }
    let mut all = vec!["nosuid", "nodev", "noexec"];
    for option in options.split(',').filter(|o| !o.is_empty()) {
        match option {
            "exec" => all.retain(|o| *o != "noexec"),
            "suid" => all.retain(|o| *o != "nosuid"),
            "dev" => all.retain(|o| *o != "nodev"),
            other => all.push(other),
        }
    }
    Ok(mount("tmpfs", target, &all))
}

/// A device rule of the cgroup.
fn device(kind: &str, major: Option<u32>, minor: Option<u32>, access: &str) -> Value {
    let mut rule = json!({"allow": true, "type": kind, "access": access});
    if let Some(major) = major {
        rule["major"] = major.into();
    }
    if let Some(minor) = minor {
        rule["minor"] = minor.into();
    }
    rule
}

/// Docker's: any node may be made, a few may be used.
fn devices(privileged: bool) -> Vec<Value> {
    if privileged {
        return vec![json!({"allow": true, "access": "rwm"})];
    }
    let mut rules = vec![
        json!({"allow": false, "access": "rwm"}),
        device("c", None, None, "m"),
        device("b", None, None, "m"),
    ];
    // null, zero, full, random, urandom; tty, console, ptmx; pts; fuse.
    let usable = [
        (1, 3),
        (1, 5),
        (1, 7),
        (1, 8),
        (1, 9),
        (5, 0),
        (5, 1),
        (5, 2),
        (10, 229),
    ];
    rules.extend(usable.map(|(major, minor)| device("c", Some(major), Some(minor), "rwm")));
    rules.push(device("c", Some(136), None, "rwm"));
    rules
}

/// Builds the spec.
pub(super) fn build(
    args: &CreateArgs,
    image: &ImageConfiguration,
    resources: &Value,
    given: &Given<'_>,
) -> anyhow::Result<Value> {
    let config = image.config().as_ref();
    let user = match &args.process.user {
        Some(user) => user.clone(),
        None => config.and_then(|c| c.user().clone()).unwrap_or_default(),
    };
    let workdir = args
        .process
        .workdir
        .clone()
        .or_else(|| config.and_then(|c| c.working_dir().clone()))
        .filter(|dir| !dir.is_empty())
        .unwrap_or_else(|| "/".to_owned());
    if !workdir.starts_with('/') {
        bail!("the working directory {workdir:?} is not an absolute path");
    }
    let security = given.security;
    let mut process = json!({
        "terminal": args.process.tty,
        "user": {"uid": 0, "gid": 0},
        "args": command_line(args, image)?,
        "env": environment(args, image, given),
        "cwd": workdir,
        "capabilities": capabilities(&security.caps, &user),
    });
    security.of_process(&mut process);
    let rlimits = args.resources.rlimits()?;
    if !rlimits.is_empty() {
        process["rlimits"] = rlimits.into();
    }
    if let (true, Some((rows, columns))) = (args.process.tty, given.console) {
        process["consoleSize"] = json!({"height": rows, "width": columns});
    }
    let mut resources = resources.clone();
    resources["devices"] = devices(security.privileged).into();
    let mut annotations = json!({});
    if !user.is_empty() {
        annotations[USER_ANNOTATION] = user.into();
    }
    args.resources.annotate(&mut annotations)?;
    match given.timing {
        Some(TimingFormat::Initcalls) => annotations[timing::ANNOTATION] = timing::INITCALLS.into(),
        Some(_) => annotations[timing::ANNOTATION] = "1".into(),
        None => {}
    }
    let namespaces = ["pid", "ipc", "uts", "mount", "cgroup"].map(|n| json!({"type": n}));
    let netns = given
        .network
        .then(|| json!({"type": "network", "path": given.bundle.join(NETNS)}));
    let users = security.own_users.then(|| json!({"type": "user"}));
    let namespaces: Vec<Value> = namespaces.into_iter().chain(netns).chain(users).collect();
    let mut linux = json!({"namespaces": namespaces, "resources": resources});
    security.of_linux(&mut linux);
    Ok(json!({
        "ociVersion": "1.2.0",
        "process": process,
        "root": {"path": "rootfs", "readonly": args.read_only},
        "hostname": hostname(args, given),
        "mounts": mounts(args, given)?,
        "annotations": annotations,
        "linux": linux,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(config: Value) -> ImageConfiguration {
        serde_json::from_value(json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": []}, "history": [],
        }))
        .unwrap()
    }

    fn built(line: &str, config: Value) -> anyhow::Result<Value> {
        let args = CreateArgs::of(line);
        let given = Given {
            id: "0123456789abcdef0123",
            bundle: Path::new("/b"),
            env: args.process.env.clone(),
            console: Some((24, 80)),
            timing: None,
            network: false,
            data: &Data::default(),
            security: &args.security.resolve()?,
        };
        let resources = args.resources.resources()?;
        build(&args, &image(config), &resources, &given)
    }

    #[test]
    fn build_with_image_config_follows_docker() {
        let config = json!({
            "Entrypoint": ["/entry"], "Cmd": ["serve"], "Env": ["PATH=/bin", "A=1"],
            "WorkingDir": "/srv", "User": "www-data",
        });
        let spec = built("-e A=2 web", config).unwrap();
        let process = &spec["process"];
        assert_eq!(process["args"], json!(["/entry", "serve"]));
        assert_eq!(
            process["env"],
            json!(["PATH=/bin", "HOSTNAME=0123456789ab", "A=2"])
        );
        assert_eq!(process["cwd"], "/srv");
        assert_eq!(spec["annotations"][USER_ANNOTATION], "www-data");
        assert!(process["capabilities"]["effective"].is_null());
        assert_eq!(spec["hostname"], "0123456789ab");
    }

    #[test]
    fn build_is_a_spec_that_the_library_reads() {
        let spec = built(
            "-t --memory 256m --cpus 1.5 --read-only --tmpfs /tmp:size=1m,exec busybox sh",
            json!({}),
        )
        .unwrap();
        let parsed: Spec = serde_json::from_value(spec.clone()).unwrap();
        let process = parsed.process().clone().unwrap();
        assert_eq!(process.console_size().unwrap().width(), 80);
        let linux = parsed.linux().clone().unwrap();
        let resources = linux.resources().clone().unwrap();
        assert_eq!(resources.memory().unwrap().limit(), Some(256 << 20));
        assert_eq!(resources.cpu().as_ref().unwrap().quota(), Some(150_000));
        let mounts = parsed.mounts().clone().unwrap();
        let options = mounts.last().unwrap().options().clone().unwrap();
        assert_eq!(options, ["nosuid", "nodev", "size=1m"]);
        assert!(parsed.root().clone().unwrap().readonly().unwrap());
    }

    #[test]
    fn build_with_entrypoint_drops_the_images_command() {
        let config = json!({"Entrypoint": ["/entry"], "Cmd": ["serve"]});
        let spec = built("--entrypoint /bin/sh web -c true", config.clone()).unwrap();
        assert_eq!(spec["process"]["args"], json!(["/bin/sh", "-c", "true"]));
        let spec = built("--entrypoint /bin/sh web", config).unwrap();
        assert_eq!(spec["process"]["args"], json!(["/bin/sh"]));
    }

    #[test]
    fn build_without_any_command_is_refused() {
        let error = built("scratch", json!({})).unwrap_err().to_string();
        assert!(error.contains("scratch"), "{error}");
    }

    #[test]
    fn build_of_bad_wishes_names_them() {
        for (line, part) in [
            ("--tmpfs tmp busybox sh", "\"tmp\""),
            ("--cap-add FLY busybox sh", "FLY"),
            ("-w here busybox sh", "here"),
        ] {
            let error = format!("{:#}", built(line, json!({})).unwrap_err());
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
