//! All nodes, kept up to date: each is read once for each of its versions, and shared by all who look.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use kube::Client;
use kube::ResourceExt as _;
use kube::api::Api;
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt as _, watcher};
use tokio::sync::watch;
use tracing::debug;

use super::watched::{Watching, from_now, pauses, until};
use super::{Node, NodeFacts, WATCH_SECONDS};
use crate::api::{CALL_TIMEOUT, Error, Result, chain};

/// Nodes are read so many at once. A page is held as a whole, and several times as large as its text, before the nodes are made of it.
const PAGE: u32 = 100;

/// All nodes that run Linux at some moment, by name.
pub type Snapshot = Arc<[Arc<NodeFacts>]>;

/// All nodes, kept up to date.
#[derive(Clone)]
pub struct Nodes {
    known: Arc<Mutex<Known>>,
    changes: watch::Receiver<u64>,
    _watching: Arc<Watching>,
}

impl Nodes {
    /// Watches all nodes; returns when they are known.
    pub async fn watch(client: Client) -> Result<Self> {
        let known = Arc::new(Mutex::new(Known::default()));
        let (tick, changes) = watch::channel(0_u64);
        let config = watcher::Config::default().timeout(WATCH_SECONDS).page_size(PAGE);
        let store = Arc::clone(&known);
        let (arriving, mut complete) = watch::channel(false);
        let watching = Watching::new(tokio::spawn(async move {
            let mut events = pin!(watcher(Api::<Node>::all(client), config).backoff(pauses()));
            while let Some(event) = events.next().await {
                match event {
                    Ok(event) => {
                        let is_list = matches!(event, Event::Init | Event::InitApply(_));
                        if lock(&store).apply(event) {
                            tick.send_modify(|count| *count = count.wrapping_add(1));
                        }
                        arriving.send_modify(|complete| *complete |= !is_list);
                    }
                    Err(error) => debug!(error = chain(&error), "watch of all nodes interrupted"),
                }
            }
        }));
        // Thousands of nodes may take their time, but not without any arriving.
        while !*complete.borrow_and_update() {
            match tokio::time::timeout(CALL_TIMEOUT, complete.changed()).await {
                Ok(Ok(())) => {}
                _ => return Err(Error::Timeout { what: "list all nodes".to_owned() }),
            }
        }
        Ok(Self { known, changes, _watching: Arc::new(watching) })
    }

    /// Remembers the answer to a read or a write until the watch has caught up with it.
    pub fn learnt(&self, node: NodeFacts) {
        lock(&self.known).learnt(node);
    }

    /// All nodes that run Linux, by name. Others have no flannel of the kind that is migrated.
    #[must_use]
    pub fn all(&self) -> Snapshot {
        lock(&self.known).all()
    }

    /// One node.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Arc<NodeFacts>> {
        lock(&self.known).newest(name).filter(|node| node.linux).cloned()
    }

    /// Nodes in flannel's network that don't run Linux, by name.
    #[must_use]
    pub fn foreign(&self) -> Vec<String> {
        let known = lock(&self.known);
        let foreign = known.seen.values().filter(|node| !node.linux && node.in_flannels_network());
        foreign.map(|node| node.name.clone()).collect()
    }

    /// What wakes up on each change that decisions may depend on. A change before the call isn't told again.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        from_now(&self.changes)
    }

    /// Waits until `holds`, looking at each change; `None` when it doesn't within `limit`.
    pub async fn until<T>(
        &self,
        limit: Duration,
        mut holds: impl FnMut(&[Arc<NodeFacts>]) -> Option<T>,
    ) -> Option<T> {
        until(self.changes(), limit, || holds(&self.all())).await
    }
}

// What is known is whole after every call: a panic elsewhere leaves nothing half done.
fn lock(known: &Mutex<Known>) -> MutexGuard<'_, Known> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

type ByName = BTreeMap<String, Arc<NodeFacts>>;

/// What the watch has told, and what was read or written beside it.
#[derive(Default)]
struct Known {
    seen: ByName,
    /// A list that is under way.
    arriving: ByName,
    /// What was read or written and hasn't come through the watch yet: without it a lease just granted would be granted again elsewhere.
    learnt: ByName,
    /// Made when somebody asks, and kept until something changes.
    snapshot: Option<Snapshot>,
}

impl Known {
    /// Takes in what the watch tells; whether anything changed that decisions may depend on. Kubelets write all the time.
    fn apply(&mut self, event: Event<Node>) -> bool {
        let changed = match event {
            Event::Init => {
                self.arriving.clear();
                false
            }
            Event::InitApply(node) => {
                let node = NodeFacts::from(&node);
                self.arriving.insert(node.name.clone(), Arc::new(node));
                false
            }
            Event::InitDone => {
                self.seen = std::mem::take(&mut self.arriving);
                let seen = &self.seen;
                self.learnt.retain(|name, learnt| seen.get(name).is_some_and(|seen| is_newer(learnt, seen)));
                true
            }
            Event::Apply(node) => {
                let node = NodeFacts::from(&node);
                if self.learnt.get(&node.name).is_some_and(|learnt| !is_newer(learnt, &node)) {
                    self.learnt.remove(&node.name);
                }
                let same = self.seen.get(&node.name).is_some_and(|before| says_the_same(before, &node));
                self.seen.insert(node.name.clone(), Arc::new(node));
                !same
            }
            Event::Delete(node) => {
                let name = node.name_any();
                self.learnt.remove(&name);
                self.seen.remove(&name).is_some()
            }
        };
        self.snapshot = None;
        changed
    }

    fn learnt(&mut self, node: NodeFacts) {
        if self.newest(&node.name).is_some_and(|known| is_newer(&node, known)) {
            self.learnt.insert(node.name.clone(), Arc::new(node));
            self.snapshot = None;
        }
    }

    /// A node as it was last seen, read or written, whichever is newest.
    fn newest(&self, name: &str) -> Option<&Arc<NodeFacts>> {
        self.learnt.get(name).or_else(|| self.seen.get(name))
    }

    fn all(&mut self) -> Snapshot {
        if let Some(snapshot) = &self.snapshot {
            return Arc::clone(snapshot);
        }
        let newest = self.seen.iter().map(|(name, seen)| self.learnt.get(name).unwrap_or(seen));
        let snapshot: Snapshot = newest.filter(|node| node.linux).cloned().collect();
        self.snapshot = Some(Arc::clone(&snapshot));
        snapshot
    }
}

/// Versions of one kind of object are comparable numbers (KEP-5504); what was seen with one that isn't is taken for caught up.
fn is_newer(learnt: &NodeFacts, seen: &NodeFacts) -> bool {
    let number = |node: &NodeFacts| node.version.parse::<u64>().ok();
    number(seen).is_some() && number(learnt) > number(seen)
}

/// Whether two versions of a node differ in nothing but their number.
fn says_the_same(a: &NodeFacts, b: &NodeFacts) -> bool {
    let NodeFacts {
        name,
        version: _,
        view,
        ready,
        migrated,
        unschedulable,
        taints,
        control_plane,
        linux,
        pod_cidrs,
        addresses,
        annotations,
    } = a;
    *name == b.name
        && *view == b.view
        && (*ready, *migrated, *unschedulable) == (b.ready, b.migrated, b.unschedulable)
        && (*control_plane, *linux, addresses) == (b.control_plane, b.linux, &b.addresses)
        && (taints, pod_cidrs) == (&b.taints, &b.pod_cidrs)
        && *annotations == b.annotations
}

#[cfg(test)]
mod tests {
    use flannel_migration_protocol::keys;
    use serde_json::json;

    use super::super::facts::tests::object;
    use super::*;

    fn node(name: &str, version: &str) -> Node {
        serde_json::from_value(object(name, version)).unwrap()
    }

    fn uncordoned(name: &str, version: &str) -> Node {
        let mut object = object(name, version);
        object["spec"]["unschedulable"] = json!(false);
        serde_json::from_value(object).unwrap()
    }

    fn known() -> Known {
        let mut known = Known::default();
        assert!(!known.apply(Event::Init) && !known.apply(Event::InitApply(node("a", "9"))));
        assert!(known.all().is_empty(), "a list counts when it is complete");
        assert!(known.apply(Event::InitDone));
        known
    }

    fn versions(known: &mut Known) -> Vec<(String, String)> {
        known.all().iter().map(|node| (node.name.clone(), node.version.clone())).collect()
    }

    fn one(name: &str, version: &str) -> [(String, String); 1] {
        [(name.to_owned(), version.to_owned())]
    }

    #[test]
    fn what_was_learnt_counts_until_the_watch_has_caught_up() {
        let mut known = known();
        known.learnt(NodeFacts::from(&uncordoned("a", "12")));
        assert_eq!(versions(&mut known), one("a", "12"));
        known.apply(Event::Apply(node("a", "11")));
        assert_eq!(versions(&mut known), one("a", "12"));
        known.apply(Event::Apply(uncordoned("a", "12")));
        assert!(known.learnt.is_empty());
        known.learnt(NodeFacts::from(&node("a", "10")));
        assert_eq!(versions(&mut known), one("a", "12"), "older than what was seen");
        known.learnt(NodeFacts::from(&node("a", "15")));
        known.learnt(NodeFacts::from(&node("a", "14")));
        assert_eq!(versions(&mut known), one("a", "15"), "read before what was written, told after it");
        known.apply(Event::Apply(node("a", "15")));
        known.learnt(NodeFacts::from(&node("a", "16")));
        known.apply(Event::Apply(node("a", "not a number")));
        assert_eq!(versions(&mut known), one("a", "not a number"));
    }

    #[test]
    fn a_node_that_is_gone_is_forgotten() {
        let mut known = known();
        known.learnt(NodeFacts::from(&node("a", "12")));
        assert!(known.apply(Event::Delete(node("a", "13"))));
        assert!(known.all().is_empty() && known.learnt.is_empty());
        known.learnt(NodeFacts::from(&node("a", "12")));
        assert!(known.all().is_empty(), "an answer that comes late makes no node");
        known.apply(Event::Init);
        known.apply(Event::InitApply(node("b", "14")));
        known.apply(Event::InitDone);
        known.learnt(NodeFacts::from(&node("b", "15")));
        known.apply(Event::Init);
        known.apply(Event::InitDone);
        assert!(known.all().is_empty() && known.learnt.is_empty());
    }

    #[test]
    fn what_nobody_decides_by_wakes_nobody() {
        let mut known = known();
        assert!(!known.apply(Event::Apply(node("a", "10"))), "a kubelet's heartbeat");
        assert_eq!(versions(&mut known), one("a", "10"));
        assert!(known.apply(Event::Apply(uncordoned("a", "11"))));
        known.learnt(NodeFacts::from(&node("a", "13")));
        assert!(!known.apply(Event::Apply(uncordoned("a", "12"))));
        assert!(
            known.apply(Event::Apply(node("a", "13"))),
            "what was written is told like what others write"
        );
        assert!(known.apply(Event::Apply(node("b", "14"))));
    }

    #[test]
    fn only_nodes_with_linux_are_told_and_others_in_flannels_network_are_named() {
        let mut known = known();
        let mut windows = object("w", "10");
        windows["metadata"]["labels"]["kubernetes.io/os"] = json!("windows");
        known.apply(Event::Apply(serde_json::from_value(windows.clone()).unwrap()));
        assert_eq!(versions(&mut known), one("a", "9"));
        let (tick, changes) = watch::channel(0);
        let nodes =
            Nodes { known: Arc::new(Mutex::new(known)), changes, _watching: Arc::new(Watching::none()) };
        assert!(nodes.foreign().is_empty() && nodes.get("w").is_none() && nodes.get("a").is_some());
        windows["metadata"]["annotations"]["flannel.example/kube-subnet-manager"] = json!("true");
        windows["metadata"]["annotations"][keys::REPORT] = json!("{}");
        lock(&nodes.known).apply(Event::Apply(serde_json::from_value(windows).unwrap()));
        assert_eq!(nodes.foreign(), ["w"]);
        drop(tick);
    }
}
