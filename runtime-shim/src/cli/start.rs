//! `start` and `restart`: from a container on disk to a running one.

use super::args::{StartArgs, StopArgs};
use super::attend::{Fifos, Signals};
use super::client::{ProcessId, Shim, ShimOptions};
use super::create::{self, Made};
use super::detach_keys::DetachKeys;
use super::run::{Failure, not_started};
use super::{attach, containers, images, lifecycle};
use crate::settings::Settings;
use crate::state::{Container, SandboxDir, State, StateRoot};
use crate::update;
use anyhow::{Context, bail};
use casemate_image::RootfsDisk;
use containerd_shim_protos::api;
use std::os::fd::OwnedFd;
use std::path::Path;

/// The request that creates the container's task.
pub(super) fn request(
    settings: &Settings,
    made: &Made,
    fifos: Fifos,
) -> anyhow::Result<api::CreateTaskRequest> {
    Ok(api::CreateTaskRequest {
        id: made.meta.id.clone(),
        bundle: text(made.dir.path())?,
        rootfs: rootfs_mounts(settings, made)?,
        terminal: made.meta.tty,
        stdin: fifos.stdin,
        stdout: fifos.stdout,
        stderr: fifos.stderr,
        ..Default::default()
    })
}

/// How the shim shall treat a container.
pub(super) fn options<'a>(
    made: &'a Made,
    attended: bool,
    console: Option<&'a OwnedFd>,
) -> ShimOptions<'a> {
    ShimOptions {
        discard: made.meta.auto_remove,
        console,
        unattended: (!attended).then_some(made.meta.restart),
        log: made.meta.log,
        lease: made.rootfs.lease.as_file(),
        fills: made.meta.mounts.iter().any(|mount| mount.copy_up),
    }
}

/// Starts a container that is left to itself from then on. What fails leaves it as it was.
pub(super) async fn leave_to_itself(settings: &Settings, made: &Made) -> Result<(), Failure> {
    let fifos = Fifos::stdin_only(made.dir.path(), made.meta.interactive)?;
    let shim = Shim::start(settings, &made.dir, &options(made, false, None))?;
    let started = async {
        let request = request(settings, made, fifos)?;
        shim.create(&request).await.map_err(not_started)?;
        let init = ProcessId::first_of(&made.meta.id);
        shim.client().start(init).await.map_err(not_started)
    };
    match started.await {
        Ok(()) => {
            shim.leave();
            Ok(())
        }
        Err(failure) => {
            let _ = shim.end().await;
            Err(failure)
        }
    }
}

/// A container that was made before or has ended, ready to start.
pub(super) fn again(
    settings: &Settings,
    root: &StateRoot,
    container: Container,
) -> anyhow::Result<Made> {
    let dir: SandboxDir = root.take(&container)?;
    // It may have been removed while we waited for it.
    let Container { meta, .. } = root.find(&container.meta.id)?;
    dir.forget_run()?;
    update::settle(dir.path()).context("can't apply the limits that the container was given")?;
    let store = images::store(settings)?;
    let image = store
        .find(&meta.image_id)?
        .with_context(|| format!("the image {} ({}) is gone", meta.image, meta.image_id))?;
    let rootfs = store.rootfs(&image)?;
    Ok(Made { meta, dir, rootfs })
}

/// `casemate start`
pub(super) async fn start(settings: &Settings, args: &StartArgs) -> Result<u8, Failure> {
    let attached = args.attach || args.interactive;
    if !attached {
        let started = lifecycle::for_each(settings, &args.containers, async |root, name| {
            start_one(settings, root, name).await?;
            Ok(name.to_owned())
        });
        started.await.map_err(|error| Failure { error, code: 1 })?;
        return Ok(0);
    }
    let [name] = args.containers.as_slice() else {
        return Err(anyhow::anyhow!("only one container can be attached to").into());
    };
    let signals = Signals::new()?;
    let root = containers::state(settings)?;
    let container = root.find(name)?;
    let from = attach::From::now(settings, &container)?;
    start_one(settings, &root, name).await?;
    let wishes = attach::Wishes {
        input: args.interactive,
        ends_input: true,
        keys: DetachKeys::default(),
    };
    attach::follow(&root, container, from, wishes, signals).await
}

async fn start_one(settings: &Settings, root: &StateRoot, name: &str) -> anyhow::Result<()> {
    let container = root.find(name)?;
    // As with Docker, one that runs is started.
    if container.status.state.is_alive() {
        return Ok(());
    }
    let before = container.status.clone();
    let made = again(settings, root, container)?;
    if let Err(failure) = leave_to_itself(settings, &made).await {
        let _ = made.dir.write_status(&before);
        return Err(failure.error);
    }
    Ok(())
}

/// `casemate restart`
pub(super) async fn restart(settings: &Settings, args: &StopArgs) -> anyhow::Result<()> {
    lifecycle::for_each(settings, &args.containers, async |root, name| {
        let container = root.find(name)?;
        if container.meta.auto_remove && container.status.state != State::Created {
            bail!("container {name} goes away when it ends (--rm), so it can't be started again");
        }
        lifecycle::stop_one(root, name, args.timeout).await?;
        start_one(settings, root, name).await?;
        root.tell(&container.meta, "restart", []);
        Ok(name.to_owned())
    })
    .await
}

fn text(path: &Path) -> anyhow::Result<String> {
    let text = path.to_str();
    let text = text.with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(text.to_owned())
}

fn mount(kind: &str, source: &str, options: Vec<String>) -> api::Mount {
    api::Mount {
        type_: kind.to_owned(),
        source: source.to_owned(),
        options,
        ..Default::default()
    }
}

/// The image's disk, something to write on, and the overlay of both.
fn rootfs_mounts(settings: &Settings, made: &Made) -> anyhow::Result<Vec<api::Mount>> {
    let RootfsDisk {
        metadata, layers, ..
    } = &made.rootfs;
    let mut options = vec!["ro".to_owned()];
    for layer in layers {
        options.push(format!("device={}", text(layer)?));
    }
    let lower = mount("erofs", &text(metadata)?, options);
    let upper = if made.meta.read_only {
        // Mount points that the image lacks still have to be made somewhere.
        mount("tmpfs", "tmpfs", vec!["mode=755".to_owned()])
    } else {
        let file = create::scratch_file(settings, &made.meta.id);
        mount("ext4", &text(&file)?, vec!["rw".to_owned()])
    };
    let overlay = [
        "lowerdir={{ mount 0 }}",
        "upperdir={{ mount 1 }}/upper",
        "workdir={{ mount 1 }}/work",
    ];
    let overlay = mount("overlay", "overlay", overlay.map(str::to_owned).to_vec());
    Ok(vec![lower, upper, overlay])
}
