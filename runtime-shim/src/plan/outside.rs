//! What a container gets of outside its image: small files, what the host shares, and volumes.
//!
//! A file in the bundle is copied into the guest; any other file or directory that the spec binds is a share.
//!
//! In the spec a volume is a mount of an ext4 image, as mount(8) would take it: type `ext4`, the image as the source.
//! The guest gets the image as a disk; what the container sees is the directory `data` in it.

use super::pod::{self, Place, Placed};
use super::{CopiedFile, Disk, Found, PlanError, Share, file_target};
use casemate_protocol::GUEST_RUN_DIR;
use casemate_protocol::agent::Mount as AgentMount;
use oci_spec::runtime::{Mount, Spec};
use std::path::{Component, Path, PathBuf};

/// A mount option of ours: an empty volume gets what the image has at its place.
pub const COPY_UP: &str = "X-casemate.copyup";
/// The one name in the share of a single file.
pub const SHARED_FILE: &str = "file";
/// Disks and shares together leave some of the VMM's places for devices.
const MAX_DISKS: usize = 10;
const MAX_SHARES: usize = 8;

/// What [`outside`] finds out.
pub(super) struct Outside {
    /// The spec without what only the host could apply.
    pub(super) spec: Spec,
    /// What it expects to find in the guest.
    pub(super) files: Vec<CopiedFile>,
    /// Behind the disks of the rootfs.
    pub(super) disks: Vec<Disk>,
    /// What the host shares.
    pub(super) shares: Vec<Share>,
    /// What the agent mounts of disks and shares.
    pub(super) mounts: Vec<AgentMount>,
    /// What is put into the pod's share.
    pub(super) placed: Vec<Placed>,
}

/// What is being gathered.
struct Gathered<'a> {
    id: &'a str,
    bundle: &'a Path,
    before: usize,
    look: fn(&Path) -> Found,
    files: Vec<CopiedFile>,
    /// With the agent's mount of each.
    disks: Vec<(Disk, AgentMount)>,
    shares: Vec<(Share, AgentMount)>,
    place: Option<&'a Place<'a>>,
    placed: Vec<Placed>,
}

/// Takes a spec's mounts apart. `before` disks come before those found here. In a pod no
/// share is made: what would be one has its `place` in the pod's.
pub(super) fn outside(
    id: &str,
    bundle: &Path,
    spec: &Spec,
    before: usize,
    place: Option<&Place<'_>>,
    look: fn(&Path) -> Found,
) -> Result<Outside, PlanError> {
    let mut all = Gathered {
        id,
        bundle,
        before,
        look,
        files: Vec::new(),
        disks: Vec::new(),
        shares: Vec::new(),
        place,
        placed: Vec::new(),
    };
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for (index, mount) in mounts.iter_mut().enumerate() {
        if binds(mount) {
            all.bind(index, mount)?;
        } else if mount.typ().as_deref() == Some("ext4") {
            all.volume(mount)?;
        }
    }
    let mut spec = spec.clone();
    spec.set_mounts(Some(mounts));
    let (disks, of_disks): (Vec<_>, Vec<_>) = all.disks.into_iter().unzip();
    let (shares, of_shares): (Vec<_>, Vec<_>) = all.shares.into_iter().unzip();
    Ok(Outside {
        spec,
        files: all.files,
        disks,
        shares,
        mounts: of_disks.into_iter().chain(of_shares).collect(),
        placed: all.placed,
    })
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

/// Makes the mount one that binds a path of the guest.
fn bind_in_guest(mount: &mut Mount, source: String, dropped: &[&str]) {
    let own = |o: &&String| !dropped.contains(&o.as_str());
    let kept: Vec<String> = options(mount).iter().filter(own).cloned().collect();
    let bind = ["bind".to_owned(), "rprivate".to_owned()];
    mount.set_options(Some(bind.into_iter().chain(kept).collect()));
    mount.set_typ(Some("bind".to_owned()));
    mount.set_source(Some(source.into()));
}

impl Gathered<'_> {
    /// A file of the bundle, or a share.
    fn bind(&mut self, index: usize, mount: &mut Mount) -> Result<(), PlanError> {
        let source = mount.source().clone().unwrap_or_default();
        if let Some(place) = self.place
            && pod::is_shm(mount.destination(), &source)?
        {
            bind_in_guest(mount, place.shm(), &["bind", "rbind", "rw"]);
            return Ok(());
        }
        let in_bundle = source
            .strip_prefix(self.bundle)
            .is_ok_and(|rest| rest.components().all(|c| matches!(c, Component::Normal(_))));
        if in_bundle {
            let target = file_target(self.id, index);
            mount.set_source(Some(target.clone().into()));
            self.files.push(CopiedFile { source, target });
            return Ok(());
        }
        let found = match source.is_absolute() {
            true => (self.look)(&source),
            false => Found::Nothing,
        };
        if found == Found::Nothing {
            return Err(PlanError::Bind {
                destination: mount.destination().clone(),
                source_path: source,
            });
        }
        if let Some(place) = self.place {
            pod::check_propagation(mount.destination(), options(mount))?;
            let placed = pod::bind(index, source, options(mount), found);
            let path = place.path(self.id, &placed.name);
            // The host keeps what is below it writable, and here a mount below has what the one above it has.
            let only_top = placed.is_read_only_at_top();
            let dropped: &[&str] = match only_top {
                true => &["bind", "rbind", "rw", "ro"],
                false => &["bind", "rbind", "rw"],
            };
            self.placed.push(placed);
            bind_in_guest(mount, path, dropped);
            return Ok(());
        }
        let shared = self.share(source, read_only(mount))?;
        let path = match found {
            Found::Directory => shared,
            _ => format!("{shared}/{SHARED_FILE}"),
        };
        // Before the other options: what it propagates within the guest may be among them.
        bind_in_guest(mount, path, &["bind", "rbind", "rw"]);
        Ok(())
    }

    /// Where in the guest the share of a path is.
    fn share(&mut self, source: PathBuf, read_only: bool) -> Result<String, PlanError> {
        let same = |(share, _): &&(Share, AgentMount)| {
            share.source == source && share.read_only == read_only
        };
        if let Some((_, mount)) = self.shares.iter().find(same) {
            return Ok(mount.target.clone());
        }
        if self.shares.len() >= MAX_SHARES {
            return Err(PlanError::Shares(MAX_SHARES));
        }
        let tag = format!("share{}", self.shares.len());
        let target = format!("{GUEST_RUN_DIR}/{}/{tag}", self.id);
        let mount = AgentMount {
            type_: "virtiofs".to_owned(),
            source: tag.clone(),
            target: target.clone(),
            options: vec![if read_only { "ro" } else { "rw" }.to_owned()],
            ..Default::default()
        };
        let share = Share {
            tag,
            source,
            read_only,
            is_pods: false,
        };
        self.shares.push((share, mount));
        Ok(target)
    }

    /// Makes a disk of the volume and a bind of the mount.
    fn volume(&mut self, mount: &mut Mount) -> Result<(), PlanError> {
        let source = mount.source().clone().unwrap_or_default();
        if !source.is_absolute() {
            return Err(PlanError::Volume {
                destination: mount.destination().clone(),
                source_path: source,
            });
        }
        let read_only = read_only(mount);
        let same = |(disk, _): &(Disk, AgentMount)| disk.files == [source.clone()];
        let place = match self.disks.iter().position(same) {
            Some(place) => place,
            None => self.disk(source)?,
        };
        let (disk, done) = &mut self.disks[place];
        if !read_only && disk.read_only {
            disk.read_only = false;
            done.options = mount_options(false);
        }
        if !read_only && options(mount).iter().any(|o| o == COPY_UP) {
            done.copy_up = mount.destination().display().to_string();
        }
        let data = format!("{}/data", done.target);
        bind_in_guest(mount, data, &["loop", "rw", COPY_UP]);
        Ok(())
    }

    /// A further disk, read-only so far.
    fn disk(&mut self, file: PathBuf) -> Result<usize, PlanError> {
        let place = self.disks.len();
        let number = self.before + place;
        if number >= MAX_DISKS {
            return Err(PlanError::Disks(MAX_DISKS - self.before));
        }
        let disk = Disk {
            id: format!("volume{place}"),
            files: vec![file],
            read_only: true,
            volume: true,
        };
        let mount = AgentMount {
            type_: "ext4".to_owned(),
            source: format!("/dev/vd{}", (b'a' + number as u8) as char),
            target: format!("{GUEST_RUN_DIR}/{}/volume{place}", self.id),
            options: mount_options(true),
            ..Default::default()
        };
        self.disks.push((disk, mount));
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
        let look = |path: &Path| match path.extension().and_then(|e| e.to_str()) {
            Some("dir") => Found::Directory,
            Some("file") => Found::File,
            _ => Found::Nothing,
        };
        outside("c1", Path::new("/bundle"), &spec, 2, None, look)
    }

    #[test]
    fn bind_of_a_file_in_the_bundle_is_a_copy_and_any_other_a_share() {
        let planned = planned(json!([
            {"destination": "/etc/hosts", "type": "bind", "source": "/bundle/hosts", "options": ["rbind", "rprivate"]},
            {"destination": "/d", "type": "bind", "source": "/x.dir", "options": ["rbind", "nosuid"]},
            {"destination": "/f", "source": "/bundle/../y.file", "options": ["bind", "ro"]},
            {"destination": "/e", "type": "none", "source": "/x.dir", "options": ["rbind"]},
            {"destination": "/r", "type": "bind", "source": "/x.dir", "options": ["ro"]},
        ]))
        .unwrap();
        assert_eq!(planned.files.len(), 1);
        let shares: Vec<_> = planned
            .shares
            .iter()
            .map(|s| (s.tag.as_str(), s.source.to_str().unwrap(), s.read_only))
            .collect();
        assert_eq!(
            shares,
            [
                ("share0", "/x.dir", false),
                ("share1", "/bundle/../y.file", true),
                ("share2", "/x.dir", true),
            ]
        );
        assert_eq!(planned.mounts[1].type_, "virtiofs");
        assert_eq!(planned.mounts[1].options, ["ro"]);
        let mounts = planned.spec.mounts().clone().unwrap();
        let source = |i: usize| mounts[i].source().clone().unwrap();
        assert_eq!(source(1), Path::new("/run/casemate/c1/share0"));
        assert_eq!(source(2), Path::new("/run/casemate/c1/share1/file"));
        assert_eq!(source(3), source(1));
        let options = |i: usize| mounts[i].options().clone().unwrap();
        assert_eq!(options(1), ["bind", "rprivate", "nosuid"]);
        assert_eq!(options(2), ["bind", "rprivate", "ro"]);
    }

    #[test]
    fn binds_of_nothing_and_too_many_are_refused() {
        for source in ["/none", "x.dir", ""] {
            let mount = json!([{"destination": "/d", "type": "bind", "source": source}]);
            assert!(matches!(planned(mount), Err(PlanError::Bind { .. })));
        }
        let many: Vec<_> = (0..9)
            .map(|n| json!({"destination": "/d", "type": "bind", "source": format!("/{n}.dir")}))
            .collect();
        assert!(planned(json!(many[..8])).is_ok());
        assert!(matches!(planned(json!(many)), Err(PlanError::Shares(8))));
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
        let many: Vec<_> = (0..9)
            .map(|n| json!({"destination": "/d", "type": "ext4", "source": format!("/v/{n}")}))
            .collect();
        assert!(planned(json!(many[..8])).is_ok());
        assert!(matches!(planned(json!(many)), Err(PlanError::Disks(8))));
    }
}
