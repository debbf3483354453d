//! flannel's pods that no DaemonSet has any more.
//!
//! Whoever deletes flannel's DaemonSet and installs it again leaves its pods to Kubernetes' garbage collector. After an outage of the API
//! server it was seen to leave one for six minutes, and a node that flannel is to leave waited for as long.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::{Api, ListParams};
use tracing::warn;

use crate::api::{Result, Writer, found, read};
use crate::discover::Name;
use crate::drain::{self, PodName};

/// Deletes them from nodes that flannel is to leave.
///
/// # Errors
///
/// The API server refuses or doesn't answer, or the leadership is lost.
pub async fn end(writer: &Writer, set: &Name, nodes: &[String]) -> Result<()> {
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
            let pod = PodName::of(pod);
            if drain::delete(writer, &pod).await? {
                warn!(node, step = "orphan", pod = %pod, daemonset = %set, "its DaemonSet is gone: deleted");
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
    use std::sync::{Arc, Mutex};

    use http::{Method, Request, Response};
    use kube::Client;
    use kube::client::Body;
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;
    use crate::leader::Leadership;

    fn made_by(name: &str, uid: &str, kind: &str, set: &str) -> Value {
        let owner =
            json!({ "apiVersion": "apps/v1", "kind": kind, "name": set, "uid": uid, "controller": true });
        json!({ "metadata": { "name": name, "namespace": "kube-flannel", "uid": name, "ownerReferences": [owner] } })
    }

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
        let mut pod = made_by("p", owner, kind, name);
        if deleted {
            pod["metadata"]["deletionTimestamp"] = json!("2026-01-02T03:04:05Z");
        }
        let pod: Pod = serde_json::from_value(pod).unwrap();
        assert_eq!(is_orphan(&pod, "kube-flannel-ds", "new"), orphan);
        assert!(!is_orphan(&Pod::default(), "kube-flannel-ds", "new"), "of nobody");
    }

    #[rstest]
    #[case::installed_again(Some("new"), &["left"])]
    #[case::not_installed_again(None, &["left", "present"])]
    #[tokio::test]
    async fn only_pods_that_no_daemon_set_has_are_deleted(
        #[case] there: Option<&'static str>,
        #[case] expected: &[&str],
    ) {
        let deleted = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&deleted);
        let service = tower::service_fn(move |request: Request<Body>| {
            let seen = Arc::clone(&seen);
            async move {
                let (parts, body) = request.into_parts();
                let path = parts.uri.path();
                let mut status = 200;
                let answer = if parts.method == Method::DELETE {
                    let body: Value = serde_json::from_slice(&body.collect_bytes().await.unwrap()).unwrap();
                    let name = path.rsplit('/').next().unwrap().to_owned();
                    assert_eq!(body["preconditions"]["uid"], json!(name));
                    seen.lock().unwrap().push(name);
                    json!({ "kind": "Status", "apiVersion": "v1", "status": "Success" })
                } else if path.ends_with("/pods") {
                    assert!(parts.uri.query().unwrap().contains("spec.nodeName%3Dn1"));
                    let pods = [("left", "old"), ("present", "new")]
                        .map(|(name, uid)| made_by(name, uid, "DaemonSet", "kube-flannel-ds"));
                    json!({ "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": pods })
                } else if let Some(uid) = there {
                    json!({ "kind": "DaemonSet", "apiVersion": "apps/v1", "metadata": { "name": "kube-flannel-ds", "uid": uid } })
                } else {
                    status = 404;
                    json!({ "kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404 })
                };
                Response::builder().status(status).body(Body::from(answer.to_string().into_bytes()))
            }
        });
        let writer = Writer::new(Client::new(service, "default"), Leadership::held_for_ever(), None);
        let set = Name { namespace: "kube-flannel".to_owned(), name: "kube-flannel-ds".to_owned() };
        end(&writer, &set, &["n1".to_owned()]).await.unwrap();
        assert_eq!(*deleted.lock().unwrap(), expected);
    }
}
