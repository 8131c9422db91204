//! `--volume` and `--mount`: what the user writes, as Docker reads it. Pure.

use crate::size;
use crate::volume;
use anyhow::{Context, bail, ensure};
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

/// What is to be mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// A volume; without a name it is made for this container.
    Volume(Option<String>),
    /// A file or directory of the host.
    Host {
        /// An absolute path.
        path: PathBuf,
        /// A missing one is made a directory, as `--volume` does with Docker.
        make: bool,
    },
    /// Memory, with these options.
    Tmpfs(Vec<String>),
}

/// One mount that the user wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wish {
    /// What.
    pub(super) source: Source,
    /// Where in the container: absolute and plain.
    pub(super) target: String,
    /// It can't be written to.
    pub(super) read_only: bool,
    /// An empty volume gets what the image has there.
    pub(super) copy_up: bool,
    /// nosuid, nodev, noexec.
    pub(super) options: Vec<String>,
    /// Bytes of a volume that is made for this.
    pub(super) size: Option<u64>,
    /// Labels of a volume that is made for this.
    pub(super) labels: BTreeMap<String, String>,
}

impl Wish {
    fn of(source: Source, target: String) -> Self {
        Self {
            source,
            target,
            read_only: false,
            copy_up: true,
            options: Vec::new(),
            size: None,
            labels: BTreeMap::new(),
        }
    }

    /// A volume without a name, as an image asks for it.
    pub(super) fn anonymous(target: &str) -> anyhow::Result<Self> {
        Ok(Self::of(Source::Volume(None), plain_target(target)?))
    }
}

/// A path in the container, made plain as Docker does: no dots, no doubled slashes; not the root.
fn plain_target(text: &str) -> anyhow::Result<String> {
    ensure!(!text.contains('\0'), "{text:?} holds a NUL");
    let path = Path::new(text);
    ensure!(
        path.is_absolute(),
        "the path in the container {text:?} is not absolute"
    );
    let mut parts: Vec<&str> = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => parts.push(name.to_str().unwrap_or_default()),
            Component::ParentDir => drop(parts.pop()),
            _ => {}
        }
    }
    ensure!(
        !parts.is_empty(),
        "a mount can't take the place of the container's root"
    );
    Ok(format!("/{}", parts.join("/")))
}

/// A path of the host: one that begins with a dot is meant from here on.
fn host_path(text: &str) -> anyhow::Result<PathBuf> {
    ensure!(!text.contains('\0'), "{text:?} holds a NUL");
    std::path::absolute(text).with_context(|| format!("the path {text:?} makes no sense"))
}

fn is_host_path(text: &str) -> bool {
    text.starts_with('/') || text.starts_with('.')
}

fn volume_name(text: &str) -> anyhow::Result<String> {
    volume::check_name(text)?;
    Ok(text.to_owned())
}

/// An option that every kind of mount takes; `false` if it is none.
fn common_option(wish: &mut Wish, option: &str) -> anyhow::Result<bool> {
    match option {
        "ro" | "readonly" => wish.read_only = true,
        "rw" => wish.read_only = false,
        "nocopy" => wish.copy_up = false,
        "nosuid" | "nodev" | "noexec" => wish.options.push(option.to_owned()),
        "suid" | "dev" | "exec" => wish.options.retain(|o| o[2..] != *option),
        // The guest has no SELinux, and what it caches is its own affair.
        "z" | "Z" | "cached" | "consistent" | "delegated" | "default" => {}
        "private" | "rprivate" => {}
        "shared" | "rshared" | "slave" | "rslave" => bail!(
            "{option} is not possible: mounts of the host don't come to appear in a virtual machine"
        ),
        _ => return Ok(false),
    }
    Ok(true)
}

fn are_options(text: &str) -> bool {
    let mut scratch = Wish::of(Source::Volume(None), String::new());
    !text.is_empty()
        && text
            .split(',')
            .all(|o| common_option(&mut scratch, o).is_ok_and(|known| known))
}

/// `--volume [SOURCE:]DIR[:OPTIONS]`
pub(super) fn volume(text: &str) -> anyhow::Result<Wish> {
    parse_volume(text).with_context(|| format!("--volume {text:?}"))
}

fn parse_volume(text: &str) -> anyhow::Result<Wish> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, options) = match parts[..] {
        [target] => (None, target, ""),
        [target, options] if are_options(options) => (None, target, options),
        [source, target] => (Some(source), target, ""),
        [source, target, options] => (Some(source), target, options),
        _ => bail!("there are too many colons; --mount takes paths with colons"),
    };
    let source = match source {
        None => Source::Volume(None),
        Some("") => bail!("the part before the colon is empty"),
        Some(path) if is_host_path(path) => Source::Host {
            path: host_path(path)?,
            make: true,
        },
        Some(name) => Source::Volume(Some(volume_name(name)?)),
    };
    let mut wish = Wish::of(source, plain_target(target)?);
    for option in options.split(',').filter(|o| !o.is_empty()) {
        if !common_option(&mut wish, option)? {
            bail!("{option:?} is not an option of a mount");
        }
    }
    Ok(wish)
}

/// Splits at commas, as a line of CSV: a field in quotes may hold commas, and doubled quotes for quotes.
fn fields(text: &str) -> anyhow::Result<Vec<String>> {
    let mut all = Vec::new();
    let mut chars = text.chars().peekable();
    loop {
        let mut field = String::new();
        if chars.next_if_eq(&'"').is_some() {
            loop {
                match chars.next() {
                    Some('"') if chars.next_if_eq(&'"').is_some() => field.push('"'),
                    Some('"') => break,
                    Some(c) => field.push(c),
                    None => bail!("a quote is not closed"),
                }
            }
            ensure!(
                matches!(chars.peek(), None | Some(',')),
                "there is something between a closing quote and the next comma"
            );
        } else {
            while let Some(c) = chars.next_if(|c| *c != ',') {
                field.push(c);
            }
        }
        all.push(field);
        if chars.next().is_none() {
            return Ok(all);
        }
    }
}

/// `--mount KEY=VALUE,…`
pub(super) fn mount(text: &str) -> anyhow::Result<Wish> {
    parse_mount(text).with_context(|| format!("--mount {text:?}"))
}

/// What `--mount` said so far.
#[derive(Default)]
struct Said {
    kind: Option<String>,
    source: Option<String>,
    target: Option<String>,
    tmpfs: Vec<String>,
    /// Keys that only one type has, with the type.
    special: Vec<(String, &'static str)>,
}

fn parse_mount(text: &str) -> anyhow::Result<Wish> {
    let mut said = Said::default();
    let mut wish = Wish::of(Source::Volume(None), String::new());
    for field in fields(text)? {
        let (key, value) = match field.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (field.as_str(), None),
        };
        take(&mut said, &mut wish, &key.to_ascii_lowercase(), value)?;
    }
    let kind = said.kind.as_deref().unwrap_or("volume");
    if let Some((key, of)) = said.special.iter().find(|(_, of)| *of != kind) {
        bail!("{key} is for type={of}, and this is type={kind}");
    }
    let target = said.target.context("target is missing")?;
    wish.target = plain_target(&target)?;
    wish.source = match (kind, said.source) {
        ("volume", None) => Source::Volume(None),
        ("volume", Some(name)) => Source::Volume(Some(volume_name(&name)?)),
        ("bind", None) => bail!("source is missing"),
        ("bind", Some(path)) => {
            ensure!(
                is_host_path(&path),
                "the source {path:?} is not an absolute path, and begins with no dot"
            );
            Source::Host {
                path: host_path(&path)?,
                make: false,
            }
        }
        ("tmpfs", None) => Source::Tmpfs(said.tmpfs),
        ("tmpfs", Some(_)) => bail!("a tmpfs has no source"),
        (other, _) => bail!("type {other:?} is none of volume, bind and tmpfs"),
    };
    Ok(wish)
}

fn take(said: &mut Said, wish: &mut Wish, key: &str, value: Option<&str>) -> anyhow::Result<()> {
    let text = || match value {
        Some(value) if !value.is_empty() => Ok(value),
        _ => bail!("{key} needs a value"),
    };
    let special = match key.split('-').next() {
        Some("volume") => Some("volume"),
        Some("bind") => Some("bind"),
        Some("tmpfs") => Some("tmpfs"),
        _ => None,
    };
    said.special.extend(special.map(|of| (key.to_owned(), of)));
    match key {
        "type" => said.kind = Some(text()?.to_ascii_lowercase()),
        "source" | "src" => said.source = Some(text()?.to_owned()),
        "target" | "dst" | "destination" => said.target = Some(text()?.to_owned()),
        "readonly" | "ro" => wish.read_only = truth(key, value)?,
        "rw" => wish.read_only = !truth(key, value)?,
        "nosuid" | "nodev" | "noexec" if truth(key, value)? => wish.options.push(key.to_owned()),
        "nosuid" | "nodev" | "noexec" => wish.options.retain(|o| o != key),
        "consistency" => drop(text()?),
        "volume-nocopy" => wish.copy_up = !truth(key, value)?,
        "volume-driver" => ensure!(text()? == "local", "the only volume driver is local"),
        "volume-label" => {
            let (name, value) = text()?.split_once('=').unwrap_or((text()?, ""));
            wish.labels.insert(name.to_owned(), value.to_owned());
        }
        "volume-opt" => wish.size = Some(volume_option(text()?)?),
        "bind-propagation" => {
            if !common_option(wish, text()?)? {
                bail!("{:?} is not a propagation", text()?);
            }
        }
        "bind-recursive" => ensure!(
            matches!(text()?, "enabled" | "writable"),
            "bind-recursive={} is not possible: what is mounted below comes with it",
            text()?
        ),
        "tmpfs-size" => {
            let bytes = size::parse(text()?)?;
            said.tmpfs.push(format!("size={bytes}"));
        }
        "tmpfs-mode" => {
            let mode = u32::from_str_radix(text()?, 8)
                .ok()
                .filter(|m| *m <= 0o7777);
            let mode = mode.with_context(|| format!("tmpfs-mode: {value:?} is no mode"))?;
            said.tmpfs.push(format!("mode={mode:o}"));
        }
        _ => bail!("{key:?} is not a key of a mount"),
    }
    Ok(())
}

fn truth(key: &str, value: Option<&str>) -> anyhow::Result<bool> {
    match value {
        None | Some("true" | "1") => Ok(true),
        Some("false" | "0") => Ok(false),
        Some(other) => bail!("{key}: {other:?} is neither true nor false"),
    }
}

/// `size=SIZE`, the one option of a volume.
pub(super) fn volume_option(text: &str) -> anyhow::Result<u64> {
    match text.split_once('=') {
        Some(("size", value)) => Ok(size::parse(value)?),
        _ => bail!("{text:?} is not an option of a volume; there is size=SIZE"),
    }
}

/// `--volumes-from CONTAINER[:ro|rw]`: the container, and whether nothing of it may be written to.
pub(super) fn volumes_from(text: &str) -> anyhow::Result<(&str, bool)> {
    match text.split_once(':') {
        None => Ok((text, false)),
        Some((name, "rw" | "z" | "Z")) => Ok((name, false)),
        Some((name, "ro")) => Ok((name, true)),
        Some((_, other)) => bail!("--volumes-from {text:?}: {other:?} is neither ro nor rw"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Source {
        Source::Volume(Some(name.into()))
    }

    fn host(path: &str, make: bool) -> Source {
        Source::Host {
            path: path.into(),
            make,
        }
    }

    #[test]
    fn volume_is_read_as_docker_does() {
        let cases = [
            ("/data", Source::Volume(None), "/data", false),
            ("/data:ro", Source::Volume(None), "/data", true),
            ("cache:/data", named("cache"), "/data", false),
            ("cache:/data:ro,z", named("cache"), "/data", true),
            ("/src:/data", host("/src", true), "/data", false),
            (
                "/src:/a/../data//x/./",
                host("/src", true),
                "/data/x",
                false,
            ),
        ];
        for (text, source, target, read_only) in cases {
            let wish = volume(text).unwrap();
            assert_eq!(wish.source, source, "{text}");
            assert_eq!((wish.target.as_str(), wish.read_only), (target, read_only));
            assert!(wish.copy_up);
        }
        let here = std::env::current_dir().unwrap();
        for (text, below) in [("./x:/d", "x"), (".:/d", "")] {
            let Source::Host { path, .. } = volume(text).unwrap().source else {
                panic!("{text}")
            };
            assert_eq!(path, here.join(below));
        }
        let wish = volume("c1:/d:nosuid,noexec,exec,nocopy").unwrap();
        assert_eq!(wish.options, ["nosuid"]);
        assert!(!wish.copy_up);
    }

    #[test]
    fn volume_of_nonsense_is_refused_and_named() {
        for text in [
            "",
            ":",
            ":/d",
            "c1:",
            "c1:d",
            "c1:/",
            "/",
            "data",
            "/a:/b:/c:/d",
            "c1:/d:rx",
            "../x/y",
            "a/b:/d",
            "-x:/d",
            "c1:/d:shared",
            "c1:/..",
            "c1:/d\0",
            "~/x:/d",
        ] {
            let error = format!("{:#}", volume(text).unwrap_err());
            assert!(error.contains("--volume"), "{text:?}: {error}");
        }
        let long = format!("{}:/d", "x".repeat(300));
        assert!(volume(&long).is_err());
    }

    #[test]
    fn mount_is_read_as_docker_does() {
        let wish = mount("type=volume,source=cache,target=/d,readonly,volume-opt=size=1g").unwrap();
        assert_eq!((wish.source, wish.read_only), (named("cache"), true));
        assert_eq!(wish.size, Some(1 << 30));
        let wish = mount("src=cache,dst=/d,volume-nocopy,volume-label=a=b").unwrap();
        assert!(!wish.copy_up);
        assert_eq!(wish.labels["a"], "b");
        let wish = mount("target=/d").unwrap();
        assert_eq!(wish.source, Source::Volume(None));
        let wish = mount("type=bind,\"source=/a,b:\n\"\"c\",destination=/d,ro=false").unwrap();
        assert_eq!(wish.source, host("/a,b:\n\"c", false));
        assert!(!wish.read_only);
        let wish = mount("type=tmpfs,target=/d,tmpfs-size=64m,tmpfs-mode=1770").unwrap();
        let options = ["size=67108864".to_owned(), "mode=1770".to_owned()];
        assert_eq!(wish.source, Source::Tmpfs(options.to_vec()));
    }

    #[test]
    fn mount_of_nonsense_is_refused() {
        for text in [
            "",
            "type=volume",
            "type=bind,target=/d",
            "type=bind,source=here,target=/d",
            "type=npipe,source=/x,target=/d",
            "type=tmpfs,source=x,target=/d",
            "type=tmpfs,target=/d,tmpfs-mode=9",
            "type=bind,source=/x,target=/d,tmpfs-size=1m",
            "type=volume,source=../x,target=/d",
            "source=/x,target=/d",
            "target=d",
            "target=/d,colour=red",
            "target=/d,ro=maybe",
            "\"target=/d",
            "\"target=/d\"x",
            "target=/d,volume-driver=nfs",
            "target=/d,volume-opt=type=nfs",
            "type=bind,source=/x,target=/d,bind-propagation=rshared",
        ] {
            assert!(mount(text).is_err(), "{text}");
        }
    }

    #[test]
    fn volumes_from_takes_a_mode() {
        assert_eq!(volumes_from("box").unwrap(), ("box", false));
        assert_eq!(volumes_from("box:ro").unwrap(), ("box", true));
        assert!(volumes_from("box:rx").is_err());
    }

    proptest::proptest! {
        #[test]
        fn volume_of_anything_stays_plain(text in "[a-z./:,~\\\\\n\0 ]{0,24}|\\PC{0,24}") {
            if let Ok(wish) = volume(&text) {
                assert_plain(&wish);
            }
        }

        #[test]
        fn mount_of_anything_stays_plain(text in "((type=(volume|bind|tmpfs)|source=[a-z/.:]{0,8}|target=/[a-z/.]{0,8}|ro|\"[a-z=,\"]{0,6}\"),){0,5}[a-z=/]{0,8}|\\PC{0,32}") {
            if let Ok(wish) = mount(&text) {
                assert_plain(&wish);
            }
        }

        #[test]
        fn fields_of_quoted_texts_give_them_back(texts in proptest::collection::vec("\\PC{1,8}", 1..4)) {
            let quoted: Vec<String> = texts.iter().map(|t| format!("\"{}\"", t.replace('"', "\"\""))).collect();
            proptest::prop_assert_eq!(fields(&quoted.join(",")).unwrap(), texts);
        }
    }

    fn assert_plain(wish: &Wish) {
        let target = Path::new(&wish.target);
        assert!(target.is_absolute() && wish.target != "/");
        let plain = |c| matches!(c, Component::Normal(_) | Component::RootDir);
        assert!(target.components().all(plain));
        match &wish.source {
            Source::Volume(Some(name)) => volume::check_name(name).unwrap(),
            Source::Host { path, .. } => assert!(path.is_absolute()),
            _ => {}
        }
    }
}
