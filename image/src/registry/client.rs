//! One registry, or one mirror of it: manifests, documents and blob streams, with retries.

use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use oci_client::client::{
    BlobResponse, Certificate, CertificateEncoding, ClientConfig, ClientProtocol,
};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use tokio::sync::mpsc::Sender;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::progress::{Event, Progress};

use super::auth::credentials;
use super::config::RegistryConfig;

/// The first retry's delay; it doubles up to the second.
const DELAY: Duration = Duration::from_millis(300);
const DELAY_MAX: Duration = Duration::from_secs(5);
const USER_AGENT: &str = concat!("casemate/", env!("CARGO_PKG_VERSION"));

/// What registries may send for a manifest.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

/// A host to ask for one repository.
pub(crate) struct Endpoint {
    client: Client,
    /// For what oci-client has no bound on.
    http: reqwest::Client,
    base: String,
    reference: Reference,
    host: String,
    auth: RegistryAuth,
    limits: Limits,
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
        let mut certificates = Vec::new();
        for path in &settings.ca_files {
            let data =
                std::fs::read(path).map_err(|e| Error::io("cannot read certificate", path, e))?;
            certificates.push(Certificate {
                encoding: CertificateEncoding::Pem,
                data,
            });
        }
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
        for certificate in &certificates {
            let parsed = reqwest::Certificate::from_pem(&certificate.data).map_err(|e| {
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
        let client = Client::try_from(ClientConfig {
            protocol: if plain {
                ClientProtocol::Http
            } else {
                ClientProtocol::Https
            },
            extra_root_certificates: certificates,
            read_timeout: Some(timeout),
            connect_timeout: Some(connect_timeout),
            user_agent: USER_AGENT,
            ..ClientConfig::default()
        })
        .map_err(|e| failed("cannot set up TLS".into(), Some(e.into())))?;
        let auth = credentials(name, reference.repository(), auth_file).await?;
        client.store_auth_if_needed(&host, &auth).await;
        let scheme = if plain { "http" } else { "https" };
        let base = format!("{scheme}://{host}/v2/{}", reference.repository());
        Ok(Self {
            client,
            http,
            base,
            reference,
            host,
            auth,
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
        self.retry("the manifest", progress, || {
            self.manifest_once(tag_or_digest)
        })
        .await
    }

    async fn manifest_once(&self, tag_or_digest: &str) -> Result<(Bytes, Digest), Failure> {
        let token = self
            .client
            .auth(&self.reference, &self.auth, RegistryOperation::Pull)
            .await
            .map_err(|e| self.failure(e, "the manifest"))?;
        // A mirror of several registries is told which one is meant, as containerd does.
        let namespace = self
            .reference
            .namespace()
            .map(|name| format!("?ns={name}"))
            .unwrap_or_default();
        let url = format!("{}/manifests/{tag_or_digest}{namespace}", self.base);
        let mut request = self.http.get(url).header("Accept", MANIFEST_TYPES);
        request = match (&token, &self.auth) {
            (Some(token), _) => request.bearer_auth(token),
            (None, RegistryAuth::Basic(user, password)) => request.basic_auth(user, Some(password)),
            (None, RegistryAuth::Bearer(token)) => request.bearer_auth(token),
            (None, RegistryAuth::Anonymous) => request,
        };
        let response = request
            .send()
            .await
            .map_err(|e| self.failure(e.into(), "the manifest"))?;
        let status = response.status().as_u16();
        if status != 200 {
            let body = self
                .bounded(response.bytes_stream(), 64 << 10, "the manifest")
                .await
                .unwrap_or_default();
            return Err(self.status(status, String::from_utf8_lossy(&body).trim()));
        }
        let body = self
            .bounded(
                response.bytes_stream(),
                self.limits.document_bytes,
                "the manifest",
            )
            .await?;
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
            return Err(self.too_large("the configuration"));
        }
        let body = self
            .retry("the configuration", progress, || {
                self.document_once(digest, size)
            })
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

    async fn document_once(&self, digest: &Digest, size: u64) -> Result<Bytes, Failure> {
        let (_, stream) = self.open(digest, size, 0, "the configuration").await?;
        self.bounded(stream, self.limits.document_bytes, "the configuration")
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
        loop {
            let before = offset;
            let failure = match self
                .blob_from(digest, size, &mut offset, &what, &pieces, received)
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
        what: &str,
        pieces: &Sender<Result<Bytes>>,
        received: &(dyn Fn(u64) + Sync),
    ) -> Result<(), Failure> {
        let (start, mut stream) = self.open(digest, size, *offset, what).await?;
        let mut skip = *offset - start;
        while let Some(piece) = self.next(&mut stream, what).await? {
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
        size: u64,
        offset: u64,
        what: &str,
    ) -> Result<
        (
            u64,
            futures_util::stream::BoxStream<'static, std::io::Result<Bytes>>,
        ),
        Failure,
    > {
        let descriptor = OciDescriptor {
            digest: digest.to_string(),
            size: size.cast_signed(),
            ..OciDescriptor::default()
        };
        // Asked for in part, even from the start: then the client doesn't hash what we hash anyway.
        let response =
            self.client
                .pull_blob_stream_partial(&self.reference, &descriptor, offset, None);
        let stall = Duration::from_secs(self.limits.stall_seconds + self.limits.connect_seconds);
        let response = tokio::time::timeout(stall, response)
            .await
            .map_err(|_| self.stalled(what))?;
        match response.map_err(|e| self.failure(e, what))? {
            BlobResponse::Partial(stream) => Ok((offset, stream.stream)),
            BlobResponse::Full(stream) => Ok((0, stream.stream)),
        }
    }

    async fn next<E: Into<OciDistributionError>>(
        &self,
        stream: &mut (impl futures_util::Stream<Item = Result<Bytes, E>> + Unpin),
        what: &str,
    ) -> Result<Option<Bytes>, Failure> {
        let stall = Duration::from_secs(self.limits.stall_seconds);
        let piece = tokio::time::timeout(stall, stream.next())
            .await
            .map_err(|_| self.stalled(what))?;
        piece.transpose().map_err(|e| self.failure(e.into(), what))
    }

    async fn bounded<E: Into<OciDistributionError>>(
        &self,
        stream: impl futures_util::Stream<Item = Result<Bytes, E>>,
        limit: u64,
        what: &str,
    ) -> Result<Bytes, Failure> {
        let mut stream = std::pin::pin!(stream);
        let mut body = Vec::new();
        while let Some(piece) = self.next(&mut stream, what).await? {
            if (body.len() + piece.len()) as u64 > limit {
                return Err(self.too_large(what).into());
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

    fn too_large(&self, what: &str) -> Error {
        let limit = self.limits.document_bytes;
        Error::Limit {
            what: format!("{what} from {}", self.host),
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

    /// What an HTTP status means.
    fn status(&self, status: u16, message: &str) -> Failure {
        let reference = self.reference.whole();
        let registry = self.host.clone();
        let message = crate::error::printable(message.as_bytes());
        let error = match status {
            401 | 403 => Error::Unauthorized {
                reference,
                registry,
                message,
            },
            404 => Error::UnknownImage {
                reference,
                registry,
            },
            _ => Error::Registry {
                registry,
                message: format!("HTTP status {status}: {message}"),
                source: None,
            },
        };
        Failure {
            error,
            again: status == 408 || status == 429 || status >= 500,
        }
    }

    fn failure(&self, e: OciDistributionError, what: &str) -> Failure {
        let registry = self.host.clone();
        match e {
            OciDistributionError::RequestError(e) if e.is_timeout() && !e.is_connect() => {
                self.stalled(what)
            }
            OciDistributionError::UnauthorizedError { .. } => {
                self.status(401, "wrong or no credentials")
            }
            OciDistributionError::AuthenticationFailure(message) => self.status(401, &message),
            OciDistributionError::ServerError { code, message, .. } => self.status(code, &message),
            OciDistributionError::RegistryError { envelope, .. } => {
                let message = envelope
                    .errors
                    .iter()
                    .map(|e| e.message.as_str())
                    .collect::<Vec<_>>()
                    .join("; ");
                let has = |codes: &[OciErrorCode]| {
                    envelope.errors.iter().any(|e| codes.contains(&e.code))
                };
                let unknown = [
                    OciErrorCode::ManifestUnknown,
                    OciErrorCode::NameUnknown,
                    OciErrorCode::NotFound,
                ];
                if has(&unknown) {
                    self.status(404, &message)
                } else if has(&[OciErrorCode::Denied, OciErrorCode::Unauthorized]) {
                    self.status(403, &message)
                } else if has(&[OciErrorCode::Toomanyrequests]) {
                    self.status(429, &message)
                } else {
                    let message = format!("cannot fetch {what}: {message}");
                    Failure {
                        error: Error::Registry {
                            registry,
                            message,
                            source: None,
                        },
                        again: false,
                    }
                }
            }
            OciDistributionError::RequestError(e) => {
                let again = e.is_connect() || e.is_body() || e.is_request() || e.is_decode();
                let hint = if e.is_connect() {
                    "cannot connect; check its name, its port and the network"
                } else {
                    ""
                };
                let message = if hint.is_empty() {
                    format!("cannot fetch {what}")
                } else {
                    hint.to_owned()
                };
                Failure {
                    error: Error::Registry {
                        registry,
                        message,
                        source: Some(e.into()),
                    },
                    again,
                }
            }
            OciDistributionError::IoError(e) if timed_out(&e) => self.stalled(what),
            OciDistributionError::IoError(e) => {
                let message = format!("the connection broke while fetching {what}");
                Failure {
                    error: Error::Registry {
                        registry,
                        message,
                        source: Some(e.into()),
                    },
                    again: true,
                }
            }
            other => {
                let message = format!("cannot fetch {what}");
                Failure {
                    error: Error::Registry {
                        registry,
                        message,
                        source: Some(other.into()),
                    },
                    again: false,
                }
            }
        }
    }
}

/// Whether a broken stream is one that fell silent.
fn timed_out(e: &std::io::Error) -> bool {
    e.get_ref()
        .and_then(|e| e.downcast_ref::<reqwest::Error>())
        .is_some_and(reqwest::Error::is_timeout)
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
