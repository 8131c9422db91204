//! Hostile and broken specs must be refused with a reason and never panic.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn spec() -> serde_json::Value {
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs"},
        "process": {"cwd": "/", "args": ["/bin/true"], "user": {"uid": 0, "gid": 0}},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "uts"}]},
    })
}

fn check(spec: &serde_json::Value) -> Result<()> {
    check_spec("c1", spec.to_string().as_bytes())
}

#[test]
fn check_spec_plain_spec_passes() {
    check(&spec()).unwrap();
}

#[test]
fn check_spec_what_a_guest_lacks_is_refused() {
    for (path, value, word) in [
        ("/linux/intelRdt", json!({"closID": "x"}), "intelRdt"),
        ("/linux/mountLabel", json!("x"), "mountLabel"),
        (
            "/linux/netDevices",
            json!({"eth0": {"name": "x"}}),
            "netDevices",
        ),
        ("/linux/rootfsPropagation", json!("sideways"), "sideways"),
        (
            "/hooks",
            json!({"startContainer": [{"path": "/x"}]}),
            "startContainer",
        ),
        (
            "/linux/timeOffsets",
            json!({"monotonic": {"secs": 1}}),
            "time namespace",
        ),
    ] {
        let mut spec = spec();
        let (parent, key) = path.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[key] = value;
        let error = check(&spec).unwrap_err();
        assert!(error.text.contains(word), "{path}: {error}");
    }
}

#[test]
fn check_spec_hostname_without_uts_namespace_is_refused() {
    let mut spec = spec();
    spec["hostname"] = json!("x");
    check(&spec).unwrap();
    spec["linux"]["namespaces"] = json!([{"type": "mount"}]);
    assert!(check(&spec).unwrap_err().text.contains("hostname"));
}

#[test]
fn check_id_only_plain_names_pass() {
    assert!(check_id("a-b_c.d+e0").is_ok());
    for bad in ["", ".", "..", "a/b", "a\0", "ä", &"x".repeat(129)] {
        assert!(check_id(bad).is_err(), "{bad:?}");
    }
}

/// Any JSON, with the words of the spec often in the right places.
fn any_json() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(json!(null)),
        any::<bool>().prop_map(|b| json!(b)),
        any::<i64>().prop_map(|n| json!(n)),
        "[a-zA-Z/_:.]{0,12}".prop_map(|s| json!(s)),
        prop::sample::select(vec![
            "mount",
            "pid",
            "SCMP_ACT_ERRNO",
            "CAP_KILL",
            "/proc",
            "bind",
            "RLIMIT_CPU"
        ])
        .prop_map(|s| json!(s)),
    ];
    let key = prop::sample::select(vec![
        "process",
        "args",
        "cwd",
        "user",
        "uid",
        "gid",
        "linux",
        "namespaces",
        "type",
        "path",
        "mounts",
        "destination",
        "options",
        "seccomp",
        "defaultAction",
        "syscalls",
        "names",
        "action",
        "resources",
        "devices",
        "memory",
        "limit",
        "sysctl",
        "rlimits",
        "capabilities",
        "bounding",
    ]);
    leaf.prop_recursive(5, 64, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(|v| json!(v)),
            prop::collection::hash_map(key.clone(), inner, 0..6).prop_map(|m| json!(m)),
        ]
    })
}

proptest! {
    #[test]
    fn check_spec_any_bytes_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = check_spec("c1", &bytes);
        let _ = check_process(&bytes);
    }

    #[test]
    fn check_spec_any_json_never_panics(value in any_json()) {
        let _ = check(&value);
        let _ = check_process(value.to_string().as_bytes());
    }

    #[test]
    fn check_spec_plain_spec_with_one_value_replaced_never_panics(
        value in any_json(),
        path in prop::sample::select(vec!["/process", "/mounts", "/mounts/0", "/mounts/0/options", "/linux", "/linux/namespaces", "/root", "/process/user"]),
    ) {
        let mut spec = spec();
        if let Some(place) = spec.pointer_mut(path) {
            *place = value;
        }
        let _ = check(&spec);
    }
}
