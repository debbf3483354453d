//! The agent's own Node: watched, and written by one writer. Every call has a time limit.

use std::collections::BTreeMap;
use std::time::Duration;

use flannel_migration_protocol::{HostFacts, NodeView, Report, State, keys};
use flannel_migration_telemetry::CountCalls;
use futures::{StreamExt as _, TryStreamExt as _};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod};
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::client::ClientBuilder;
use kube::core::PartialObjectMeta;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::runtime::{WatchStreamExt as _, watcher};
use serde_json::json;
use tokio::sync::watch;

use crate::inventory::Known;
use crate::journal::Entry;
use crate::names::IDENTIFIER;

/// How long a call may take.
const LIMIT: Duration = Duration::from_secs(10);

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

/// The node's API.
pub struct OwnNode {
    name: String,
    nodes: Api<Node>,
    pods: Api<Pod>,
    recorder: Recorder,
    // What the condition was last set to; it is not part of what is watched.
    condition: Option<(String, String, String)>,
    announced: Option<(State, String)>,
    // The version that was last written, which the watch may not have told yet.
    written: String,
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
            nodes: Api::all(client.clone()),
            pods: Api::all(client.clone()),
            recorder: Recorder::new(client, reporter),
            condition: None,
            announced: None,
            written: String::new(),
        })
    }

    /// Watches the node until the receiver is dropped.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Option<Seen>> {
        let (sender, receiver) = watch::channel(None);
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.name));
        let nodes: Api<PartialObjectMeta<Node>> = Api::all(self.nodes.clone().into_client());
        tokio::spawn(async move {
            let stream = watcher::watcher(nodes, config).default_backoff().applied_objects();
            let mut stream = std::pin::pin!(stream.into_stream());
            let mut failing = false;
            while let Some(event) = stream.next().await {
                match event {
                    Ok(node) => {
                        failing = false;
                        let empty = BTreeMap::new();
                        let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
                        let annotations = node.metadata.annotations.as_ref().unwrap_or(&empty);
                        let view = NodeView::parse(labels, annotations);
                        let (uid, version) = (node.metadata.uid, node.metadata.resource_version);
                        let seen =
                            Seen { view, uid: uid.unwrap_or_default(), version: version.unwrap_or_default() };
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

    /// Writes what the journal says, as far as the node doesn't say it yet.
    pub async fn publish(
        &mut self,
        seen: &Seen,
        entry: &Entry,
        step: &str,
        host: Option<&HostFacts>,
    ) -> Result<(), Error> {
        let report = Report {
            epoch: entry.epoch,
            state: entry.state,
            step: step.to_owned(),
            since: entry.since,
            reason: entry.reason.clone(),
            message: entry.message.clone(),
            evict: entry.to_evict().to_vec(),
            host: host.filter(|_| entry.state == State::Flannel).cloned(),
        }
        .bounded();
        let adopted =
            entry.adopted().map(|pods| pods.iter().map(|pod| pod.adopted.clone()).collect::<Vec<_>>());
        let kept = (!entry.kept.is_empty()).then_some(&entry.kept);
        let view = &seen.view;
        if view.state.get() != Some(&entry.state)
            || view.report.get() != Some(&report)
            || view.adopted.get().is_none_or(|old| Some(old) != adopted.as_ref()) && adopted.is_some()
            || !view.adopted.is_absent() && adopted.is_none()
            || view.kept.get() != kept
            || view.kept.malformed().is_some()
        {
            let text = |value: serde_json::Value| serde_json::Value::String(value.to_string());
            // With a precondition: a write that the API server takes late, after newer ones, would tell what isn't true any more.
            let patch = json!({ "metadata": {
                "resourceVersion": newest(&seen.version, &self.written),
                "labels": { keys::STATE: entry.state.as_str() },
                "annotations": { keys::REPORT: text(json!(report)), keys::ADOPTED: adopted.map(|pods| text(json!(pods))),
                    keys::KEPT: kept.map(|addresses| text(json!(addresses))) },
            }});
            let (parameters, patch) = (PatchParams::default(), Patch::Merge(patch));
            let what = "write the node's state";
            match call(what, self.nodes.patch_metadata(&self.name, &parameters, &patch)).await {
                Ok(written) => self.written = written.metadata.resource_version.unwrap_or_default(),
                // The watch brings the newer version, and with it the next try.
                Err(Error::Call(_, error)) if is_conflict(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.condition(entry).await?;
        self.announce(seen, entry).await;
        Ok(())
    }

    async fn condition(&mut self, entry: &Entry) -> Result<(), Error> {
        let status = match entry.state {
            State::Calico => "True",
            State::Flannel | State::Stuck => "False",
            _ => "Unknown",
        };
        let condition = (status.to_owned(), entry.reason.clone(), entry.message.clone());
        if self.condition.as_ref() == Some(&condition) {
            return Ok(());
        }
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let patch = json!({ "status": { "conditions": [{
            "type": keys::CONDITION, "status": status, "reason": entry.reason, "message": entry.message,
            "lastTransitionTime": now, "lastHeartbeatTime": now,
        }]}});
        let (parameters, patch) = (PatchParams::default(), Patch::Strategic(patch));
        let what = "write the node's condition";
        let written = call(what, self.nodes.patch_status(&self.name, &parameters, &patch)).await?;
        self.written = written.metadata.resource_version.unwrap_or_default();
        self.condition = Some(condition);
        Ok(())
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
fn newest<'a>(seen: &'a str, written: &'a str) -> &'a str {
    let number = |version: &str| version.parse::<u64>().unwrap_or(0);
    if number(written) > number(seen) { written } else { seen }
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
