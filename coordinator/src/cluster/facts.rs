//! What is read of a Node, and what decisions depend on of it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use flannel_migration_protocol::{NodeView, keys};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node as ApiNode;
use kube::ResourceExt as _;
use kube::api::ObjectMeta;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::calico::family::Family;
use crate::calico::names;

/// A Node as far as it is read. Most of a real one are the images that the kubelet reports and who wrote which field: that is skipped
/// while the text is parsed.
#[derive(Clone, Debug, Default, Deserialize, kube::Resource)]
#[resource(inherit = ApiNode)]
pub struct Node {
    #[serde(deserialize_with = "metadata")]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Spec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
    unschedulable: Option<bool>,
    taints: Option<Vec<Value>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Status {
    conditions: Option<Vec<Condition>>,
    addresses: Option<Vec<Address>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

#[derive(Clone, Debug, Deserialize)]
struct Address {
    #[serde(rename = "type")]
    kind: String,
    address: String,
}

fn metadata<'de, D: Deserializer<'de>>(from: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Metadata {
        name: Option<String>,
        resource_version: Option<String>,
        labels: Option<BTreeMap<String, String>>,
        annotations: Option<BTreeMap<String, String>>,
    }
    let Metadata { name, resource_version, labels, annotations } = Metadata::deserialize(from)?;
    Ok(ObjectMeta { name, resource_version, labels, annotations, ..ObjectMeta::default() })
}

/// A node, as far as decisions depend on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own that the API server reports")]
pub struct NodeFacts {
    /// Its name.
    pub name: String,
    /// The version that was looked at: the precondition of writes.
    pub version: String,
    /// What the protocol's keys say.
    pub view: NodeView,
    /// Whether the kubelet reports it as ready.
    pub ready: bool,
    /// Whether its agent's condition says that its network is Calico's; it outlives the labels.
    pub migrated: bool,
    /// Whether it is cordoned, by whomever.
    pub unschedulable: bool,
    /// Its taints, as they are in the API: patches replace the list as a whole.
    pub taints: Vec<Value>,
    /// Whether it carries a control plane.
    pub control_plane: bool,
    /// Whether it runs Linux.
    pub linux: bool,
    /// Its pod networks.
    pub pod_cidrs: Vec<IpNet>,
    /// Its own addresses in the cluster.
    pub addresses: Vec<IpAddr>,
    /// The annotations of flannel's and Calico's that are read.
    pub annotations: BTreeMap<String, String>,
}

/// The names of flannel's annotations, under whatever prefix.
const FLANNELS: [&str; 6] =
    ["backend-type", "backend-data", "backend-v6-data", "public-ip", "public-ipv6", SUBNET_MANAGER];
/// The annotation of every node in flannel's network.
const SUBNET_MANAGER: &str = "kube-subnet-manager";

/// Whether an annotation is read as it is. What the protocol's keys say is in the view, and nothing is kept twice.
fn is_read(annotation: &str) -> bool {
    let flannels = annotation.rsplit_once('/').is_some_and(|(_, name)| FLANNELS.contains(&name));
    flannels || names::ON_NODES.contains(&annotation)
}

impl NodeFacts {
    /// Its own address of a family.
    #[must_use]
    pub fn address_of(&self, family: Family) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|address| Family::of(*address) == family)
    }

    /// Whether flannel has announced it.
    #[must_use]
    pub fn in_flannels_network(&self) -> bool {
        self.annotations
            .keys()
            .any(|key| key.rsplit_once('/').is_some_and(|(_, name)| name == SUBNET_MANAGER))
    }
}

impl From<&Node> for NodeFacts {
    fn from(node: &Node) -> Self {
        let labels = node.labels();
        let is_true = |kind: &str| {
            let mut conditions = node.status.conditions.iter().flatten();
            conditions.any(|condition| condition.kind == kind && condition.status == "True")
        };
        let cidrs = match (&node.spec.pod_cidrs, &node.spec.pod_cidr) {
            (Some(cidrs), _) => cidrs.as_slice(),
            (None, cidr) => cidr.as_slice(),
        };
        let annotations = node.annotations().iter().filter(|(key, _)| is_read(key));
        Self {
            name: node.name_any(),
            version: node.resource_version().unwrap_or_default(),
            view: NodeView::parse(labels, node.annotations()),
            ready: is_true("Ready"),
            migrated: is_true(keys::CONDITION),
            unschedulable: node.spec.unschedulable.unwrap_or(false),
            taints: node.spec.taints.clone().unwrap_or_default(),
            control_plane: ["control-plane", "master", "controlplane"]
                .iter()
                .any(|role| labels.contains_key(&format!("node-role.kubernetes.io/{role}"))),
            linux: labels.get("kubernetes.io/os").is_none_or(|os| os == "linux"),
            pod_cidrs: cidrs.iter().filter_map(|cidr| cidr.parse().ok()).collect(),
            addresses: node
                .status
                .addresses
                .iter()
                .flatten()
                .filter(|address| address.kind == "InternalIP")
                .filter_map(|address| address.address.parse().ok())
                .collect(),
            annotations: annotations.map(|(key, value)| (key.clone(), value.clone())).collect(),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use flannel_migration_protocol::{Network, State};
    use serde_json::json;

    use super::*;

    pub(in crate::cluster) fn object(name: &str, version: &str) -> serde_json::Value {
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {
                "name": name, "resourceVersion": version, "uid": "u", "creationTimestamp": "2026-01-02T03:04:05Z",
                "labels": { "kubernetes.io/os": "linux", "node-role.kubernetes.io/master": "", keys::STATE: "flannel" },
                "annotations": {
                    "flannel.example/public-ip": "172.16.0.1", names::TUNNEL_ADDRESS: "10.244.1.0",
                    "somebody.example/else": "x", keys::REPORT: "{}",
                },
                "managedFields": [{ "manager": "kubelet", "fieldsV1": { "f:metadata": {} } }],
            },
            "spec": { "podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00::/64"], "unschedulable": true },
            "status": {
                "addresses": [{ "type": "Hostname", "address": name }, { "type": "InternalIP", "address": "172.16.0.1" },
                    { "type": "InternalIP", "address": "fd00:172::1" }],
                "conditions": [{ "type": "Ready", "status": "True", "reason": "KubeletReady" }],
                "images": [{ "names": ["busybox"], "sizeBytes": 1 }],
            },
        })
    }

    #[test]
    fn a_node_is_read_as_the_api_server_tells_it_and_only_what_is_needed_is_kept() {
        let node: Node = serde_json::from_value(object("a", "7")).unwrap();
        let facts = NodeFacts::from(&node);
        assert_eq!((facts.name.as_str(), facts.version.as_str()), ("a", "7"));
        assert!(facts.ready && facts.unschedulable && facts.control_plane && facts.linux && !facts.migrated);
        assert_eq!(facts.pod_cidrs.len(), 2);
        assert_eq!(facts.address_of(Family::V4), Some([172, 16, 0, 1].into()));
        assert_eq!(facts.address_of(Family::V6), Some("fd00:172::1".parse().unwrap()));
        assert_eq!(facts.view.state.get(), Some(&State::Flannel));
        assert!(facts.view.report.malformed().is_some());
        let kept: Vec<&String> = facts.annotations.keys().collect();
        assert_eq!(kept, ["flannel.example/public-ip", names::TUNNEL_ADDRESS]);
    }

    #[test]
    fn a_node_of_which_hardly_anything_is_known_is_read_too() {
        let text = format!(r#"{{"metadata":{{"name":"a","labels":{{"{}":"calico"}}}}}}"#, keys::NETWORK);
        let facts = NodeFacts::from(&serde_json::from_str::<Node>(&text).unwrap());
        assert_eq!(facts.view.network.get(), Some(&Network::Calico));
        assert!(facts.linux && !facts.ready && facts.pod_cidrs.is_empty());
        let old =
            serde_json::from_str::<Node>(r#"{"metadata":{},"spec":{"podCIDR":"10.0.0.0/24"}}"#).unwrap();
        assert_eq!(NodeFacts::from(&old).pod_cidrs.len(), 1);
    }
}
