//! The end: what is left of flannel and of the migration is removed. It can be resumed at any point: a record on Calico's DaemonSet, put
//! there first and taken away last, says that it was begun and what is to be removed.

use std::time::Duration;

use flannel_migration_protocol::keys;
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, PersistentVolumeClaim, Pod, Service, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use k8s_openapi::{ClusterResourceScope, NamespaceResourceScope};
use kube::api::{Api, DeleteParams, ListParams};
use kube::runtime::watcher;
use kube::{Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tracing::{info, warn};

use crate::api::{self, Error, Result, Writer, found, read};
use crate::calico::ipam::Ipam;
use crate::cluster::{Node, Nodes, Watched};
use crate::discover::Name;
use crate::settings::Settings;
use crate::{images, selectors};

/// Annotation on Calico's DaemonSet: the record, as JSON.
pub const FINISHING: &str = "flannel-migration/finishing";
/// How long flannel's DaemonSet may take to be gone.
const GONE_LIMIT: Duration = Duration::from_mins(5);

/// How many nodes are cleaned at once.
const CLEANED_AT_ONCE: usize = 8;

/// How much longer than they may an agent may take to let an address go.
const KEPT_MARGIN: Duration = Duration::from_mins(1);

/// What is to be removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Namespace of flannel's objects.
    pub namespace: String,
    /// Its DaemonSet.
    pub daemon_set: String,
    /// Its ConfigMap.
    pub config_map: String,
    /// Its service account.
    pub service_account: Option<String>,
    /// Prefix of its annotations on nodes.
    pub annotation_prefix: String,
    /// Calico's DaemonSet.
    pub calico: String,
    /// Its namespace.
    pub calico_namespace: String,
    /// How long, in seconds, a node may keep its bridge's address.
    #[serde(default)]
    pub keep_seconds: u64,
}

impl Record {
    /// Of these settings.
    #[must_use]
    pub fn new(settings: &Settings, keep_connections: Duration) -> Self {
        let flannel = &settings.flannel;
        Self {
            namespace: flannel.daemon_set.namespace.clone(),
            daemon_set: flannel.daemon_set.name.clone(),
            config_map: flannel.config_map.clone(),
            service_account: flannel.service_account.clone(),
            annotation_prefix: flannel.annotation_prefix.clone(),
            calico: settings.calico.daemon_set.name.clone(),
            calico_namespace: settings.calico.daemon_set.namespace.clone(),
            keep_seconds: keep_connections.as_secs(),
        }
    }

    /// The record on Calico's DaemonSet, if a finish was begun.
    #[must_use]
    pub fn of(set: &DaemonSet) -> Option<Self> {
        serde_json::from_str(set.annotations().get(FINISHING)?).ok()
    }

    fn calico(&self) -> Name {
        Name { namespace: self.calico_namespace.clone(), name: self.calico.clone() }
    }
}

/// Finishes. Every node must be Calico's.
pub async fn finish(writer: &Writer, nodes: &Nodes, record: &Record) -> Result<()> {
    note(writer, record, Some(record)).await?;
    images::remove(writer, &record.calico_namespace).await?;
    selectors::free_calico(writer, &record.calico()).await?;
    flannel(writer, record).await?;
    let_go(writer, nodes, record).await?;
    let all = nodes.all();
    stream::iter(all.iter().map(|node| clean(writer, &node.name, record)))
        .buffer_unordered(CLEANED_AT_ONCE)
        .try_collect::<()>()
        .await?;
    namespace(writer, record).await?;
    note(writer, record, None).await?;
    info!(step = "finish", "flannel is gone, and so is what the migration needed");
    Ok(())
}

/// Waits until no node keeps an address for connections of its own, and gives these back to Calico.
async fn let_go(writer: &Writer, nodes: &Nodes, record: &Record) -> Result<()> {
    let limit = Duration::from_secs(record.keep_seconds) + KEPT_MARGIN;
    let mut told = Vec::new();
    let free = nodes.until(limit, |all| {
        let keep = all.iter().filter(|node| node.ready && !node.view.kept.is_absent());
        let names: Vec<String> = keep.map(|node| node.name.clone()).collect();
        if names.is_empty() {
            return Some(());
        }
        if told != names {
            info!(
                step = "finish",
                nodes = names.join(", "),
                "waiting for connections from these nodes themselves to their own pods"
            );
            told = names;
        }
        None
    });
    if free.await.is_none() {
        let what = format!("wait until nodes {} let the addresses of their bridges go", told.join(", "));
        return Err(Error::Timeout { what });
    }
    Ipam::new(writer.clone()).release_kept().await.map_err(|error| Error::Unexpected {
        what: "release kept addresses".to_owned(),
        why: api::chain(&error),
    })
}

async fn note(writer: &Writer, record: &Record, value: Option<&Record>) -> Result<()> {
    let text = value.and_then(|record| serde_json::to_string(record).ok());
    let sets: Api<DaemonSet> = Api::namespaced(writer.client.clone(), &record.calico_namespace);
    let patch = json!({ "metadata": { "annotations": { FINISHING: text } } });
    writer.merge("note on Calico's DaemonSet how far the finish is", &sets, &record.calico, &patch).await?;
    Ok(())
}

/// Deletes a namespaced object; whether it was there.
async fn delete<K>(writer: &Writer, namespace: &str, name: &str) -> Result<bool>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(writer.client.clone(), namespace);
    let what = format!("delete {} {namespace}/{name}", K::kind(&()));
    let gone = found(writer.write(what, api.delete(name, &DeleteParams::foreground())).await)?.is_some();
    if gone {
        info!(step = "finish", kind = %K::kind(&()), namespace, name, "deleted");
    }
    Ok(gone)
}

async fn flannel(writer: &Writer, record: &Record) -> Result<()> {
    delete::<DaemonSet>(writer, &record.namespace, &record.daemon_set).await?;
    let sets: Api<DaemonSet> = Api::namespaced(writer.client.clone(), &record.namespace);
    let config = watcher::Config::default().fields(&format!("metadata.name={}", record.daemon_set));
    let watched: Watched<DaemonSet> = Watched::new("flannel's DaemonSet", sets, config).await?;
    watched
        .until(GONE_LIMIT, |sets| sets.is_empty().then_some(()))
        .await
        .ok_or_else(|| Error::Timeout { what: "wait until flannel's DaemonSet is gone".to_owned() })?;
    if !record.config_map.is_empty() {
        delete::<ConfigMap>(writer, &record.namespace, &record.config_map).await?;
    }
    if let Some(account) = record.service_account.as_deref().filter(|account| *account != "default") {
        rights(writer, &record.namespace, account).await?;
        delete::<ServiceAccount>(writer, &record.namespace, account).await?;
    }
    Ok(())
}

/// flannel's cluster role and its binding: those that nobody else uses.
async fn rights(writer: &Writer, namespace: &str, account: &str) -> Result<()> {
    let bindings: Api<ClusterRoleBinding> = Api::all(writer.client.clone());
    let all = read("list ClusterRoleBindings", bindings.list(&ListParams::default())).await?.items;
    for binding in all.iter().filter(|binding| is_only_for(binding, namespace, account)) {
        let name = binding.name_any();
        let role = &binding.role_ref.name;
        let shared = all.iter().any(|other| {
            other.name_any() != name && other.role_ref.kind == "ClusterRole" && other.role_ref.name == *role
        });
        // The role first: it is found by its binding. Roles that come with Kubernetes or serve others stay.
        if binding.role_ref.kind == "ClusterRole" && !shared && role.contains("flannel") {
            cluster_wide::<ClusterRole>(writer, role).await?;
        }
        cluster_wide::<ClusterRoleBinding>(writer, &name).await?;
    }
    Ok(())
}

async fn cluster_wide<K>(writer: &Writer, name: &str) -> Result<()>
where
    K: Resource<DynamicType = (), Scope = ClusterResourceScope> + Clone + std::fmt::Debug + DeserializeOwned,
{
    let (kind, api) = (K::kind(&()), Api::<K>::all(writer.client.clone()));
    let params = DeleteParams::default();
    let deleted = api.delete(name, &params);
    if found(writer.write(format!("delete {kind} {name}"), deleted).await)?.is_some() {
        info!(step = "finish", %kind, name, "deleted");
    }
    Ok(())
}

fn is_only_for(binding: &ClusterRoleBinding, namespace: &str, account: &str) -> bool {
    let subjects = binding.subjects.as_deref().unwrap_or_default();
    !subjects.is_empty()
        && subjects.iter().all(|subject| {
            subject.kind == "ServiceAccount"
                && subject.name == account
                && subject.namespace.as_deref() == Some(namespace)
        })
}

/// What is removed from a node: flannel's annotations and all keys of the migration but its administrator's. By now no agent has
/// anything to say any more, so that its keys go too.
fn leftovers<'a>(
    labels: impl Iterator<Item = &'a String>,
    annotations: impl Iterator<Item = &'a String>,
    prefix: &str,
) -> Value {
    let flannels = format!("{prefix}/");
    let ours = |key: &str| {
        keys::KEYS.iter().any(|known| {
            known.name == key && known.writer != flannel_migration_protocol::Writer::Administrator
        })
    };
    let gone = |all: &mut dyn Iterator<Item = &'a String>| -> Map<String, Value> {
        let gone = all.filter(|key| ours(key) || key.starts_with(&flannels));
        gone.map(|key| (key.clone(), Value::Null)).collect()
    };
    json!({ "labels": gone(&mut labels.into_iter()), "annotations": gone(&mut annotations.into_iter()) })
}

async fn clean(writer: &Writer, node: &str, record: &Record) -> Result<()> {
    let nodes: Api<Node> = Api::all(writer.client.clone());
    let what = format!("clean node {node}");
    let Some(now) = found(read(what.as_str(), nodes.get(node)).await)? else { return Ok(()) };
    let patch = leftovers(now.labels().keys(), now.annotations().keys(), &record.annotation_prefix);
    let nothing = |part: &str| patch.get(part).and_then(Value::as_object).is_none_or(Map::is_empty);
    if nothing("labels") && nothing("annotations") {
        return Ok(());
    }
    found(writer.merge(what, &nodes, node, &json!({ "metadata": patch })).await)?;
    Ok(())
}

/// flannel's namespace, if it was made for flannel and holds nothing else.
async fn namespace(writer: &Writer, record: &Record) -> Result<()> {
    let name = &record.namespace;
    let namespaces: Api<Namespace> = Api::all(writer.client.clone());
    let Some(namespace) = found(read("read flannel's namespace", namespaces.get(name)).await)? else {
        return Ok(());
    };
    let made_for_flannel =
        name == "kube-flannel" || namespace.labels().get("k8s-app").is_some_and(|app| app == "flannel");
    if !made_for_flannel || namespace.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    let mut others = Vec::new();
    others.extend(list::<DaemonSet>(writer, name).await?);
    others.extend(list::<Deployment>(writer, name).await?);
    others.extend(list::<StatefulSet>(writer, name).await?);
    others.extend(list::<Job>(writer, name).await?);
    others.extend(list::<CronJob>(writer, name).await?);
    others.extend(list::<Service>(writer, name).await?);
    others.extend(list::<PersistentVolumeClaim>(writer, name).await?);
    others.extend(list::<Pod>(writer, name).await?);
    others.extend(
        list::<ConfigMap>(writer, name)
            .await?
            .into_iter()
            .filter(|object| object != "ConfigMap kube-root-ca.crt"),
    );
    others.extend(
        list::<ServiceAccount>(writer, name)
            .await?
            .into_iter()
            .filter(|object| object != "ServiceAccount default"),
    );
    if others.is_empty() {
        found(
            writer
                .write(format!("delete namespace {name}"), namespaces.delete(name, &DeleteParams::default()))
                .await,
        )?;
        info!(step = "finish", kind = "Namespace", name, "deleted");
    } else {
        warn!(
            step = "finish",
            namespace = name,
            others = others.join(", "),
            "namespace kept: it holds other objects"
        );
    }
    Ok(())
}

async fn list<K>(writer: &Writer, namespace: &str) -> Result<Vec<String>>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned,
{
    let kind = K::kind(&());
    let api: Api<K> = Api::namespaced(writer.client.clone(), namespace);
    let objects =
        read(format!("list {kind}s of {namespace}"), api.list_metadata(&ListParams::default())).await?;
    let there = objects.items.iter().filter(|object| object.metadata.deletion_timestamp.is_none());
    Ok(there.map(|object| format!("{kind} {}", object.name_any())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_from_calicos_daemon_set() {
        let record = Record::new(&crate::settings::tests::settings(), Duration::from_mins(10));
        let mut set = DaemonSet::default();
        assert_eq!(Record::of(&set), None);
        set.annotations_mut().insert(FINISHING.into(), serde_json::to_string(&record).unwrap());
        assert_eq!(Record::of(&set), Some(record));
    }

    #[test]
    fn a_node_keeps_what_is_neither_flannels_nor_ours() {
        let annotations =
            ["f.example/public-ip", "projectcalico.org/IPv4Address", keys::REPORT, keys::STRATEGY, "mine"];
        let labels = [keys::NETWORK, keys::STATE, keys::PAUSE, "kubernetes.io/os"];
        let (labels, annotations) = (labels.map(str::to_owned), annotations.map(str::to_owned));
        let patch = leftovers(labels.iter(), annotations.iter(), "f.example");
        assert_eq!(patch["labels"], json!({ keys::NETWORK: null, keys::STATE: null }));
        assert_eq!(patch["annotations"], json!({ "f.example/public-ip": null, keys::REPORT: null }));
    }

    #[test]
    fn a_binding_that_serves_others_stays() {
        let binding = |subjects: &str| -> ClusterRoleBinding {
            serde_saphyr::from_str(&format!(
                "roleRef: {{apiGroup: x, kind: ClusterRole, name: flannel}}\nsubjects: [{subjects}]"
            ))
            .unwrap()
        };
        let flannel = "{kind: ServiceAccount, name: flannel, namespace: kube-flannel}";
        assert!(is_only_for(&binding(flannel), "kube-flannel", "flannel"));
        assert!(!is_only_for(
            &binding(&format!("{flannel}, {{kind: User, name: u}}")),
            "kube-flannel",
            "flannel"
        ));
        assert!(!is_only_for(&binding(""), "kube-flannel", "flannel"));
    }
}
