//! `-info`: what this runtime can do, as containerd asks it (`containerd/types/introspection.proto`, and the
//! runtime specification's features.md).

use anyhow::Context;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message;
use serde_json::{Value, json};

const NAME: &str = "io.containerd.casemate.v2";
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
/// Kinds of mounts of a root that containerd hands on as they are: the guest does them.
const ALLOWED_MOUNTS: [(&str, &str); 1] = [(
    "containerd.io/runtime-allow-mounts",
    "erofs,format/overlay,format/mkdir/overlay",
)];

/// What is to be printed: a `RuntimeInfo`.
pub(super) fn info() -> anyhow::Result<Vec<u8>> {
    let version = RuntimeVersion {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..Default::default()
    };
    let features = Any {
        type_url: FEATURES.to_owned(),
        value: features().to_string().into_bytes(),
        ..Default::default()
    };
    let annotations = ALLOWED_MOUNTS.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let info = RuntimeInfo {
        name: NAME.to_owned(),
        version: Some(version).into(),
        features: Some(features).into(),
        annotations: annotations.into(),
        ..Default::default()
    };
    info.write_to_bytes().context("can't write the answer")
}

/// What the agent applies in the guest; see its `container` and `seccomp`.
fn features() -> Value {
    let mount_options = "async atime bind defaults dev diratime dirsync exec lazytime loud noatime nodev nodiratime noexec \
        nolazytime norelatime nostrictatime nosuid nosymfollow private ratime rbind rdev rdiratime relatime rexec rnoatime \
        rnodev rnodiratime rnoexec rnorelatime rnostrictatime rnosuid rnosymfollow ro rprivate rrelatime rro rrw rshared \
        rslave rstrictatime rsuid rsymfollow runbindable rw shared silent slave strictatime suid symfollow sync tmpcopyup unbindable";
    let words =
        |text: &str| -> Vec<String> { text.split_whitespace().map(str::to_owned).collect() };
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "hooks": [],
        "mountOptions": words(mount_options),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": words("SCMP_ACT_ALLOW SCMP_ACT_ERRNO SCMP_ACT_KILL SCMP_ACT_KILL_PROCESS SCMP_ACT_KILL_THREAD SCMP_ACT_LOG SCMP_ACT_TRACE SCMP_ACT_TRAP"),
                "operators": words("SCMP_CMP_EQ SCMP_CMP_GE SCMP_CMP_GT SCMP_CMP_LE SCMP_CMP_LT SCMP_CMP_MASKED_EQ SCMP_CMP_NE"),
                "archs": words("SCMP_ARCH_X86_64 SCMP_ARCH_X86 SCMP_ARCH_X32"),
                "knownFlags": words("SECCOMP_FILTER_FLAG_TSYNC SECCOMP_FILTER_FLAG_LOG SECCOMP_FILTER_FLAG_SPEC_ALLOW"),
                "supportedFlags": words("SECCOMP_FILTER_FLAG_TSYNC SECCOMP_FILTER_FLAG_LOG SECCOMP_FILTER_FLAG_SPEC_ALLOW"),
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": false}},
        },
        "annotations": {"casemate.version": env!("CARGO_PKG_VERSION")},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_is_what_containerd_reads() {
        let info = RuntimeInfo::parse_from_bytes(&info().unwrap()).unwrap();
        assert_eq!(info.name, NAME);
        assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
        assert!(info.annotations["containerd.io/runtime-allow-mounts"].contains("erofs"));
        // As containerd decodes it.
        let features: oci_spec::runtime::Features =
            serde_json::from_slice(&info.features.value).unwrap();
        assert!(
            features
                .mount_options()
                .as_ref()
                .unwrap()
                .iter()
                .any(|option| option == "rro")
        );
        assert_eq!(info.features.type_url, FEATURES);
    }
}
