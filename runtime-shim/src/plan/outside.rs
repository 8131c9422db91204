//! What a container gets of outside its image: small files, and volumes.
//!
//! In the spec a volume is a mount of an ext4 image, as mount(8) would take it: type `ext4`, the image as the source.
//! The guest gets the image as a disk; what the container sees is the directory `data` in it.

use super::{CopiedFile, Disk, PlanError, file_target, without_netns};
use casemate_protocol::GUEST_RUN_DIR;
use casemate_protocol::agent::Mount as AgentMount;
use oci_spec::runtime::{Mount, Spec};
use std::path::{Component, Path, PathBuf};

/// A mount option of ours: an empty volume gets what the image has at its place.
pub const COPY_UP: &str = "X-casemate.copyup";
/// Letters of `/dev/vda` onwards, and places that the VMM has for devices.
const MAX_DISKS: usize = 16;

/// What [`outside`] finds out.
pub(super) struct Outside {
    /// The spec without what only the host could apply.
    pub(super) spec: Spec,
    /// What it expects to find in the guest.
    pub(super) files: Vec<CopiedFile>,
    /// Behind the disks of the rootfs.
    pub(super) disks: Vec<Disk>,
    /// What the agent mounts of them.
    pub(super) mounts: Vec<AgentMount>,
}

/// Takes a spec's mounts apart. `before` disks come before those found here.
pub(super) fn outside(
    id: &str,
    bundle: &Path,
    spec: &Spec,
    before: usize,
) -> Result<Outside, PlanError> {
    let mut all = Outside {
        spec: spec.clone(),
        files: Vec::new(),
        disks: Vec::new(),
        mounts: Vec::new(),
    };
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for (index, mount) in mounts.iter_mut().enumerate() {
        if binds(mount) {
            let file = copied_file(id, bundle, index, mount)?;
            mount.set_source(Some(file.target.clone().into()));
            all.files.push(file);
        } else if mount.typ().as_deref() == Some("ext4") {
            all.volume(id, before, mount)?;
        }
    }
    all.spec.set_mounts(Some(mounts));
    without_netns(&mut all.spec);
    Ok(all)
}

fn options(mount: &Mount) -> &[String] {
    mount.options().as_deref().unwrap_or_default()
}

fn binds(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || options(mount).iter().any(|o| o == "bind" || o == "rbind")
}

/// The last of `ro` and `rw` wins, as with mount(8).
fn read_only(mount: &Mount) -> bool {
    let last = options(mount).iter().rfind(|o| *o == "ro" || *o == "rw");
    last.is_some_and(|o| o == "ro")
}

fn copied_file(
    id: &str,
    bundle: &Path,
    index: usize,
    mount: &Mount,
) -> Result<CopiedFile, PlanError> {
    let source = mount.source().clone().unwrap_or_default();
    let in_bundle = source
        .strip_prefix(bundle)
        .is_ok_and(|rest| rest.components().all(|c| matches!(c, Component::Normal(_))));
    if !in_bundle {
        return Err(PlanError::Bind {
            destination: mount.destination().clone(),
            source_path: source,
        });
    }
    let target = file_target(id, index);
    Ok(CopiedFile { source, target })
}

impl Outside {
    /// Makes a disk of the volume and a bind of the mount.
    fn volume(&mut self, id: &str, before: usize, mount: &mut Mount) -> Result<(), PlanError> {
        let source = mount.source().clone().unwrap_or_default();
        if !source.is_absolute() {
            return Err(PlanError::Volume {
                destination: mount.destination().clone(),
                source_path: source,
            });
        }
        let read_only = read_only(mount);
        let place = match self.disks.iter().position(|d| d.files == [source.clone()]) {
            Some(place) => place,
            None => self.disk(id, before, source)?,
        };
        let (disk, done) = (&mut self.disks[place], &mut self.mounts[place]);
        if !read_only && disk.read_only {
            disk.read_only = false;
            done.options = mount_options(false);
        }
        if !read_only && options(mount).iter().any(|o| o == COPY_UP) {
            done.copy_up = mount.destination().display().to_string();
        }
        let own = |o: &&String| !matches!(o.as_str(), "loop" | "rw" | COPY_UP);
        let kept: Vec<String> = options(mount).iter().filter(own).cloned().collect();
        let bind = ["bind".to_owned(), "rprivate".to_owned()];
        mount.set_options(Some(bind.into_iter().chain(kept).collect()));
        mount.set_typ(Some("bind".to_owned()));
        let data = PathBuf::from(format!("{}/data", done.target));
        mount.set_source(Some(data));
        Ok(())
    }

    /// A further disk, read-only so far.
    fn disk(&mut self, id: &str, before: usize, file: PathBuf) -> Result<usize, PlanError> {
        let place = self.disks.len();
        let number = before + place;
        if number >= MAX_DISKS {
            return Err(PlanError::Disks(MAX_DISKS - before));
        }
        self.disks.push(Disk {
            id: format!("volume{place}"),
            files: vec![file],
            read_only: true,
            volume: true,
        });
        self.mounts.push(AgentMount {
            type_: "ext4".to_owned(),
            source: format!("/dev/vd{}", (b'a' + number as u8) as char),
            target: format!("{GUEST_RUN_DIR}/{id}/volume{place}"),
            options: mount_options(true),
            ..Default::default()
        });
        Ok(place)
    }
}

fn mount_options(read_only: bool) -> Vec<String> {
    let options: &[&str] = match read_only {
        true => &["ro"],
        // What is deleted goes back to the host. The tables are lazily initialised: filling them in would be work for nothing.
        false => &["rw", "discard", "noinit_itable"],
    };
    options.iter().map(|o| (*o).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn planned(mounts: serde_json::Value) -> Result<Outside, PlanError> {
        let spec = json!({"ociVersion": "1.2.0", "mounts": mounts});
        let spec: Spec = serde_json::from_value(spec).unwrap();
        outside("c1", Path::new("/bundle"), &spec, 2)
    }

    #[test]
    fn volume_becomes_a_disk_and_a_bind() {
        let planned = planned(json!([
            {"destination": "/data", "type": "ext4", "source": "/v/a/disk.img", "options": ["loop", "nosuid", COPY_UP]},
            {"destination": "/look", "type": "ext4", "source": "/v/b/disk.img", "options": ["loop", "ro", COPY_UP]},
        ]))
        .unwrap();
        let [a, b] = &planned.disks[..] else { panic!() };
        assert_eq!(
            (a.read_only, a.volume, a.id.as_str()),
            (false, true, "volume0")
        );
        assert!(b.read_only);
        assert_eq!(planned.mounts[0].source, "/dev/vdc");
        assert_eq!(planned.mounts[0].copy_up, "/data");
        assert_eq!(planned.mounts[0].options[0], "rw");
        assert_eq!(planned.mounts[1].source, "/dev/vdd");
        assert_eq!(planned.mounts[1].copy_up, "");
        assert_eq!(planned.mounts[1].options, ["ro"]);
        let mounts = planned.spec.mounts().clone().unwrap();
        let source = mounts[0].source().clone().unwrap();
        assert_eq!(source, Path::new("/run/casemate/c1/volume0/data"));
        assert_eq!(mounts[0].typ().as_deref(), Some("bind"));
        let options = |i: usize| mounts[i].options().clone().unwrap();
        assert_eq!(options(0), ["bind", "rprivate", "nosuid"]);
        assert_eq!(options(1), ["bind", "rprivate", "ro"]);
    }

    #[test]
    fn volume_at_two_places_is_one_disk_that_is_written_if_either_is() {
        let planned = planned(json!([
            {"destination": "/ro", "type": "ext4", "source": "/v/a/disk.img", "options": ["ro"]},
            {"destination": "/rw", "type": "ext4", "source": "/v/a/disk.img", "options": []},
        ]))
        .unwrap();
        assert_eq!((planned.disks.len(), planned.mounts.len()), (1, 1));
        assert!(!planned.disks[0].read_only);
        assert_eq!(planned.mounts[0].options[0], "rw");
        let mounts = planned.spec.mounts().clone().unwrap();
        assert_eq!(mounts[0].source(), mounts[1].source());
        assert!(read_only(&mounts[0]) && !read_only(&mounts[1]));
    }

    #[test]
    fn volumes_that_no_guest_can_have_are_refused() {
        let relative = json!([{"destination": "/d", "type": "ext4", "source": "disk.img"}]);
        assert!(matches!(planned(relative), Err(PlanError::Volume { .. })));
        let many: Vec<_> = (0..15)
            .map(|n| json!({"destination": "/d", "type": "ext4", "source": format!("/v/{n}")}))
            .collect();
        assert!(planned(json!(many[..14])).is_ok());
        assert!(matches!(planned(json!(many)), Err(PlanError::Disks(14))));
    }
}
