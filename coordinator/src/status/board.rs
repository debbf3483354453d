//! What the coordinator tells while it works: a ConfigMap for dashboards and for its successor, and metrics. Nothing is decided by it, and
//! failing to tell is no failure of the migration.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Client;
use kube::api::Api;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::debug;

use super::{Coordinator, Noted, Phase, PolicyStatus, Status, compose};
use crate::api::{self, Writer, found, read};
use crate::args::{Options, Policy};
use crate::cluster::Nodes;
use crate::metrics::Metrics;
use crate::names;
use crate::preflight::Finding;

/// Key of the ConfigMap that holds the whole status as JSON.
pub const STATUS_KEY: &str = "status.json";
/// A ConfigMap holds at most 1 MiB; beyond this many bytes the nodes are left out.
const LARGEST: usize = 900_000;
/// It isn't written more often than this.
const SPACING: Duration = Duration::from_secs(1);
/// Nor for so many times as long as it took to tell: the status grows with the cluster.
const REST_AFTER_TELLING: u32 = 30;
/// But at least as often as this.
const LONGEST_SPACING: Duration = Duration::from_secs(10);

/// Copies share one state.
#[derive(Clone)]
pub struct Board {
    /// The figures.
    pub metrics: Metrics,
    noted: Arc<Mutex<Noted>>,
    changed: Arc<watch::Sender<u64>>,
    own: Option<String>,
    policy: Policy,
    namespace: String,
}

/// The status that a coordinator left, if any did.
pub async fn kept(client: &Client, namespace: &str) -> api::Result<Option<Status>> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let map = found(read("read the status", maps.get(names::STATUS)).await)?;
    let text = map.and_then(|map| map.data?.remove(STATUS_KEY));
    // Of another version, or edited: as if there were none.
    Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
}

impl Board {
    /// Nothing is noted yet.
    #[must_use]
    pub fn new(options: &Options, identity: &str, metrics: Metrics) -> Self {
        let coordinator = Coordinator {
            identity: identity.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            renewed: None,
        };
        let noted = Noted {
            coordinator: Some(coordinator),
            policy: Some(PolicyStatus::from(&options.policy)),
            ..Noted::default()
        };
        Self {
            metrics,
            noted: Arc::new(Mutex::new(noted)),
            changed: Arc::new(watch::Sender::new(0)),
            own: options.node_name.clone(),
            policy: options.policy.clone(),
            namespace: options.namespace.clone(),
        }
    }

    /// Takes over what the predecessor noted. A migration that was complete is another one.
    pub async fn resume(&self, client: &Client) {
        match kept(client, &self.namespace).await {
            Ok(Some(status)) if status.phase != Phase::Complete => {
                let before = Noted::from(&status);
                self.note(|noted| {
                    noted.started = before.started;
                    noted.nodes = before.nodes;
                });
            }
            Ok(_) => {}
            Err(error) => debug!(error = api::chain(&error), "no status of a predecessor"),
        }
        self.note(|noted| {
            noted.started.get_or_insert_with(Timestamp::now);
        });
    }

    /// The cluster enters a phase; whether it is another one.
    #[must_use]
    pub fn enter(&self, phase: Phase, message: &str) -> bool {
        let mut entered = false;
        self.note(|noted| {
            entered = noted.phase != phase;
            noted.phase = phase;
            message.clone_into(&mut noted.message);
            if phase == Phase::Complete {
                noted.ended.get_or_insert_with(Timestamp::now);
            }
        });
        entered
    }

    /// What is in the way now.
    pub fn found(&self, findings: &[Finding]) {
        self.note(|noted| noted.findings = findings.iter().map(Into::into).collect());
    }

    /// A lease was granted.
    pub fn granted(&self, node: &str, strategy: &str) {
        self.note(|noted| {
            let node = noted.nodes.entry(node.to_owned()).or_default();
            node.leased_at = Some(Timestamp::now());
            node.migrated_at = None;
            node.evicted = None;
            node.strategy = Some(strategy.to_owned());
        });
    }

    /// Pods were evicted for a node's switch.
    pub fn evicted(&self, node: &str, count: usize) {
        self.metrics.pods_evicted(count);
        self.note(|noted| noted.nodes.entry(node.to_owned()).or_default().evicted = Some(count));
    }

    /// A node is migrated and back at work.
    pub fn migrated(&self, node: &str, adopted: usize) {
        let now = Timestamp::now();
        let mut took = None;
        self.note(|noted| {
            let node = noted.nodes.entry(node.to_owned()).or_default();
            node.migrated_at = Some(now);
            node.adopted = Some(adopted);
            took = node.leased_at.and_then(|at| Duration::try_from(now.duration_since(at)).ok());
        });
        self.metrics.node_done(took, adopted);
    }

    fn note(&self, change: impl FnOnce(&mut Noted)) {
        change(&mut self.lock());
        self.changed.send_modify(|count| *count = count.wrapping_add(1));
    }

    // What is noted is whole after every statement: a panic elsewhere leaves nothing half done.
    fn lock(&self) -> MutexGuard<'_, Noted> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self, nodes: &Nodes) -> Status {
        compose(&nodes.all(), self.own.as_deref(), &self.lock().clone(), &self.policy, Timestamp::now())
    }

    /// Tells whatever changes, until dropped.
    pub async fn keep(&self, writer: &Writer, nodes: &Nodes) -> Infallible {
        let (mut changed, mut moved) = (self.changed.subscribe(), nodes.changes());
        let mut told = None;
        loop {
            let telling = Instant::now();
            let status = self.status(nodes);
            self.metrics.see(&status, writer.leads());
            if told.as_ref() != Some(&status) && self.write(writer, &status).await {
                told = Some(status);
            }
            sleep(SPACING.max(telling.elapsed() * REST_AFTER_TELLING).min(LONGEST_SPACING)).await;
            tokio::select! {
                result = changed.changed() => if result.is_err() { std::future::pending::<()>().await },
                result = moved.changed() => if result.is_err() { std::future::pending::<()>().await },
            }
        }
    }

    /// Tells now: the last word.
    pub async fn tell(&self, writer: &Writer, nodes: &Nodes) {
        let status = self.status(nodes);
        self.metrics.see(&status, writer.leads());
        self.write(writer, &status).await;
    }

    async fn write(&self, writer: &Writer, status: &Status) -> bool {
        let text = |status: &Status| serde_json::to_string(status).unwrap_or_default();
        let mut whole = text(status);
        if whole.len() > LARGEST {
            whole = text(&Status { nodes: Vec::new(), ..status.clone() });
        }
        let patch = json!({ "data": {
            STATUS_KEY: whole,
            "phase": status.phase.as_str(),
            "nodesDone": status.progress.done.to_string(),
            "nodesTotal": status.progress.total.to_string(),
        } });
        let maps: Api<ConfigMap> = Api::namespaced(writer.client.clone(), &self.namespace);
        match writer.merge("write the status", &maps, names::STATUS, &patch).await {
            Ok(_) => true,
            Err(error) => {
                debug!(error = api::chain(&error), "status not written");
                // Without its ConfigMap there is nothing to write to, and nothing to try again.
                error.is_not_found()
            }
        }
    }
}
