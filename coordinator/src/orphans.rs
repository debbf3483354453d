//! flannel's pods that no DaemonSet has any more.
//!
//! Whoever deletes flannel's DaemonSet and installs it again leaves its pods to Kubernetes' garbage collector, which takes minutes, and
//! after an outage of the API server was seen to take none within six. The new DaemonSet neither ends them nor makes its own beside them,
//! and a node that flannel is to leave would wait for as long.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams, Preconditions};
use tracing::warn;

use crate::api::{Result, Writer, found, read};
use crate::discover::Name;

/// Deletes them from nodes that flannel is to leave.
///
/// # Errors
///
/// The API server refuses or doesn't answer, or the leadership is lost.
pub async fn end(writer: &Writer, set: &Name, nodes: &[&str]) -> Result<()> {
    if nodes.is_empty() {
        return Ok(());
    }
    let sets: Api<DaemonSet> = Api::namespaced(writer.client.clone(), &set.namespace);
    let now = found(read(format!("read DaemonSet {set}"), sets.get(&set.name)).await)?;
    let uid = now.and_then(|set| set.uid()).unwrap_or_default();
    let pods: Api<Pod> = Api::namespaced(writer.client.clone(), &set.namespace);
    for node in nodes {
        let on_it = ListParams::default().fields(&format!("spec.nodeName={node}"));
        let there =
            read(format!("list the pods of {} on node {node}", set.namespace), pods.list(&on_it)).await?;
        for pod in there.items.iter().filter(|pod| is_orphan(pod, &set.name, &uid)) {
            let name = pod.name_any();
            let preconditions = Preconditions { uid: pod.uid(), resource_version: None };
            let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
            let what = format!("delete pod {}/{name}", set.namespace);
            match found(writer.write(what, pods.delete(&name, &params)).await) {
                Ok(_) => {
                    warn!(node, step = "orphan", pod = name, daemonset = %set, "its DaemonSet is gone: deleted");
                }
                // Another pod of that name by now.
                Err(error) if error.is_conflict() => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Whether a pod was made by a DaemonSet of this name that isn't the one with this UID, and isn't being deleted.
fn is_orphan(pod: &Pod, set: &str, uid: &str) -> bool {
    let made = pod.owner_references().iter().any(|owner| {
        owner.controller == Some(true) && owner.kind == "DaemonSet" && owner.name == set && owner.uid != uid
    });
    made && pod.metadata.deletion_timestamp.is_none()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    #[rstest]
    #[case::of_the_one_that_was_deleted("old", "DaemonSet", "kube-flannel-ds", false, true)]
    #[case::of_the_one_that_is_there("new", "DaemonSet", "kube-flannel-ds", false, false)]
    #[case::of_another("old", "DaemonSet", "kube-proxy", false, false)]
    #[case::of_another_kind("old", "ReplicaSet", "kube-flannel-ds", false, false)]
    #[case::that_is_being_deleted("old", "DaemonSet", "kube-flannel-ds", true, false)]
    fn a_pod(
        #[case] owner: &str,
        #[case] kind: &str,
        #[case] name: &str,
        #[case] deleted: bool,
        #[case] orphan: bool,
    ) {
        let owner =
            json!({ "apiVersion": "apps/v1", "kind": kind, "name": name, "uid": owner, "controller": true });
        let deleted = deleted.then_some("2026-01-02T03:04:05Z");
        let metadata = json!({ "name": "p", "ownerReferences": [owner], "deletionTimestamp": deleted });
        let pod: Pod = serde_json::from_value(json!({ "metadata": metadata })).unwrap();
        assert_eq!(is_orphan(&pod, "kube-flannel-ds", "new"), orphan);
        assert!(!is_orphan(&Pod::default(), "kube-flannel-ds", "new"), "of nobody");
    }
}
