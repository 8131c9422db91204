//! Credentials: Docker's and Podman's auth files, and the credential helpers they name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result};

use super::helper;

/// The key under which Docker keeps its own registry.
const DOCKER_KEYS: [&str; 4] = [
    "https://index.docker.io/v1/",
    "docker.io",
    "index.docker.io",
    "registry-1.docker.io",
];

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AuthFile {
    auths: BTreeMap<String, AuthEntry>,
    #[serde(rename = "credsStore")]
    store: Option<String>,
    #[serde(rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AuthEntry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    #[serde(rename = "identitytoken")]
    identity_token: Option<String>,
    #[serde(rename = "registrytoken")]
    registry_token: Option<String>,
}

/// What to answer a registry's challenge with.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    Anonymous,
    Basic(String, String),
    /// An identity token: the token server gives access tokens for it.
    Refresh(String),
    /// A token for the registry itself, as it is.
    Bearer(String),
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Basic(..) => "Basic(…)",
            Self::Refresh(_) => "Refresh(…)",
            Self::Bearer(_) => "Bearer(…)",
        })
    }
}

/// Credentials for `repository` on `registry`; anonymous where no file has any.
pub(super) async fn credentials(
    registry: &str,
    repository: &str,
    file: Option<&Path>,
) -> Result<Credentials> {
    let files = match file {
        Some(file) => vec![file.to_owned()],
        None => usual_files(),
    };
    for path in files {
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && file.is_none() => continue,
            Err(e) => return Err(Error::io("cannot read credentials", &path, e)),
        };
        // The parser's words may quote a password; its place in the file tells enough.
        let parsed: AuthFile = serde_json::from_slice(&bytes).map_err(|e| Error::Credentials {
            registry: registry.to_owned(),
            message: format!("{} is malformed at line {}", path.display(), e.line()),
        })?;
        if let Some(found) = parsed.find(registry, repository).await? {
            return Ok(found);
        }
    }
    Ok(Credentials::Anonymous)
}

/// Podman's places, then Docker's.
fn usual_files() -> Vec<PathBuf> {
    let variable = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    if let Some(file) = variable("REGISTRY_AUTH_FILE") {
        return vec![file];
    }
    let home = variable("HOME");
    let config = variable("XDG_CONFIG_HOME").or(home.as_ref().map(|home| home.join(".config")));
    let docker = variable("DOCKER_CONFIG").or(home.map(|home| home.join(".docker")));
    [
        variable("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")),
        config.map(|dir| dir.join("containers/auth.json")),
        docker.map(|dir| dir.join("config.json")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Keys that stand for a repository, the most specific first.
fn keys(registry: &str, repository: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut path = format!("{registry}/{repository}");
    while let Some((shorter, _)) = path.rsplit_once('/') {
        keys.push(path.clone());
        path = shorter.to_owned();
    }
    keys.push(registry.to_owned());
    keys.extend([
        format!("https://{registry}"),
        format!("http://{registry}"),
        format!("https://{registry}/v1/"),
    ]);
    keys.extend([
        format!("https://{registry}/"),
        format!("http://{registry}/"),
        format!("https://{registry}/v2/"),
    ]);
    if DOCKER_KEYS.contains(&registry) {
        keys.extend(DOCKER_KEYS.map(str::to_owned));
    }
    keys
}

impl AuthFile {
    async fn find(&self, registry: &str, repository: &str) -> Result<Option<Credentials>> {
        let keys = keys(registry, repository);
        if let Some((key, helper)) = keys
            .iter()
            .find_map(|key| Some((key, self.helpers.get(key)?)))
            && let Some(found) = helper::ask(helper, key, registry).await?
        {
            return Ok(Some(found));
        }
        for key in &keys {
            if let Some(found) = self
                .auths
                .get(key)
                .map(|entry| entry.credentials(registry))
                .transpose()?
                .flatten()
            {
                return Ok(Some(found));
            }
        }
        let Some(store) = self.store.as_ref().filter(|store| !store.is_empty()) else {
            return Ok(None);
        };
        let key = if DOCKER_KEYS.contains(&registry) {
            DOCKER_KEYS[0]
        } else {
            registry
        };
        helper::ask(store, key, registry).await
    }
}

impl AuthEntry {
    fn credentials(&self, registry: &str) -> Result<Option<Credentials>> {
        let given = |token: &Option<String>| token.clone().filter(|token| !token.is_empty());
        if let Some(token) = given(&self.registry_token) {
            return Ok(Some(Credentials::Bearer(token)));
        }
        if let Some(token) = given(&self.identity_token) {
            return Ok(Some(Credentials::Refresh(token)));
        }
        if let (Some(user), Some(password)) = (&self.username, &self.password)
            && !user.is_empty()
        {
            return Ok(Some(Credentials::Basic(user.clone(), password.clone())));
        }
        // With a credential store the entry is there but empty.
        let Some(encoded) = self.auth.as_ref().filter(|encoded| !encoded.is_empty()) else {
            return Ok(None);
        };
        let decoded =
            crate::tar::base64(encoded.as_bytes()).and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = decoded.as_deref().and_then(|text| text.split_once(':'));
        let (user, password) = pair.ok_or_else(|| Error::Credentials {
            registry: registry.to_owned(),
            message: "the auth file's entry is not base 64 of USER:PASSWORD; log in again".into(),
        })?;
        Ok(Some(Credentials::Basic(
            user.to_owned(),
            password.trim_end_matches('\0').to_owned(),
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn find(json: &str, registry: &str, repository: &str) -> Result<Option<Credentials>> {
        serde_json::from_str::<AuthFile>(json)
            .unwrap()
            .find(registry, repository)
            .await
    }

    #[tokio::test]
    async fn auths_most_specific_key_wins() {
        let json = r#"{"auths":{"r.io":{"auth":"YTpi"},"r.io/team":{"auth":"Yzpk"}}}"#;
        let found = find(json, "r.io", "team/app").await.unwrap().unwrap();
        assert!(found == Credentials::Basic("c".into(), "d".into()));
        let found = find(json, "r.io", "other").await.unwrap().unwrap();
        assert!(found == Credentials::Basic("a".into(), "b".into()));
        assert!(find(json, "other.io", "x").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn auths_docker_hub_has_an_odd_key() {
        let json = r#"{"auths":{"https://index.docker.io/v1/":{"auth":"YTpi"}}}"#;
        assert!(
            find(json, "docker.io", "library/debian")
                .await
                .unwrap()
                .is_some()
        );
    }

    #[tokio::test]
    async fn auths_malformed_is_an_error_without_the_secret() {
        let json = r#"{"auths":{"r.io":{"auth":"c2VjcmV0"}}}"#;
        let error = find(json, "r.io", "x").await.unwrap_err().to_string();
        assert!(!error.contains("c2VjcmV0") && error.contains("r.io"));
    }

    #[tokio::test]
    async fn auths_tokens_are_told_apart() {
        for (json, expected) in [
            (
                r#"{"auths":{"r.io":{"auth":"YTo=","identitytoken":"t"}}}"#,
                Credentials::Refresh("t".into()),
            ),
            (
                r#"{"auths":{"r.io":{"registrytoken":"t","identitytoken":""}}}"#,
                Credentials::Bearer("t".into()),
            ),
        ] {
            assert!(find(json, "r.io", "x").await.unwrap() == Some(expected));
        }
    }

    #[tokio::test]
    async fn credentials_of_a_malformed_file_is_an_error_without_the_secret() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"{"auths":{"r.io":"s3cret"}}"#).unwrap();
        let error = credentials("r.io", "x", Some(file.path())).await;
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("line 1") && !error.contains("s3cret"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn helper_with_a_path_is_refused() {
        let json = r#"{"credHelpers":{"r.io":"../../bin/sh"}}"#;
        assert!(find(json, "r.io", "x").await.is_err());
    }
}
