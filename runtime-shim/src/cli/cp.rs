//! `casemate cp`: files into a container and out of it.

use super::containers;
use super::tools::{Feed, Workshop};
use crate::settings::Settings;
use crate::size::Human;
use anyhow::{Context, bail};
use casemate_archive::{Ids, pack, unpack};
use casemate_protocol::tool::{Stat, Tool};
use clap::Args;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

/// A [`Stat`] is no longer.
const MAX_STAT: u64 = 4096;

/// `casemate cp`
#[derive(Debug, Args)]
pub(super) struct CpArgs {
    /// Keep the owners and modes of files
    #[arg(short, long)]
    archive: bool,
    /// Copy what a symbolic link leads to, rather than the link
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// Don't say how much was copied
    #[arg(short, long)]
    quiet: bool,
    /// CONTAINER:PATH or PATH; - is a tar stream on standard input
    #[arg(value_name = "SOURCE")]
    source: String,
    /// PATH or CONTAINER:PATH; - is a tar stream on standard output
    #[arg(value_name = "DESTINATION")]
    destination: String,
}

/// One of the two ends.
#[derive(Debug, PartialEq, Eq)]
enum End<'a> {
    Stream,
    Here(&'a str),
    Inside { container: &'a str, path: PathBuf },
}

impl<'a> End<'a> {
    /// As with Docker, a path with a colon in it begins with / or with a dot.
    fn of(text: &'a str) -> Self {
        match text.split_once(':') {
            _ if text == "-" => Self::Stream,
            Some((container, path)) if !text.starts_with(['/', '.']) && !container.is_empty() => {
                Self::Inside {
                    container,
                    // A relative one is one from the root; `join` would swallow a final `/.`
                    path: format!("/{}", path.trim_start_matches('/')).into(),
                }
            }
            _ => Self::Here(text),
        }
    }
}

/// What a path leads to, on either side.
enum Target {
    Nothing,
    File,
    Directory,
}

impl From<Option<Stat>> for Target {
    fn from(stat: Option<Stat>) -> Self {
        match stat {
            None => Self::Nothing,
            Some(stat) if stat.directory => Self::Directory,
            Some(_) => Self::File,
        }
    }
}

/// A copy as both sides are told of it.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    /// Is unpacked into this directory,
    into: PathBuf,
    /// with this name; empty: what is in the source directory, without itself.
    name: PathBuf,
}

/// `casemate cp`
pub(super) async fn cp(settings: &Settings, args: &CpArgs) -> anyhow::Result<()> {
    let root = containers::state(settings)?;
    match (End::of(&args.source), End::of(&args.destination)) {
        (End::Inside { container, path }, end @ (End::Here(_) | End::Stream)) => {
            let workshop = Workshop::open(settings, &root, container).await?;
            let copied = match end {
                End::Here(here) => out_of(&workshop, &path, Path::new(here), args).await,
                _ => stream_out(&workshop, path, args).await,
            };
            workshop.close().await.and(copied)
        }
        (end @ (End::Here(_) | End::Stream), End::Inside { container, path }) => {
            let workshop = Workshop::open(settings, &root, container).await?;
            let copied = match end {
                End::Here(here) => into(&workshop, Path::new(here), &path, args).await,
                _ => stream_in(&workshop, path, args).await,
            };
            workshop.close().await.and(copied)
        }
        (End::Inside { .. }, End::Inside { .. }) => {
            bail!(
                "copying between containers is not supported: copy out of the one, then into the other"
            )
        }
        _ => bail!("one of the two must be CONTAINER:PATH"),
    }
}

async fn stat(workshop: &Workshop, path: &Path, follow: bool) -> anyhow::Result<Option<Stat>> {
    let path = path.to_owned();
    let answer = workshop.ask(&Tool::Stat { path, follow }, MAX_STAT).await?;
    if answer.is_empty() {
        return Ok(None);
    }
    let stat = serde_json::from_slice(&answer).context("the guest's answer is no stat")?;
    Ok(Some(stat))
}

fn stat_here(path: &Path, follow: bool) -> anyhow::Result<Option<Stat>> {
    let metadata = match follow {
        true => std::fs::metadata(path),
        false => std::fs::symlink_metadata(path),
    };
    match metadata {
        Ok(metadata) => Ok(Some(Stat {
            directory: metadata.is_dir(),
            link: metadata.is_symlink(),
        })),
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(e) => Err(e).with_context(|| format!("can't look at {}", path.display())),
    }
}

/// `path/.` means what is in the directory.
fn is_content(path: &Path) -> bool {
    let text = path.as_os_str().as_encoded_bytes();
    text == b"." || text.ends_with(b"/.")
}

fn ends_with_slash(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(b"/") || is_content(path)
}

/// Docker's rules for where a copy goes (docs.docker.com, `docker container cp`).
fn plan(
    source: &Path,
    source_is_dir: bool,
    destination: &Path,
    target: &Target,
) -> anyhow::Result<Plan> {
    let content = source_is_dir && is_content(source);
    let (shown, own) = (destination.display(), base_name(source));
    match target {
        Target::Directory => Ok(Plan {
            into: destination.to_owned(),
            name: if content { PathBuf::new() } else { own.into() },
        }),
        Target::File if source_is_dir => {
            bail!("{shown} is a file, and {} a directory", source.display())
        }
        Target::File if ends_with_slash(destination) => bail!("{shown} is not a directory"),
        Target::Nothing if !source_is_dir && ends_with_slash(destination) => {
            bail!("there is no directory {shown}")
        }
        Target::File | Target::Nothing => Ok(Plan {
            into: match destination.parent() {
                None => "/".into(),
                Some(parent) if parent.as_os_str().is_empty() => ".".into(),
                Some(parent) => parent.to_owned(),
            },
            name: base_name(destination).into(),
        }),
    }
}

/// The last part of a path; that of the root is the root's content.
fn base_name(path: &Path) -> OsString {
    path.file_name().map_or_else(OsString::new, OsStr::to_owned)
}

async fn out_of(
    workshop: &Workshop,
    source: &Path,
    destination: &Path,
    args: &CpArgs,
) -> anyhow::Result<()> {
    let follow = args.follow_link || ends_with_slash(source);
    let Some(found) = stat(workshop, source, follow).await? else {
        bail!("there is no {} in the container", source.display());
    };
    let target = stat_here(destination, true)?.into();
    let Plan { into, name } = plan(source, found.directory, destination, &target)?;
    if !into.is_dir() {
        bail!("there is no directory {}", into.display());
    }
    let tool = Tool::Pack {
        path: source.to_owned(),
        name: name.clone(),
        follow,
    };
    let ids = if args.archive { Ids::Keep } else { Ids::Mine };
    let take = move |stream: File| {
        let only = (!name.as_os_str().is_empty()).then_some(name.as_os_str());
        Ok(unpack(stream, &into, only, ids)?)
    };
    let unpacked = workshop.call(&tool, None, take).await?;
    for path in &unpacked.left_out {
        eprintln!(
            "casemate: warning: left out: {} is no file, directory or link",
            path.display()
        );
    }
    tell(args, unpacked.bytes, &args.destination);
    Ok(())
}

async fn into(
    workshop: &Workshop,
    source: &Path,
    destination: &Path,
    args: &CpArgs,
) -> anyhow::Result<()> {
    let follow = args.follow_link || ends_with_slash(source);
    let Some(found) = stat_here(source, follow)? else {
        bail!("there is no {}", source.display());
    };
    let target = stat(workshop, destination, true).await?.into();
    let Plan { into, name } = plan(source, found.directory, destination, &target)?;
    let source = match follow {
        true => source.canonicalize(),
        false => Ok(source.to_owned()),
    };
    let source = source.with_context(|| format!("can't follow {}", args.source))?;
    let (tell_bytes, bytes) = std::sync::mpsc::channel();
    let feed: Feed = Box::new(move |stream| {
        let stream = io::BufWriter::with_capacity(64 << 10, stream);
        let packed = pack(&source, &name, stream)?;
        let _ = tell_bytes.send(packed.bytes);
        Ok(())
    });
    unpack_inside(workshop, into, args, feed).await?;
    tell(args, bytes.try_recv().unwrap_or(0), &args.destination);
    Ok(())
}

async fn unpack_inside(
    workshop: &Workshop,
    into: PathBuf,
    args: &CpArgs,
    feed: Feed,
) -> anyhow::Result<()> {
    if !stat(workshop, &into, true)
        .await?
        .is_some_and(|s| s.directory)
    {
        bail!("there is no directory {} in the container", into.display());
    }
    let tool = Tool::Unpack {
        into,
        keep_ids: args.archive,
    };
    workshop.call(&tool, Some(feed), |_| Ok(())).await
}

async fn stream_in(workshop: &Workshop, into: PathBuf, args: &CpArgs) -> anyhow::Result<()> {
    let feed: Feed = Box::new(|mut stream| {
        io::copy(&mut io::stdin().lock(), &mut stream).context("can't pass on standard input")?;
        Ok(())
    });
    unpack_inside(workshop, into, args, feed).await
}

async fn stream_out(workshop: &Workshop, path: PathBuf, args: &CpArgs) -> anyhow::Result<()> {
    if io::stdout().is_terminal() {
        bail!("an archive won't be written to a terminal; redirect standard output");
    }
    let follow = args.follow_link || ends_with_slash(&path);
    let name = match is_content(&path) {
        true => PathBuf::new(),
        false => base_name(&path).into(),
    };
    let tool = Tool::Pack { path, name, follow };
    let take = |mut stream: File| {
        match io::copy(&mut stream, &mut io::stdout().lock()) {
            // As with `tar | head`: a reader may leave.
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
                Err(e).context("can't write to standard output")
            }
            _ => Ok(()),
        }
    };
    workshop.call(&tool, None, take).await
}

fn tell(args: &CpArgs, bytes: u64, to: &str) {
    if !args.quiet && io::stderr().is_terminal() {
        eprintln!("Copied {} to {to}", Human(bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_tells_containers_from_paths() {
        let inside = |container, path: &str| End::Inside {
            container,
            path: path.into(),
        };
        for (text, end) in [
            ("-", End::Stream),
            ("web:/etc/hosts", inside("web", "/etc/hosts")),
            ("web:tmp/.", inside("web", "/tmp/.")),
            ("web:", inside("web", "/")),
            ("./a:b", End::Here("./a:b")),
            ("/a:b", End::Here("/a:b")),
            (":x", End::Here(":x")),
            ("file", End::Here("file")),
        ] {
            assert_eq!(End::of(text), end, "{text}");
        }
    }

    #[test]
    fn plan_follows_dockers_rules() {
        use Target::{Directory, File, Nothing};
        let plan = |source: &str, is_dir, to: &str, target: Target| {
            let plan = plan(Path::new(source), is_dir, Path::new(to), &target).ok()?;
            Some((
                plan.into.display().to_string(),
                plan.name.display().to_string(),
            ))
        };
        let to = |into: &str, name: &str| Some((into.to_owned(), name.to_owned()));
        assert_eq!(plan("/a/f", false, "new", Nothing), to(".", "new"));
        assert_eq!(plan("/a/f", false, "d/new", Nothing), to("d", "new"));
        assert_eq!(plan("/a/f", false, "new/", Nothing), None);
        assert_eq!(plan("/a/f", false, "old", File), to(".", "old"));
        assert_eq!(plan("/a/f", false, "/d", Directory), to("/d", "f"));
        assert_eq!(plan("/a/d", true, "new", Nothing), to(".", "new"));
        assert_eq!(plan("/a/d", true, "new/", Nothing), to(".", "new"));
        assert_eq!(plan("/a/d", true, "old", File), None);
        assert_eq!(plan("/a/d", true, "/t", Directory), to("/t", "d"));
        assert_eq!(plan("/a/d/", true, "/t", Directory), to("/t", "d"));
        assert_eq!(plan("/a/d/.", true, "/t", Directory), to("/t", ""));
        assert_eq!(plan("/a/d/.", true, "new", Nothing), to(".", "new"));
        assert_eq!(plan("/", true, "/t", Directory), to("/t", ""));
    }
}
