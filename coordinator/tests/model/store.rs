//! The object store: Nodes with labels and annotations, every version of each, and writes as the API server does them.

use std::collections::BTreeMap;

use flannel_migration_coordinator::cluster::NodeFacts;
use flannel_migration_protocol::{KEYS, Kind, NodeView, Writer, keys};
use serde_json::Value;

type Texts = BTreeMap<String, String>;

/// One version of a Node.
#[derive(Clone, Debug, Default)]
pub struct Object {
    pub version: u64,
    pub labels: Texts,
    pub annotations: Texts,
    pub unschedulable: bool,
    pub taints: Vec<Value>,
    pub ready: bool,
    /// What the keys say, read once for each version.
    view: NodeView,
}

impl Object {
    pub fn view(&self) -> &NodeView {
        &self.view
    }

    pub fn facts(&self, name: &str) -> NodeFacts {
        NodeFacts {
            name: name.to_owned(),
            version: self.version.to_string(),
            view: self.view.clone(),
            ready: self.ready,
            unschedulable: self.unschedulable,
            taints: self.taints.clone(),
            linux: true,
            ..NodeFacts::default()
        }
    }
}

/// All Nodes, each with its history: a watcher sees any version that isn't older than the last one it saw.
#[derive(Clone, Debug, Default)]
pub struct Store {
    pub nodes: BTreeMap<String, Vec<Object>>,
    version: u64,
    /// Whether to print every version.
    trace: bool,
}

impl Store {
    pub fn new(names: &[String], trace: bool) -> Self {
        let mut store = Self { trace, ..Self::default() };
        for name in names {
            let labels = BTreeMap::from([(keys::NETWORK.to_owned(), "flannel".to_owned())]);
            store.put(name, Object { labels, ready: true, ..Object::default() });
        }
        store
    }

    pub fn now(&self, name: &str) -> &Object {
        self.nodes[name].last().unwrap()
    }

    fn put(&mut self, name: &str, mut object: Object) {
        self.version += 1;
        object.version = self.version;
        object.view = NodeView::parse(&object.labels, &object.annotations);
        if self.trace {
            let of = |texts: &Texts, key: &str| texts.get(key).cloned().unwrap_or_else(|| "-".to_owned());
            eprintln!(
                "{:>5} {name}: lease {} state {} network {} ready {} request {} report {}",
                self.version,
                of(&object.labels, keys::LEASE),
                of(&object.labels, keys::STATE),
                of(&object.labels, keys::NETWORK),
                object.ready,
                of(&object.annotations, keys::REQUEST),
                of(&object.annotations, keys::REPORT).chars().take(60).collect::<String>(),
            );
        }
        self.nodes.entry(name.to_owned()).or_default().push(object);
    }

    /// Anything, by whoever may do anything: kubelets and people.
    pub fn edit(&mut self, name: &str, edit: impl FnOnce(&mut Object)) {
        let mut object = self.now(name).clone();
        edit(&mut object);
        self.put(name, object);
    }

    /// A merge patch; with a version it is a compare-and-swap. Whether it was taken. Panics when `writer` writes another's key.
    pub fn merge(&mut self, writer: Writer, name: &str, expected: Option<u64>, patch: &Value) -> bool {
        let mut object = self.now(name).clone();
        if expected.is_some_and(|expected| expected != object.version) {
            return false;
        }
        for (part, kind) in [("labels", Kind::Label), ("annotations", Kind::Annotation)] {
            for (key, value) in patch["metadata"][part].as_object().into_iter().flatten() {
                let texts = if kind == Kind::Label { &mut object.labels } else { &mut object.annotations };
                let new = value.as_str();
                if texts.get(key).map(String::as_str) != new {
                    let known = KEYS.iter().find(|known| known.name == key && known.kind == kind);
                    assert_eq!(known.map(|known| known.writer), Some(writer), "{key} written by {writer:?}");
                }
                match new {
                    Some(new) => texts.insert(key.clone(), new.to_owned()),
                    None => texts.remove(key),
                };
            }
        }
        match patch.pointer("/spec/unschedulable") {
            Some(Value::Bool(value)) => object.unschedulable = *value,
            Some(Value::Null) => object.unschedulable = false,
            _ => {}
        }
        if let Some(taints) = patch.pointer("/spec/taints") {
            object.taints = taints.as_array().cloned().unwrap_or_default();
        }
        self.put(name, object);
        true
    }
}
