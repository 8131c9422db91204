//! Registries, token servers and archives that mean ill: what they say is shown escaped, and what they send is bounded.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::images::{Blobs, Packing, layer, noise};
use crate::common::server::{Fault, Server};
use crate::common::{runtime, stored};
use casemate_image::{
    Error, Image, Limits, LoadOptions, LoadSource, PullOptions, PullPolicy, Result, Store,
    parse_reference,
};
use serde_json::{Value, json};

/// A title for the terminal, C1's and a turn of direction.
const EVIL: &str = "\x1b]0;x\x07\u{9b}2J\u{202e}";
const SHOWN: &str = r"\u001b]0;x\u0007\u009b2J\u202e";

fn pull(data: &Path, name: &str, auth: Option<&Value>) -> Result<Image> {
    let limits = Limits {
        stall_seconds: 1,
        connect_seconds: 1,
        attempts: 2,
        ..Limits::default()
    };
    let file = data.join("auth.json");
    std::fs::write(&file, auth.unwrap_or(&json!({})).to_string()).unwrap();
    let options = PullOptions {
        limits,
        policy: PullPolicy::Always,
        auth_file: Some(file),
        ..PullOptions::default()
    };
    runtime().block_on(Store::open(data)?.pull(&parse_reference(name)?, &options))
}

fn small() -> Blobs {
    Blobs::image(&[layer(&[("a", &noise(1, 100_000))])], Packing::Gzip)
}

/// The error and its causes.
fn whole(error: &Error) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        text += &format!(": {cause}");
        next = cause.source();
    }
    text
}

#[test]
fn pull_error_body_with_escapes_is_shown_escaped() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start();
    let image = small();
    let name = server.add("x", &image);
    let document = json!({"errors": [{"code": "UNKNOWN", "message": EVIL}]}).to_string();
    for (what, status, body) in [
        ("x", 400, EVIL.to_owned()),
        ("x", 403, EVIL.to_owned()),
        ("x", 401, document.clone()),
        ("x", 418, document.clone()),
        (image.layers[0].as_str(), 404, document.clone()),
        (image.config.as_str(), 403, document),
    ] {
        server.mend();
        server.fault(what, Fault::Say(status, body));
        let text = whole(&pull(data.path(), &name, None).unwrap_err());
        assert!(text.contains(SHOWN), "{status}: {text:?}");
        assert!(!text.contains(char::is_control), "{status}: {text:?}");
    }
}

#[test]
fn pull_platform_with_escapes_is_shown_escaped() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start();
    let platform = json!({"os": "linux", "architecture": EVIL});
    let index = Blobs::index(&[(small(), platform.clone())]);
    let single = Blobs::image_with(&[layer(&[("a", b"1")])], Packing::Gzip, &platform);
    for image in [&index, &single] {
        let error = pull(data.path(), &server.add("x", image), None).unwrap_err();
        assert!(matches!(error, Error::NoPlatform { .. }), "{error:?}");
        assert!(error.to_string().contains(SHOWN), "{error}");
    }
}

#[test]
fn pull_a_byte_at_a_time_ends_with_a_clear_error() {
    let server = Server::start();
    let image = small();
    let name = server.add("x", &image);
    for what in ["x", &image.config, &image.layers[0]] {
        let data = tempfile::tempdir().unwrap();
        server.mend();
        server.fault(what, Fault::Drip(100));
        let start = Instant::now();
        let error = pull(data.path(), &name, None).unwrap_err();
        assert!(matches!(error, Error::Slow { .. }), "{what}: {error:?}");
        assert!(error.to_string().contains("too slow"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(30));
        assert_eq!(stored(data.path(), "tmp"), [""; 0]);
    }
}

#[test]
fn pull_identity_token_is_exchanged_for_an_access_token() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start();
    let name = server.add("x", &small());
    server.protect_by_refresh_token("r3fresh");
    let auth = |token: &str| json!({"auths": {&server.address: {"identitytoken": token}}});
    pull(data.path(), &name, Some(&auth("r3fresh"))).unwrap();
    let asked = server.asked();
    assert_eq!(asked.len(), 1, "one token does for all: {asked:?}");
    for part in [
        "grant_type=refresh_token",
        "service=test",
        "client_id=casemate",
        "scope=repository%3Aapp%3Apull",
    ] {
        assert!(asked[0].contains(part), "{part}: {asked:?}");
    }
    let error = pull(data.path(), &name, Some(&auth("wr0ng"))).unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
    assert!(!whole(&error).contains("wr0ng"));
}

#[test]
fn pull_token_answer_that_is_hostile_is_refused() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start();
    let name = server.add("x", &small());
    server.protect_by_refresh_token("r3fresh");
    let auth = json!({"auths": {&server.address: {"identitytoken": "r3fresh"}}});
    for (status, answer, part) in [
        (200, vec![b' '; 1 << 20], "more than 65536 bytes"),
        (
            200,
            br#"{"access_token":"a\r\nX: s3cret"}"#.to_vec(),
            "could be used",
        ),
        (200, b"s3cret".to_vec(), "could be used"),
        (403, EVIL.as_bytes().to_vec(), SHOWN),
        (403, vec![b'x'; 64 << 20], "refuses access"),
    ] {
        server.answer_refresh_token("r3fresh", status, &answer);
        let text = whole(&pull(data.path(), &name, Some(&auth)).unwrap_err());
        assert!(text.contains(part) && !text.contains("s3cret"), "{text}");
    }
}

#[test]
fn pull_redirected_challenge_gets_no_credentials() {
    let data = tempfile::tempdir().unwrap();
    let (server, thief) = (Server::start(), Server::start());
    let image = small();
    let name = server.add("x", &image);
    let there = format!("http://{}/v2/app/blobs/loot", thief.address);
    server.fault(&image.config, Fault::Redirect(there));
    thief.protect_by_refresh_token("r3fresh");
    let auth = json!({"auths": {&server.address: {"identitytoken": "r3fresh"}}});
    assert!(pull(data.path(), &name, Some(&auth)).is_err());
    assert_eq!(thief.requests("blobs/loot"), 1);
    assert_eq!(thief.asked(), [""; 0]);
}

const CHILD: &str = "CASEMATE_TEST_HELPER_NAME";

/// Not a test of its own: a pull whose PATH has a helper.
#[test]
fn child_pull_with_helper() {
    if let (Ok(name), Some(data)) = (std::env::var(CHILD), std::env::var_os("DATA")) {
        let host = name.split('/').next().unwrap();
        let auth = json!({"credHelpers": {host: "x"}});
        let pulled = pull(Path::new(&data), &name, Some(&auth));
        println!("RESULT {:?}", pulled.map(|_| ()).map_err(|e| whole(&e)));
    }
}

#[test]
fn pull_with_a_helper_on_the_path() {
    use std::os::unix::fs::PermissionsExt as _;
    let server = Server::start();
    let name = server.add("x", &small());
    server.protect_by_refresh_token("r3fresh");
    for (script, part) in [
        (
            r#"echo '{"Username":"<token>","Secret":"r3fresh"}'"#,
            "Ok(())",
        ),
        (
            "echo credentials not found in native keychain; exit 1",
            "refuses access",
        ),
        ("echo r3fresh", "no JSON"),
        ("exec yes r3fresh", "more than 65536 bytes"),
    ] {
        let data = tempfile::tempdir().unwrap();
        let helper = data.path().join("docker-credential-x");
        std::fs::write(&helper, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = std::env::var("PATH").unwrap();
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "hostile::child_pull_with_helper", "--nocapture"])
            .env("PATH", format!("{}:{path}", data.path().display()))
            .env("DATA", data.path())
            .env(CHILD, &name)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            text.contains(part) && !text.contains("r3fresh"),
            "{script}: {text}"
        );
    }
}

#[test]
fn load_of_a_compressed_bomb_stops_at_the_ratio() {
    let data = tempfile::tempdir().unwrap();
    let store = Store::open(data.path()).unwrap();
    let bomb = data.path().join("bomb.tar.zst");
    let mut encoder = zstd::Encoder::new(std::fs::File::create(&bomb).unwrap(), 1).unwrap();
    let zeros = std::io::Read::take(std::io::repeat(0), (1 << 30) + (8 << 20));
    std::io::copy(
        &mut std::io::BufReader::with_capacity(1 << 20, zeros),
        &mut encoder,
    )
    .unwrap();
    encoder.finish().unwrap();
    let options = LoadOptions::default();
    let load = store.load(LoadSource::Path(&bomb), &options);
    let error = runtime().block_on(load).unwrap_err();
    assert!(error.to_string().contains("layer_ratio"), "{error}");
    assert_eq!(stored(data.path(), "tmp"), [""; 0]);
}
