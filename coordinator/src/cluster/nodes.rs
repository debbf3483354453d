//! All nodes, kept up to date: each is read once for each of its versions, and shared by all who look.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures::StreamExt as _;
use kube::Client;
use kube::ResourceExt as _;
use kube::api::Api;
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt as _, watcher};
use tokio::sync::watch;
use tracing::debug;

use super::follow::{Change, Following, News};
use super::watched::{Watching, pauses, until};
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
    /// The watch holds it: whoever waits for changes is told when it has ended.
    news: Weak<News>,
    _watching: Arc<Watching>,
}

impl Nodes {
    /// Watches all nodes; returns when they are known.
    pub async fn watch(client: Client) -> Result<Self> {
        let known = Arc::new(Mutex::new(Known::default()));
        let news = Arc::new(News::new());
        let told = Arc::downgrade(&news);
        let config = watcher::Config::default().timeout(WATCH_SECONDS).page_size(PAGE);
        let (store, telling) = (Arc::clone(&known), news);
        let (arriving, mut complete) = watch::channel(false);
        let watching = Watching::new(tokio::spawn(async move {
            let mut events = pin!(watcher(Api::<Node>::all(client), config).backoff(pauses()));
            while let Some(event) = events.next().await {
                match event {
                    Ok(event) => {
                        let is_list = matches!(event, Event::Init | Event::InitApply(_));
                        let change = lock(&store).apply(event);
                        telling.tell(change);
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
        Ok(Self { known, news: told, _watching: Arc::new(watching) })
    }

    /// Remembers the answer to a read or a write until the watch has caught up with it.
    pub fn learnt(&self, node: NodeFacts) {
        let change = lock(&self.known).learnt(node);
        if let Some(news) = self.news.upgrade() {
            news.tell(change);
        }
    }

    /// All nodes that run Linux, by name. Others have no flannel of the kind that is migrated.
    #[must_use]
    pub fn all(&self) -> Snapshot {
        lock(&self.known).all()
    }

    /// One node.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Arc<NodeFacts>> {
        lock(&self.known).linux(name)
    }

    /// Nodes in flannel's network that don't run Linux, by name.
    #[must_use]
    pub fn foreign(&self) -> Vec<String> {
        let known = lock(&self.known);
        let foreign = known.seen.values().filter(|node| !node.linux && node.in_flannels_network());
        foreign.map(|node| node.name.clone()).collect()
    }

    /// These nodes as they are; `None` for what is gone or doesn't run Linux.
    pub(super) fn named(&self, names: BTreeSet<String>) -> BTreeMap<String, Option<Arc<NodeFacts>>> {
        let known = lock(&self.known);
        let now = |name: String| {
            let node = known.linux(&name);
            (name, node)
        };
        names.into_iter().map(now).collect()
    }

    /// What wakes up on each change that decisions may depend on. A change before the call isn't told again.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.news.upgrade().map_or_else(|| watch::channel(0).1, |news| news.count())
    }

    /// Which nodes change.
    #[must_use]
    pub fn follow(&self) -> Following {
        Following::new(self.clone(), self.news.upgrade().as_deref())
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
    /// Takes in what the watch tells; what of it decisions may depend on. Kubelets write all the time, and what was learnt before is none.
    fn apply(&mut self, event: Event<Node>) -> Option<Change> {
        self.snapshot = None;
        match event {
            Event::Init => {
                self.arriving.clear();
                None
            }
            Event::InitApply(node) => {
                let node = NodeFacts::from(&node);
                self.arriving.insert(node.name.clone(), Arc::new(node));
                None
            }
            Event::InitDone => {
                self.seen = std::mem::take(&mut self.arriving);
                let seen = &self.seen;
                self.learnt.retain(|name, learnt| seen.get(name).is_some_and(|seen| is_newer(learnt, seen)));
                Some(Change::All)
            }
            Event::Apply(node) => {
                let node = Arc::new(NodeFacts::from(&node));
                let before = self.newest(&node.name).cloned();
                if self.learnt.get(&node.name).is_some_and(|learnt| !is_newer(learnt, &node)) {
                    self.learnt.remove(&node.name);
                }
                self.seen.insert(node.name.clone(), Arc::clone(&node));
                self.changed(&node.name, before.as_deref())
            }
            Event::Delete(node) => {
                let name = node.name_any();
                self.learnt.remove(&name);
                self.seen.remove(&name).map(|_| Change::Node(name))
            }
        }
    }

    fn learnt(&mut self, node: NodeFacts) -> Option<Change> {
        let before = self.newest(&node.name).filter(|known| is_newer(&node, known)).cloned()?;
        self.learnt.insert(node.name.clone(), Arc::new(node));
        self.snapshot = None;
        self.changed(&before.name, Some(&before))
    }

    fn changed(&self, name: &str, before: Option<&NodeFacts>) -> Option<Change> {
        let now = self.newest(name)?;
        let same = before.is_some_and(|before| says_the_same(before, now));
        (!same).then(|| Change::Node(name.to_owned()))
    }

    /// A node as it was last seen, read or written, whichever is newest.
    fn newest(&self, name: &str) -> Option<&Arc<NodeFacts>> {
        self.learnt.get(name).or_else(|| self.seen.get(name))
    }

    fn linux(&self, name: &str) -> Option<Arc<NodeFacts>> {
        self.newest(name).filter(|node| node.linux).cloned()
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
    use super::super::follow::{Changed, FOLLOWED};
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
        assert_eq!((known.apply(Event::Init), known.apply(Event::InitApply(node("a", "9")))), (None, None));
        assert!(known.all().is_empty(), "a list counts when it is complete");
        assert_eq!(known.apply(Event::InitDone), Some(Change::All));
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
        assert_eq!(known.apply(Event::Delete(node("a", "13"))), Some(change("a")));
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

    fn change(name: &str) -> Change {
        Change::Node(name.to_owned())
    }

    #[test]
    fn what_nobody_decides_by_wakes_nobody() {
        let mut known = known();
        assert_eq!(known.apply(Event::Apply(node("a", "10"))), None, "a kubelet's heartbeat");
        assert_eq!(versions(&mut known), one("a", "10"));
        assert_eq!(known.apply(Event::Apply(uncordoned("a", "11"))), Some(change("a")));
        assert_eq!(known.learnt(NodeFacts::from(&node("a", "13"))), Some(change("a")));
        assert_eq!(known.learnt(NodeFacts::from(&node("a", "14"))), None, "read, and nothing is new");
        assert_eq!(known.apply(Event::Apply(uncordoned("a", "12"))), None, "older than what is known");
        assert_eq!(known.apply(Event::Apply(node("a", "13"))), None, "an own write that comes back");
        assert_eq!(known.apply(Event::Apply(uncordoned("a", "15"))), Some(change("a")));
        assert_eq!(known.apply(Event::Apply(node("b", "16"))), Some(change("b")));
    }

    fn nodes(known: Known) -> (Nodes, Arc<News>) {
        let news = Arc::new(News::new());
        let nodes = Nodes {
            known: Arc::new(Mutex::new(known)),
            news: Arc::downgrade(&news),
            _watching: Arc::new(Watching::none()),
        };
        (nodes, news)
    }

    fn told(following: &mut Following) -> Vec<(String, Option<String>)> {
        let Changed::Some(changed) = following.take() else { panic!("all") };
        changed.into_iter().map(|(name, node)| (name, node.map(|node| node.version.clone()))).collect()
    }

    #[test]
    fn who_follows_is_told_all_once_and_then_what_changes() {
        let (nodes, news) = nodes(known());
        let apply = |event| {
            let change = lock(&nodes.known).apply(event);
            news.tell(change);
        };
        let (mut following, changes) = (nodes.follow(), nodes.changes());
        assert!(matches!(following.take(), Changed::All(all) if all.len() == 1));
        assert_eq!((told(&mut following), changes.has_changed().unwrap()), (vec![], false));
        apply(Event::Apply(node("b", "10")));
        nodes.learnt(NodeFacts::from(&uncordoned("a", "12")));
        apply(Event::Apply(node("a", "11")));
        apply(Event::Apply(uncordoned("a", "12")));
        let both = [("a".to_owned(), Some("12".to_owned())), ("b".to_owned(), Some("10".to_owned()))];
        assert_eq!((told(&mut following), changes.has_changed().unwrap()), (both.to_vec(), true));
        apply(Event::Delete(node("a", "13")));
        assert_eq!(told(&mut following), [("a".to_owned(), None)]);
        apply(Event::Init);
        apply(Event::InitDone);
        assert!(matches!(following.take(), Changed::All(all) if all.is_empty()));
        for version in 20..25 + FOLLOWED {
            let event = if version % 2 == 0 { node } else { uncordoned };
            apply(Event::Apply(event("c", &version.to_string())));
        }
        assert!(matches!(following.take(), Changed::All(all) if all.len() == 1), "more than are kept");
        assert_eq!(told(&mut following), []);
        drop(news);
        assert!(
            changes.has_changed().is_err() && nodes.changes().has_changed().is_err(),
            "the watch has ended"
        );
        nodes.learnt(NodeFacts::from(&node("c", "9999")));
        let mut late = nodes.follow();
        assert!(matches!(late.take(), Changed::All(all) if all.len() == 1));
        assert_eq!((told(&mut following), told(&mut late)), (vec![], vec![]));
    }

    #[test]
    fn only_nodes_with_linux_are_told_and_others_in_flannels_network_are_named() {
        let mut known = known();
        let mut windows = object("w", "10");
        windows["metadata"]["labels"]["kubernetes.io/os"] = json!("windows");
        known.apply(Event::Apply(serde_json::from_value(windows.clone()).unwrap()));
        assert_eq!(versions(&mut known), one("a", "9"));
        let (nodes, _news) = nodes(known);
        assert!(nodes.foreign().is_empty() && nodes.get("w").is_none() && nodes.get("a").is_some());
        windows["metadata"]["annotations"]["flannel.example/kube-subnet-manager"] = json!("true");
        windows["metadata"]["annotations"][keys::REPORT] = json!("{}");
        lock(&nodes.known).apply(Event::Apply(serde_json::from_value(windows).unwrap()));
        assert_eq!(nodes.foreign(), ["w"]);
    }
}
