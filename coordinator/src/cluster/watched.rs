//! Objects of any kind, kept up to date by a watch.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use kube::api::Api;
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tracing::debug;

use crate::api::{Error, Result};

/// Objects of one kind, kept up to date.
pub struct Watched<K>
where
    K: kube::Resource<DynamicType = ()> + Clone + 'static,
{
    store: Store<K>,
    changes: watch::Receiver<u64>,
    watching: Arc<Watching>,
}

impl<K> Clone for Watched<K>
where
    K: kube::Resource<DynamicType = ()> + Clone + 'static,
{
    fn clone(&self) -> Self {
        Self {
            store: self.store.clone(),
            changes: self.changes.clone(),
            watching: Arc::clone(&self.watching),
        }
    }
}

/// Ends the watch with its last user.
pub(super) struct Watching(Option<tokio::task::JoinHandle<()>>);

impl Watching {
    pub(super) fn new(task: tokio::task::JoinHandle<()>) -> Self {
        Self(Some(task))
    }

    /// Of nothing.
    #[cfg(test)]
    pub(super) const fn none() -> Self {
        Self(None)
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// Watch calls end after this time, in seconds, and are made anew: a dead connection is noticed that soon.
pub const WATCH_SECONDS: u32 = 60;

/// Pauses between attempts while the API server can't be reached: once it is back, what has changed is seen within five seconds.
pub(crate) fn pauses() -> watcher::ExponentialBackoff {
    backon::ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(800))
        .with_max_delay(Duration::from_secs(5))
        .with_jitter()
        .without_max_times()
        .into()
}

impl<K> Watched<K>
where
    K: kube::Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    /// Watches; returns when all objects are known. `what` names them, for errors.
    pub async fn new(what: &str, api: Api<K>, config: watcher::Config) -> Result<Self> {
        Self::trimmed(what, api, config, |_| {}).await
    }

    /// The same, with what nobody asks for removed from each object before it is kept.
    pub async fn trimmed(
        what: &str,
        api: Api<K>,
        config: watcher::Config,
        trim: impl Fn(&mut K) + Send + 'static,
    ) -> Result<Self> {
        let (store, writer) = reflector::store();
        let (tick, changes) = watch::channel(0_u64);
        let events = watcher(api, config.timeout(WATCH_SECONDS)).backoff(pauses()).modify(move |object| {
            // Who wrote which field is most of an object that many write, and nobody asks.
            object.meta_mut().managed_fields = None;
            trim(object);
        });
        let name = what.to_owned();
        let watching = tokio::spawn(reflector::reflector(writer, events).for_each(move |event| {
            match event {
                Ok(watcher::Event::Apply(_) | watcher::Event::Delete(_) | watcher::Event::InitDone) => {
                    tick.send_modify(|count| *count = count.wrapping_add(1));
                }
                Ok(_) => {}
                Err(error) => debug!(error = crate::api::chain(&error), "watch of {name} interrupted"),
            }
            std::future::ready(())
        }));
        let watching = Arc::new(Watching::new(watching));
        match tokio::time::timeout(crate::api::CALL_TIMEOUT, store.wait_until_ready()).await {
            Ok(Ok(())) => Ok(Self { store, changes, watching }),
            _ => Err(Error::Timeout { what: format!("list {what}") }),
        }
    }

    /// All objects, in no order.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<K>> {
        self.store.state()
    }

    /// What wakes up on each change. A change before the call isn't told again.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        let mut changes = self.changes.clone();
        changes.borrow_and_update();
        changes
    }

    /// Waits until `holds`, looking at each change; `None` when it doesn't within `limit`.
    pub async fn until<T>(
        &self,
        limit: Duration,
        mut holds: impl FnMut(&[Arc<K>]) -> Option<T>,
    ) -> Option<T> {
        until(self.changes(), limit, || holds(&self.store.state())).await
    }
}

/// Looks at once and at each change, until there is something to be seen; `None` when there isn't within `limit`.
pub(super) async fn until<T>(
    mut changes: watch::Receiver<u64>,
    limit: Duration,
    mut look: impl FnMut() -> Option<T>,
) -> Option<T> {
    let waiting = async {
        loop {
            if let Some(value) = look() {
                return Some(value);
            }
            if changes.changed().await.is_err() {
                return None;
            }
        }
    };
    tokio::time::timeout(limit, waiting).await.ok().flatten()
}
