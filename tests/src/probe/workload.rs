//! The workloads that are probed: their manifests (pure), and putting them into a cluster and out of it.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::Error;
use super::flow::ECHO;
use super::watch::client;

/// The namespace of everything here.
pub const NAMESPACE: &str = "probe";
/// The Service with a cluster address.
pub const SERVICE: &str = "web";
/// The Service with a port on every node.
pub const NODE_PORT_SERVICE: &str = "web-nodeport";
/// The image, which every node must have already.
pub const IMAGE: &str = "docker.io/flannel-migration/echo:bed";
const WEB: &str = "web";
const OWNER: &str = "flannel-migration-prober";
const REQUEST: Duration = Duration::from_secs(10);

/// What to put into the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workloads {
    /// The image of all pods.
    pub image: String,
    /// Replicas of the `Deployment` behind the Services.
    pub web: u32,
    /// Pods wanted on every node, those of others included; the missing ones are added as fillers.
    pub pods_per_node: Option<u32>,
    /// Port of the TCP echo.
    pub echo_port: u16,
    /// Port of the HTTP answer.
    pub http_port: u16,
}

impl Default for Workloads {
    fn default() -> Self {
        Self { image: IMAGE.to_owned(), web: 6, pods_per_node: None, echo_port: 7, http_port: 8080 }
    }
}

impl Workloads {
    fn container(&self) -> Value {
        json!({
            "name": "echo",
            "image": self.image,
            "imagePullPolicy": "IfNotPresent",
            "env": [
                {"name": "ECHO_PORT", "value": self.echo_port.to_string()},
                {"name": "HTTP_PORT", "value": self.http_port.to_string()},
            ],
            "ports": [{"name": "http", "containerPort": self.http_port}],
        })
    }

    /// A pod whose readiness is looked at every `period` seconds.
    fn pod(&self, period: u32, more: Value) -> Value {
        let mut container = self.container();
        let probe = json!({"tcpSocket": {"port": "http"}, "periodSeconds": period, "timeoutSeconds": 1});
        merge(&mut container, json!({"readinessProbe": probe}));
        let mut spec = json!({
            "containers": [container],
            "terminationGracePeriodSeconds": 2,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
        });
        merge(&mut spec, more);
        spec
    }

    fn daemon_set(&self, name: &str) -> Value {
        let everywhere = json!({"tolerations": [{"operator": "Exists"}]});
        controller("DaemonSet", name, &self.pod(2, everywhere), json!({}))
    }

    fn web(&self) -> Value {
        let spread = json!({
            "tolerations": [
                {"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"},
                {"key": "node-role.kubernetes.io/master", "operator": "Exists"},
            ],
            "topologySpreadConstraints": [{
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {"app": WEB}},
            }],
        });
        controller("Deployment", WEB, &self.pod(2, spread), json!({"replicas": self.web}))
    }

    fn filler(&self, node: &str, count: u32) -> Value {
        let there = json!({
            "nodeSelector": {"kubernetes.io/hostname": node},
            "tolerations": [{"operator": "Exists"}],
        });
        let name = format!("filler-{node}");
        // Looked at less often: a hundred pods on a node would keep its kubelet busy with nothing else.
        controller("Deployment", &name, &self.pod(10, there), json!({"replicas": count}))
    }

    fn service(&self, name: &str, kind: &str) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {
                "type": kind,
                "ipFamilyPolicy": "PreferDualStack",
                "selector": {"app": WEB},
                "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": self.http_port}],
            },
        })
    }
}

fn controller(kind: &str, name: &str, pod: &Value, more: Value) -> Value {
    let labels = json!({"app": name});
    let mut spec = json!({
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    });
    merge(&mut spec, more);
    json!({
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": spec,
    })
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}

/// How many fillers each node needs to have `wanted` pods.
fn fillers(wanted: u32, nodes: &[String], pods: &[Pod]) -> BTreeMap<String, u32> {
    let ended = |pod: &Pod| {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        matches!(phase, Some("Succeeded" | "Failed"))
    };
    let is_filler = |pod: &Pod| pod.labels().get("app").is_some_and(|app| app.starts_with("filler-"));
    let on =
        |pod: &Pod, node: &str| pod.spec.as_ref().is_some_and(|spec| spec.node_name.as_deref() == Some(node));
    nodes
        .iter()
        .map(|node| {
            let others = pods.iter().filter(|pod| on(pod, node) && !ended(pod) && !is_filler(pod)).count();
            (node.clone(), wanted.saturating_sub(u32::try_from(others).unwrap_or(u32::MAX)))
        })
        .collect()
}

/// Puts the workloads into the cluster and waits until all their pods are ready; again, it changes what differs.
pub async fn deploy(client: &Client, workloads: &Workloads, limit: Duration) -> Result<(), Error> {
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
    apply(&Api::<Namespace>::all(client.clone()), NAMESPACE, &namespace).await?;
    for name in ECHO {
        apply(&namespaced::<DaemonSet>(client), name, &workloads.daemon_set(name)).await?;
    }
    apply(&namespaced::<Deployment>(client), WEB, &workloads.web()).await?;
    let services = namespaced::<Service>(client);
    apply(&services, SERVICE, &workloads.service(SERVICE, "ClusterIP")).await?;
    apply(&services, NODE_PORT_SERVICE, &workloads.service(NODE_PORT_SERVICE, "NodePort")).await?;
    wait_ready(client, limit).await?;
    if let Some(wanted) = workloads.pods_per_node {
        let all = ListParams::default();
        let nodes = request("list nodes", Api::<Node>::all(client.clone()).list(&all)).await?;
        let pods = request("list pods", Api::<Pod>::all(client.clone()).list(&all)).await?;
        let nodes: Vec<String> = nodes.iter().map(ResourceExt::name_any).collect();
        for (node, count) in fillers(wanted, &nodes, &pods.items) {
            let name = format!("filler-{node}");
            apply(&namespaced::<Deployment>(client), &name, &workloads.filler(&node, count)).await?;
        }
        wait_ready(client, limit).await?;
    }
    Ok(())
}

/// Waits until every workload of the namespace has all its pods ready.
pub async fn wait_ready(client: &Client, limit: Duration) -> Result<(), Error> {
    let wait = async {
        let all = ListParams::default();
        let daemons = namespaced::<DaemonSet>(client);
        for found in request("list DaemonSets", daemons.list(&all)).await? {
            reach(&daemons, &found.name_any(), daemon_set_is_ready).await?;
        }
        let deployments = namespaced::<Deployment>(client);
        for found in request("list Deployments", deployments.list(&all)).await? {
            reach(&deployments, &found.name_any(), deployment_is_ready).await?;
        }
        Ok(())
    };
    match tokio::time::timeout(limit, wait).await {
        Ok(result) => result,
        Err(_) => Err(Error::NotDeployed(unready(client).await?)),
    }
}

/// Takes the workloads out of the cluster, and waits until they are gone.
pub async fn remove(client: &Client, limit: Duration) -> Result<(), Error> {
    let namespaces = Api::<Namespace>::all(client.clone());
    let Some(found) = request("read the namespace", namespaces.get_opt(NAMESPACE)).await? else {
        return Ok(());
    };
    let uid = found.uid().unwrap_or_default();
    request("delete the namespace", namespaces.delete(NAMESPACE, &DeleteParams::foreground())).await?;
    let gone = await_condition(namespaces, NAMESPACE, conditions::is_deleted(&uid));
    match tokio::time::timeout(limit, gone).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(source)) => Err(Error::Wait { what: NAMESPACE.to_owned(), source: Box::new(source) }),
        Err(_) => Err(Error::Silent { what: "delete the namespace" }),
    }
}

/// [`deploy`] for callers without an async runtime; must not be called inside one.
pub fn deploy_to(kubeconfig: &Path, workloads: &Workloads, limit: Duration) -> Result<(), Error> {
    block_on(async { Box::pin(deploy(&client(kubeconfig).await?, workloads, limit)).await })
}

/// [`remove`] for callers without an async runtime; must not be called inside one.
pub fn remove_from(kubeconfig: &Path, limit: Duration) -> Result<(), Error> {
    block_on(async { remove(&client(kubeconfig).await?, limit).await })
}

fn block_on<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(Error::Thread)?.block_on(work)
}

fn namespaced<K>(client: &Client) -> Api<K>
where
    K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
{
    Api::namespaced(client.clone(), NAMESPACE)
}

async fn request<T>(what: &'static str, answer: impl Future<Output = kube::Result<T>>) -> Result<T, Error> {
    match tokio::time::timeout(REQUEST, answer).await {
        Ok(result) => result.map_err(|source| Error::Api { what, source: Box::new(source) }),
        Err(_) => Err(Error::Silent { what }),
    }
}

async fn apply<K>(api: &Api<K>, name: &str, manifest: &Value) -> Result<(), Error>
where
    K: Clone + DeserializeOwned + Debug + Serialize,
{
    let params = PatchParams::apply(OWNER).force();
    request("apply the workloads", api.patch(name, &params, &Patch::Apply(manifest))).await.map(drop)
}

async fn reach<K>(api: &Api<K>, name: &str, ready: fn(&K) -> bool) -> Result<(), Error>
where
    K: Clone + Debug + Send + DeserializeOwned + Resource + 'static,
{
    let condition = |object: Option<&K>| object.is_some_and(ready);
    await_condition(api.clone(), name, condition)
        .await
        .map(drop)
        .map_err(|source| Error::Wait { what: name.to_owned(), source: Box::new(source) })
}

fn daemon_set_is_ready(set: &DaemonSet) -> bool {
    set.status.as_ref().is_some_and(|status| {
        status.observed_generation == set.metadata.generation
            && status.desired_number_scheduled > 0
            && status.number_ready == status.desired_number_scheduled
            && status.updated_number_scheduled == Some(status.desired_number_scheduled)
    })
}

fn deployment_is_ready(deployment: &Deployment) -> bool {
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    deployment.status.as_ref().is_some_and(|status| {
        status.observed_generation == deployment.metadata.generation
            && status.ready_replicas.unwrap_or(0) == wanted
            && status.updated_replicas.unwrap_or(0) == wanted
            && status.replicas.unwrap_or(0) == wanted
    })
}

/// Names the pods that are not ready.
async fn unready(client: &Client) -> Result<String, Error> {
    let pods = request("list pods", namespaced::<Pod>(client).list(&ListParams::default())).await?;
    let ready = |pod: &Pod| {
        let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
        conditions.into_iter().any(|found| found.type_ == "Ready" && found.status == "True")
    };
    let names: Vec<String> = pods.iter().filter(|pod| !ready(pod)).map(ResourceExt::name_any).collect();
    Ok(format!("not ready in namespace {NAMESPACE}: {}", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_manifest_is_what_its_type_says() {
        let workloads = Workloads::default();
        let echo: DaemonSet = serde_json::from_value(workloads.daemon_set("echo")).unwrap();
        let pod = echo.spec.unwrap().template.spec.unwrap();
        assert_eq!(pod.tolerations.unwrap()[0].operator.as_deref(), Some("Exists"));
        assert_eq!(pod.containers[0].image.as_deref(), Some(IMAGE));
        assert!(pod.containers[0].readiness_probe.is_some());
        let web: Deployment = serde_json::from_value(workloads.web()).unwrap();
        let spec = web.spec.unwrap();
        assert_eq!(spec.replicas, Some(6));
        assert_eq!(spec.template.spec.unwrap().topology_spread_constraints.unwrap().len(), 1);
        let filler: Deployment = serde_json::from_value(workloads.filler("n1", 9)).unwrap();
        assert_eq!(
            filler.spec.unwrap().template.spec.unwrap().node_selector.unwrap()["kubernetes.io/hostname"],
            "n1"
        );
        let service: Service = serde_json::from_value(workloads.service("web-nodeport", "NodePort")).unwrap();
        assert_eq!(service.spec.unwrap().type_.as_deref(), Some("NodePort"));
    }

    #[test]
    fn fillers_bring_every_node_to_the_number_wanted() {
        let pod = |node: &str, app: &str, phase: &str| -> Pod {
            serde_json::from_value(json!({"metadata": {"labels": {"app": app}},
                "spec": {"nodeName": node, "containers": []}, "status": {"phase": phase}}))
            .unwrap()
        };
        let pods = [
            pod("n1", "echo", "Running"),
            pod("n1", "done", "Succeeded"),
            pod("n1", "filler-n1", "Running"),
            pod("n2", "echo", "Running"),
            pod("n2", "web", "Pending"),
        ];
        let nodes = ["n1".to_owned(), "n2".to_owned()];
        let expected =
            |wanted: u32| BTreeMap::from([("n1".to_owned(), wanted - 1), ("n2".to_owned(), wanted - 2)]);
        assert_eq!(fillers(30, &nodes, &pods), expected(30));
        assert_eq!(fillers(1, &nodes, &pods)["n2"], 0);
    }
}
