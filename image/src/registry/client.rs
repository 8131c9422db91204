//! One registry, or one mirror of it: manifests, documents and blob streams, with retries.
//!
//! Everything a registry or token server says is bounded in size, in silence and in slowness, error messages included.

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use oci_spec::distribution::Reference;
use reqwest::header::{ACCEPT, RANGE};
use reqwest::{RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::mpsc::Sender;

use crate::digest::Digest;
use crate::error::{Error, Result, printable};
use crate::limits::Limits;
use crate::progress::{Event, Progress};

use super::auth::{Credentials, credentials};
use super::config::RegistryConfig;
use super::pace::Pace;
use super::token::{self, Access, Challenge};

/// The first retry's delay; it doubles up to the second.
const DELAY: Duration = Duration::from_millis(300);
const DELAY_MAX: Duration = Duration::from_secs(5);
const USER_AGENT: &str = concat!("casemate/", env!("CARGO_PKG_VERSION"));

/// What registries may send for a manifest.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

/// What the errors of a manifest are told from others by: an unknown one means an unknown image.
const MANIFEST: &str = "the manifest";
const CONFIGURATION: &str = "the configuration";
/// Error messages and tokens.
const ANSWER_MAX: u64 = 64 << 10;

/// A host to ask for one repository.
pub(crate) struct Endpoint {
    http: reqwest::Client,
    /// The repository's address.
    base: Url,
    reference: Reference,
    host: String,
    credentials: Credentials,
    /// What the last answered challenge gave.
    access: Mutex<Option<Access>>,
    limits: Limits,
}

/// The error document of the distribution specification.
#[derive(Deserialize)]
struct ErrorDocument {
    errors: Vec<ErrorEntry>,
}

#[derive(Deserialize)]
struct ErrorEntry {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// A failure and whether another try may help.
pub(super) struct Failure {
    pub(super) error: Error,
    pub(super) again: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            error,
            again: false,
        }
    }
}

/// Where to ask for `reference`, in order: its registry's mirrors, then the registry.
pub(crate) async fn endpoints(
    reference: &Reference,
    config: &RegistryConfig,
    auth_file: Option<&std::path::Path>,
    limits: &Limits,
) -> Result<Vec<Endpoint>> {
    let registry = reference.registry();
    let settings = config.hosts.get(registry).cloned().unwrap_or_default();
    let mut all = Vec::new();
    for mirror in &settings.mirrors {
        let (plain, host) = match mirror.split_once("://") {
            Some(("http", host)) => (Some(true), host),
            Some(("https", host)) => (Some(false), host),
            None => (None, mirror.as_str()),
            Some(_) => {
                return Err(Error::Registry {
                    registry: registry.to_owned(),
                    message: format!("mirror {mirror:?}: write HOST[:PORT], http://… or https://…"),
                    source: None,
                });
            }
        };
        let mut mirrored = reference.clone();
        mirrored.set_mirror_registry(host.trim_end_matches('/').to_owned());
        all.push(Endpoint::new(mirrored, plain, config, auth_file, limits).await?);
    }
    all.push(Endpoint::new(reference.clone(), None, config, auth_file, limits).await?);
    Ok(all)
}

impl Endpoint {
    async fn new(
        reference: Reference,
        plain: Option<bool>,
        config: &RegistryConfig,
        auth_file: Option<&std::path::Path>,
        limits: &Limits,
    ) -> Result<Self> {
        let host = reference.resolve_registry().to_owned();
        let name = if reference.namespace().is_some() {
            &host
        } else {
            reference.registry()
        };
        let settings = config.hosts.get(name).cloned().unwrap_or_default();
        let plain = plain
            .or(settings.plain_http)
            .unwrap_or_else(|| is_loopback(&host));
        let failed = |message: String, source: Option<Box<dyn std::error::Error + Send + Sync>>| {
            Error::Registry {
                registry: host.clone(),
                message,
                source,
            }
        };
        // One provider for the process; if another part of it was faster, that one serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let timeout = Duration::from_secs(limits.stall_seconds);
        let connect_timeout = Duration::from_secs(limits.connect_seconds);
        let mut http = reqwest::Client::builder().user_agent(USER_AGENT);
        http = http.read_timeout(timeout).connect_timeout(connect_timeout);
        for path in &settings.ca_files {
            let data =
                std::fs::read(path).map_err(|e| Error::io("cannot read certificate", path, e))?;
            let parsed = reqwest::Certificate::from_pem(&data).map_err(|e| {
                failed(
                    "a certificate of ca_files is malformed".into(),
                    Some(e.into()),
                )
            })?;
            http = http.add_root_certificate(parsed);
        }
        let http = http
            .build()
            .map_err(|e| failed("cannot set up TLS".into(), Some(e.into())))?;
        let scheme = if plain { "http" } else { "https" };
        let base = format!("{scheme}://{host}/v2/{}", reference.repository());
        let mut base = Url::parse(&base)
            .map_err(|e| failed("its name gives no address".into(), Some(e.into())))?;
        // A mirror of several registries is told which one is meant, as containerd does.
        if let Some(namespace) = reference.namespace() {
            base.query_pairs_mut().append_pair("ns", namespace);
        }
        let credentials = credentials(name, reference.repository(), auth_file).await?;
        let access = match &credentials {
            Credentials::Bearer(token) => Some(Access::Bearer(token.clone())),
            _ => None,
        };
        Ok(Self {
            http,
            base,
            reference,
            host,
            credentials,
            access: Mutex::new(access),
            limits: limits.clone(),
        })
    }

    /// Host and port, for messages.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// A manifest by tag or digest, as it came, and its digest. A digest asked for is verified.
    pub(crate) async fn manifest(
        &self,
        tag_or_digest: &str,
        progress: &dyn Progress,
    ) -> Result<(Bytes, Digest)> {
        self.retry(MANIFEST, progress, || self.manifest_once(tag_or_digest))
            .await
    }

    async fn manifest_once(&self, tag_or_digest: &str) -> Result<(Bytes, Digest), Failure> {
        let path = format!("manifests/{tag_or_digest}");
        let response = self.get(&path, MANIFEST, |r| r.header(ACCEPT, MANIFEST_TYPES));
        let response = response.await?;
        if response.status() != StatusCode::OK {
            return Err(self.refusal(response, MANIFEST).await);
        }
        let limit = self.limits.document_bytes;
        let body = self.body(response, limit, MANIFEST).await?;
        let actual = Digest::of(&body);
        if tag_or_digest.contains(':') && tag_or_digest != actual.to_string() {
            return Err(Failure::from(Error::DigestMismatch {
                what: format!("manifest from {}", self.host),
                expected: tag_or_digest.to_owned(),
                actual: actual.to_string(),
            }));
        }
        Ok((body, actual))
    }

    /// A small blob, verified.
    pub(crate) async fn document(
        &self,
        digest: &Digest,
        size: u64,
        progress: &dyn Progress,
    ) -> Result<Bytes> {
        if size > self.limits.document_bytes {
            return Err(self.too_large(CONFIGURATION, self.limits.document_bytes));
        }
        let body = self
            .retry(CONFIGURATION, progress, || self.document_once(digest))
            .await?;
        let actual = Digest::of(&body);
        if actual != *digest {
            return Err(Error::DigestMismatch {
                what: format!("configuration from {}", self.host),
                expected: digest.to_string(),
                actual: actual.to_string(),
            });
        }
        Ok(body)
    }

    async fn document_once(&self, digest: &Digest) -> Result<Bytes, Failure> {
        let (_, response) = self.open(digest, 0, CONFIGURATION).await?;
        self.body(response, self.limits.document_bytes, CONFIGURATION)
            .await
    }

    /// Sends a blob's bytes to `pieces`. A broken download goes on where it broke. Errors go to `pieces` as well.
    pub(crate) async fn blob(
        &self,
        digest: &Digest,
        size: u64,
        pieces: Sender<Result<Bytes>>,
        progress: &dyn Progress,
        received: &(dyn Fn(u64) + Sync),
    ) {
        let what = format!("layer {digest}");
        let mut offset = 0;
        let mut tries = 0;
        // One measure for all tries: a byte in each of many must not do.
        let mut pace = Pace::layer(self.stall());
        loop {
            let before = offset;
            let failure = match self
                .blob_from(digest, size, &mut offset, &mut pace, &pieces, received)
                .await
            {
                Ok(()) => return,
                Err(failure) => failure,
            };
            // Progress was made: the next breakdown is a new one.
            tries = if offset > before { 1 } else { tries + 1 };
            if !failure.again || tries >= self.limits.attempts {
                let _ = pieces.send(Err(failure.error)).await;
                return;
            }
            self.pause(tries, &what, &failure.error, progress).await;
        }
    }

    async fn blob_from(
        &self,
        digest: &Digest,
        size: u64,
        offset: &mut u64,
        pace: &mut Pace,
        pieces: &Sender<Result<Bytes>>,
        received: &(dyn Fn(u64) + Sync),
    ) -> Result<(), Failure> {
        let what = &format!("layer {digest}");
        let begun = Instant::now();
        let opened = self.open(digest, *offset, what).await;
        self.keep_up(pace, begun, 0, what)?;
        let (start, mut response) = opened?;
        let mut skip = *offset - start;
        while let Some(piece) = self.next(&mut response, pace, what).await? {
            let skipped = skip.min(piece.len() as u64);
            skip -= skipped;
            let piece = piece.slice(skipped as usize..);
            *offset += piece.len() as u64;
            received(*offset);
            if !piece.is_empty() && pieces.send(Ok(piece)).await.is_err() {
                // The converter gave up, and says why.
                return Ok(());
            }
            if *offset > size {
                return Ok(());
            }
        }
        if *offset < size {
            let detail = format!("{offset} of {size} bytes came from {}", self.host);
            return Err(Failure {
                error: Error::Truncated {
                    what: what.to_owned(),
                    detail,
                },
                again: true,
            });
        }
        Ok(())
    }

    /// A blob's stream, and the offset it really starts at.
    async fn open(
        &self,
        digest: &Digest,
        offset: u64,
        what: &str,
    ) -> Result<(u64, Response), Failure> {
        let ranged = |request: RequestBuilder| match offset {
            0 => request,
            _ => request.header(RANGE, format!("bytes={offset}-")),
        };
        let response = self.get(&format!("blobs/{digest}"), what, ranged).await?;
        match response.status() {
            StatusCode::OK => Ok((0, response)),
            StatusCode::PARTIAL_CONTENT => Ok((offset, response)),
            _ => Err(self.refusal(response, what).await),
        }
    }

    /// Asks the repository; a challenge is answered once.
    async fn get(
        &self,
        path: &str,
        what: &str,
        prepare: impl Fn(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response, Failure> {
        let mut url = self.base.clone();
        url.set_path(&format!("{}/{path}", self.base.path()));
        let mut access = self.lock_access().clone();
        let mut answered = false;
        loop {
            let request = prepare(self.http.get(url.clone()));
            let request = match &access {
                Some(Access::Basic(user, password)) => request.basic_auth(user, Some(password)),
                Some(Access::Bearer(token)) => request.bearer_auth(token),
                None => request,
            };
            let response = self.send(request, what).await?;
            // Whoever the registry sends us on to may not ask for our credentials.
            let ours = response.url().origin() == self.base.origin();
            if answered || !ours || response.status() != StatusCode::UNAUTHORIZED {
                return Ok(response);
            }
            answered = true;
            let Some(fresh) = self.answer(&response).await? else {
                return Ok(response);
            };
            *self.lock_access() = Some(fresh.clone());
            access = Some(fresh);
        }
    }

    fn lock_access(&self) -> std::sync::MutexGuard<'_, Option<Access>> {
        self.access.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a challenge wants, if we have it.
    async fn answer(&self, response: &Response) -> Result<Option<Access>, Failure> {
        let (realm, service) = match (token::challenge(response.headers()), &self.credentials) {
            // It was sent and is refused.
            (None, _) | (_, Credentials::Bearer(_)) => return Ok(None),
            (Some(Challenge::Basic), Credentials::Basic(user, password)) => {
                return Ok(Some(Access::Basic(user.clone(), password.clone())));
            }
            (Some(Challenge::Basic), _) => return Ok(None),
            (Some(Challenge::Bearer { realm, service }), _) => (realm, service),
        };
        if self.credentials != Credentials::Anonymous
            && self.base.scheme() == "https"
            && realm.scheme() == "http"
        {
            return Err(Failure::from(Error::Credentials {
                registry: self.host.clone(),
                message: format!(
                    "not sent: its token server {} has no TLS",
                    printable(realm.as_str().as_bytes())
                ),
            }));
        }
        let what = &format!("a token from {}", realm.authority());
        let request = token::request(
            &self.http,
            &realm,
            service.as_deref(),
            self.reference.repository(),
            &self.credentials,
        );
        let response = self.send(request, what).await?;
        let status = response.status();
        if status != StatusCode::OK {
            let mut refusal = self.refusal(response, what).await;
            // OAuth 2 says 400 to a refresh token it doesn't know.
            if status == StatusCode::BAD_REQUEST {
                refusal = self.status(401, &refusal.error.to_string(), what);
            }
            return Err(refusal);
        }
        let body = self.body(response, ANSWER_MAX, what).await?;
        let token = token::token(&body).ok_or_else(|| Error::Registry {
            registry: self.host.clone(),
            message: format!("{what}: the answer holds none that could be used"),
            source: None,
        })?;
        Ok(Some(Access::Bearer(token)))
    }

    fn stall(&self) -> Duration {
        Duration::from_secs(self.limits.stall_seconds)
    }

    /// Sends a request; its answer's head comes in bounded time, redirections included.
    async fn send(&self, request: RequestBuilder, what: &str) -> Result<Response, Failure> {
        let limit = self.stall() + Duration::from_secs(self.limits.connect_seconds);
        tokio::time::timeout(limit, request.send())
            .await
            .map_err(|_| self.stalled(what))?
            .map_err(|e| self.failure(e, what))
    }

    async fn next(
        &self,
        response: &mut Response,
        pace: &mut Pace,
        what: &str,
    ) -> Result<Option<Bytes>, Failure> {
        let begun = Instant::now();
        let piece = tokio::time::timeout(self.stall(), response.chunk()).await;
        let length = match &piece {
            Ok(Ok(Some(piece))) => piece.len() as u64,
            _ => 0,
        };
        let ended = matches!(piece, Ok(Ok(None)));
        if !ended {
            self.keep_up(pace, begun, length, what)?;
        }
        piece
            .map_err(|_| self.stalled(what))?
            .map_err(|e| self.failure(e, what))
    }

    /// Notes what came since `begun`.
    fn keep_up(
        &self,
        pace: &mut Pace,
        begun: Instant,
        bytes: u64,
        what: &str,
    ) -> Result<(), Failure> {
        pace.note(begun.elapsed(), bytes)
            .map_err(|(bytes, seconds)| {
                let error = if bytes == 0 {
                    return self.stalled(what);
                } else {
                    Error::Slow {
                        registry: self.host.clone(),
                        what: what.to_owned(),
                        bytes,
                        seconds,
                    }
                };
                // It took long already.
                Failure::from(error)
            })
    }

    /// A small answer, whole.
    async fn body(&self, mut response: Response, limit: u64, what: &str) -> Result<Bytes, Failure> {
        let mut pace = Pace::document(self.stall());
        let mut body = Vec::new();
        while let Some(piece) = self.next(&mut response, &mut pace, what).await? {
            if (body.len() + piece.len()) as u64 > limit {
                return Err(self.too_large(what, limit).into());
            }
            body.extend_from_slice(&piece);
        }
        Ok(body.into())
    }

    async fn retry<T, F: Future<Output = Result<T, Failure>>>(
        &self,
        what: &str,
        progress: &dyn Progress,
        run: impl Fn() -> F,
    ) -> Result<T> {
        let mut tries = 0;
        loop {
            match run().await {
                Ok(value) => return Ok(value),
                Err(failure) if failure.again && tries + 1 < self.limits.attempts => {
                    tries += 1;
                    self.pause(tries, what, &failure.error, progress).await;
                }
                Err(failure) => return Err(failure.error),
            }
        }
    }

    async fn pause(&self, tries: u32, what: &str, error: &Error, progress: &dyn Progress) {
        let delay = (DELAY * 2u32.saturating_pow(tries.saturating_sub(1).min(16))).min(DELAY_MAX);
        let reason = error.to_string();
        progress.event(Event::Retrying {
            what,
            reason: &reason,
            delay_ms: delay.as_millis() as u64,
        });
        tokio::time::sleep(delay).await;
    }

    fn too_large(&self, what: &str, limit: u64) -> Error {
        let what = format!("{what} from {}", self.host);
        if limit != self.limits.document_bytes {
            let reason = format!("more than {limit} bytes");
            return Error::BadDocument { what, reason };
        }
        Error::Limit {
            what,
            limit,
            unit: "bytes",
            key: "document_bytes",
        }
    }

    fn stalled(&self, what: &str) -> Failure {
        let error = Error::Stalled {
            registry: self.host.clone(),
            what: what.to_owned(),
            seconds: self.limits.stall_seconds,
        };
        Failure { error, again: true }
    }

    /// What an answer other than the one asked for means.
    async fn refusal(&self, response: Response, what: &str) -> Failure {
        let status = response.status().as_u16();
        // The status says enough if the rest doesn't come.
        let body = self
            .body(response, ANSWER_MAX, what)
            .await
            .unwrap_or_default();
        let Ok(ErrorDocument { errors }) = serde_json::from_slice(&body) else {
            return self.status(status, String::from_utf8_lossy(&body).trim(), what);
        };
        let has = |codes: &[&str]| errors.iter().any(|e| codes.contains(&e.code.as_str()));
        let status = if has(&["MANIFEST_UNKNOWN", "NAME_UNKNOWN", "NOT_FOUND"]) {
            404
        } else if has(&["DENIED", "UNAUTHORIZED"]) {
            403
        } else if has(&["TOOMANYREQUESTS"]) {
            429
        } else {
            status
        };
        let messages: Vec<&str> = errors.iter().map(|e| e.message.as_str()).collect();
        self.status(status, &messages.join("; "), what)
    }

    /// What an HTTP status means.
    fn status(&self, status: u16, message: &str, what: &str) -> Failure {
        let reference = self.reference.whole();
        let registry = self.host.clone();
        let message = printable(message.as_bytes());
        let error = match status {
            401 | 403 => Error::Unauthorized {
                reference,
                registry,
                message,
            },
            404 if what == MANIFEST => Error::UnknownImage {
                reference,
                registry,
            },
            _ => Error::Registry {
                registry,
                message: format!("cannot fetch {what}: HTTP status {status}: {message}"),
                source: None,
            },
        };
        Failure {
            error,
            again: status == 408 || status == 429 || status >= 500,
        }
    }

    fn failure(&self, e: reqwest::Error, what: &str) -> Failure {
        if e.is_timeout() && !e.is_connect() {
            return self.stalled(what);
        }
        let message = if e.is_connect() {
            "cannot connect; check its name, its port and the network".to_owned()
        } else if e.is_body() || e.is_decode() {
            format!("the connection broke while fetching {what}")
        } else {
            format!("cannot fetch {what}")
        };
        let again = e.is_connect() || e.is_body() || e.is_request() || e.is_decode();
        let error = Error::Registry {
            registry: self.host.clone(),
            message,
            // Addresses that registries redirect to hold signatures.
            source: Some(e.without_url().into()),
        };
        Failure { error, again }
    }
}

/// Registries on this machine seldom have certificates.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name == "localhost"
        || name
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_loopback_only_for_this_machine() {
        for host in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:5000",
            "127.9.9.9",
            "[::1]:5000",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "example.com",
            "10.0.0.1:5000",
            "localhost.example.com",
            "[2001:db8::1]:5000",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
