//! What is wrong with single nodes: what flannel says about them, and what their agents see.

use std::collections::BTreeMap;
use std::sync::Arc;

use flannel_migration_protocol::{HostFacts, Network, State};
use ipnet::IpNet;
use serde_json::{Map, Value};

use super::{Finding, address, calico};
use crate::calico::announced;
use crate::calico::family::Family;
use crate::cluster::NodeFacts;
use crate::settings::Settings;

/// Whether flannel alone runs the node's network.
#[must_use]
pub fn untouched(node: &NodeFacts) -> bool {
    matches!(node.view.network.get(), None | Some(Network::Flannel))
        && matches!(node.view.state.get(), None | Some(State::Flannel | State::Preparing | State::Prepared))
}

/// About all nodes that run Linux. `agents`: their DaemonSet is there.
pub fn all(settings: &Settings, nodes: &[Arc<NodeFacts>], agents: bool, findings: &mut Vec<Finding>) {
    let networks = settings.networks();
    let plugins = calico::foreign_plugins(&settings.calico_facts.cni_conf_template, settings.calico.version);
    for node in nodes {
        let object = format!("Node {}", node.name);
        // A node that the migration has labelled was prepared; what it needs then is the roll's business.
        let enrolled = matches!(node.view.network.get(), Some(Network::None | Network::Calico));
        if !enrolled {
            let read = announced::flannel_node(node, &settings.flannel.annotation_prefix, networks);
            findings.extend(read.err().into_iter().flatten());
            room(node, &object, settings, findings);
        }
        if agents && node.view.state.is_absent() {
            findings.push(Finding::blocking(
                "AgentSilent",
                &object,
                "its agent hasn't reported",
                format!("See to the pod of DaemonSet {} on the node", crate::names::AGENT),
            ));
        }
        for malformed in node.view.malformed() {
            findings.push(Finding::blocking(
                "KeyUnreadable",
                &object,
                malformed.to_string(),
                "Correct or remove it",
            ));
        }
        if !node.ready {
            findings.push(Finding::warning(
                "NodeNotReady",
                &object,
                "its kubelet doesn't report it ready: it counts as unavailable, and isn't migrated while it is so",
                "See to the node",
            ));
        }
        if untouched(node) {
            announced(node, &object, settings, findings);
            if let Some(host) = host(node) {
                self::seen(node, &object, host, settings, &plugins, findings);
            }
        }
    }
    shared(settings, nodes, findings);
    mtus(settings, nodes, findings);
}

/// What the node's agent has told about its host.
#[must_use]
pub fn host(node: &NodeFacts) -> Option<&HostFacts> {
    node.view.report.get().and_then(|report| report.host.as_ref())
}

/// The families of flannel's networks.
fn families(settings: &Settings) -> impl Iterator<Item = Family> {
    settings.networks().iter().map(Family::of_net)
}

fn room(node: &NodeFacts, object: &str, settings: &Settings, findings: &mut Vec<Finding>) {
    for family in families(settings) {
        let smallest = family.smallest();
        let small = |cidr: &&IpNet| Family::of_net(cidr) == family && cidr.prefix_len() > smallest;
        if let Some(cidr) = node.pod_cidrs.iter().find(small) {
            findings.push(Finding::fatal(
                "NodeNetworkTooSmall",
                object,
                format!("its podCIDR {cidr} is smaller than a block of Calico's with room for a pod"),
                format!("Delete the Node and let it join again with a podCIDR of /{smallest} or larger (--node-cidr-mask-size)"),
            ));
        }
    }
}

/// What flannel announced for its device.
fn backend_data(node: &NodeFacts, settings: &Settings, family: Family) -> BTreeMap<String, Value> {
    let key = format!("{}/{}", settings.flannel.annotation_prefix, family.backend_data());
    let text = node.annotations.get(&key).map(String::as_str).unwrap_or_default();
    let data: Map<String, Value> = serde_json::from_str(text).unwrap_or_default();
    data.into_iter().map(|(name, value)| (name.to_lowercase(), value)).collect()
}

const RESTART: &str = "Restart flannel's pod on the node: it announces its device when it starts";

fn announced(node: &NodeFacts, object: &str, settings: &Settings, findings: &mut Vec<Finding>) {
    let configured = settings.flannel_facts.vni;
    for family in families(settings) {
        let data = backend_data(node, settings, family);
        let other = |vni: &u64| *vni != u64::from(configured);
        if let Some(vni) = data.get("vni").and_then(Value::as_u64).filter(other) {
            findings.push(Finding::holds_node(
                "AnnotationDiffers",
                object,
                format!("flannel announced VNI {vni}; its configuration says {configured}"),
                RESTART,
            ));
        }
    }
}

/// `plugins`: those that must be there before Calico comes.
fn seen(
    node: &NodeFacts,
    object: &str,
    host: &HostFacts,
    settings: &Settings,
    plugins: &[String],
    findings: &mut Vec<Finding>,
) {
    if let Some(filter) = host.rp_filter.filter(|filter| *filter != 1) {
        findings.push(Finding::holds_node(
            "RpFilterNotStrict",
            object,
            format!("net.ipv4.conf.all.rp_filter is {filter}; Calico needs 1"),
            "On the node: sysctl -w net.ipv4.conf.all.rp_filter=1, and the same in /etc/sysctl.d",
        ));
    }
    for family in families(settings) {
        device(node, object, host, (settings, family), findings);
        autodetection(node, object, host, (settings, family), findings);
    }
    let missing: Vec<&str> =
        plugins.iter().filter(|plugin| !host.plugins.contains(plugin)).map(String::as_str).collect();
    if !missing.is_empty() && !host.plugins.is_empty() {
        findings.push(Finding::holds_node(
            "CniPluginMissing",
            object,
            format!(
                "Calico's CNI config names plugins that aren't in /opt/cni/bin there: {}",
                missing.join(", ")
            ),
            "Install them on the node, or take them out of Calico's CNI config",
        ));
    }
}

/// About flannel's device.
fn device(
    node: &NodeFacts,
    object: &str,
    host: &HostFacts,
    (settings, family): (&Settings, Family),
    findings: &mut Vec<Finding>,
) {
    let facts = &settings.flannel_facts;
    let name = family.device(facts.vni);
    match host.vxlan.iter().find(|device| device.name == name) {
        None => {
            let there = host.vxlan.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let there = if there.is_empty() { "none".to_owned() } else { there };
            findings.push(Finding::holds_node(
                "VxlanDeviceMissing",
                object,
                format!("there is no device {name} on it; devices of flannel's: {there}"),
                "See to flannel's pod on the node: it makes the device when it starts",
            ));
        }
        Some(device) => {
            if (device.vni, device.port) != (facts.vni, facts.port) {
                findings.push(Finding::holds_node(
                    "VxlanDiffers",
                    object,
                    format!(
                        "its device is {device}; flannel's configuration says VNI {} and port {}",
                        facts.vni, facts.port
                    ),
                    "Delete the device on the node and restart flannel's pod there, or correct net-conf.json",
                ));
            }
            let data = backend_data(node, settings, family);
            let mac = data.get("vtepmac").and_then(Value::as_str).unwrap_or_default();
            // One that can't be read is told by itself.
            if mac.len() == device.mac.len() && !mac.eq_ignore_ascii_case(&device.mac) {
                findings.push(Finding::holds_node(
                    "AnnotationDiffers",
                    object,
                    format!("flannel announced MAC {mac}; its device is {device}"),
                    RESTART,
                ));
            }
        }
    }
}

/// Calico must find the address that flannel's packets go to.
fn autodetection(
    node: &NodeFacts,
    object: &str,
    host: &HostFacts,
    (settings, family): (&Settings, Family),
    findings: &mut Vec<Finding>,
) {
    let public = announced::public_address(node, &settings.flannel.annotation_prefix, family);
    let (variable, method) = match family {
        Family::V4 => ("IP_AUTODETECTION_METHOD", &settings.calico.autodetection),
        Family::V6 => ("IP6_AUTODETECTION_METHOD", &settings.calico.ipv6.autodetection),
    };
    let method = method.as_deref();
    let taken = method.and_then(|method| address::detected(method, family, host, node.address_of(family)));
    if let (Some(method), Some(taken), Some(public)) = (method, taken, public)
        && taken != public
    {
        findings.push(Finding::fatal(
            "AutodetectionDiffers",
            object,
            format!("Calico's {variable}={method} finds {taken} on it; flannel's packets go to {public}"),
            format!("Set {variable} in Calico's DaemonSet to what finds flannel's address: kubernetes-internal-ip, interface=..., cidr=..."),
        ));
    }
}

/// Addresses that must be a node's own.
fn shared(settings: &Settings, nodes: &[Arc<NodeFacts>], findings: &mut Vec<Finding>) {
    let prefix = &settings.flannel.annotation_prefix;
    let mut owners: BTreeMap<String, &str> = BTreeMap::new();
    for (node, family) in nodes.iter().flat_map(|node| families(settings).map(move |family| (node, family))) {
        let data = backend_data(node, settings, family);
        let mac = data.get("vtepmac").and_then(Value::as_str).filter(|mac| !mac.is_empty());
        let mac = mac.map(|mac| format!("the MAC address {}", mac.to_lowercase()));
        let public = announced::public_address(node, prefix, family);
        let public = public.map(|public| format!("the address {public}"));
        for what in [mac, public].into_iter().flatten() {
            if let Some(other) = owners.insert(what.clone(), &node.name) {
                findings.push(Finding::fatal(
                    "VtepNotUnique",
                    format!("Node {}", node.name),
                    format!("flannel announced {what} for it and for node {other}"),
                    "Delete flannel's device on one of them and restart flannel's pod there; see that cloned machines have their own addresses",
                ));
            }
        }
    }
    for ((node, other), cidr) in overlaps(nodes) {
        findings.push(Finding::fatal(
            "PodCidrShared",
            format!("Node {other}"),
            format!("its podCIDR overlaps {cidr} of node {node}"),
            "Delete one of the Nodes and let it join again with a podCIDR of its own",
        ));
    }
}

/// Pairs of nodes whose pod networks overlap, in the order of the nodes, and the first one's network that does.
fn overlaps(nodes: &[Arc<NodeFacts>]) -> BTreeMap<(&str, &str), IpNet> {
    let all = nodes.iter().enumerate().flat_map(|(i, node)| node.pod_cidrs.iter().map(move |cidr| (cidr, i)));
    let mut sorted: Vec<(IpNet, &IpNet, usize)> = all.map(|(cidr, i)| (cidr.trunc(), cidr, i)).collect();
    // Two networks are apart, or one holds the other: a network is held by those before it that haven't ended.
    sorted.sort_unstable();
    let mut open: Vec<(IpNet, &IpNet, usize)> = Vec::new();
    let mut pairs = BTreeMap::new();
    for one in sorted {
        while open.pop_if(|(around, ..)| !around.contains(&one.0)).is_some() {}
        for other in open.iter().filter(|(.., i)| *i != one.2) {
            let (first, second) = if one.2 < other.2 { (&one, other) } else { (other, &one) };
            if let (Some(node), Some(other)) = (nodes.get(first.2), nodes.get(second.2)) {
                pairs.entry((node.name.as_str(), other.name.as_str())).or_insert(*first.1);
            }
        }
        open.push(one);
    }
    pairs
}

/// Calico has one MTU for all nodes.
fn mtus(settings: &Settings, nodes: &[Arc<NodeFacts>], findings: &mut Vec<Finding>) {
    let name = Family::V4.device(settings.flannel_facts.vni);
    let used = settings.flannel_facts.mtu;
    for node in nodes.iter().filter(|node| untouched(node)) {
        let device = host(node).and_then(|host| host.vxlan.iter().find(|device| device.name == name));
        if let Some(device) = device.filter(|device| device.mtu != used) {
            findings.push(Finding::warning(
                "MtuDiffers",
                format!("Node {}", node.name),
                format!("the MTU of its {name} is {}; Calico will use {used} on all nodes", device.mtu),
                "If the networks of all nodes allow the larger one, set it for flannel everywhere first",
            ));
        }
    }
}

/// Nodes with Windows that take part in flannel's network, by name.
pub fn windows(names: &[String], findings: &mut Vec<Finding>) {
    for name in names {
        findings.push(Finding::fatal(
            "WindowsNode",
            format!("Node {name}"),
            "it runs Windows and takes part in flannel's network; only nodes that run Linux can be migrated",
            "Take it out of the cluster",
        ));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn nodes(cidrs: &[Vec<IpNet>]) -> Vec<Arc<NodeFacts>> {
        let named = cidrs.iter().enumerate();
        named
            .map(|(i, cidrs)| NodeFacts {
                name: format!("n{i}"),
                pod_cidrs: cidrs.clone(),
                ..NodeFacts::default()
            })
            .map(Arc::new)
            .collect()
    }

    fn network() -> impl proptest::strategy::Strategy<Value = IpNet> {
        (0_u8..4, 0_u8..8, 22_u8..=27)
            .prop_map(|(a, b, length)| format!("10.0.{a}.{}/{length}", b * 32).parse().unwrap())
    }

    proptest! {
        #[test]
        fn networks_that_overlap_are_found_as_by_comparing_each_with_each(
            cidrs in proptest::collection::vec(proptest::collection::vec(network(), 0..3), 0..8),
        ) {
            let nodes = nodes(&cidrs);
            let found: Vec<(String, String)> =
                overlaps(&nodes).into_keys().map(|(a, b)| (a.to_owned(), b.to_owned())).collect();
            let mut expected = Vec::new();
            for (i, a) in nodes.iter().enumerate() {
                for b in &nodes[i + 1..] {
                    let both = |x: &IpNet| b.pod_cidrs.iter().any(|y| x.contains(y) || y.contains(x));
                    if a.pod_cidrs.iter().any(both) {
                        expected.push((a.name.clone(), b.name.clone()));
                    }
                }
            }
            prop_assert_eq!(found, expected);
        }
    }
}
