//! What an administrator asks for from a terminal: pause, resume, abort, rollback. Writes the administrator's keys only, so it needs no
//! leadership; the coordinator that leads reads them.

use flannel_migration_protocol::{Request, keys};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};

use crate::api::{Error, Result, found, read};
use crate::{finish, names};

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Something.
    For(Request),
    /// Nothing any more: the migration goes on.
    Resume,
}

/// Asks it of these nodes, of the whole cluster without any. Returns what to tell the person.
pub async fn ask(client: &Client, namespace: &str, ask: Ask, nodes: &[String]) -> Result<Vec<String>> {
    let jobs: Api<Job> = Api::namespaced(client.clone(), namespace);
    let job = found(read("read the Job", jobs.get(names::JOB)).await)?.ok_or_else(|| {
        refused(
            format!("there is no Job {namespace}/{}", names::JOB),
            "apply the manifests first: kubectl apply -k manifests",
        )
    })?;
    if is_complete(&job) {
        return Err(refused(
            format!("Job {namespace}/{} is complete: every node is migrated and flannel is gone", names::JOB),
            "there is nothing left to control; a cluster on Calico goes back to flannel by installing flannel anew",
        ));
    }
    if ask != Ask::Resume && finishing(client).await? {
        return Err(refused(
            "every node is migrated, and the removal of flannel has begun".to_owned(),
            "let it finish; before it, `coordinator pause` would have held it back",
        ));
    }
    let patch = |patch: Value| async move {
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        read("write the Job", jobs.patch(names::JOB, &params, &Patch::Merge(patch))).await
    };
    if nodes.is_empty() {
        patch(cluster_patch(ask)).await?;
        return cluster_told(client, ask, &job).await;
    }
    let api: Api<Node> = Api::all(client.clone());
    // All or none: a name that is misspelt shows before anything is written.
    for node in nodes {
        read(format!("read node {node}"), api.get(node)).await?;
    }
    for node in nodes {
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        read(format!("write node {node}"), api.patch(node, &params, &Patch::Merge(node_patch(ask)))).await?;
    }
    let mut told: Vec<String> = nodes.iter().map(|node| format!("node {node}: {}", words(ask))).collect();
    let suspended = job.spec.as_ref().is_some_and(|spec| spec.suspend == Some(true));
    if suspended && matches!(ask, Ask::For(Request::Rollback)) {
        patch(json!({ "spec": { "suspend": false } })).await?;
        told.push("the Job was suspended; it goes on until these nodes are back".to_owned());
    } else if suspended {
        told.push("the Job is suspended: nothing is done before `coordinator resume`".to_owned());
    }
    Ok(told)
}

/// Who writes, as the API server records it.
const MANAGER: &str = "flannel-migration-administrator";

fn refused(what: String, remedy: &str) -> Error {
    Error::Unexpected { what, why: remedy.to_owned() }
}

fn is_complete(job: &Job) -> bool {
    let conditions = job.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions
        .into_iter()
        .flatten()
        .any(|condition| condition.type_ == "Complete" && condition.status == "True")
}

async fn finishing(client: &Client) -> Result<bool> {
    let sets: Api<DaemonSet> = Api::all(client.clone());
    let sets = read("list DaemonSets", sets.list_metadata(&ListParams::default())).await?;
    Ok(sets.items.iter().any(|set| set.annotations().contains_key(finish::FINISHING)))
}

fn cluster_patch(ask: Ask) -> Value {
    let annotations = |request: Option<&str>| json!({ "annotations": { keys::REQUEST: request } });
    match ask {
        // After an abort there is no coordinator to do it.
        Ask::For(Request::Rollback) => {
            json!({ "metadata": annotations(Some(Request::Rollback.as_str())), "spec": { "suspend": false } })
        }
        Ask::For(request) => json!({ "metadata": annotations(Some(request.as_str())) }),
        Ask::Resume => json!({ "metadata": annotations(None), "spec": { "suspend": false } }),
    }
}

fn node_patch(ask: Ask) -> Value {
    match ask {
        Ask::For(Request::Pause) => json!({ "metadata": { "labels": { keys::PAUSE: "true" } } }),
        Ask::For(request) => json!({ "metadata": { "annotations": { keys::REQUEST: request.as_str() } } }),
        Ask::Resume => json!({ "metadata": {
            "labels": { keys::PAUSE: null },
            "annotations": { keys::REQUEST: null },
        } }),
    }
}

fn words(ask: Ask) -> &'static str {
    match ask {
        Ask::For(Request::Pause) => "not started until resumed; what has begun goes on to its end",
        Ask::For(Request::Abort) => "brought to rest by the shortest way, and not started until resumed",
        Ask::For(Request::Rollback) => "goes back to flannel, and stays there until resumed",
        Ask::Resume => "is migrated",
    }
}

async fn cluster_told(client: &Client, ask: Ask, job: &Job) -> Result<Vec<String>> {
    let mut told = vec![format!("every node: {}", words(ask))];
    match ask {
        Ask::For(Request::Abort | Request::Rollback) => {
            told.push(format!("the Job {} is suspended when that is done", job.name_any()));
        }
        Ask::For(Request::Pause) => {}
        Ask::Resume => {
            let nodes: Api<Node> = Api::all(client.clone());
            let all = read("list nodes", nodes.list_metadata(&ListParams::default())).await?;
            let held = all.items.iter().filter(|node| {
                node.labels().contains_key(keys::PAUSE) || node.annotations().contains_key(keys::REQUEST)
            });
            told.extend(held.map(|node| {
                format!("node {0} is still held by itself: coordinator resume {0}", node.name_any())
            }));
        }
    }
    Ok(told)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resuming_takes_back_whatever_was_asked() {
        let patch = cluster_patch(Ask::Resume);
        assert_eq!(patch["metadata"]["annotations"], json!({ keys::REQUEST: null }));
        assert_eq!(patch["spec"], json!({ "suspend": false }));
        let patch = node_patch(Ask::Resume);
        assert_eq!(patch["metadata"]["labels"], json!({ keys::PAUSE: null }));
        assert_eq!(patch["metadata"]["annotations"], json!({ keys::REQUEST: null }));
    }

    #[test]
    fn only_a_rollback_wakes_a_suspended_job() {
        assert_eq!(cluster_patch(Ask::For(Request::Rollback))["spec"], json!({ "suspend": false }));
        assert!(cluster_patch(Ask::For(Request::Abort)).get("spec").is_none());
        assert!(cluster_patch(Ask::For(Request::Pause)).get("spec").is_none());
    }
}
