//! The node selectors that make the network label move the pods of flannel's and Calico's DaemonSets.
//!
//! A changed pod template would make the DaemonSet controller restart every pod. While the update strategy is `OnDelete` it doesn't, and
//! still removes pods from nodes that the selector no longer matches.

use std::time::Duration;

use flannel_migration_protocol::{Network, keys};
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::{Api, ListParams};
use kube::runtime::watcher;
use serde_json::{Value, json};
use tracing::{info, warn};

use crate::api::{CONFLICT_RETRIES, Error, Result, Writer, read};
use crate::cluster::Watched;
use crate::discover::Name;
use crate::names;

/// How long the DaemonSet controller may take to see a change.
const OBSERVE_LIMIT: Duration = Duration::from_mins(1);
/// How long Calico's pods may take to be ready at the end.
const READY_LIMIT: Duration = Duration::from_mins(10);
/// The label by which the DaemonSet controller knows which template a pod was made from.
const REVISION_LABEL: &str = "controller-revision-hash";

fn selects(set: &DaemonSet) -> Option<String> {
    let selector = set.spec.as_ref()?.template.spec.as_ref()?.node_selector.as_ref()?;
    selector.get(keys::NETWORK).cloned()
}

fn strategy(set: &DaemonSet) -> Value {
    let strategy = set.spec.as_ref().and_then(|spec| spec.update_strategy.clone()).unwrap_or_default();
    serde_json::to_value(strategy).unwrap_or_else(|_| json!({ "type": "RollingUpdate" }))
}

/// The patch that sets a selector without a restart; the original strategy is kept in an annotation.
fn set_aside(set: &DaemonSet, selector: Option<Network>) -> Value {
    let kept =
        set.annotations().get(names::ORIGINAL_STRATEGY).cloned().unwrap_or_else(|| strategy(set).to_string());
    json!({
        "metadata": { "resourceVersion": set.resource_version(), "annotations": { names::ORIGINAL_STRATEGY: kept } },
        "spec": {
            "updateStrategy": { "type": "OnDelete", "rollingUpdate": null },
            "template": { "spec": { "nodeSelector": { keys::NETWORK: selector.map(Network::as_str) } } },
        },
    })
}

async fn swap(
    writer: &Writer,
    name: &Name,
    what: &str,
    patch: impl Fn(&DaemonSet) -> Option<Value>,
) -> Result<Option<DaemonSet>> {
    let sets: Api<DaemonSet> = Api::namespaced(writer.client.clone(), &name.namespace);
    let what = format!("{what} (DaemonSet {name})");
    let mut last = None;
    for _ in 0..CONFLICT_RETRIES {
        let now = read(what.as_str(), sets.get(&name.name)).await?;
        let Some(patch) = patch(&now) else { return Ok(None) };
        match writer.merge(what.as_str(), &sets, &name.name, &patch).await {
            Ok(written) => return Ok(Some(written)),
            Err(error) if error.is_conflict() => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(last.unwrap_or(Error::Timeout { what }))
}

/// Ties flannel to nodes labelled `flannel`. All nodes it is to stay on must carry the label before.
pub async fn tie_flannel(writer: &Writer, name: &Name) -> Result<()> {
    let tied = swap(writer, name, "tie flannel to labelled nodes", |set| {
        (selects(set).as_deref() != Some(Network::Flannel.as_str()))
            .then(|| set_aside(set, Some(Network::Flannel)))
    })
    .await?;
    if tied.is_some() {
        info!(step = "selector", daemonset = %name, "flannel's pods follow the network label; none was restarted");
    }
    Ok(())
}

/// Frees flannel from the label, where it was tied to it. Its pods on nodes that came back are of the tied template, and are restarted by
/// their DaemonSet as it restarts them at an update; the nodes' network doesn't notice.
pub async fn free_flannel(writer: &Writer, name: &Name) -> Result<()> {
    free(writer, name, false).await
}

/// Frees Calico from the label without restarting its pods: apart from the selector, which has done its work, they are what the new
/// template would make. So they are declared to be of the new template.
pub async fn free_calico(writer: &Writer, name: &Name) -> Result<()> {
    free(writer, name, true).await
}

async fn free(writer: &Writer, name: &Name, keep_pods: bool) -> Result<()> {
    swap(writer, name, "free from the network label", |set| selects(set).map(|_| set_aside(set, None)))
        .await?;
    let sets: Api<DaemonSet> = Api::namespaced(writer.client.clone(), &name.namespace);
    let config = watcher::Config::default().fields(&format!("metadata.name={}", name.name));
    let watched: Watched<DaemonSet> = Watched::new("the DaemonSet", sets, config).await?;
    let observed = |set: &DaemonSet| {
        set.status.as_ref().and_then(|status| status.observed_generation) >= set.metadata.generation
    };
    let set = watched
        .until(OBSERVE_LIMIT, |sets| sets.iter().find(|set| selects(set).is_none() && observed(set)).cloned())
        .await
        .ok_or_else(|| Error::Timeout { what: format!("wait for the controller of DaemonSet {name}") })?;
    if set.annotations().contains_key(names::ORIGINAL_STRATEGY) {
        if keep_pods && let Err(error) = relabel_pods(writer, name, &set).await {
            // Then the DaemonSet controller restarts them one by one, which is harmless and waited for.
            warn!(
                step = "selector",
                error = crate::api::chain(&error),
                "Calico's pods are restarted by their DaemonSet"
            );
        }
        swap(writer, name, "restore the update strategy", |set| {
            let kept = set.annotations().get(names::ORIGINAL_STRATEGY)?;
            let strategy: Value = serde_json::from_str(kept).unwrap_or_else(|_| json!({ "type": "RollingUpdate" }));
            Some(json!({
                "metadata": { "resourceVersion": set.resource_version(), "annotations": { names::ORIGINAL_STRATEGY: null } },
                "spec": { "updateStrategy": strategy },
            }))
        })
        .await?;
    }
    let ready = watched.until(READY_LIMIT, |sets| {
        let set = sets.first()?;
        let status = set.status.as_ref()?;
        let all = status.desired_number_scheduled;
        let settled = !set.annotations().contains_key(names::ORIGINAL_STRATEGY) && observed(set);
        (settled && status.updated_number_scheduled.unwrap_or(0) >= all && status.number_ready >= all)
            .then_some(all)
    });
    let all = ready.await.ok_or_else(|| Error::Timeout {
        what: format!("wait until all pods of DaemonSet {name} are ready"),
    })?;
    info!(step = "selector", daemonset = %name, pods = all, "its pods no longer depend on the network label");
    Ok(())
}

async fn relabel_pods(writer: &Writer, name: &Name, set: &DaemonSet) -> Result<()> {
    let uid = set.uid();
    let owned = |owners: &[k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference]| {
        owners.iter().any(|owner| Some(&owner.uid) == uid.as_ref())
    };
    let revisions: Api<ControllerRevision> = Api::namespaced(writer.client.clone(), &name.namespace);
    let revisions =
        read("list revisions of Calico's DaemonSet", revisions.list(&ListParams::default())).await?;
    let newest = revisions
        .items
        .iter()
        .filter(|revision| owned(revision.owner_references()))
        .max_by_key(|revision| revision.revision);
    let hash = newest.and_then(|revision| revision.labels().get(REVISION_LABEL)).ok_or_else(|| {
        Error::Unexpected {
            what: format!("find the newest revision of DaemonSet {name}"),
            why: "there is none".to_owned(),
        }
    })?;
    let pods: Api<Pod> = Api::namespaced(writer.client.clone(), &name.namespace);
    for pod in read("list Calico's pods", pods.list(&ListParams::default())).await?.items {
        if owned(pod.owner_references()) && pod.labels().get(REVISION_LABEL) != Some(hash) {
            let patch = json!({ "metadata": { "uid": pod.uid(), "labels": { REVISION_LABEL: hash } } });
            writer
                .merge(
                    format!("declare pod {} to be of the new template", pod.name_any()),
                    &pods,
                    &pod.name_any(),
                    &patch,
                )
                .await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(yaml: &str) -> DaemonSet {
        serde_saphyr::from_str(yaml).unwrap()
    }

    const SET: &str = "
metadata: {name: d, resourceVersion: '7'}
spec:
  selector: {}
  updateStrategy: {type: RollingUpdate, rollingUpdate: {maxUnavailable: 1}}
  template: {spec: {containers: [], nodeSelector: {a: b, projectcalico.org/node-network-during-migration: calico}}}";

    #[test]
    fn a_selector_is_changed_without_a_restart_and_the_strategy_is_kept() {
        let patch = set_aside(&set(SET), None);
        assert_eq!(patch["spec"]["updateStrategy"], json!({ "type": "OnDelete", "rollingUpdate": null }));
        assert_eq!(patch["spec"]["template"]["spec"]["nodeSelector"], json!({ keys::NETWORK: null }));
        assert_eq!(patch["metadata"]["resourceVersion"], "7");
        let kept: Value = serde_json::from_str(
            patch["metadata"]["annotations"][names::ORIGINAL_STRATEGY].as_str().unwrap(),
        )
        .unwrap();
        assert_eq!(kept, json!({ "type": "RollingUpdate", "rollingUpdate": { "maxUnavailable": 1 } }));
    }

    #[test]
    fn the_kept_strategy_is_not_overwritten_by_a_repetition() {
        let mut set = set(SET);
        set.annotations_mut().insert(names::ORIGINAL_STRATEGY.into(), "first".into());
        assert_eq!(
            set_aside(&set, Some(Network::Flannel))["metadata"]["annotations"][names::ORIGINAL_STRATEGY],
            "first"
        );
    }
}
