//! Plans of specs and roots of all kinds.

use super::*;

pub(super) const HOST: Host = Host {
    cpus: 4,
    memory: 8 << 30,
};
pub(super) const DEFAULTS: Defaults = Defaults {
    memory: 512 << 20,
    cpus: 1,
};

fn mount(kind: &str, source: &str, options: &[&str]) -> RootfsMount {
    RootfsMount {
        kind: kind.into(),
        source: source.into(),
        options: options.iter().map(|o| o.to_string()).collect(),
    }
}

fn three_mounts() -> Vec<RootfsMount> {
    vec![
        mount("erofs", "/b/meta", &["ro", "device=/b/l1", "device=/b/l2"]),
        mount("ext4", "/s/scratch", &["rw"]),
        mount(
            "overlay",
            "",
            &[
                "lowerdir={{ mount 0 }}",
                "upperdir={{ mount 1 }}/upper",
                "workdir={{ mount 1 }}/work",
            ],
        ),
    ]
}

fn spec(resources: &str) -> Spec {
    let json = format!(
        r#"{{"ociVersion":"1.2.0","root":{{"path":"rootfs"}},"linux":{{"resources":{resources}}}}}"#
    );
    serde_json::from_str(&json).unwrap()
}

fn planned(resources: &str) -> Result<Plan, PlanError> {
    plan(
        "c1",
        Path::new("/bundle"),
        &spec(resources),
        &three_mounts(),
        HOST,
        DEFAULTS,
        |_| Found::Nothing,
    )
}

#[test]
fn plan_of_an_image_lays_its_blobs_on_one_disk() {
    let plan = planned("{}").unwrap();
    assert_eq!(
        plan.disks[0].files,
        ["/b/meta", "/b/l1", "/b/l2"].map(PathBuf::from)
    );
    assert!(plan.disks[0].read_only && !plan.disks[1].read_only);
    let mounts: Vec<_> = plan
        .inside
        .mounts
        .iter()
        .map(|m| {
            (
                m.type_.as_str(),
                m.source.as_str(),
                m.target.as_str(),
                m.options.join(","),
            )
        })
        .collect();
    let dir = "/run/casemate/c1";
    assert_eq!(
        mounts,
        [
            ("erofs", "/dev/vda", &*format!("{dir}/m0"), "ro".to_owned()),
            (
                "ext4",
                "/dev/vdb",
                &*format!("{dir}/m1"),
                "rw,noinit_itable".to_owned()
            ),
            (
                "overlay",
                "none",
                &*format!("{dir}/rootfs"),
                format!("lowerdir={dir}/m0,upperdir={dir}/m1/upper,workdir={dir}/m1/work")
            ),
        ]
    );
    assert_eq!(plan.inside.rootfs, format!("{dir}/rootfs"));
}

#[test]
fn plan_without_limits_takes_the_defaults() {
    let plan = planned("{}").unwrap();
    assert_eq!((plan.memory_mib, plan.vcpus), (512, 1));
}

#[test]
fn plan_with_memory_limit_adds_the_guests_own_share() {
    let plan = planned(r#"{"memory":{"limit":134217728}}"#).unwrap();
    assert_eq!(plan.memory_mib, 128 + 40 + 2);
}

#[test]
fn plan_with_fractional_cpus_rounds_up() {
    let plan = planned(r#"{"cpu":{"quota":150000,"period":100000}}"#).unwrap();
    assert_eq!(plan.vcpus, 2);
}

#[test]
fn plan_with_impossible_limits_names_them() {
    for (resources, part) in [
        (r#"{"memory":{"limit":1048576}}"#, "1048576"),
        (r#"{"memory":{"limit":-5}}"#, "-5"),
        (r#"{"memory":{"limit":9223372036854775807}}"#, "8192 MiB"),
        (r#"{"cpu":{"quota":500000,"period":100000}}"#, "only 4 CPUs"),
        (r#"{"cpu":{"quota":0,"period":100000}}"#, "quota of 0"),
        (r#"{"cpu":{"quota":1,"period":0}}"#, "periods of 0"),
    ] {
        let text = planned(resources).unwrap_err().to_string();
        assert!(text.contains(part), "{resources}: {text}");
    }
}

fn plan_of_json(json: &str) -> Result<Plan, PlanError> {
    let spec = serde_json::from_str(json).unwrap();
    plan(
        "c1",
        Path::new("/bundle"),
        &spec,
        &three_mounts(),
        HOST,
        DEFAULTS,
        |_| Found::Nothing,
    )
}

#[test]
fn plan_with_bind_of_a_bundle_file_copies_it() {
    let plan = plan_of_json(
        r#"{"ociVersion":"1.2.0","mounts":[{"destination":"/etc/hosts","type":"bind","source":"/bundle/hosts","options":["rbind","ro"]}],"annotations":{"io.casemate.user":"www-data"}}"#,
    )
    .unwrap();
    let target = "/run/casemate/c1/file0";
    assert_eq!(
        plan.inside.files,
        [CopiedFile {
            source: "/bundle/hosts".into(),
            target: target.into()
        }]
    );
    let mounts = plan.inside.guest_spec.mounts().clone().unwrap();
    assert_eq!(mounts[0].source(), &Some(target.into()));
    assert_eq!(plan.inside.user, "www-data");
}

#[test]
fn plan_with_bind_from_elsewhere_is_refused() {
    for source in ["/etc/shadow", "/bundle/../etc/shadow", "/bundleful/x", ""] {
        let json = format!(
            r#"{{"ociVersion":"1.2.0","mounts":[{{"destination":"/x","source":"{source}","options":["bind"]}}]}}"#
        );
        assert!(
            matches!(plan_of_json(&json), Err(PlanError::Bind { .. })),
            "{source}"
        );
    }
}

#[test]
fn plan_of_a_directory_shares_it() {
    let root = [mount(ROOT_SHARE, "/bundle/rootfs", &[])];
    let look = |_: &Path| Found::Nothing;
    let bundle = Path::new("/bundle");
    let plan = plan("c1", bundle, &spec("{}"), &root, HOST, DEFAULTS, look).unwrap();
    assert!(plan.disks.is_empty() && plan.is_lasting());
    assert_eq!(plan.shares[0].source, Path::new("/bundle/rootfs"));
    assert_eq!(plan.inside.mounts[0].source, plan.shares[0].tag);
    assert_eq!(plan.inside.mounts[0].target, plan.inside.rootfs);
}

#[test]
fn plan_with_odd_rootfs_is_refused() {
    for rootfs in [
        vec![],
        vec![mount("bind", "/etc", &["rbind"])],
        vec![mount("erofs", "relative", &[])],
        vec![mount(ROOT_SHARE, "relative", &[])],
        vec![mount(ROOT_SHARE, "/a", &[]), mount(ROOT_SHARE, "/b", &[])],
        vec![mount("overlay", "", &["lowerdir={{ mount 0 }}"])],
        vec![mount("overlay", "", &["lowerdir={{ mount "])],
        vec![mount("overlay", "", &["lowerdir={{ mount -1 }}"])],
        vec![mount("tmpfs", "", &[]); MAX_MOUNTS + 1],
    ] {
        assert!(
            plan(
                "c1",
                Path::new("/bundle"),
                &spec("{}"),
                &rootfs,
                HOST,
                DEFAULTS,
                |_| Found::Nothing,
            )
            .is_err(),
            "{rootfs:?}"
        );
    }
}

proptest::proptest! {
    #[test]
    fn plan_of_any_mount_never_panics(kind in "(erofs|ext4|overlay|tmpfs|.{0,8})", source in ".{0,20}", option in ".{0,40}") {
        let rootfs = [mount("tmpfs", "", &[]), mount(&kind, &source, &[&option])];
        let _ = plan("c1", Path::new("/bundle"), &spec("{}"), &rootfs, HOST, DEFAULTS, |_| Found::Nothing);
    }
}
