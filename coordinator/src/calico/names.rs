//! How Calico names its objects.

use std::collections::BTreeMap;

use data_encoding::{BASE32_NOPAD, HEXLOWER};
use ipnet::IpNet;
use sha2::Sha256;
use sha3::{Digest as _, Sha3_256};

use super::family::Family;

/// The pool that the flannel network becomes; Calico's own migration takes the same.
pub const POOL: &str = "default-ipv4-ippool";
/// Felix's cluster-wide configuration.
pub const FELIX: &str = "default";
/// Name of Felix's configuration of one node.
#[must_use]
pub fn felix_of(node: &str) -> String {
    format!("node.{node}")
}

/// Name of Calico's CNI network, from which its plugin makes handles.
pub const CNI_NETWORK: &str = "k8s-pod-network";
/// Node annotation: address of the VXLAN device.
pub const TUNNEL_ADDRESS: &str = "projectcalico.org/IPv4VXLANTunnelAddr";
/// Node annotation: MAC address of the VXLAN device.
pub const TUNNEL_MAC: &str = "projectcalico.org/VXLANTunnelMACAddr";
/// Node annotation: the node's own address with prefix length.
pub const NODE_ADDRESS: &str = "projectcalico.org/IPv4Address";
/// Node annotation: address of the VXLAN device for IPv6.
pub const TUNNEL_ADDRESS_V6: &str = "projectcalico.org/IPv6VXLANTunnelAddr";
/// Node annotation: MAC address of the VXLAN device for IPv6.
pub const TUNNEL_MAC_V6: &str = "projectcalico.org/VXLANTunnelMACAddrV6";
/// Node annotation: the node's own IPv6 address with prefix length.
pub const NODE_ADDRESS_V6: &str = "projectcalico.org/IPv6Address";
/// All of these annotations of nodes.
pub const ON_NODES: [&str; 6] =
    [TUNNEL_ADDRESS, TUNNEL_MAC, NODE_ADDRESS, TUNNEL_ADDRESS_V6, TUNNEL_MAC_V6, NODE_ADDRESS_V6];

/// Longest name of an object that Calico shortens to.
const LONGEST: usize = 253;

/// A block's name.
#[must_use]
pub fn block(cidr: &IpNet) -> String {
    cidr.to_string().replace(['.', ':', '/'], "-")
}

/// An affinity's name.
#[must_use]
pub fn affinity(node: &str, cidr: &IpNet) -> String {
    let block = block(cidr);
    let name = format!("{node}-{block}");
    if name.len() < LONGEST {
        return name;
    }
    let kept = node.get(..LONGEST - 1 - block.len() - 13).unwrap_or(node);
    let hash = HEXLOWER.encode(&Sha256::digest(format!("{node}+{block}")));
    format!("{kept}-{block}-{}", hash.get(..11).unwrap_or(&hash))
}

/// An affinity's labels; without them it is invisible to listing by host in Calico 3.31 and later.
#[must_use]
pub fn affinity_labels(node: &str, family: Family) -> BTreeMap<String, String> {
    [
        ("projectcalico.org/hostname-hash", BASE32_NOPAD.encode(&Sha3_256::digest(node))),
        ("projectcalico.org/affinity-type", "host".to_owned()),
        ("projectcalico.org/ip-version", family.number().to_owned()),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value))
    .collect()
}

/// The handle of a node's VXLAN device.
#[must_use]
pub fn tunnel_handle(node: &str, family: Family) -> String {
    format!("{}{node}", family.tunnel())
}

/// Beginning of the handles of addresses that nodes keep for themselves.
pub const KEPT: &str = "flannel-migration.";

/// The handle of the addresses that a node keeps for itself.
#[must_use]
pub fn kept_handle(node: &str) -> String {
    format!("{KEPT}{node}")
}

/// The handle that Calico's CNI plugin gives a pod's sandbox, and by which CNI DEL releases.
#[must_use]
pub fn pod_handle(sandbox: &str) -> String {
    format!("{CNI_NETWORK}.{sandbox}")
}

/// The name of the object of a handle.
#[must_use]
pub fn handle(handle_id: &str) -> String {
    handle_id.to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn names_are_calicos() {
        assert_eq!(block(&net("10.244.1.0/26")), "10-244-1-0-26");
        assert_eq!(affinity("node1", &net("10.244.1.0/26")), "node1-10-244-1-0-26");
        assert_eq!(tunnel_handle("node1", Family::V4), "vxlan-tunnel-addr-node1");
        assert_eq!(pod_handle("abc"), "k8s-pod-network.abc");
        assert_eq!(block(&net("fd00:10:244:1::40/122")), "fd00-10-244-1--40-122");
        assert_eq!(affinity("node1", &net("fd00:10:244:1::/122")), "node1-fd00-10-244-1---122");
        assert_eq!(tunnel_handle("node1", Family::V6), "vxlan-v6-tunnel-addr-node1");
    }

    #[test]
    fn a_long_node_name_is_cut_and_hashed() {
        let name = affinity(&"n".repeat(252), &net("10.244.1.0/26"));
        assert_eq!(name.len(), 252);
        assert!(name.contains("-10-244-1-0-26-"));
    }

    // Values computed with Calico's own code.
    #[test]
    fn host_hashes_are_calicos() {
        for (node, hash) in [
            ("node1", "7DS2CCNJGGLTHBDQLLFO6SX24SY2YDDEG3W2VN556FA2W4DLLV5A"),
            ("node-0", "SGWB6YWABUSNFPFRM7CZD2XU3T5P2F6DNTULOHS3NX7DUIB4C6UQ"),
            ("kind-worker", "IBVBROKXJCMHPK3CZI3D3PWK642IN433QZEAMKIO7Z4KRA4BKK3Q"),
        ] {
            assert_eq!(affinity_labels(node, Family::V4)["projectcalico.org/hostname-hash"], hash);
        }
    }
}
