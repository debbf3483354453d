//! The cluster as it is watched: nodes as plain data for decisions, and a wake-up whenever one changes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flannel_migration_protocol::{NodeView, keys};
use futures::StreamExt as _;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Client, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::watch;
use tracing::debug;

use crate::api::{Error, Result};

/// A node, as far as decisions depend on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own that the API server reports")]
pub struct NodeFacts {
    /// Its name.
    pub name: String,
    /// The version that was looked at: the precondition of writes.
    pub version: String,
    /// What the protocol's keys say.
    pub view: NodeView,
    /// Whether the kubelet reports it as ready.
    pub ready: bool,
    /// Whether its agent's condition says that its network is Calico's; it outlives the labels.
    pub migrated: bool,
    /// Whether it is cordoned, by whomever.
    pub unschedulable: bool,
    /// Its taints, as they are in the API: patches replace the list as a whole.
    pub taints: Vec<Value>,
    /// Whether it carries a control plane.
    pub control_plane: bool,
    /// Whether it runs Linux.
    pub linux: bool,
    /// Its pod networks.
    pub pod_cidrs: Vec<IpNet>,
    /// Its own address in the cluster.
    pub address: Option<Ipv4Addr>,
    /// All annotations.
    pub annotations: BTreeMap<String, String>,
}

impl From<&Node> for NodeFacts {
    fn from(node: &Node) -> Self {
        // Nothing is copied that isn't kept: kubelets report dozens of images, and all nodes are read at each change of one.
        let (spec, status) = (node.spec.as_ref(), node.status.as_ref());
        let labels = node.labels();
        let is_true = |kind: &str| {
            let mut conditions = status.iter().flat_map(|status| status.conditions.iter().flatten());
            conditions.any(|condition| condition.type_ == kind && condition.status == "True")
        };
        let cidrs = spec.map_or(&[][..], |spec| match (&spec.pod_cidrs, &spec.pod_cidr) {
            (Some(cidrs), _) => cidrs.as_slice(),
            (None, cidr) => cidr.as_slice(),
        });
        Self {
            name: node.name_any(),
            version: node.resource_version().unwrap_or_default(),
            view: NodeView::parse(labels, node.annotations()),
            ready: is_true("Ready"),
            migrated: is_true(keys::CONDITION),
            unschedulable: spec.and_then(|spec| spec.unschedulable).unwrap_or(false),
            taints: spec
                .iter()
                .flat_map(|spec| spec.taints.iter().flatten())
                .filter_map(|taint| serde_json::to_value(taint).ok())
                .collect(),
            control_plane: ["control-plane", "master", "controlplane"]
                .iter()
                .any(|role| labels.contains_key(&format!("node-role.kubernetes.io/{role}"))),
            linux: labels.get("kubernetes.io/os").is_none_or(|os| os == "linux"),
            pod_cidrs: cidrs.iter().filter_map(|cidr| cidr.parse().ok()).collect(),
            address: status
                .iter()
                .flat_map(|status| status.addresses.iter().flatten())
                .filter(|address| address.type_ == "InternalIP")
                .find_map(|address| address.address.parse().ok()),
            annotations: node.annotations().clone(),
        }
    }
}

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
struct Watching(tokio::task::JoinHandle<()>);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Watch calls end after this time, in seconds, and are made anew: a dead connection is noticed that soon.
pub const WATCH_SECONDS: u32 = 60;

impl<K> Watched<K>
where
    K: kube::Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    /// Watches; returns when all objects are known. `what` names them, for errors.
    pub async fn new(what: &str, api: Api<K>, config: watcher::Config) -> Result<Self> {
        let (store, writer) = reflector::store();
        let (tick, changes) = watch::channel(0_u64);
        let events = watcher(api, config.timeout(WATCH_SECONDS)).default_backoff().modify(|object| {
            // Who wrote which field is most of an object that many write, and nobody asks.
            object.meta_mut().managed_fields = None;
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
        let watching = Arc::new(Watching(watching));
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
        let mut changes = self.changes();
        let waiting = async {
            loop {
                if let Some(value) = holds(&self.store.state()) {
                    return Some(value);
                }
                if changes.changed().await.is_err() {
                    return None;
                }
            }
        };
        tokio::time::timeout(limit, waiting).await.ok().flatten()
    }
}

/// All nodes, kept up to date.
#[derive(Clone)]
pub struct Nodes {
    watched: Watched<Node>,
    /// What was written and hasn't come back through the watch yet: without it a lease just granted would be granted again elsewhere.
    written: Arc<Mutex<BTreeMap<String, NodeFacts>>>,
}

impl Nodes {
    /// Watches all nodes; returns when they are known.
    pub async fn watch(client: Client) -> Result<Self> {
        let watched = Watched::new("all nodes", Api::all(client), watcher::Config::default()).await?;
        Ok(Self { watched, written: Arc::default() })
    }

    /// Remembers the answer to a write until the watch has caught up with it.
    pub fn wrote(&self, node: NodeFacts) {
        if let Ok(mut written) = self.written.lock() {
            written.insert(node.name.clone(), node);
        }
    }

    /// All nodes that run Linux, by name. Others have no flannel of the kind that is migrated.
    #[must_use]
    pub fn all(&self) -> Vec<NodeFacts> {
        let seen = self.watched.all().iter().map(|node| NodeFacts::from(node.as_ref())).collect();
        let mut all = match self.written.lock() {
            Ok(mut written) => newest(seen, &mut written),
            Err(_) => seen,
        };
        all.retain(|node| node.linux);
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// What wakes up on each change. A change before the call isn't told again.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.watched.changes()
    }

    /// Waits until `holds`, looking at each change; `None` when it doesn't within `limit`.
    pub async fn until<T>(
        &self,
        limit: Duration,
        mut holds: impl FnMut(&[NodeFacts]) -> Option<T>,
    ) -> Option<T> {
        self.watched.until(limit, |_| holds(&self.all())).await
    }

    /// Images that the kubelets report, by node. They report only some (50 by default): an image that isn't listed may be there.
    #[must_use]
    pub fn images(&self) -> BTreeMap<String, BTreeSet<String>> {
        let names = |node: &Node| {
            let images = node.status.as_ref().and_then(|status| status.images.clone()).unwrap_or_default();
            images.into_iter().flat_map(|image| image.names.unwrap_or_default()).collect()
        };
        self.watched.all().iter().map(|node| (node.name_any(), names(node))).collect()
    }
}

/// Each node as it was last seen or written, whichever is newer. What the watch has caught up with is forgotten.
fn newest(seen: Vec<NodeFacts>, written: &mut BTreeMap<String, NodeFacts>) -> Vec<NodeFacts> {
    // Versions of one kind of object are comparable numbers (KEP-5504); one that isn't is taken for caught up.
    let number = |node: &NodeFacts| node.version.parse::<u64>().ok();
    let present: BTreeSet<String> = seen.iter().map(|node| node.name.clone()).collect();
    written.retain(|name, _| present.contains(name));
    seen.into_iter()
        .map(|node| match written.get(&node.name) {
            Some(ours) if number(ours) > number(&node) && number(&node).is_some() => ours.clone(),
            Some(_) => {
                written.remove(&node.name);
                node
            }
            None => node,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(version: &str) -> NodeFacts {
        NodeFacts { name: "a".into(), version: version.into(), ..NodeFacts::default() }
    }

    #[test]
    fn what_was_written_counts_until_the_watch_has_caught_up() {
        let mut written = BTreeMap::from([("a".to_owned(), version("12"))]);
        assert_eq!(newest(vec![version("9")], &mut written), [version("12")]);
        assert_eq!(newest(vec![version("12")], &mut written), [version("12")]);
        assert!(written.is_empty());
    }

    #[test]
    fn a_node_that_is_gone_is_forgotten() {
        let mut written = BTreeMap::from([("a".to_owned(), version("12"))]);
        assert!(newest(vec![], &mut written).is_empty());
        assert!(written.is_empty());
    }
}
