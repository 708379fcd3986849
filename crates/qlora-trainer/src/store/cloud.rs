//! Stores of the crate `object_store`, which is asynchronous: its requests run on a runtime of their own, and each call waits.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt as _, ObjectStoreScheme, PutMode, RetryConfig, WriteMultipart};
use tokio::runtime::{Builder, Runtime};
use url::Url;

use super::Store;
use crate::error::{Error, Result};

/// The content of one request: more is sent and fetched in pieces.
const PIECE: usize = 16 << 20;
/// Pieces that are on their way at a time.
const AT_ONCE: usize = 4;
/// The variables that stores read.
const VARIABLES: [&str; 3] = ["AWS_", "AZURE_", "GOOGLE_"];

/// How often the crate tries a request again, and for how long: [`Mirror`](super::Mirror) tries again too, and a run that has ended must
/// not wait a quarter of an hour for a store that is gone.
const RETRIES: (usize, Duration) = (3, Duration::from_secs(60));

/// A bucket, or a part of one.
pub(super) struct Cloud {
    store: Box<dyn ObjectStore>,
    prefix: Key,
    runtime: Runtime,
}

impl Cloud {
    pub(super) fn open(url: &str) -> Result<Self> {
        let failed = |why: String| Error::Invalid(format!("{url}: {why}"));
        let parsed = Url::parse(url).map_err(|error| failed(error.to_string()))?;
        let (store, prefix) = build(&parsed).map_err(|error| failed(error.to_string()))?;
        let runtime = Builder::new_current_thread().enable_all().build().map_err(|error| failed(error.to_string()))?;
        Ok(Self { store, prefix, runtime })
    }

    fn key(&self, key: &str) -> Key {
        Key::from_iter(self.prefix.parts().chain(Key::from(key).parts()))
    }
}

/// The store of a URL with the options of the environment, as the crate's `parse_url_opts` makes it but for [`RETRIES`].
fn build(url: &Url) -> object_store::Result<(Box<dyn ObjectStore>, Key)> {
    let (scheme, prefix) = ObjectStoreScheme::parse(url)?;
    let texts =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let variables = texts.filter(|(name, _)| VARIABLES.iter().any(|prefix| name.starts_with(prefix)));
    let retry = RetryConfig { max_retries: RETRIES.0, retry_timeout: RETRIES.1, ..RetryConfig::default() };
    macro_rules! store {
        ($builder:ty) => {{
            let builder = <$builder>::new().with_url(url.to_string()).with_retry(retry);
            let configured =
                variables.fold(builder, |builder, (name, value)| match name.to_ascii_lowercase().parse() {
                    Ok(key) => builder.with_config(key, value),
                    Err(_) => builder,
                });
            Box::new(configured.build()?) as Box<dyn ObjectStore>
        }};
    }
    let store = match scheme {
        ObjectStoreScheme::AmazonS3 => store!(AmazonS3Builder),
        ObjectStoreScheme::GoogleCloudStorage => store!(GoogleCloudStorageBuilder),
        ObjectStoreScheme::MicrosoftAzure => store!(MicrosoftAzureBuilder),
        other => {
            return Err(object_store::Error::NotSupported {
                source: format!("{other:?} is no store of objects").into(),
            });
        }
    };
    Ok((store, prefix))
}

fn failed(error: object_store::Error) -> io::Error {
    use object_store::Error as Of;
    let kind = match &error {
        Of::NotFound { .. } => io::ErrorKind::NotFound,
        Of::AlreadyExists { .. } => io::ErrorKind::AlreadyExists,
        Of::PermissionDenied { .. } | Of::Unauthenticated { .. } => io::ErrorKind::PermissionDenied,
        Of::InvalidPath { .. } | Of::NotSupported { .. } => io::ErrorKind::InvalidInput,
        _ => io::ErrorKind::Other,
    };
    // With its causes: the first line of these errors says little.
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    // Of a list the crate says these by their text alone.
    let kind = match kind {
        io::ErrorKind::Other if text.contains("NoSuchBucket") => io::ErrorKind::InvalidInput,
        io::ErrorKind::Other if ["401 Unauthorized", "403 Forbidden"].iter().any(|status| text.contains(status)) => {
            io::ErrorKind::PermissionDenied
        }
        kind => kind,
    };
    io::Error::new(kind, text)
}

/// The next piece of a file; shorter at its end.
fn piece(mut file: &File) -> io::Result<Vec<u8>> {
    let mut piece = Vec::new();
    (&mut file).take(PIECE as u64).read_to_end(&mut piece)?;
    Ok(piece)
}

impl Store for Cloud {
    fn put(&self, key: &str, content: &File) -> io::Result<()> {
        let key = self.key(key);
        let first = piece(content)?;
        self.runtime.block_on(async {
            if first.len() < PIECE {
                return self.store.put(&key, first.into()).await.map(drop).map_err(failed);
            }
            // Nobody sees it before it is finished.
            let upload = self.store.put_multipart(&key).await.map_err(failed)?;
            let mut writer = WriteMultipart::new_with_chunk_size(upload, PIECE);
            writer.write(&first);
            loop {
                let next = match piece(content) {
                    Ok(next) if next.is_empty() => break,
                    Ok(next) => writer.wait_for_capacity(AT_ONCE).await.map(|()| next).map_err(failed),
                    Err(error) => Err(error),
                };
                match next {
                    Ok(next) => writer.put(Bytes::from(next)),
                    Err(error) => {
                        // The pieces that have arrived would be paid for.
                        let _ = writer.abort().await;
                        return Err(error);
                    }
                }
            }
            writer.finish().await.map(drop).map_err(failed)
        })
    }

    fn put_new(&self, key: &str, content: &[u8]) -> io::Result<()> {
        let (key, content) = (self.key(key), Bytes::copy_from_slice(content));
        let put = self.store.put_opts(&key, content.into(), PutMode::Create.into());
        self.runtime.block_on(put).map(drop).map_err(failed)
    }

    fn get(&self, key: &str, to: &Path) -> io::Result<()> {
        let key = self.key(key);
        let mut file = File::create(to)?;
        self.runtime.block_on(async {
            let size = self.store.head(&key).await.map_err(failed)?.size;
            for begin in (0..size).step_by(PIECE) {
                let end = size.min(begin + PIECE as u64);
                file.write_all(&self.store.get_range(&key, begin..end).await.map_err(failed)?)?;
            }
            Ok(())
        })
    }

    fn list(&self, prefix: &str) -> io::Result<Vec<String>> {
        // Stores list what is below a key, not what begins like it.
        let (below, _) = prefix.rsplit_once('/').unwrap_or_default();
        let below = self.key(below);
        let found = self.runtime.block_on(self.store.list_with_delimiter(Some(&below))).map_err(failed)?;
        let own = |location: &Key| {
            let parts = location.prefix_match(&self.prefix)?;
            Some(parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/"))
        };
        let keys = found.objects.iter().filter_map(|object| own(&object.location));
        Ok(keys.filter(|key| key.starts_with(prefix)).collect())
    }

    fn delete(&self, key: &str) -> io::Result<()> {
        match self.runtime.block_on(self.store.delete(&self.key(key))).map_err(failed) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Cloud {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.store, self.prefix)
    }
}
