//! Taking pods off a node: which of them is pure; how is by the eviction API, bounded, and telling what is in the way.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use flannel_migration_protocol::{Adopted, Evict, Strategy};
use futures::stream::{FuturesUnordered, StreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::Eviction;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Preconditions};
use kube::api::{Api, DeleteParams, ListParams, ObjectMeta};
use kube::core::Status;
use kube::runtime::watcher;
use kube::{Client, ResourceExt as _};
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use crate::api::{self, Error, Writer, found, post, read};
use crate::cluster::Watched;
use crate::discover::Name;

/// How soon an eviction that a budget forbids is asked for again: nothing tells when the budget allows it.
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// Annotation of a static pod's stand-in in the API.
const MIRRORED: &str = "kubernetes.io/config.mirror";

/// A pod, named for people and machines.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PodName {
    /// Namespace.
    pub namespace: String,
    /// Name in it.
    pub name: String,
    /// UID, so that a successor of the same name is left alone.
    pub uid: String,
}

impl PodName {
    /// That of a pod as it was read.
    #[must_use]
    pub fn of(pod: &Pod) -> Self {
        Self {
            namespace: pod.namespace().unwrap_or_default(),
            name: pod.name_any(),
            uid: pod.uid().unwrap_or_default(),
        }
    }
}

impl std::fmt::Display for PodName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Whether a pod must leave before the switch. `listed`: the agent can't adopt it.
///
/// Unlike `kubectl drain`, pods on the host's network stay, since nothing changes for them, and so do pods that nobody would make
/// again: they are adopted.
#[must_use]
pub fn must_leave(pod: &Pod, strategy: Strategy, listed: bool) -> bool {
    let spec = pod.spec.as_ref();
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    if is_mirror(pod) || spec.is_some_and(|spec| spec.host_network == Some(true)) {
        return false;
    }
    if listed {
        return true;
    }
    let finished = matches!(phase, Some("Succeeded" | "Failed"));
    strategy == Strategy::Drain && !finished && controller(pod).is_some_and(|kind| kind != "DaemonSet")
}

/// Static pods: the API server holds only their image.
fn is_mirror(pod: &Pod) -> bool {
    pod.annotations().contains_key(MIRRORED)
}

/// The kind of the pod's controller.
fn controller(pod: &Pod) -> Option<&str> {
    pod.owner_references()
        .iter()
        .find(|owner| owner.controller == Some(true))
        .map(|owner| owner.kind.as_str())
}

/// Whether a pod that a drain left is to be made anew after the switch: somebody makes it again, and it runs with an adopted network.
#[must_use]
pub fn is_left_over(pod: &Pod, adopted: &[Adopted]) -> bool {
    let uid = pod.uid().unwrap_or_default();
    !is_mirror(pod) && controller(pod).is_some() && adopted.iter().any(|adopted| adopted.uid == uid)
}

/// Why pods are still there.
#[derive(Debug, thiserror::Error)]
pub enum Blocked {
    /// They were not gone in time.
    #[error("not gone within {} s: {}", limit.as_secs(), list(pods))]
    InTime {
        /// The bound.
        limit: Duration,
        /// The pods, and what is in the way of each.
        pods: BTreeMap<PodName, String>,
    },
    /// They can't be evicted at all.
    #[error("can't be adopted, and can't be evicted, for the kubelet runs them by itself: {}", list(.0))]
    Static(BTreeMap<PodName, String>),
    /// A call failed.
    #[error(transparent)]
    Api(#[from] Error),
}

impl Blocked {
    /// `CamelCase`, for events.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InTime { .. } => "DrainBlocked",
            Self::Static(_) => "StaticPodNotAdoptable",
            Self::Api(error) => error.reason(),
        }
    }
}

fn list(pods: &BTreeMap<PodName, String>) -> String {
    pods.iter().map(|(pod, why)| format!("pod {pod} ({why})")).collect::<Vec<_>>().join("; ")
}

/// The pods of one node, watched.
pub async fn pods_of(client: &Client, node: &str) -> Result<Watched<Pod>, Error> {
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    Watched::new(&format!("pods of node {node}"), Api::all(client.clone()), config).await
}

/// The pods of a node that must leave.
#[must_use]
pub fn leaving(pods: &Watched<Pod>, strategy: Strategy, evict: &[Evict]) -> Vec<PodName> {
    let listed: BTreeSet<&str> = evict.iter().map(|evict| evict.uid.as_str()).collect();
    let pods = pods.all();
    let leave = pods
        .iter()
        .filter(|pod| must_leave(pod, strategy, listed.contains(pod.uid().unwrap_or_default().as_str())));
    leave.map(|pod| PodName::of(pod)).collect()
}

/// Of the listed pods those that nobody can evict, and why they can't be adopted.
#[must_use]
pub fn unmovable(pods: &[std::sync::Arc<Pod>], listed: &[Evict]) -> BTreeMap<PodName, String> {
    let found = pods.iter().filter_map(|pod| {
        // The runtime, which the agent asks, knows a static pod by this UID, not by that of its stand-in in the API.
        let uid = pod.annotations().get(MIRRORED)?;
        let evict = listed.iter().find(|evict| evict.uid == *uid)?;
        Some((PodName::of(pod), evict.reason.clone()))
    });
    found.collect()
}

/// Whether a DaemonSet would make one of the listed pods again on a cordoned node.
#[must_use]
pub fn come_back(pods: &[std::sync::Arc<Pod>], listed: &[Evict]) -> bool {
    pods.iter().any(|pod| {
        controller(pod) == Some("DaemonSet")
            && listed.iter().any(|evict| Some(evict.uid.as_str()) == pod.metadata.uid.as_deref())
    })
}

/// Of the pods that Calico made on a node that is flannel's again: those that somebody makes again, and the others.
#[must_use]
pub fn guests(pods: &Watched<Pod>, listed: &[Evict]) -> (Vec<PodName>, Vec<PodName>) {
    let listed: BTreeSet<&str> = listed.iter().map(|evict| evict.uid.as_str()).collect();
    let pods = pods.all();
    let found = pods.iter().filter(|pod| listed.contains(pod.uid().unwrap_or_default().as_str()));
    let (leave, stay): (Vec<_>, Vec<_>) = found.partition(|pod| !is_mirror(pod) && controller(pod).is_some());
    let names = |pods: Vec<&std::sync::Arc<Pod>>| pods.into_iter().map(|pod| PodName::of(pod)).collect();
    (names(leave), names(stay))
}

/// Whether a pod of this DaemonSet is ready among these.
#[must_use]
pub fn daemon_ready(pods: &[std::sync::Arc<Pod>], set: &Name) -> bool {
    let is_of = |pod: &Pod| {
        let owners = pod.owner_references();
        pod.namespace().as_deref() == Some(&set.namespace)
            && pod.metadata.deletion_timestamp.is_none()
            && owners.iter().any(|owner| owner.kind == "DaemonSet" && owner.name == set.name)
    };
    pods.iter().any(|pod| is_of(pod) && is_ready(pod))
}

/// Evicts pods and waits until they are gone.
pub async fn evict(
    writer: &Writer,
    node: &str,
    watched: &Watched<Pod>,
    leave: &[PodName],
    limit: Duration,
) -> Result<(), Blocked> {
    if leave.is_empty() {
        return Ok(());
    }
    let started = Instant::now();
    let deadline = started + limit;
    let mut asked: FuturesUnordered<_> = leave.iter().map(|pod| ask(writer, pod, deadline)).collect();
    let mut blocked = BTreeMap::new();
    while let Some((pod, answer)) = asked.next().await {
        if let Some(why) = answer? {
            warn!(node, step = "drain", pod = %pod, why, "eviction refused to the end");
            blocked.insert(pod.clone(), why);
        }
    }
    if !blocked.is_empty() {
        return Err(Blocked::InTime { limit, pods: blocked });
    }
    gone(watched, leave, limit, deadline).await?;
    info!(
        node,
        step = "drain",
        pods = leave.len(),
        seconds = started.elapsed().as_secs_f32(),
        "pods evicted"
    );
    Ok(())
}

/// Asks for one eviction until it is granted or the pod is gone; otherwise what is in the way.
async fn ask<'a>(
    writer: &Writer,
    pod: &'a PodName,
    deadline: Instant,
) -> (&'a PodName, Result<Option<String>, Error>) {
    let pods: Api<Pod> = Api::namespaced(writer.client.clone(), &pod.namespace);
    let mut pause = FIRST_RETRY;
    loop {
        let why = match evict_once(writer, &pods, pod).await {
            Ok(()) => return (pod, Ok(None)),
            Err(error) if error.is_not_found() => return (pod, Ok(None)),
            // Another pod of that name by now; or somebody wrote the pod or its budget just then, and it must be asked for again.
            Err(error) if error.is_conflict() => match is_there(&pods, pod).await {
                Ok(false) => return (pod, Ok(None)),
                Ok(true) => api::chain(&error),
                Err(error) => return (pod, Err(error)),
            },
            Err(error) => match error.too_many_requests() {
                Some(why) => why,
                None => return (pod, Err(error)),
            },
        };
        debug!(pod = %pod, why, "eviction not allowed now");
        if Instant::now() + pause > deadline {
            return (pod, Ok(Some(why)));
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_RETRY);
    }
}

async fn is_there(pods: &Api<Pod>, pod: &PodName) -> Result<bool, Error> {
    let named = ListParams::default().fields(&format!("metadata.name={}", pod.name));
    let found = read(format!("look for pod {pod}"), pods.list(&named)).await?.items;
    Ok(found.iter().any(|found| found.uid().as_deref() == Some(&pod.uid)))
}

async fn evict_once(writer: &Writer, pods: &Api<Pod>, pod: &PodName) -> Result<(), Error> {
    let what = format!("evict pod {pod}");
    // Written by hand: kube's `evict` misspells deleteOptions, so that the UID would not be a precondition.
    let eviction = Eviction {
        metadata: ObjectMeta {
            name: Some(pod.name.clone()),
            namespace: Some(pod.namespace.clone()),
            ..ObjectMeta::default()
        },
        delete_options: Some(DeleteOptions {
            preconditions: Some(Preconditions { uid: Some(pod.uid.clone()), resource_version: None }),
            ..DeleteOptions::default()
        }),
    };
    let _: Status =
        writer.write(what, pods.create_subresource("eviction", &pod.name, &post(), &eviction)).await?;
    Ok(())
}

async fn gone(
    watched: &Watched<Pod>,
    pods: &[PodName],
    limit: Duration,
    deadline: Instant,
) -> Result<(), Blocked> {
    let left = |seen: &[std::sync::Arc<Pod>]| -> BTreeMap<PodName, String> {
        let there: BTreeSet<String> = seen.iter().filter_map(|pod| pod.uid()).collect();
        pods.iter()
            .filter(|pod| there.contains(&pod.uid))
            .map(|pod| (pod.clone(), "still terminating".to_owned()))
            .collect()
    };
    let remaining = deadline.saturating_duration_since(Instant::now());
    match watched.until(remaining, |seen| left(seen).is_empty().then_some(())).await {
        Some(()) => Ok(()),
        None => Err(Blocked::InTime { limit, pods: left(&watched.all()) }),
    }
}

/// Has the adopted pods that a drain left made anew, and waits until they and, on this node, their successors are there. Disruption
/// budgets don't count here, as they don't for `kubectl drain`: these are pods of DaemonSets in all but odd cases.
pub async fn renew(
    writer: &Writer,
    node: &str,
    adopted: &[Adopted],
    limit: Duration,
) -> Result<usize, Blocked> {
    let watched = pods_of(&writer.client, node).await?;
    let all = watched.all();
    let old: Vec<_> = all.iter().filter(|pod| is_left_over(pod, adopted)).collect();
    if old.is_empty() {
        return Ok(0);
    }
    let deadline = Instant::now() + limit;
    let names: Vec<_> = old.iter().map(|pod| PodName::of(pod)).collect();
    for pod in &names {
        delete(writer, pod).await?;
    }
    gone(&watched, &names, limit, deadline).await?;
    // Their DaemonSets make new ones here.
    let owners: BTreeSet<String> = old
        .iter()
        .filter(|pod| controller(pod) == Some("DaemonSet"))
        .flat_map(|pod| pod.owner_references())
        .map(|owner| owner.uid.clone())
        .collect();
    let remaining = deadline.saturating_duration_since(Instant::now());
    let ready = watched.until(remaining, |seen| {
        let back: BTreeSet<&str> = seen
            .iter()
            .filter(|pod| is_ready(pod))
            .flat_map(|pod| pod.owner_references())
            .map(|owner| owner.uid.as_str())
            .collect();
        owners.iter().all(|owner| back.contains(owner.as_str())).then_some(())
    });
    if ready.await.is_none() {
        warn!(node, step = "settle", "not all pods of DaemonSets are ready again; going on");
    }
    Ok(names.len())
}

/// Deletes a pod, but not a successor of its name; whether it was there.
pub async fn delete(writer: &Writer, pod: &PodName) -> Result<bool, Error> {
    let pods: Api<Pod> = Api::namespaced(writer.client.clone(), &pod.namespace);
    let preconditions = kube::api::Preconditions { uid: Some(pod.uid.clone()), resource_version: None };
    let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
    match found(writer.write(format!("delete pod {pod}"), pods.delete(&pod.name, &params)).await) {
        Ok(deleted) => Ok(deleted.is_some()),
        Err(error) if error.is_conflict() => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// For logs: what an error says with its sources.
#[must_use]
pub fn describe(blocked: &Blocked) -> String {
    api::chain(blocked)
}

#[cfg(test)]
#[path = "drain_tests.rs"]
mod tests;
