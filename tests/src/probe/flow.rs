//! Which flows are measured: who talks to whom, and how. Pure.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// The place of a pod in its workload, which one pod after another can fill.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// The workload, as `Kind/name`.
    pub workload: String,
    /// The node's name for a `DaemonSet`, an ordinal for any other workload.
    pub place: String,
}

impl Slot {
    /// The place of a `DaemonSet`'s pod on one node.
    #[must_use]
    pub fn daemon(name: &str, node: &str) -> Self {
        Self { workload: format!("DaemonSet/{name}"), place: node.to_owned() }
    }
}

/// One end of a flow.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// A node's own network namespace.
    Host(String),
    /// Whichever pod fills this slot.
    Pod(Slot),
    /// The same by its IPv6 address.
    PodV6(Slot),
    /// The namespace outside the cluster.
    Outside,
    /// A fixed address.
    Address(SocketAddr),
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(node) => write!(formatter, "host@{node}"),
            Self::Pod(Slot { workload, place }) | Self::PodV6(Slot { workload, place }) => {
                let name = workload.rsplit('/').next().unwrap_or(workload);
                write!(formatter, "{name}@{place}")
            }
            Self::Outside => formatter.write_str("outside"),
            Self::Address(address) => write!(formatter, "{address}"),
        }
    }
}

/// What is measured by a flow. The order is that of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// ICMP echo from a pod to a pod of another node.
    PodToPodOtherNode,
    /// ICMP echo from a pod to another pod of its node.
    PodToPodSameNode,
    /// ICMP echo from a node to a pod of its own.
    HostToOwnPod,
    /// ICMP echo from a node to a pod of another node.
    HostToOtherPod,
    /// A new TCP connection from a pod to the Service's cluster address, request and answer.
    PodToService,
    /// A UDP datagram, from a new port each, to a server outside that answers with the source it saw.
    PodToOutside,
    /// A new TCP connection from outside to a `NodePort`, request and answer.
    OutsideToNodePort,
    /// One TCP connection held between pods of two nodes, an echo round trip each time.
    LongLivedOtherNode,
    /// One TCP connection held between two pods of a node, an echo round trip each time.
    LongLivedSameNode,
    /// [`Self::PodToPodOtherNode`] by IPv6, and so on.
    PodToPodOtherNodeV6,
    /// See above.
    PodToPodSameNodeV6,
    /// See above.
    HostToOwnPodV6,
    /// See above.
    HostToOtherPodV6,
    /// See above.
    PodToServiceV6,
    /// See above.
    PodToOutsideV6,
    /// See above.
    OutsideToNodePortV6,
    /// See above.
    LongLivedOtherNodeV6,
    /// See above.
    LongLivedSameNodeV6,
}

impl Kind {
    /// The same by IPv6.
    #[must_use]
    pub const fn v6(self) -> Self {
        match self {
            Self::PodToPodOtherNode => Self::PodToPodOtherNodeV6,
            Self::PodToPodSameNode => Self::PodToPodSameNodeV6,
            Self::HostToOwnPod => Self::HostToOwnPodV6,
            Self::HostToOtherPod => Self::HostToOtherPodV6,
            Self::PodToService => Self::PodToServiceV6,
            Self::PodToOutside => Self::PodToOutsideV6,
            Self::OutsideToNodePort => Self::OutsideToNodePortV6,
            Self::LongLivedOtherNode => Self::LongLivedOtherNodeV6,
            Self::LongLivedSameNode => Self::LongLivedSameNodeV6,
            same => same,
        }
    }

    /// Whether a Service answers: its pods may be on any node.
    #[must_use]
    pub const fn is_of_a_service(self) -> bool {
        matches!(
            self,
            Self::PodToService | Self::OutsideToNodePort | Self::PodToServiceV6 | Self::OutsideToNodePortV6
        )
    }
}

/// How one probe of a flow is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// ICMP echo, answered by the target's kernel.
    Ping,
    /// A TCP connection of its own, with a request and an answer.
    Connect,
    /// A datagram from a socket of its own; the answer says which source the server saw, which must be this one.
    Observe(IpAddr),
    /// One record on the connection that is held, echoed by the target on this port.
    Stream(u16),
}

/// One flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// What it measures.
    pub kind: Kind,
    /// Where probes start.
    pub from: Place,
    /// Where they go.
    pub to: Place,
    /// The nodes whose network every probe passes: of the source, and of the target where it has only one.
    pub nodes: Vec<String>,
    /// How a probe is made.
    pub method: Method,
}

/// What flows are made of.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    /// Names and addresses of the nodes.
    pub nodes: &'a [(String, IpAddr)],
    /// Cluster address and port of the Service; `None` leaves its flows out.
    pub service: Option<SocketAddr>,
    /// The port opened on every node; `None` leaves its flows out.
    pub node_port: Option<u16>,
    /// Where the observing server outside listens; `None` leaves its flows out.
    pub observer: Option<SocketAddr>,
    /// Port on which the echo pods hold long-lived connections.
    pub echo_port: u16,
    /// With how many other nodes each node is paired, so that big clusters don't get flows by the square.
    pub peers: usize,
    /// Whether all of this is by IPv6.
    pub v6: bool,
}

/// The two `DaemonSet`s whose pods are the ends of flows: one pod each on every node makes pairs on a node and across.
pub const ECHO: [&str; 2] = ["echo", "echo2"];

impl Plan<'_> {
    /// All flows, ordered by kind.
    #[must_use]
    pub fn flows(&self) -> Vec<Flow> {
        let mut flows: Vec<Flow> = self
            .nodes
            .iter()
            .enumerate()
            .flat_map(|(index, (node, address))| {
                let mut flows = self.alone(node, *address);
                flows.extend(self.peers_of(index).flat_map(|peer| self.paired(node, peer)));
                flows
            })
            .collect();
        flows.sort_by_key(|flow| flow.kind);
        flows
    }

    /// The nodes that follow this one, the list taken as a ring.
    fn peers_of(&self, index: usize) -> impl Iterator<Item = &str> {
        let others = self.nodes.len().saturating_sub(1);
        self.nodes.iter().cycle().skip(index + 1).take(self.peers.min(others)).map(|(name, _)| name.as_str())
    }

    fn kind(&self, kind: Kind) -> Kind {
        if self.v6 { kind.v6() } else { kind }
    }

    /// A pod as a target.
    fn target(&self, slot: Slot) -> Place {
        if self.v6 { Place::PodV6(slot) } else { Place::Pod(slot) }
    }

    fn alone(&self, node: &str, address: IpAddr) -> Vec<Flow> {
        let [one, two] = ECHO.map(|name| Place::Pod(Slot::daemon(name, node)));
        let [to_one, to_two] = ECHO.map(|name| self.target(Slot::daemon(name, node)));
        let host = Place::Host(node.to_owned());
        let flow = |kind, from: &Place, to: &Place, method| Flow {
            kind: self.kind(kind),
            from: from.clone(),
            to: to.clone(),
            nodes: vec![node.to_owned()],
            method,
        };
        let mut flows = vec![
            flow(Kind::PodToPodSameNode, &one, &to_two, Method::Ping),
            flow(Kind::PodToPodSameNode, &two, &to_one, Method::Ping),
            flow(Kind::HostToOwnPod, &host, &to_one, Method::Ping),
            flow(Kind::LongLivedSameNode, &one, &to_two, Method::Stream(self.echo_port)),
        ];
        if let Some(service) = self.service {
            flows.push(flow(Kind::PodToService, &one, &Place::Address(service), Method::Connect));
        }
        if let Some(observer) = self.observer {
            let method = Method::Observe(address);
            flows.push(flow(Kind::PodToOutside, &one, &Place::Address(observer), method));
        }
        if let Some(port) = self.node_port {
            let target = Place::Address(SocketAddr::new(address, port));
            flows.push(flow(Kind::OutsideToNodePort, &Place::Outside, &target, Method::Connect));
        }
        flows
    }

    fn paired(&self, node: &str, peer: &str) -> [Flow; 3] {
        let [name, _] = ECHO;
        let pod = Place::Pod(Slot::daemon(name, node));
        let target = self.target(Slot::daemon(name, peer));
        let flow = |kind, from: Place, method| Flow {
            kind: self.kind(kind),
            from,
            to: target.clone(),
            nodes: vec![node.to_owned(), peer.to_owned()],
            method,
        };
        [
            flow(Kind::PodToPodOtherNode, pod.clone(), Method::Ping),
            flow(Kind::HostToOtherPod, Place::Host(node.to_owned()), Method::Ping),
            flow(Kind::LongLivedOtherNode, pod, Method::Stream(self.echo_port)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(count: u8) -> Vec<(String, IpAddr)> {
        (1..=count).map(|number| (format!("n{number}"), IpAddr::from([10, 99, 0, number]))).collect()
    }

    fn plan(nodes: &[(String, IpAddr)], peers: usize) -> Plan<'_> {
        Plan {
            nodes,
            service: Some(([10, 96, 0, 9], 80).into()),
            node_port: Some(30080),
            observer: Some(([10, 98, 0, 1], 9).into()),
            echo_port: 7,
            peers,
            v6: false,
        }
    }

    fn number(flows: &[Flow], kind: Kind) -> usize {
        flows.iter().filter(|flow| flow.kind == kind).count()
    }

    #[test]
    fn three_nodes_are_paired_each_with_each() {
        let nodes = nodes(3);
        let flows = plan(&nodes, 2).flows();
        for (kind, expected) in [
            (Kind::PodToPodOtherNode, 6),
            (Kind::PodToPodSameNode, 6),
            (Kind::HostToOwnPod, 3),
            (Kind::HostToOtherPod, 6),
            (Kind::PodToService, 3),
            (Kind::PodToOutside, 3),
            (Kind::OutsideToNodePort, 3),
            (Kind::LongLivedOtherNode, 6),
            (Kind::LongLivedSameNode, 3),
        ] {
            assert_eq!(number(&flows, kind), expected, "{kind:?}");
        }
    }

    #[test]
    fn a_single_node_has_no_flows_to_other_nodes() {
        let nodes = nodes(1);
        let flows = plan(&nodes, 2).flows();
        assert_eq!(number(&flows, Kind::PodToPodOtherNode), 0);
        assert_eq!(number(&flows, Kind::PodToPodSameNode), 2);
        assert_eq!(flows.len(), 7);
    }

    #[test]
    fn a_big_cluster_has_flows_in_proportion_to_its_nodes() {
        let nodes = nodes(50);
        let flows = plan(&nodes, 2).flows();
        assert_eq!(number(&flows, Kind::PodToPodOtherNode), 100);
        assert!(flows.iter().all(|flow| flow.nodes.len() < 2 || flow.nodes[0] != flow.nodes[1]));
    }

    #[test]
    fn every_node_is_the_target_of_as_many_flows_as_it_is_the_source() {
        let nodes = nodes(5);
        let flows = plan(&nodes, 2).flows();
        for (node, _) in &nodes {
            let pod = Place::Pod(Slot::daemon("echo", node));
            let pairs = |end: fn(&Flow) -> &Place| {
                flows.iter().filter(|flow| flow.kind == Kind::PodToPodOtherNode && end(flow) == &pod).count()
            };
            assert_eq!((pairs(|flow| &flow.from), pairs(|flow| &flow.to)), (2, 2), "{node}");
        }
    }

    #[test]
    fn a_masquerade_flow_expects_the_address_of_its_own_node() {
        let nodes = nodes(3);
        for flow in plan(&nodes, 2).flows().iter().filter(|flow| flow.kind == Kind::PodToOutside) {
            let (_, address) = nodes.iter().find(|(name, _)| flow.nodes == [name.as_str()]).unwrap();
            assert_eq!(flow.method, Method::Observe(*address));
        }
    }

    #[test]
    fn what_is_measured_by_ipv6_is_the_same_and_told_apart() {
        let nodes = nodes(3);
        let (v4, v6) = (plan(&nodes, 2).flows(), Plan { v6: true, ..plan(&nodes, 2) }.flows());
        assert_eq!(v4.len(), v6.len());
        for (four, six) in v4.iter().zip(&v6) {
            assert_eq!((four.kind.v6(), four.to.to_string()), (six.kind, six.to.to_string()));
            assert!(four.kind < six.kind && !matches!(six.to, Place::Pod(_)));
            assert_eq!(four.kind.is_of_a_service(), six.kind.is_of_a_service());
        }
    }

    #[test]
    fn places_are_named_briefly() {
        assert_eq!(Place::Pod(Slot::daemon("echo", "n1")).to_string(), "echo@n1");
        assert_eq!(Place::Host("n1".into()).to_string(), "host@n1");
        assert_eq!(Place::Address(([10, 0, 0, 1], 80).into()).to_string(), "10.0.0.1:80");
    }
}
