//! What a node is in flannel's network, as flannel's annotations say, and the annotations by which Calico takes its place. Pure.

use std::net::{IpAddr, Ipv4Addr};

use flannel_migration_protocol::{Network, keys};
use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::names;
use crate::cluster::NodeFacts;
use crate::preflight::Finding;
use crate::settings::Settings;

/// What flannel says about a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlannelNode {
    /// The node's IPv4 pod network.
    pub network: IpNet,
    /// Address of its VXLAN device: the network's first.
    pub tunnel: IpAddr,
    /// MAC address of its VXLAN device, as flannel writes it.
    pub mac: String,
    /// The address other nodes send to.
    pub public: Ipv4Addr,
}

/// Reads what flannel's annotations say about a node.
pub fn flannel_node(node: &NodeFacts, prefix: &str, network: IpNet) -> Result<FlannelNode, Finding> {
    let object = || format!("Node {}", node.name);
    let not_annotated = |what: &str| {
        Finding::blocking(
            "NodeNotAnnotatedByFlannel",
            object(),
            format!("annotation {prefix}/{what}"),
            "See to it that flannel's pod runs on the node; it writes the annotations when it starts",
        )
    };
    let own = node.pod_cidrs.iter().copied().find(|cidr| matches!(cidr, IpNet::V4(_))).ok_or_else(|| {
        Finding::blocking(
            "NodeWithoutPodCidr",
            object(),
            "it has no IPv4 podCIDR",
            "Let the controller manager allocate node CIDRs",
        )
    })?;
    if !network.contains(&own) {
        return Err(Finding::fatal(
            "PodCidrOutsideNetwork",
            object(),
            format!("its podCIDR {own} is not in flannel's network {network}"),
            "Correct flannel's network or the node's podCIDR",
        ));
    }
    let annotation = |name: &str| node.annotations.get(&format!("{prefix}/{name}"));
    let backend = annotation("backend-type").ok_or_else(|| not_annotated("backend-type is missing"))?;
    if backend != "vxlan" {
        return Err(Finding::fatal(
            "BackendNotVxlan",
            object(),
            format!("flannel's backend there is {backend}"),
            "Only flannel's vxlan backend can be migrated; change net-conf.json and restart flannel first",
        ));
    }
    let data = annotation("backend-data").ok_or_else(|| not_annotated("backend-data is missing"))?;
    let mac = serde_json::from_str::<Map<String, Value>>(data)
        .ok()
        .and_then(|data| {
            data.into_iter()
                .find(|(key, _)| key.eq_ignore_ascii_case("VtepMAC"))
                .and_then(|(_, mac)| mac.as_str().map(str::to_owned))
        })
        .filter(|mac| {
            mac.split(':').filter(|byte| byte.len() == 2 && u8::from_str_radix(byte, 16).is_ok()).count() == 6
        })
        .ok_or_else(|| not_annotated(&format!("backend-data holds no VtepMAC: {data}")))?;
    let public = annotation("public-ip").ok_or_else(|| not_annotated("public-ip is missing"))?;
    let public = public
        .split('/')
        .next()
        .and_then(|address| address.parse().ok())
        .ok_or_else(|| not_annotated(&format!("public-ip is no IPv4 address: {public}")))?;
    Ok(FlannelNode { network: own.trunc(), tunnel: own.network(), mac, public })
}

/// The address that flannel announced for a node.
#[must_use]
pub fn public_address(node: &NodeFacts, prefix: &str) -> Option<Ipv4Addr> {
    node.annotations.get(&format!("{prefix}/public-ip"))?.split('/').next()?.parse().ok()
}

/// A node that never had flannel: what Calico will be there. The MAC address is made from the name, as Felix makes it: locally
/// administered, and the same at each try.
pub fn joined_node(node: &NodeFacts, network: IpNet) -> Result<FlannelNode, Finding> {
    use sha2::Digest as _;
    let missing = |what: &str| {
        Finding::blocking(
            "JoinedNodeIncomplete",
            format!("Node {}", node.name),
            what,
            "It is looked at again when the node changes",
        )
    };
    let own = node
        .pod_cidrs
        .iter()
        .copied()
        .find(|cidr| network.contains(cidr))
        .ok_or_else(|| missing("it has no podCIDR in flannel's network"))?;
    let public = node.address.ok_or_else(|| missing("it has no IPv4 InternalIP"))?;
    let hash = sha2::Sha256::digest(node.name.as_bytes());
    let mac = hash.iter().take(5).fold("66".to_owned(), |mac, byte| format!("{mac}:{byte:02x}"));
    Ok(FlannelNode { network: own.trunc(), tunnel: own.network(), mac, public })
}

/// A node as flannel announces it to its peers.
#[must_use]
pub fn flannel_annotations(node: &FlannelNode, settings: &Settings) -> Map<String, Value> {
    let prefix = &settings.flannel.annotation_prefix;
    let data = json!({ "VNI": settings.flannel_facts.vni, "VtepMAC": node.mac }).to_string();
    [
        ("backend-type", "vxlan".to_owned()),
        ("backend-data", data),
        ("public-ip", node.public.to_string()),
        ("kube-subnet-manager", "true".to_owned()),
    ]
    .into_iter()
    .map(|(name, value)| (format!("{prefix}/{name}"), value.into()))
    .collect()
}

/// What a node's annotations must become; empty when they are so.
#[must_use]
pub fn annotation_changes(node: &NodeFacts, flannel: &FlannelNode) -> Map<String, Value> {
    let now = |key: &str| node.annotations.get(key).map(String::as_str);
    let mut changes = Map::new();
    let tunnel = flannel.tunnel.to_string();
    if now(names::TUNNEL_ADDRESS) != Some(&tunnel) {
        changes.insert(names::TUNNEL_ADDRESS.to_owned(), tunnel.into());
    }
    if now(names::TUNNEL_MAC) != Some(&flannel.mac) {
        changes.insert(names::TUNNEL_MAC.to_owned(), flannel.mac.clone().into());
    }
    // Calico detects the prefix length itself later; the address is what counts.
    let public = flannel.public.to_string();
    if now(names::NODE_ADDRESS).and_then(|address| address.split('/').next()) != Some(&public) {
        changes.insert(names::NODE_ADDRESS.to_owned(), format!("{public}/32").into());
    }
    changes
}

/// What is written to a Node that is prepared for Calico: its annotations, `more` of them, and its network where it carries none. None:
/// nothing is to be written.
#[must_use]
pub fn patch(
    node: &NodeFacts,
    flannel: &FlannelNode,
    label: Option<Network>,
    more: Map<String, Value>,
) -> Option<Value> {
    let mut annotations = annotation_changes(node, flannel);
    annotations.extend(more);
    let mut metadata = Map::new();
    if !annotations.is_empty() {
        metadata.insert("annotations".to_owned(), annotations.into());
    }
    if let Some(label) = label {
        metadata.insert("labels".to_owned(), json!({ keys::NETWORK: label.as_str() }));
    }
    (!metadata.is_empty()).then(|| json!({ "metadata": metadata }))
}

#[cfg(test)]
#[path = "announced_tests.rs"]
mod tests;
