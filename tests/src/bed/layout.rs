//! Where a test bed's things are: addresses, names, paths. Nothing here touches the machine.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

/// All test beds of the machine.
#[must_use]
pub fn top() -> PathBuf {
    // Not /tmp, which may be memory: containerd's snapshots need room and a file system that overlays take.
    PathBuf::from("/var/tmp/flannel-migration-testbed")
}

/// The API server's port, in the control plane's namespace.
pub const API_PORT: u16 = 6443;
/// The Service network; its first address is the API server's.
pub const SERVICE_CIDR: &str = "10.96.0.0/16";
/// The API server's Service address.
pub const API_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// IPv6 networks of a dual-stack test bed.
pub const SERVICE_CIDR_V6: &str = "fd00:10:96::/112";
/// Pods' IPv6 network of a dual-stack test bed.
pub const POD_CIDR_V6: &str = "fd00:10:244::/56";

/// Names, addresses and paths of one test bed.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The test bed's name.
    pub bed: String,
    /// Its number on this machine, which makes its addresses its own.
    pub index: u8,
}

impl Plan {
    /// Everything that the test bed writes.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        top().join(&self.bed)
    }

    /// Disks, logs and configuration of a node.
    #[must_use]
    pub fn node_directory(&self, node: &str) -> PathBuf {
        self.directory().join("nodes").join(node)
    }

    /// Certificates, keys and kubeconfigs.
    #[must_use]
    pub fn secrets(&self) -> PathBuf {
        self.directory().join("secrets")
    }

    /// The kubeconfig of user `user`, from within the test bed's networks.
    #[must_use]
    pub fn kubeconfig_inside(&self, user: &str) -> PathBuf {
        self.secrets().join(format!("{user}.kubeconfig"))
    }

    /// The administrator's kubeconfig for the machine itself.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory().join("kubeconfig")
    }

    /// Prefix of the names of all its network namespaces.
    #[must_use]
    pub fn netns_prefix(&self) -> String {
        format!("fm-{}-", self.bed)
    }

    /// The network namespace of a node or of one of `switch`, `control`, `outside`.
    #[must_use]
    pub fn netns(&self, part: &str) -> String {
        format!("{}{part}", self.netns_prefix())
    }

    /// The same as a path.
    #[must_use]
    pub fn netns_path(&self, part: &str) -> PathBuf {
        Path::new("/run/netns").join(self.netns(part))
    }

    /// The nodes' gateway, on the switch.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::new(172, 31, self.index, 1)
    }

    /// The control plane.
    #[must_use]
    pub fn control(&self) -> Ipv4Addr {
        Ipv4Addr::new(172, 31, self.index, 2)
    }

    /// The node with this number, from 1.
    #[must_use]
    pub fn node(&self, number: u8) -> Ipv4Addr {
        Ipv4Addr::new(172, 31, self.index, 10 + number)
    }

    /// The host outside the cluster, behind the gateway.
    #[must_use]
    pub fn outside(&self) -> Ipv4Addr {
        Ipv4Addr::new(172, 30, self.index, 2)
    }

    /// The gateway's address towards the outside.
    #[must_use]
    pub fn outside_gateway(&self) -> Ipv4Addr {
        Ipv4Addr::new(172, 30, self.index, 1)
    }

    /// The IPv6 address beside one of the IPv4 addresses above.
    #[must_use]
    pub fn beside(&self, address: Ipv4Addr) -> String {
        let [_, net, _, host] = address.octets();
        format!("fd00:172:{net}:{:x}::{host:x}", self.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_test_beds_share_no_address_name_or_path() {
        let [a, b] = [(1, "a"), (2, "b")].map(|(index, bed)| Plan { bed: bed.into(), index });
        assert_ne!(a.node(1), b.node(1));
        assert_ne!(a.outside(), b.outside());
        assert_ne!(a.netns_path("n1"), b.netns_path("n1"));
        assert_ne!(a.directory(), b.directory());
        assert_ne!(a.beside(a.node(1)), a.beside(a.node(2)));
    }
}
