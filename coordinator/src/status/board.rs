//! What the coordinator tells while it works: a ConfigMap for dashboards and for its successor, and metrics. Nothing is decided by it, and
//! failing to tell is no failure of the migration.

use std::convert::Infallible;
use std::io;
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

use super::{AlarmStatus, Coordinator, FindingStatus, Noted, Phase, PolicyStatus, Status, compose};
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
/// It isn't looked at more often than this.
const SPACING: Duration = Duration::from_secs(1);
/// Nor for so many times as long as it took to tell: the status grows with the cluster.
const REST_AFTER_TELLING: u32 = 200;
/// But at least as often as this.
const LONGEST_SPACING: Duration = Duration::from_secs(10);
/// What isn't news for the whole cluster, such as a node's next state, isn't written more often than this.
const SPACING_OF_DETAILS: Duration = Duration::from_secs(10);

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
        compose(&nodes.all(), self.own.as_deref(), &self.lock(), &self.policy, Timestamp::now())
    }

    /// Tells whatever changes, until dropped.
    pub async fn keep(&self, writer: &Writer, nodes: &Nodes) -> Infallible {
        let (mut changed, mut moved) = (self.changed.subscribe(), nodes.changes());
        let mut told = Told::default();
        loop {
            let telling = Instant::now();
            let status = self.status(nodes);
            self.metrics.see(&status, writer.leads());
            let due = told.due(&status, telling);
            if due.is_zero() {
                let text = whole(&status);
                if told.text == text || self.write(writer, &status, &text).await {
                    told = Told { at: Some(telling), text, news: news(&status) };
                }
            }
            drop(status);
            sleep(SPACING.max(telling.elapsed() * REST_AFTER_TELLING).min(LONGEST_SPACING)).await;
            tokio::select! {
                result = changed.changed() => if result.is_err() { std::future::pending::<()>().await },
                result = moved.changed() => if result.is_err() { std::future::pending::<()>().await },
                () = sleep(due), if !due.is_zero() => {},
            }
        }
    }

    /// Tells now: the last word.
    pub async fn tell(&self, writer: &Writer, nodes: &Nodes) {
        let status = self.status(nodes);
        self.metrics.see(&status, writer.leads());
        self.write(writer, &status, &whole(&status)).await;
    }

    async fn write(&self, writer: &Writer, status: &Status, text: &str) -> bool {
        let patch = json!({ "data": {
            STATUS_KEY: text,
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

/// What was written last.
#[derive(Default)]
struct Told {
    at: Option<Instant>,
    text: String,
    news: News,
}

impl Told {
    /// How long from now the status may not be written.
    fn due(&self, status: &Status, now: Instant) -> Duration {
        match self.at {
            Some(at) if self.news == news(status) => (at + SPACING_OF_DETAILS).saturating_duration_since(now),
            _ => Duration::ZERO,
        }
    }
}

/// What is news for the whole cluster: phase, why, how many are done of how many, alarms, findings.
type News = (Phase, String, usize, usize, Vec<AlarmStatus>, Vec<FindingStatus>);

fn news(status: &Status) -> News {
    let progress = &status.progress;
    let (phase, message) = (status.phase, status.message.clone());
    (phase, message, progress.done, progress.total, status.alarms.clone(), status.findings.clone())
}

/// The status as JSON; without the nodes where it would be too large with them.
fn whole(status: &Status) -> String {
    let mut text = Bounded(Vec::new());
    if serde_json::to_writer(&mut text, status).is_ok() {
        return String::from_utf8(text.0).unwrap_or_default();
    }
    let rest = Status {
        phase: status.phase,
        message: status.message.clone(),
        coordinator: status.coordinator.clone(),
        started: status.started,
        ended: status.ended,
        policy: status.policy.clone(),
        progress: status.progress,
        nodes: Vec::new(),
        alarms: status.alarms.clone(),
        findings: status.findings.clone(),
    };
    serde_json::to_string(&rest).unwrap_or_default()
}

/// Takes so many bytes and no more: what is too large anyway isn't written to its end first.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, more: &[u8]) -> io::Result<usize> {
        if self.0.len() + more.len() > LARGEST {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{NodeStatus, Progress};

    fn status(done: usize, nodes: usize) -> Status {
        let node = |i: usize| NodeStatus {
            node: format!("n{i}"),
            message: "m".repeat(100),
            ..NodeStatus::default()
        };
        Status {
            phase: Phase::Roll,
            progress: Progress { done, total: nodes, remaining_seconds: None },
            nodes: (0..nodes).map(node).collect(),
            ..Status::default()
        }
    }

    #[test]
    fn news_are_told_at_once_and_details_some_seconds_later() {
        let now = Instant::now();
        assert!(Told::default().due(&status(1, 3), now).is_zero(), "nothing was told");
        let told = Told { at: Some(now), text: String::new(), news: news(&status(1, 3)) };
        assert!(told.due(&status(2, 3), now).is_zero(), "a node is done");
        let mut later = status(1, 3);
        later.nodes.remove(0);
        later.progress.remaining_seconds = Some(7);
        assert_eq!(told.due(&later, now), SPACING_OF_DETAILS);
        assert_eq!(told.due(&later, now + SPACING_OF_DETAILS), Duration::ZERO);
    }

    #[test]
    fn a_status_that_is_too_large_is_told_without_its_nodes() {
        let read = |status: &Status| serde_json::from_str::<Status>(&whole(status)).unwrap();
        let small = status(1, 10);
        assert_eq!(read(&small), small);
        let large = status(1, 10_000);
        assert!(whole(&large).len() < 1000);
        assert_eq!(read(&large), Status { nodes: Vec::new(), ..large });
    }
}
