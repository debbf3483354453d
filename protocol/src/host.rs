//! What an agent sees on its host before anything is changed there, so that the coordinator can say what is in the way.

use std::fmt;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Most interfaces that are told; a report must stay small.
pub const MOST_INTERFACES: usize = 16;
/// Most plugins that are told.
pub const MOST_PLUGINS: usize = 48;

/// A host's facts. Absent or empty: not known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostFacts {
    /// `net.ipv4.conf.all.rp_filter`: 0 off, 1 strict, 2 loose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rp_filter: Option<u8>,
    /// flannel's VXLAN devices, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vxlan: Vec<VxlanDevice>,
    /// Names of the files in `/opt/cni/bin`, sorted; at most [`MOST_PLUGINS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plugins: Vec<String>,
    /// Interfaces with addresses that nodes could be reached by, by index; at most [`MOST_INTERFACES`]. Not those of pods, bridges and
    /// tunnels, which Calico never takes either.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
}

/// One of flannel's VXLAN devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VxlanDevice {
    /// Name, `flannel.1`.
    pub name: String,
    /// Network identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// Hardware address, lower case with colons.
    pub mac: String,
    /// MTU in bytes.
    pub mtu: u32,
}

/// An interface of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// Addresses of both families with the prefix length of their network; not link-local ones of IPv6.
    pub addresses: Vec<IpNet>,
}

impl fmt::Display for VxlanDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, vni, port, mac, mtu } = self;
        write!(f, "{name} (VNI {vni}, port {port}, MAC {mac}, MTU {mtu})")
    }
}
