//! What a node is in flannel's networks, as flannel's annotations say, and the annotations by which Calico takes its place. Pure.

use std::net::IpAddr;

use flannel_migration_protocol::{Network, keys};
use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::family::Family;
use crate::cluster::NodeFacts;
use crate::preflight::Finding;
use crate::settings::Settings;

/// A node in one of flannel's networks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vtep {
    /// The node's pod network.
    pub network: IpNet,
    /// Address of its VXLAN device: the network's first.
    pub tunnel: IpAddr,
    /// MAC address of its VXLAN device, as flannel writes it.
    pub mac: String,
    /// The address other nodes send to.
    pub public: IpAddr,
}

impl Vtep {
    fn new(share: IpNet, mac: String, public: IpAddr) -> Self {
        Self { network: share.trunc(), tunnel: share.network(), mac, public }
    }

    /// Of which family all of it is.
    #[must_use]
    pub const fn family(&self) -> Family {
        Family::of_net(&self.network)
    }
}

/// What a node is in each of flannel's networks, IPv4 first.
pub type FlannelNode = Vec<Vtep>;

/// Reads what flannel's annotations say about a node in these networks; what is wrong in the first network comes first.
pub fn flannel_node(node: &NodeFacts, prefix: &str, networks: &[IpNet]) -> Result<FlannelNode, Vec<Finding>> {
    let (mut vteps, mut findings) = (Vec::new(), Vec::new());
    for network in networks {
        match vtep(node, prefix, network) {
            Ok(vtep) => vteps.push(vtep),
            // Both may be about the same annotation.
            Err(finding) if findings.contains(&finding) => {}
            Err(finding) => findings.push(finding),
        }
    }
    if findings.is_empty() { Ok(vteps) } else { Err(findings) }
}

fn vtep(node: &NodeFacts, prefix: &str, network: &IpNet) -> Result<Vtep, Finding> {
    let family = Family::of_net(network);
    let object = || format!("Node {}", node.name);
    let not_annotated = |what: &str| {
        Finding::blocking(
            "NodeNotAnnotatedByFlannel",
            object(),
            format!("annotation {prefix}/{what}"),
            "See to it that flannel's pod runs on the node; it writes the annotations when it starts",
        )
    };
    let own =
        node.pod_cidrs.iter().copied().find(|cidr| Family::of_net(cidr) == family).ok_or_else(|| {
            Finding::blocking(
                "NodeWithoutPodCidr",
                object(),
                format!("it has no {} podCIDR", family.as_str()),
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
    let name = family.backend_data();
    let data = annotation(name).ok_or_else(|| not_annotated(&format!("{name} is missing")))?;
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
        .ok_or_else(|| not_annotated(&format!("{name} holds no VtepMAC: {data}")))?;
    let name = family.public_address();
    let text = annotation(name).ok_or_else(|| not_annotated(&format!("{name} is missing")))?;
    let public = public_address(node, prefix, family)
        .ok_or_else(|| not_annotated(&format!("{name} is no {} address: {text}", family.as_str())))?;
    Ok(Vtep::new(own, mac, public))
}

/// The address that flannel announced for a node.
#[must_use]
pub fn public_address(node: &NodeFacts, prefix: &str, family: Family) -> Option<IpAddr> {
    let text = node.annotations.get(&format!("{prefix}/{}", family.public_address()))?;
    let address = text.split('/').next()?.parse().ok()?;
    (Family::of(address) == family).then_some(address)
}

/// A node that never had flannel: what Calico will be there. The MAC addresses are made from the name, as Felix makes them: locally
/// administered, and the same at each try.
pub fn joined_node(node: &NodeFacts, networks: &[IpNet]) -> Result<FlannelNode, Finding> {
    networks.iter().map(|network| joined(node, network)).collect()
}

fn joined(node: &NodeFacts, network: &IpNet) -> Result<Vtep, Finding> {
    use sha2::Digest as _;
    let family = Family::of_net(network);
    let missing = |what: String| {
        Finding::blocking(
            "JoinedNodeIncomplete",
            format!("Node {}", node.name),
            what,
            "It is looked at again when the node changes",
        )
    };
    let own = node.pod_cidrs.iter().copied().find(|cidr| network.contains(cidr));
    let own =
        own.ok_or_else(|| missing(format!("it has no podCIDR in flannel's {} network", family.as_str())))?;
    let public = node
        .address_of(family)
        .ok_or_else(|| missing(format!("it has no {} InternalIP", family.as_str())))?;
    // Two devices of a node must not be taken for one.
    let seed = match family {
        Family::V4 => node.name.clone(),
        Family::V6 => format!("{}-v6", node.name),
    };
    let hash = sha2::Sha256::digest(seed.as_bytes());
    let mac = hash.iter().take(5).fold("66".to_owned(), |mac, byte| format!("{mac}:{byte:02x}"));
    Ok(Vtep::new(own, mac, public))
}

/// A node as flannel announces it to its peers.
#[must_use]
pub fn flannel_annotations(node: &FlannelNode, settings: &Settings) -> Map<String, Value> {
    let prefix = &settings.flannel.annotation_prefix;
    let mut words = vec![("backend-type", "vxlan".to_owned()), ("kube-subnet-manager", "true".to_owned())];
    for vtep in node {
        let data = json!({ "VNI": settings.flannel_facts.vni, "VtepMAC": vtep.mac }).to_string();
        words.push((vtep.family().backend_data(), data));
        words.push((vtep.family().public_address(), vtep.public.to_string()));
    }
    words.into_iter().map(|(name, value)| (format!("{prefix}/{name}"), value.into())).collect()
}

/// What a node's annotations must become; empty when they are so.
#[must_use]
pub fn annotation_changes(node: &NodeFacts, flannel: &FlannelNode) -> Map<String, Value> {
    let now = |key: &str| node.annotations.get(key).map(String::as_str);
    let mut changes = Map::new();
    for vtep in flannel {
        let family = vtep.family();
        let tunnel = vtep.tunnel.to_string();
        if now(family.tunnel_address()) != Some(&tunnel) {
            changes.insert(family.tunnel_address().to_owned(), tunnel.into());
        }
        if now(family.tunnel_mac()) != Some(&vtep.mac) {
            changes.insert(family.tunnel_mac().to_owned(), vtep.mac.clone().into());
        }
        // Calico detects the prefix length itself later; the address is what counts.
        let address = now(family.node_address()).and_then(|address| address.split('/').next());
        if address.and_then(|address| address.parse().ok()) != Some(vtep.public) {
            let host = IpNet::from(vtep.public);
            changes.insert(family.node_address().to_owned(), host.to_string().into());
        }
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
