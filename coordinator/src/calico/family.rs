//! The two families of addresses, and what Calico and flannel call their things in each.

use std::net::IpAddr;

use ipnet::IpNet;

use super::names;

/// A family of addresses. Both have a pool, a VXLAN device and an address of a node each; VNI and port are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6, beside IPv4 in clusters of both.
    V6,
}

impl Family {
    /// Of an address.
    #[must_use]
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Of a network.
    #[must_use]
    pub const fn of_net(network: &IpNet) -> Self {
        match network {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }

    /// For people.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// As labels have it.
    #[must_use]
    pub const fn number(self) -> &'static str {
        match self {
            Self::V4 => "4",
            Self::V6 => "6",
        }
    }

    /// The pool that flannel's network becomes; Calico's own migration takes the same.
    #[must_use]
    pub const fn pool(self) -> &'static str {
        match self {
            Self::V4 => names::POOL,
            Self::V6 => "default-ipv6-ippool",
        }
    }

    /// Length of Calico's blocks where nodes have room for that.
    #[must_use]
    pub const fn block_size(self) -> u8 {
        match self {
            Self::V4 => 26,
            Self::V6 => 122,
        }
    }

    /// The longest prefix of a node's network with room for a pod: flannel's device and bridge have the first two addresses.
    #[must_use]
    pub const fn smallest(self) -> u8 {
        match self {
            Self::V4 => 30,
            Self::V6 => 126,
        }
    }

    /// Beginning of the handles of VXLAN devices.
    #[must_use]
    pub const fn tunnel(self) -> &'static str {
        match self {
            Self::V4 => "vxlan-tunnel-addr-",
            Self::V6 => "vxlan-v6-tunnel-addr-",
        }
    }

    /// What Calico calls the address of a VXLAN device.
    #[must_use]
    pub const fn tunnel_type(self) -> &'static str {
        match self {
            Self::V4 => "vxlanTunnelAddress",
            Self::V6 => "vxlanV6TunnelAddress",
        }
    }

    /// flannel's VXLAN device.
    #[must_use]
    pub fn device(self, vni: u32) -> String {
        match self {
            Self::V4 => format!("flannel.{vni}"),
            Self::V6 => format!("flannel-v6.{vni}"),
        }
    }

    /// Node annotation: address of the VXLAN device.
    #[must_use]
    pub const fn tunnel_address(self) -> &'static str {
        match self {
            Self::V4 => names::TUNNEL_ADDRESS,
            Self::V6 => names::TUNNEL_ADDRESS_V6,
        }
    }

    /// Node annotation: MAC address of the VXLAN device.
    #[must_use]
    pub const fn tunnel_mac(self) -> &'static str {
        match self {
            Self::V4 => names::TUNNEL_MAC,
            Self::V6 => names::TUNNEL_MAC_V6,
        }
    }

    /// Node annotation: the node's own address with prefix length.
    #[must_use]
    pub const fn node_address(self) -> &'static str {
        match self {
            Self::V4 => names::NODE_ADDRESS,
            Self::V6 => names::NODE_ADDRESS_V6,
        }
    }

    /// flannel's annotation about the node's VXLAN device, under flannel's prefix.
    #[must_use]
    pub const fn backend_data(self) -> &'static str {
        match self {
            Self::V4 => "backend-data",
            Self::V6 => "backend-v6-data",
        }
    }

    /// flannel's annotation with the address that other nodes send to, under flannel's prefix.
    #[must_use]
    pub const fn public_address(self) -> &'static str {
        match self {
            Self::V4 => "public-ip",
            Self::V6 => "public-ipv6",
        }
    }
}
