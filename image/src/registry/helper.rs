//! Credential helpers: programs that keep passwords. What one prints may hold a secret, so no message repeats it.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};

use crate::error::{Error, Result, printable};

use super::auth::Credentials;

/// A helper may ask a keyring, but not for ever.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The longest tokens seen (of cloud registries) have some 5 KiB.
const OUTPUT_MAX: u64 = 64 << 10;
/// What helpers print (on standard output) if they have nothing.
const NOT_FOUND: &[u8] = b"credentials not found";

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "Username")]
    username: String,
    #[serde(rename = "Secret")]
    secret: String,
}

/// Asks `docker-credential-HELPER` for what it keeps under `key`. `None`: nothing.
pub(super) async fn ask(helper: &str, key: &str, registry: &str) -> Result<Option<Credentials>> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    if !helper.bytes().all(plain) {
        return Err(Error::Credentials {
            registry: registry.to_owned(),
            message: format!("{helper:?} is not the name of a credential helper"),
        });
    }
    let program = format!("docker-credential-{helper}");
    ask_program(Path::new(&program), key, registry, TIMEOUT).await
}

async fn ask_program(
    program: &Path,
    key: &str,
    registry: &str,
    timeout: Duration,
) -> Result<Option<Credentials>> {
    let failed = |message: String| Error::Credentials {
        registry: registry.to_owned(),
        message: format!("{}: {message}", program.display()),
    };
    let mut child = tokio::process::Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| failed(format!("cannot be run: {e}")))?;
    let streams = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (Some(mut stdin), Some(stdout), Some(stderr)) = streams else {
        return Err(failed("it has no streams".into()));
    };
    let ask = async move {
        // A helper that doesn't read fails on its own.
        let _ = stdin.write_all(key.as_bytes()).await;
    };
    let talk = async { tokio::join!(ask, bounded(stdout), bounded(stderr), child.wait()) };
    let Ok(((), said, complained, status)) = tokio::time::timeout(timeout, talk).await else {
        // Dead before we go on: it may hold a keyring's lock.
        let _ = child.kill().await;
        let seconds = timeout.as_secs();
        return Err(failed(format!(
            "no answer within {seconds} s, so it was stopped"
        )));
    };
    let status = status.map_err(|e| failed(e.to_string()))?;
    if said.len() as u64 > OUTPUT_MAX {
        return Err(failed(format!(
            "its answer has more than {OUTPUT_MAX} bytes"
        )));
    }
    if !status.success() {
        let found_nothing = |text: &[u8]| text.windows(NOT_FOUND.len()).any(|w| w == NOT_FOUND);
        if found_nothing(&said) || found_nothing(&complained) {
            return Ok(None);
        }
        return Err(failed(match complained.trim_ascii() {
            b"" => status.to_string(),
            words => format!("{status}: {}", printable(words)),
        }));
    }
    let answer: Answer = serde_json::from_slice(&said)
        .map_err(|_| failed("its answer is no JSON with Username and Secret".into()))?;
    Ok(Some(match answer.username.as_str() {
        "<token>" => Credentials::Refresh(answer.secret),
        "" => Credentials::Bearer(answer.secret),
        _ => Credentials::Basic(answer.username, answer.secret),
    }))
}

/// What a stream has, and a byte more if that is too much. Closing it then ends its writer.
async fn bounded(stream: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut bytes = Vec::new();
    // What a broken pipe cut short isn't JSON.
    let _ = stream.take(OUTPUT_MAX + 1).read_to_end(&mut bytes).await;
    bytes
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::time::Instant;

    use super::*;

    /// Asks a helper that is this script.
    async fn ask_script(script: &str) -> Result<Option<Credentials>> {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("docker-credential-x");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        loop {
            let answer = ask_program(&program, "r.io", "r.io", Duration::from_secs(2)).await;
            // Another test's fork may hold the script open for writing for a moment.
            match answer {
                Err(e) if e.to_string().contains("busy") => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                answer => return answer,
            }
        }
    }

    #[tokio::test]
    async fn ask_password_and_both_kinds_of_tokens_are_told_apart() {
        for (user, expected) in [
            ("me", Credentials::Basic("me".into(), "s3cret".into())),
            ("<token>", Credentials::Refresh("s3cret".into())),
            ("", Credentials::Bearer("s3cret".into())),
        ] {
            let script = format!(
                r#"[ "$1 $(cat)" = "get r.io" ] && echo '{{"Username":"{user}","Secret":"s3cret"}}'"#
            );
            assert!(
                ask_script(&script).await.unwrap() == Some(expected),
                "{user}"
            );
        }
    }

    #[tokio::test]
    async fn ask_not_found_is_none_wherever_it_is_said() {
        for stream in ["", " >&2"] {
            let script = format!("echo credentials not found in native keychain{stream}; exit 1");
            assert!(ask_script(&script).await.unwrap().is_none());
        }
    }

    #[tokio::test]
    async fn ask_failing_or_babbling_helper_is_an_error_without_its_output() {
        for (script, part) in [
            (
                "echo s3cret; echo 'no \x1bkeyring' >&2; exit 3",
                r"no \u001bkeyring",
            ),
            ("echo s3cret; exit 3", "exit status: 3"),
            ("echo s3cret", "no JSON"),
            (
                r#"echo '{"Username":"me","Secret":{"s3cret":1}}'"#,
                "no JSON",
            ),
            (r#"echo '"s3cret"'"#, "no JSON"),
            ("true", "no JSON"),
            ("kill -9 $$", "signal"),
        ] {
            let error = ask_script(script).await.unwrap_err().to_string();
            assert!(
                error.contains(part) && error.contains("r.io") && !error.contains("s3cret"),
                "{script}: {error}"
            );
        }
    }

    #[tokio::test]
    async fn ask_huge_output_is_cut_off() {
        for stream in ["", " >&2"] {
            let start = Instant::now();
            let error = ask_script(&format!("yes s3cret{stream}"))
                .await
                .unwrap_err();
            assert!(!error.to_string().contains("has more") || stream.is_empty());
            assert!(start.elapsed() < Duration::from_secs(20));
        }
    }

    #[tokio::test]
    async fn ask_hanging_helper_is_killed_in_bounded_time() {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let start = Instant::now();
        let script = format!("echo $$ > {}; exec sleep 600", pid.display());
        let error = ask_script(&script).await.unwrap_err().to_string();
        assert!(error.contains("no answer within 2 s"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(20));
        let pid = std::fs::read_to_string(pid).unwrap();
        assert!(
            !Path::new("/proc").join(pid.trim()).exists(),
            "it still runs"
        );
    }
}
