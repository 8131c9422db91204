//! Registries on loopback: Debian's docker-registry, and one that misbehaves on demand.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::fixture::sha256;

/// A running docker-registry; killed when dropped.
pub struct Registry {
    child: Child,
    address: String,
}

impl Registry {
    /// Serves `storage`, which is made if it isn't there.
    pub fn serve(storage: &Path) -> Result<Self> {
        let address = free_address()?;
        let config = tempfile::NamedTempFile::with_suffix(".yml")?;
        let storage = storage.display();
        fs::write(
            config.path(),
            format!(
                "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
                 storage: {{filesystem: {{rootdirectory: {storage}}}, delete: {{enabled: true}}}}\n\
                 http: {{addr: '{address}'}}\n"
            ),
        )?;
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(config.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("docker-registry (Debian package) is needed")?;
        let mut registry = Self { child, address };
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(&registry.address).is_err() {
            if registry.child.try_wait()?.is_some() || Instant::now() > deadline {
                bail!("docker-registry did not come up on {}", registry.address);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(registry)
    }

    /// The registry that serves the fixture images.
    pub fn of_fixtures() -> Self {
        Self::serve(&crate::paths::fixtures().join("registry")).expect("a registry on loopback")
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// `127.0.0.1:PORT/NAME`.
    pub fn name(&self, image: &str) -> String {
        format!("{}/{image}", self.address)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A loopback address that nothing listens on at the moment.
pub fn free_address() -> Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

/// What a bad registry does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// One byte of the last layer is another.
    CorruptLayer,
    /// One byte of the configuration is another.
    CorruptConfig,
    /// One byte of the manifest is another: its digest is not the one asked for.
    CorruptManifest,
    /// The connection closes in the middle of the last layer.
    CutLayer,
    /// The last layer stops in the middle and the connection stays open.
    StallLayer,
    /// A login page instead of a manifest, as proxies like to send.
    Html,
    /// A manifest of Docker's first schema.
    OldManifest,
    /// Every answer has this status.
    Status(u16),
    /// Bodies trickle, a kilobyte at a time with this many milliseconds between.
    Slow(u64),
    /// A manifest of 64 MiB of spaces.
    HugeManifest,
}

/// A registry with one image, from a layout of the fixtures, that misbehaves.
pub struct BadRegistry {
    address: String,
    shared: Arc<Shared>,
}

struct Shared {
    blobs: PathBuf,
    manifest: String,
    config: String,
    last_layer: String,
    fault: Mutex<Fault>,
    served: Mutex<BTreeMap<String, usize>>,
}

impl BadRegistry {
    /// Serves the fixture `image` under every name.
    pub fn serve(image: &str, fault: Fault) -> Self {
        let blobs = crate::paths::fixtures()
            .join("layouts")
            .join(image)
            .join("blobs/sha256");
        let index = json(&blobs.join("../../index.json"));
        let manifest = digest(&index["manifests"][0]);
        let document = json(&blobs.join(&manifest));
        let last = document["layers"]
            .as_array()
            .and_then(|layers| layers.last())
            .expect("an image has layers");
        let shared = Arc::new(Shared {
            config: digest(&document["config"]),
            last_layer: digest(last),
            blobs,
            manifest,
            fault: Mutex::new(fault),
            served: Mutex::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port of loopback is free");
        let address = listener
            .local_addr()
            .expect("a bound socket has an address")
            .to_string();
        let accepted = Arc::clone(&shared);
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let shared = Arc::clone(&accepted);
                // A client that hangs up early is none of the registry's business.
                std::thread::spawn(move || drop(shared.answer(&connection)));
            }
        });
        Self { address, shared }
    }

    /// `127.0.0.1:PORT/NAME`.
    pub fn name(&self, image: &str) -> String {
        format!("{}/{image}", self.address)
    }

    /// `NAME@DIGEST` of its one manifest.
    pub fn pinned(&self, image: &str) -> String {
        format!("{}/{image}@sha256:{}", self.address, self.shared.manifest)
    }

    /// Behaves from now on.
    pub fn recovers(&self) {
        *self.shared.fault.lock().expect("no holder panics") = Fault::None;
    }

    /// How often blobs were asked for by GET, by their digest's hex digits.
    pub fn served(&self) -> BTreeMap<String, usize> {
        self.shared.served.lock().expect("no holder panics").clone()
    }
}

impl Shared {
    fn answer(&self, connection: &TcpStream) -> Result<()> {
        let mut lines = BufReader::new(connection).lines();
        let request = lines.next().context("no request")??;
        for header in lines {
            if header?.is_empty() {
                break;
            }
        }
        let mut words = request.split(' ');
        let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let fault = *self.fault.lock().expect("no holder panics");
        let mut out = connection;
        if let Fault::Status(status) = fault {
            return Ok(write!(
                out,
                "HTTP/1.1 {status} Bad\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )?);
        }
        let (hex, media_type) = if path.contains("/manifests/") {
            let media_type = match fault {
                Fault::Html => "text/html",
                Fault::OldManifest => "application/vnd.docker.distribution.manifest.v1+prettyjws",
                _ => "application/vnd.oci.image.manifest.v1+json",
            };
            (self.manifest.clone(), media_type)
        } else if let Some((_, hex)) = path.split_once("/blobs/sha256:") {
            (hex.to_owned(), "application/octet-stream")
        } else {
            return Ok(write!(
                out,
                "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )?);
        };
        let Ok(mut body) = fs::read(self.blobs.join(&hex)) else {
            return Ok(write!(
                out,
                "HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )?);
        };
        if method == "GET" {
            *self
                .served
                .lock()
                .expect("no holder panics")
                .entry(hex.clone())
                .or_default() += 1;
        }
        let corrupt = match fault {
            Fault::CorruptLayer => hex == self.last_layer,
            Fault::CorruptConfig => hex == self.config,
            Fault::CorruptManifest => hex == self.manifest,
            _ => false,
        };
        if corrupt {
            // The last byte but one: of a document it is white space or a bracket, of gzip its length.
            let at = body.len() - 2;
            body[at] ^= 1;
        }
        if hex == self.manifest {
            match fault {
                Fault::HugeManifest => body = vec![b' '; 64 << 20],
                Fault::Html => body = b"<html><body>Please log in</body></html>".to_vec(),
                Fault::OldManifest => {
                    body = br#"{"schemaVersion":1,"name":"museum","tag":"latest","fsLayers":[]}"#
                        .to_vec();
                }
                _ => {}
            }
        }
        write!(
            out,
            "HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nContent-Length: {}\r\n\
             Docker-Content-Digest: {}\r\nConnection: close\r\n\r\n",
            body.len(),
            if corrupt {
                format!("sha256:{hex}")
            } else {
                sha256(&body)
            },
        )?;
        if method == "HEAD" {
            return Ok(());
        }
        match fault {
            Fault::CutLayer if hex == self.last_layer => out.write_all(&body[..body.len() / 2])?,
            Fault::StallLayer if hex == self.last_layer => {
                out.write_all(&body[..body.len() / 2])?;
                out.flush()?;
                // Until the client has had enough.
                let _ = out.read(&mut [0; 1]);
            }
            Fault::Slow(pause) => {
                for piece in body.chunks(1024) {
                    out.write_all(piece)?;
                    std::thread::sleep(Duration::from_millis(pause));
                }
            }
            _ => out.write_all(&body)?,
        }
        Ok(())
    }
}

fn json(file: &Path) -> Value {
    let bytes = fs::read(file)
        .unwrap_or_else(|error| panic!("{}: {error}; run casemate-fixtures", file.display()));
    serde_json::from_slice(&bytes).expect("a fixture is JSON")
}

fn digest(descriptor: &Value) -> String {
    let digest = descriptor["digest"]
        .as_str()
        .expect("a descriptor has a digest");
    digest.trim_start_matches("sha256:").to_owned()
}
