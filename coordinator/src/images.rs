//! Calico's images on every node before the first node is disturbed: a pull that takes minutes, or fails, must not happen while a node
//! has no network of its own. A DaemonSet whose containers can't start is enough: to find that out, the kubelet pulls their images.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ContainerStatus, Node, Pod, PodSpec, PodStatus};
use kube::Client;
use kube::api::{Api, DeleteParams};
use kube::runtime::watcher;
use serde::Deserialize;
use serde_json::json;
use tracing::{info, warn};

use crate::api::{self, Writer, found, post};
use crate::cluster::Watched;
use crate::discover::CalicoDaemon;
use crate::{names, pages};

/// Why the images aren't everywhere.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call failed.
    #[error(transparent)]
    Api(#[from] api::Error),
    /// Not in time.
    #[error("Calico's images are not on all nodes after {} s: {}", limit.as_secs(), missing.iter().map(|(node, why)| format!("{node} ({why})")).collect::<Vec<_>>().join(", "))]
    Missing {
        /// The bound.
        limit: Duration,
        /// The nodes, and what is known about each.
        missing: BTreeMap<String, String>,
    },
    /// The DaemonSet can't be built.
    #[error("build the DaemonSet that pulls images")]
    Build(#[from] serde_json::Error),
}

impl Error {
    /// `CamelCase`, for events.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Api(error) => error.reason(),
            Self::Missing { .. } => "ImagesMissing",
            Self::Build(_) => "Internal",
        }
    }
}

/// The images that a kubelet reports. It reports only some (50 by default): an image that isn't listed may be there.
#[derive(Deserialize)]
struct Reported {
    metadata: Named,
    #[serde(default)]
    status: Images,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Images {
    images: Option<Vec<Names>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Names {
    names: Option<Vec<String>>,
}

impl Reported {
    /// Whether all the images are there, by their full names.
    fn has(&self, images: &[String]) -> bool {
        let there = || self.status.images.iter().flatten().flat_map(|image| image.names.iter().flatten());
        images.iter().all(|image| there().any(|name| name == image))
    }
}

/// Those of `nodes` whose kubelet doesn't report all the images.
async fn without(
    client: &Client,
    images: &[String],
    nodes: &[String],
) -> Result<BTreeSet<String>, api::Error> {
    let full: Vec<String> = images.iter().map(|image| full_name(image)).collect();
    let mut without: BTreeSet<String> = nodes.iter().cloned().collect();
    // Read when they are asked for, and not kept: they are most of what there is of a node.
    let take = |node: Reported| {
        if node.has(&full) {
            without.remove(&node.metadata.name);
        }
    };
    pages::each::<Node, _>(client, "list the images on nodes", take).await?;
    Ok(without)
}

/// An image's name as kubelets report it: with registry, and with tag or digest. Where both are stated the digest decides, and the tag isn't
/// reported.
#[must_use]
pub fn full_name(image: &str) -> String {
    let pinned = image.split_once('@').map(|(name, digest)| {
        let start = name.rfind('/').map_or(0, |slash| slash + 1);
        let tag = name.get(start..).and_then(|last| last.find(':')).map_or(name.len(), |colon| start + colon);
        format!("{}@{digest}", name.get(..tag).unwrap_or(name))
    });
    let image = pinned.as_deref().unwrap_or(image);
    let (first, rest) = image.split_once('/').unwrap_or(("", image));
    let registry = first.contains(['.', ':']) || first == "localhost";
    let name = match (registry, first.is_empty()) {
        (true, _) => image.to_owned(),
        (false, true) => format!("docker.io/library/{rest}"),
        (false, false) => format!("docker.io/{image}"),
    };
    let tagged = name.contains('@') || name.rsplit('/').next().is_some_and(|last| last.contains(':'));
    if tagged { name } else { format!("{name}:latest") }
}

/// Whether a container's image is on the node; why not, if the kubelet says so.
fn pulled(status: &ContainerStatus) -> Result<bool, String> {
    let state = status.state.as_ref();
    if state.is_some_and(|state| state.terminated.is_some() || state.running.is_some())
        || status.restart_count > 0
    {
        return Ok(true);
    }
    let waiting = state.and_then(|state| state.waiting.as_ref());
    match waiting.and_then(|waiting| waiting.reason.as_deref()) {
        Some(
            "CreateContainerError"
            | "RunContainerError"
            | "CrashLoopBackOff"
            | "StartError"
            | "CreateContainerConfigError",
        ) => Ok(true),
        Some(
            "ErrImagePull"
            | "ImagePullBackOff"
            | "InvalidImageName"
            | "ErrImageNeverPull"
            | "RegistryUnavailable"
            | "ImageInspectError",
        ) => {
            let message = waiting.and_then(|waiting| waiting.message.clone()).unwrap_or_default();
            Err(format!("{}: {message}", status.image))
        }
        _ => Ok(false),
    }
}

/// What is known about the images of a puller's pod: none missing, or why.
fn missing(pod: &Pod, images: usize) -> Option<String> {
    let statuses =
        pod.status.as_ref().and_then(|status| status.container_statuses.clone()).unwrap_or_default();
    if let Some(why) = statuses.iter().find_map(|status| pulled(status).err()) {
        return Some(why);
    }
    let there = statuses.iter().filter(|status| pulled(status) == Ok(true)).count();
    (there < images).then(|| format!("{there} of {images} images"))
}

fn puller(calico: &CalicoDaemon, of: &DaemonSet) -> Result<DaemonSet, serde_json::Error> {
    let spec = of.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
    let labels = json!({ names::APP_LABEL: names::PULLER });
    let containers: Vec<_> = calico
        .images
        .iter()
        .enumerate()
        .map(|(i, image)| {
            json!({
                "name": format!("image-{i}"),
                "image": image,
                "imagePullPolicy": "IfNotPresent",
                "command": ["/the-image-is-here"],
                "securityContext": { "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] }, "readOnlyRootFilesystem": true },
            })
        })
        .collect();
    serde_json::from_value(json!({
        "metadata": { "name": names::PULLER, "namespace": calico.daemon_set.namespace, "labels": labels },
        "spec": {
            "selector": { "matchLabels": labels },
            "template": {
                "metadata": { "labels": labels },
                "spec": {
                    "containers": containers,
                    "hostNetwork": true,
                    "automountServiceAccountToken": false,
                    "enableServiceLinks": false,
                    // For the pull secrets that come with it.
                    "serviceAccountName": spec.and_then(|spec| spec.service_account_name.clone()),
                    "imagePullSecrets": spec.and_then(|spec| spec.image_pull_secrets.clone()),
                    "nodeSelector": { "kubernetes.io/os": "linux" },
                    "tolerations": [{ "operator": "Exists" }],
                    "priorityClassName": "system-node-critical",
                    "terminationGracePeriodSeconds": 0,
                },
            },
        },
    }))
}

/// Leaves of a puller's pod what is looked at: there is one on each node.
fn trim(pod: &mut Pod) {
    let node_name = pod.spec.take().and_then(|spec| spec.node_name);
    pod.spec = Some(PodSpec { node_name, ..PodSpec::default() });
    let container_statuses = pod.status.take().and_then(|status| status.container_statuses);
    pod.status = Some(PodStatus { container_statuses, ..PodStatus::default() });
}

/// Has Calico's images pulled on these nodes; at once when the kubelets report them.
pub async fn pull(
    writer: &Writer,
    calico: &CalicoDaemon,
    nodes: &[String],
    limit: Duration,
) -> Result<(), Error> {
    let absent = if nodes.is_empty() {
        BTreeSet::new()
    } else {
        without(&writer.client, &calico.images, nodes).await?
    };
    if absent.is_empty() {
        info!(step = "images", images = calico.images.len(), "Calico's images are on all nodes");
        return Ok(());
    }
    info!(
        step = "images",
        nodes = absent.len(),
        images = calico.images.join(" "),
        "Calico's images are pulled"
    );
    let namespace = &calico.daemon_set.namespace;
    let sets: Api<DaemonSet> = Api::namespaced(writer.client.clone(), namespace);
    let of = api::read("read Calico's DaemonSet", sets.get(&calico.daemon_set.name)).await?;
    let set = puller(calico, &of)?;
    match writer.write("create the DaemonSet that pulls images", sets.create(&post(), &set)).await {
        Err(error) if !error.is_already_exists() => return Err(error.into()),
        _ => {}
    }
    let config = watcher::Config::default().labels(&format!("{}={}", names::APP_LABEL, names::PULLER));
    let pods: Watched<Pod> = Watched::trimmed(
        "pods that pull images",
        Api::namespaced(writer.client.clone(), namespace),
        config,
        trim,
    )
    .await?;
    let left = |seen: &[std::sync::Arc<Pod>]| -> BTreeMap<String, String> {
        let mut left: BTreeMap<String, String> =
            absent.iter().map(|node| (node.clone(), "no pod yet".to_owned())).collect();
        for pod in seen {
            let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()) else { continue };
            match missing(pod, calico.images.len()) {
                None => {
                    left.remove(node);
                }
                Some(why) => {
                    left.entry(node.clone()).and_modify(|known| *known = why);
                }
            }
        }
        left
    };
    let done = pods.until(limit, |seen| left(seen).is_empty().then_some(())).await.is_some();
    let missing = left(&pods.all());
    remove(writer, namespace).await?;
    if done {
        info!(step = "images", "Calico's images are on all nodes");
        Ok(())
    } else {
        warn!(step = "images", ?missing, "images missing");
        Err(Error::Missing { limit, missing })
    }
}

/// Removes the DaemonSet, if it is there.
pub async fn remove(writer: &Writer, namespace: &str) -> Result<(), api::Error> {
    let sets: Api<DaemonSet> = Api::namespaced(writer.client.clone(), namespace);
    found(
        writer
            .write(
                "remove the DaemonSet that pulls images",
                sets.delete(names::PULLER, &DeleteParams::background()),
            )
            .await,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("busybox", "docker.io/library/busybox:latest")]
    #[case("calico/node:v3.28.5", "docker.io/calico/node:v3.28.5")]
    #[case("docker.io/calico/cni:v3.28.5", "docker.io/calico/cni:v3.28.5")]
    #[case("localhost:5000/x", "localhost:5000/x:latest")]
    #[case("quay.io/a/b@sha256:00", "quay.io/a/b@sha256:00")]
    #[case("quay.io/a/b:v1@sha256:00", "quay.io/a/b@sha256:00")]
    #[case("localhost:5000/b:v1@sha256:00", "localhost:5000/b@sha256:00")]
    #[case("calico/node:v3.32.1@sha256:00", "docker.io/calico/node@sha256:00")]
    fn names_are_made_full_as_kubelets_report_them(#[case] image: &str, #[case] full: &str) {
        assert_eq!(full_name(image), full);
    }

    #[test]
    fn only_nodes_that_report_all_images_need_no_pull() {
        let images = ["calico/node:1", "docker.io/calico/cni:1"].map(full_name);
        let has = |status: &str| {
            let text = format!(r#"{{"metadata":{{"name":"a","uid":"u"}},"status":{status}}}"#);
            serde_json::from_str::<Reported>(&text).unwrap().has(&images)
        };
        let node = r#"{"names":["docker.io/calico/node@sha256:00","docker.io/calico/node:1"],"sizeBytes":1}"#;
        let cni = r#"{"names":["docker.io/calico/cni:1"],"sizeBytes":1}"#;
        assert!(has(&format!(r#"{{"images":[{node},{cni}],"nodeInfo":{{}}}}"#)));
        assert!(!has(&format!(r#"{{"images":[{node}]}}"#)));
        assert!(!has("{}") && !has(r#"{"images":null}"#) && !has(r#"{"images":[{"names":null}]}"#));
    }

    fn status(yaml: &str) -> Pod {
        serde_saphyr::from_str(&format!("status: {{containerStatuses: [{yaml}]}}")).unwrap()
    }

    #[rstest]
    #[case("{state: {waiting: {reason: CreateContainerError}}", None)]
    #[case("{state: {terminated: {exitCode: 128, reason: StartError}}", None)]
    #[case("{state: {waiting: {reason: ContainerCreating}}", Some("0 of 1 images"))]
    #[case("{state: {waiting: {reason: ImagePullBackOff, message: no such host}}", Some("i: no such host"))]
    fn an_image_is_there_when_the_kubelet_tried_to_run_it(#[case] state: &str, #[case] why: Option<&str>) {
        let pod =
            status(&format!("{state}, image: i, imageID: '', name: n, ready: false, restartCount: 0}}"));
        assert_eq!(missing(&pod, 1).as_deref(), why);
    }

    #[test]
    fn the_puller_runs_every_image_everywhere_and_needs_no_network() {
        let calico = crate::settings::tests::settings().calico;
        let set = puller(&calico, &DaemonSet::default()).unwrap();
        let spec = set.spec.unwrap().template.spec.unwrap();
        assert_eq!(spec.containers.len(), calico.images.len());
        assert_eq!(spec.host_network, Some(true));
        assert_eq!(spec.tolerations.unwrap()[0].operator.as_deref(), Some("Exists"));
    }
}
