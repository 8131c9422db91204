//! A pull, start to end.

use std::sync::Arc;

use futures_util::StreamExt as _;
use oci_spec::distribution::Reference;

use crate::convert::{Expected, Pieces};
use crate::digest::Digest;
use crate::error::{Error, Result, printable};
use crate::progress::Event;
use crate::reference::key;
use crate::store::{Config, Image, PullOptions, PullPolicy, Store};

use super::client::{Endpoint, endpoints};
use super::manifest::{Descriptor, Manifest, Select, parse, select};

/// Pieces of a download that wait for the converter: some hundred kilobytes a layer.
const PIECES: usize = 32;

/// What a name turned out to be.
struct Resolved {
    /// The digest that the name's tag stands for: the index's, if there is one.
    top: Digest,
    manifest_bytes: bytes::Bytes,
    manifest_digest: Digest,
    manifest: Manifest,
    config: Config,
}

impl Store {
    /// Makes `reference` present as the policy says and returns it. Nothing becomes visible before every digest is verified.
    pub async fn pull(&self, reference: &Reference, options: &PullOptions) -> Result<Image> {
        let name = reference.whole();
        if options.policy != PullPolicy::Always {
            match self
                .find(&key(reference))?
                .filter(|image| options.platform.accepts(&image.platform))
            {
                Some(image) => return Ok(image),
                None if options.policy == PullPolicy::Never => {
                    return Err(Error::NotFound { name });
                }
                None => {}
            }
        }
        options
            .progress
            .event(Event::Resolving { reference: &name });
        let all = endpoints(
            reference,
            &options.registries,
            options.auth_file.as_deref(),
            &options.limits,
        )
        .await?;
        let mut last = None;
        for endpoint in all {
            match self.pull_from(&endpoint, reference, options).await {
                Ok(image) => return Ok(image),
                // What is wrong with the image is wrong everywhere; what is wrong with a mirror isn't.
                Err(
                    e @ (Error::Limit { .. }
                    | Error::BadLayer { .. }
                    | Error::DiskFull { .. }
                    | Error::Io { .. }),
                ) => {
                    return Err(e);
                }
                Err(e) => {
                    tracing::warn!(host = endpoint.host(), error = %e, "pull failed");
                    last = Some(e);
                }
            }
        }
        Err(last.unwrap_or(Error::NotFound { name }))
    }

    async fn pull_from(
        &self,
        endpoint: &Endpoint,
        reference: &Reference,
        options: &PullOptions,
    ) -> Result<Image> {
        let name = reference.whole();
        let resolved = resolve(endpoint, reference, options).await?;
        let layers = &resolved.manifest.layers;
        options.progress.event(Event::Resolved {
            manifest: &resolved.manifest_digest,
            layers: layers.len(),
            bytes: layers
                .iter()
                .map(|layer| layer.size)
                .fold(0, u64::saturating_add),
        });
        let lock = self.use_lock()?;
        let diff_ids = &resolved.config.diff_ids;
        // An image may have a layer twice (empty ones, mostly): it is fetched once.
        let jobs = diff_ids
            .iter()
            .enumerate()
            .filter(|(index, id)| !diff_ids[..*index].contains(id));
        let mut running =
            futures_util::stream::iter(jobs.map(|(index, id)| {
                self.fetch_layer(endpoint, index, *id, &layers[index], options)
            }))
            .buffer_unordered(options.limits.parallel_layers.max(1));
        let mut failed = None;
        while let Some(result) = running.next().await {
            if let Err(e) = result {
                failed.get_or_insert(e);
                break;
            }
        }
        drop(running);
        if let Some(e) = failed {
            return Err(e);
        }
        let names = if reference.digest().is_some() {
            Vec::new()
        } else {
            vec![name]
        };
        let repository = format!("{}/{}", reference.registry(), reference.repository());
        let mut repo_digests = vec![format!("{repository}@{}", resolved.top)];
        if resolved.top != resolved.manifest_digest {
            repo_digests.push(format!("{repository}@{}", resolved.manifest_digest));
        }
        let (store, progress) = (self.clone(), Arc::clone(&options.progress));
        blocking(move || {
            store.add_image(
                &lock,
                &resolved.config,
                &resolved.manifest_bytes,
                names,
                repo_digests,
                &progress,
            )
        })
        .await
    }

    async fn fetch_layer(
        &self,
        endpoint: &Endpoint,
        index: usize,
        diff_id: Digest,
        blob: &Descriptor,
        options: &PullOptions,
    ) -> Result<()> {
        let progress = &options.progress;
        let claim = self.claim_layer(index, &diff_id, progress.as_ref(), tokio::time::sleep);
        let Some(writer) = claim.await? else {
            return Ok(());
        };
        progress.event(Event::LayerStarted {
            index,
            layer: &diff_id,
            bytes: blob.size,
        });
        let expected = Expected {
            what: format!("layer {}", blob.digest),
            blob: Some((blob.digest, blob.size)),
            diff_id,
        };
        let (sender, receiver) = tokio::sync::mpsc::channel(PIECES);
        let (store, limits) = (self.clone(), options.limits.clone());
        let convert =
            blocking(move || store.write_layer(writer, Pieces::new(receiver), &expected, &limits));
        let received = |received| {
            progress.event(Event::LayerBytes {
                index,
                layer: &diff_id,
                received,
            })
        };
        let download = endpoint.blob(
            &blob.digest,
            blob.size,
            sender,
            progress.as_ref(),
            &received,
        );
        let ((), converted) = tokio::join!(download, convert);
        progress.event(Event::LayerDone {
            index,
            layer: &diff_id,
            blob_bytes: converted?,
        });
        Ok(())
    }
}

async fn resolve(
    endpoint: &Endpoint,
    reference: &Reference,
    options: &PullOptions,
) -> Result<Resolved> {
    let name = reference.whole();
    let progress = options.progress.as_ref();
    let wanted = reference.digest().or(reference.tag()).unwrap_or("latest");
    let (mut bytes, top) = endpoint.manifest(wanted, progress).await?;
    let mut digest = top;
    let mut parsed = parse(&name, &bytes)?;
    if let Select::Index(entries) = &parsed {
        let entry = select(&name, &options.platform, entries)?;
        (bytes, digest) = endpoint
            .manifest(&entry.digest.to_string(), progress)
            .await?;
        parsed = parse(&name, &bytes)?;
    }
    let Select::Image(manifest) = parsed else {
        return Err(Error::BadDocument {
            what: format!("index of {name}"),
            reason: "it leads to another index".into(),
        });
    };
    let config = &manifest.config;
    let config_bytes = endpoint
        .document(&config.digest, config.size, progress)
        .await?;
    let config = Config::parse(
        &name,
        config.digest,
        config_bytes.to_vec(),
        manifest.layers.len(),
        &options.limits,
    )?;
    if !options.platform.accepts(&config.platform) {
        return Err(Error::NoPlatform {
            reference: name,
            wanted: options.platform.to_string(),
            available: vec![printable(config.platform.to_string().as_bytes())],
        });
    }
    Ok(Resolved {
        top,
        manifest_bytes: bytes,
        manifest_digest: digest,
        manifest,
        config,
    })
}

/// Runs `work` where it may block. Should the caller go away, `work` notices by its channels.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Error::Worker("a conversion"))?
}
