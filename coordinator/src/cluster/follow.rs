//! Which nodes changed, for one who looks again and again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio::sync::broadcast::error::TryRecvError;
use tokio::sync::{broadcast, watch};

use super::{NodeFacts, Nodes, Snapshot};

/// So many changes may wait for one who follows; when there are more, all nodes may have changed.
pub(super) const FOLLOWED: usize = 1024;

/// What may have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Node(String),
    All,
}

/// Tells changes: that there are some, and which.
pub(super) struct News {
    count: watch::Sender<u64>,
    changes: broadcast::Sender<Change>,
}

impl News {
    pub(super) fn new() -> Self {
        Self { count: watch::Sender::new(0), changes: broadcast::Sender::new(FOLLOWED) }
    }

    pub(super) fn tell(&self, change: Option<Change>) {
        let Some(change) = change else { return };
        // Nobody may be following.
        let _ = self.changes.send(change);
        self.count.send_modify(|count| *count = count.wrapping_add(1));
    }

    pub(super) fn count(&self) -> watch::Receiver<u64> {
        self.count.subscribe()
    }
}

/// Which nodes may have changed since it was asked last.
pub struct Following {
    nodes: Nodes,
    changes: broadcast::Receiver<Change>,
    begun: bool,
}

/// What may have changed of all nodes.
#[derive(Debug, PartialEq, Eq)]
pub enum Changed {
    /// Each of them: this is what there is.
    All(Snapshot),
    /// These, by name; the others are as before. None: it is gone, or doesn't run Linux.
    Some(BTreeMap<String, Option<Arc<NodeFacts>>>),
}

impl Following {
    /// Without news nothing changes any more.
    pub(super) fn new(nodes: Nodes, news: Option<&News>) -> Self {
        let changes = news.map_or_else(|| broadcast::channel(1).1, |news| news.changes.subscribe());
        Self { nodes, changes, begun: false }
    }

    /// What may have changed since the last call; at the first, all.
    pub fn take(&mut self) -> Changed {
        let mut names = BTreeSet::new();
        let mut all = !std::mem::replace(&mut self.begun, true);
        loop {
            match self.changes.try_recv() {
                Ok(Change::Node(name)) => drop(names.insert(name)),
                Ok(Change::All) | Err(TryRecvError::Lagged(_)) => all = true,
                // Looked at after all changes were taken: none is lost, but one that comes in between may be told twice.
                Err(_) if all => return Changed::All(self.nodes.all()),
                Err(_) => return Changed::Some(self.nodes.named(names)),
            }
        }
    }
}
