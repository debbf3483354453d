//! Where the prober works: the cluster's nodes as this machine sees them.

use std::net::IpAddr;
use std::path::PathBuf;

/// A cluster whose nodes are network and mount namespaces of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Kubeconfig whose server this process can reach from its own network namespace.
    pub kubeconfig: PathBuf,
    /// The nodes, in the order in which reports name them.
    pub nodes: Vec<SiteNode>,
    /// A network namespace that the nodes can reach and that is no part of the cluster, as a path (`/run/netns/NAME`).
    pub outside_netns: PathBuf,
    /// The address in it that the nodes can reach.
    pub outside_address: IpAddr,
    /// Its IPv6 address, in a cluster of both families.
    pub outside_address_v6: Option<IpAddr>,
}

/// One node of a [`Site`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SiteNode {
    /// Its name in the Kubernetes API.
    pub name: String,
    /// Its root directory as this process sees it: `/proc/PID/root` of a process in the node's mount namespace.
    pub root: PathBuf,
    /// Its network namespace as a path (`/run/netns/NAME`).
    pub netns: PathBuf,
    /// Its `InternalIP`: what masqueraded packets carry as their source, and where `NodePort`s are reached.
    pub address: IpAddr,
    /// The same of IPv6, in a cluster of both families.
    pub address_v6: Option<IpAddr>,
}
