//! The agent's own Node: watched, and written by one writer. Every call has a time limit.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use flannel_migration_protocol::{HostFacts, NodeView, State};
use flannel_migration_telemetry::CountCalls;
use futures::{StreamExt as _, TryStreamExt as _};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod};
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::client::ClientBuilder;
use kube::core::PartialObjectMeta;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::runtime::{WatchStreamExt as _, watcher};
use tokio::sync::watch;

use crate::inventory::Known;
use crate::journal::Entry;
use crate::names::IDENTIFIER;
use crate::news::{Condition, News, Said};

/// How long a call may take.
const LIMIT: Duration = Duration::from_secs(10);
/// How long words for people must have been true to be worth a write of their own.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// A call that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused, or couldn't be reached.
    #[error("can't {0}")]
    Call(&'static str, #[source] Box<kube::Error>),
    /// It took too long.
    #[error("can't {0}: no answer within {1:?}")]
    Late(&'static str, Duration),
}

async fn call<T>(what: &'static str, call: impl Future<Output = kube::Result<T>>) -> Result<T, Error> {
    match tokio::time::timeout(LIMIT, call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Error::Call(what, Box::new(error))),
        Err(_) => Err(Error::Late(what, LIMIT)),
    }
}

/// What was last seen of the node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// Its keys.
    pub view: NodeView,
    /// Its UID.
    pub uid: String,
    /// The version that was seen: the precondition of writes.
    pub version: String,
}

impl Seen {
    fn of(node: PartialObjectMeta<Node>) -> Self {
        let empty = BTreeMap::new();
        let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
        let annotations = node.metadata.annotations.as_ref().unwrap_or(&empty);
        Self {
            view: NodeView::parse(labels, annotations),
            uid: node.metadata.uid.unwrap_or_default(),
            version: node.metadata.resource_version.unwrap_or_default(),
        }
    }
}

/// The node's API.
pub struct OwnNode {
    name: String,
    own: Api<PartialObjectMeta<Node>>,
    pods: Api<Pod>,
    recorder: Recorder,
    // What the condition was last set to.
    condition: Option<Condition>,
    announced: Option<(State, String)>,
    // What was last written, which the watch may not have told yet.
    written: Seen,
    // Since when there are words that were not said.
    unsaid: Option<Instant>,
}

impl OwnNode {
    /// Connects; the configuration is that of the pod, or the kubeconfig.
    pub async fn connect(name: &str, calls: &CountCalls) -> anyhow::Result<Self> {
        let mut config = kube::Config::infer().await?;
        // The decision is made anew at each tick: a call that waits for long decides for what was.
        config.default_retry = false;
        config.connect_timeout = Some(Duration::from_secs(5));
        config.write_timeout = Some(LIMIT);
        let client = ClientBuilder::try_from(config)?.with_layer(calls).build();
        let reporter = Reporter { controller: IDENTIFIER.into(), instance: Some(name.to_owned()) };
        Ok(Self {
            name: name.to_owned(),
            own: Api::all(client.clone()),
            pods: Api::all(client.clone()),
            recorder: Recorder::new(client, reporter),
            condition: None,
            announced: None,
            written: Seen::default(),
            unsaid: None,
        })
    }

    /// Watches the node until the receiver is dropped.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Option<Seen>> {
        let (sender, receiver) = watch::channel(None);
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.name));
        let nodes = self.own.clone();
        tokio::spawn(async move {
            let stream = watcher::watcher(nodes, config).backoff(pauses()).applied_objects();
            let mut stream = std::pin::pin!(stream.into_stream());
            let mut failing = false;
            while let Some(event) = stream.next().await {
                match event {
                    Ok(node) => {
                        failing = false;
                        let seen = Seen::of(node);
                        sender.send_if_modified(|old| {
                            let changed = old.as_ref() != Some(&seen);
                            *old = Some(seen);
                            changed
                        });
                    }
                    Err(error) => {
                        if !failing {
                            tracing::warn!(
                                error = crate::steps::chain(&error),
                                "the node isn't seen; tried again"
                            );
                        }
                        failing = true;
                    }
                }
                if sender.is_closed() {
                    return;
                }
            }
        });
        receiver
    }

    /// The pods of this node.
    pub async fn pods(&self) -> Result<Vec<Known>, Error> {
        let selector = ListParams::default().fields(&format!("spec.nodeName={}", self.name));
        let pods = call("list the node's pods", self.pods.list(&selector)).await?;
        Ok(pods.items.into_iter().map(known).collect())
    }

    /// Says what the journal says, as far as the node doesn't yet: all in one write. Words for people are said once they were true for
    /// [`PATIENCE`]; most steps are over before.
    pub async fn publish(
        &mut self,
        seen: &Seen,
        entry: &Entry,
        step: &str,
        host: Option<&HostFacts>,
    ) -> Result<(), Error> {
        let news = News::of(entry, step, host);
        // What was written last, until the watch has told it.
        let newer = number(&self.written.version) > number(&seen.version);
        let (view, version) =
            if newer { (&self.written.view, &self.written.version) } else { (&seen.view, &seen.version) };
        // The condition is no part of what is watched: a new agent says it again.
        let said = if self.condition.is_some() { news.said_by(view) } else { Said::No };
        match said {
            Said::All => self.unsaid = None,
            Said::ButWords if self.unsaid.get_or_insert_with(Instant::now).elapsed() < PATIENCE => {}
            Said::ButWords | Said::No => {
                let condition = news.condition();
                let turned = self.condition.as_ref().is_none_or(|(status, ..)| *status != condition.0);
                let patch = Patch::Strategic(news.patch(version, Timestamp::now(), turned));
                let parameters = PatchParams::default();
                let what = "write the node's state";
                match call(what, self.own.patch_status(&self.name, &parameters, &patch)).await {
                    Ok(written) => self.written = Seen::of(written),
                    // The watch brings the newer version, and with it the next try.
                    Err(Error::Call(_, error)) if is_conflict(&error) => return Ok(()),
                    Err(error) => return Err(error),
                }
                self.condition = Some(condition);
                self.unsaid = None;
            }
        }
        self.announce(seen, entry).await;
        Ok(())
    }

    /// Whether there are words that were not said yet.
    #[must_use]
    pub const fn has_words_left(&self) -> bool {
        self.unsaid.is_some()
    }

    // Events are for people; that one is lost is no reason to stop.
    async fn announce(&mut self, seen: &Seen, entry: &Entry) {
        let news = (entry.state, entry.reason.clone());
        if self.announced.is_none() {
            // A predecessor has announced what it reported.
            self.announced = seen.view.report.get().map(|report| (report.state, report.reason.clone()));
        }
        if self.announced.as_ref() == Some(&news) || entry.epoch.is_none() {
            return;
        }
        let bad = matches!(entry.state, State::Reverting | State::Stuck)
            || (entry.state == State::Flannel && entry.reason != "LeaseWithdrawn");
        let event = Event {
            type_: if bad { EventType::Warning } else { EventType::Normal },
            reason: entry.reason.clone(),
            note: Some(
                format!("network migration: {}; {}", entry.state, entry.message).chars().take(1000).collect(),
            ),
            action: "MigrateNetwork".into(),
            secondary: None,
        };
        let node = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Node".into()),
            name: Some(self.name.clone()),
            uid: Some(seen.uid.clone()),
            ..ObjectReference::default()
        };
        self.announced = Some(news);
        if let Err(error) = call("write an event", self.recorder.publish(&event, &node)).await {
            tracing::debug!(error = crate::steps::chain(&error), "no event");
        }
    }
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_conflict())
}

/// Versions of one kind of object are comparable numbers (KEP-5504).
fn number(version: &str) -> u64 {
    version.parse().unwrap_or(0)
}

/// Pauses between attempts while the API server can't be reached: once it is back, what the coordinator wants is seen within ten seconds.
/// kube's own grow to half a minute.
fn pauses() -> watcher::ExponentialBackoff {
    backon::ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(800))
        .with_max_delay(Duration::from_secs(10))
        .with_jitter()
        .without_max_times()
        .into()
}

/// Annotation of a static pod's stand-in in the API: the UID that the kubelet and the runtime know the pod by.
const MIRRORED: &str = "kubernetes.io/config.mirror";

fn known(pod: Pod) -> Known {
    let status = pod.status.unwrap_or_default();
    let mirrored = pod.metadata.annotations.and_then(|mut annotations| annotations.remove(MIRRORED));
    Known {
        namespace: pod.metadata.namespace.unwrap_or_default(),
        name: pod.metadata.name.unwrap_or_default(),
        uid: mirrored.or(pod.metadata.uid).unwrap_or_default(),
        addresses: status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect(),
        finished: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_static_pod_is_known_by_the_uid_that_the_runtime_knows() {
        let pod = |annotations: serde_json::Value| {
            let metadata = serde_json::json!({ "uid": "of-the-api", "annotations": annotations });
            known(serde_json::from_value(serde_json::json!({ "metadata": metadata })).unwrap()).uid
        };
        assert_eq!(
            pod(serde_json::json!({ "kubernetes.io/config.mirror": "of-the-kubelet" })),
            "of-the-kubelet"
        );
        assert_eq!(pod(serde_json::json!({})), "of-the-api");
    }
}
