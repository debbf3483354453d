//! Verification by traffic: what worked before the switch must work after it.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::echo::echo;
use crate::host::netns;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_millis(800);
/// How often a probe is repeated before it counts as failed.
const TRIES: u32 = 3;

/// From where a probe is sent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum From {
    /// The node.
    Host,
    /// A pod: its name for people, and its namespace's path.
    Pod(String, String),
}

/// What is sent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// An ICMP echo of so many bytes on the wire, that may not be fragmented.
    Echo(IpAddr, u16),
    /// The opening of a TCP connection.
    Connect(SocketAddr),
}

/// One probe.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Probe {
    /// From where.
    pub from: From,
    /// What.
    pub kind: Kind,
}

impl std::fmt::Display for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let from = match &self.from {
            From::Host => "the node",
            From::Pod(name, _) => name,
        };
        match &self.kind {
            Kind::Echo(to, size) => write!(f, "{from} -> {to} ({size} bytes)"),
            Kind::Connect(to) => write!(f, "{from} -> {to} (TCP)"),
        }
    }
}

/// What worked before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Baseline {
    /// Probes that were answered.
    pub worked: BTreeSet<Probe>,
    /// Probes that were not; nothing is concluded from them afterwards.
    pub failed: BTreeSet<Probe>,
}

/// Sends all probes, and says which were answered.
#[must_use]
pub fn measure(probes: &[Probe]) -> Baseline {
    let mut baseline = Baseline::default();
    for (probe, answered) in probes.iter().zip(all(probes)) {
        if answered { &mut baseline.worked } else { &mut baseline.failed }.insert(probe.clone());
    }
    baseline
}

/// Probes of the baseline that worked before and are not answered now.
#[must_use]
pub fn missing(baseline: &Baseline) -> Vec<Probe> {
    let probes: Vec<Probe> = baseline.worked.iter().cloned().collect();
    let answers = all(&probes);
    probes.into_iter().zip(answers).filter(|(_, answered)| !answered).map(|(probe, _)| probe).collect()
}

// All at the same time, so that silent ones cost their patience once.
fn all(probes: &[Probe]) -> Vec<bool> {
    let mut answers = Vec::new();
    for probes in probes.chunks(32) {
        std::thread::scope(|scope| {
            let threads: Vec<_> = probes.iter().map(|probe| scope.spawn(move || answered(probe))).collect();
            answers.extend(threads.into_iter().map(|thread| thread.join().unwrap_or(false)));
        });
    }
    answers
}

fn answered(probe: &Probe) -> bool {
    (0..TRIES).any(|_| {
        let work = || match &probe.kind {
            Kind::Echo(to, size) => echo(*to, *size, PATIENCE).is_ok(),
            Kind::Connect(to) => TcpStream::connect_timeout(to, PATIENCE).is_ok(),
        };
        match &probe.from {
            From::Host => work(),
            From::Pod(_, netns) => netns::run(&netns::host_path(netns), work).unwrap_or(false),
        }
    })
}

/// Whether Felix says that it is ready: its health endpoint on the loopback answers 2xx.
#[must_use]
pub fn felix_ready(port: u16) -> bool {
    use std::io::{Read, Write};
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let ask = || -> io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE * 3))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /readiness HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut answer = [0_u8; 12];
        stream.read_exact(&mut answer)?;
        Ok(answer.starts_with(b"HTTP/1.") && answer.get(9) == Some(&b'2'))
    };
    ask().unwrap_or(false)
}

/// Whether anybody listens where Felix's health endpoint would be.
#[must_use]
pub fn felix_there(port: u16) -> bool {
    TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), PATIENCE).is_ok()
}

/// Whether a path is a namespace that can still be probed from.
#[must_use]
pub fn alive(netns: &str) -> bool {
    Path::exists(&netns::host_path(netns))
}

/// Peers' tunnel addresses of one family, and the bytes of a full-size packet to them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// Bytes, IP header included.
    pub mtu: u16,
}

/// The probes of a node: the node to its peers small and full size, the node to its pods, some pods to the peers and to the Service.
#[must_use]
pub fn plan(
    peers: &[Peers],
    pods: &[(String, String, Vec<IpAddr>)],
    service: Option<SocketAddr>,
) -> Vec<Probe> {
    // Of a large cluster, some: each costs a packet, and the point is this node's own plumbing.
    const PEERS: usize = 12;
    const PODS: usize = 8;
    const SMALL: u16 = 84;
    let mut probes = Vec::new();
    let mut full = Vec::new();
    for family in peers {
        let spread = (family.addresses.len() / PEERS).max(1);
        let some = || family.addresses.iter().step_by(spread).take(PEERS);
        for peer in some() {
            probes.push(Probe { from: From::Host, kind: Kind::Echo(*peer, SMALL) });
            probes.push(Probe { from: From::Host, kind: Kind::Echo(*peer, family.mtu) });
        }
        full.extend(some().take(4).map(|peer| Kind::Echo(*peer, family.mtu)));
    }
    for (_, _, addresses) in pods {
        probes.extend(addresses.iter().map(|to| Probe { from: From::Host, kind: Kind::Echo(*to, SMALL) }));
    }
    for (name, netns, addresses) in pods.iter().step_by((pods.len() / PODS).max(1)).take(PODS) {
        let from = From::Pod(name.clone(), netns.clone());
        for kind in &full {
            if let Kind::Echo(to, _) = kind
                && addresses.iter().any(|address| address.is_ipv4() == to.is_ipv4())
            {
                probes.push(Probe { from: from.clone(), kind: kind.clone() });
            }
        }
        probes.extend(service.map(|to| Probe { from: from.clone(), kind: Kind::Connect(to) }));
    }
    probes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_family_is_probed_at_its_own_full_size_and_only_by_pods_that_have_it() {
        let family = |address: &str, mtu| Peers { addresses: vec![address.parse().unwrap()], mtu };
        let peers = [family("10.244.2.0", 1450), family("fd00:10:244:2::", 1430)];
        let pod = |name: &str, addresses: &[&str]| {
            let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
            (name.to_owned(), format!("/run/netns/{name}"), addresses)
        };
        let pods = [pod("both", &["10.244.1.2", "fd00:10:244:1::2"]), pod("old", &["10.244.1.3"])];
        let texts: Vec<String> = plan(&peers, &pods, None).iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "the node -> 10.244.2.0 (84 bytes)",
                "the node -> 10.244.2.0 (1450 bytes)",
                "the node -> fd00:10:244:2:: (84 bytes)",
                "the node -> fd00:10:244:2:: (1430 bytes)",
                "the node -> 10.244.1.2 (84 bytes)",
                "the node -> fd00:10:244:1::2 (84 bytes)",
                "the node -> 10.244.1.3 (84 bytes)",
                "both -> 10.244.2.0 (1450 bytes)",
                "both -> fd00:10:244:2:: (1430 bytes)",
                "old -> 10.244.2.0 (1450 bytes)",
            ]
        );
    }

    #[test]
    fn what_an_older_agent_wrote_about_probes_is_read() {
        let text = r#"{"from":"host","kind":{"echo":["10.244.2.0",84]}}"#;
        let probe: Probe = serde_json::from_str(text).unwrap();
        assert_eq!(probe.kind, Kind::Echo([10, 244, 2, 0].into(), 84));
        assert_eq!(serde_json::to_string(&probe).unwrap(), text);
    }
}
