//! Calico's custom resources, group `crd.projectcalico.org/v1`. Fields that aren't ours to understand ride along in `other`, so that a
//! read and a write never lose what a newer Calico put there.

use std::collections::BTreeMap;

use kube::CustomResource;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Fields not known here.
pub type Other = BTreeMap<String, Value>;

/// A pool of pod addresses.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "crd.projectcalico.org",
    version = "v1",
    kind = "IPPool",
    plural = "ippools",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase")]
pub struct IpPoolSpec {
    /// The pool's network.
    pub cidr: String,
    /// Prefix length of blocks; Calico's default for IPv4 is 26.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<u8>,
    /// Whether traffic that leaves all pools is masqueraded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nat_outgoing: Option<bool>,
    /// Always, `CrossSubnet` or Never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipip_mode: Option<String>,
    /// Always, `CrossSubnet` or Never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vxlan_mode: Option<String>,
    /// Which nodes use it, in Calico's selector language.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<String>,
    /// Workload, Tunnel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_uses: Option<Vec<String>>,
    /// Whether no addresses are given out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disabled: Option<bool>,
    /// The rest.
    #[serde(flatten)]
    pub other: Other,
}

/// Felix's configuration, as far as VXLAN goes.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "crd.projectcalico.org",
    version = "v1",
    kind = "FelixConfiguration",
    plural = "felixconfigurations",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase")]
pub struct FelixConfigurationSpec {
    /// Absent: as the pools need it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vxlan_enabled: Option<bool>,
    /// Network identifier.
    #[serde(rename = "vxlanVNI", default, skip_serializing_if = "Option::is_none")]
    pub vxlan_vni: Option<u32>,
    /// UDP port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vxlan_port: Option<u16>,
    /// MTU of the device.
    #[serde(rename = "vxlanMTU", default, skip_serializing_if = "Option::is_none")]
    pub vxlan_mtu: Option<u32>,
    /// The rest.
    #[serde(flatten)]
    pub other: Other,
}

/// Which node a block belongs to.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "crd.projectcalico.org",
    version = "v1",
    kind = "BlockAffinity",
    plural = "blockaffinities",
    schema = "disabled"
)]
pub struct BlockAffinitySpec {
    /// The block.
    pub cidr: String,
    /// The node.
    pub node: String,
    /// pending, confirmed, pendingDeletion.
    pub state: String,
    /// `"true"` while it is being deleted; text in this group.
    pub deleted: String,
    /// host or virtual; Calico 3.30 and later.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// The rest.
    #[serde(flatten)]
    pub other: Other,
}

/// A block of addresses and who uses which.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "crd.projectcalico.org",
    version = "v1",
    kind = "IPAMBlock",
    plural = "ipamblocks",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase")]
pub struct IpamBlockSpec {
    /// The block.
    pub cidr: String,
    /// `host:<node>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<String>,
    /// For each address the index of its attributes; none: free.
    pub allocations: Vec<Option<usize>>,
    /// Free ordinals, in the order in which they are given out.
    pub unallocated: Vec<usize>,
    /// Whose the addresses are.
    pub attributes: Vec<Attributes>,
    /// Grows with each write of the block.
    #[serde(default)]
    pub sequence_number: u64,
    /// For each ordinal in use, the sequence number when it was given out.
    #[serde(default)]
    pub sequence_number_for_allocation: BTreeMap<String, u64>,
    /// True while it is being deleted.
    #[serde(default)]
    pub deleted: bool,
    /// Not used any more, but required by the schema.
    #[serde(default)]
    pub strict_affinity: bool,
    /// The rest.
    #[serde(flatten)]
    pub other: Other,
}

/// Whose addresses are.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Attributes {
    /// The handle by which they are released.
    #[serde(default)]
    pub handle_id: Option<String>,
    /// node, namespace, pod, timestamp, type.
    #[serde(default)]
    pub secondary: Option<BTreeMap<String, String>>,
    /// The rest.
    #[serde(flatten)]
    pub other: Other,
}

/// In which blocks a handle has addresses, and how many.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "crd.projectcalico.org",
    version = "v1",
    kind = "IPAMHandle",
    plural = "ipamhandles",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase")]
pub struct IpamHandleSpec {
    /// The handle.
    #[serde(rename = "handleID")]
    pub handle_id: String,
    /// Number of addresses, by block.
    pub block: BTreeMap<String, i64>,
    /// True while it is being deleted.
    #[serde(default)]
    pub deleted: bool,
    /// The rest.
    #[serde(flatten)]
    pub other: Other,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_newer_calico_wrote_survives_a_read_and_a_write() {
        let text = r#"{"cidr":"10.244.1.0/30","affinity":"host:a","allocations":[0,null,null,null],"unallocated":[1,2,3],
            "attributes":[{"handle_id":"h","secondary":{"node":"a"},"alternateOwnerAttrs":{"x":"y"}}],"sequenceNumber":17,
            "sequenceNumberForAllocation":{"0":16},"deleted":false,"strictAffinity":false,"affinityClaimTime":"2026-01-01T00:00:00Z"}"#;
        let read: IpamBlockSpec = serde_json::from_str(text).unwrap();
        let before: Value = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_value(read).unwrap(), before);
        let felix: FelixConfigurationSpec =
            serde_json::from_str(r#"{"vxlanVNI":1,"vxlanMTU":1450,"vxlanPort":8472,"bpfEnabled":false}"#)
                .unwrap();
        assert_eq!((felix.vxlan_vni, felix.vxlan_mtu, felix.vxlan_port), (Some(1), Some(1450), Some(8472)));
        assert_eq!(felix.other.len(), 1);
    }
}
