//! Verification by traffic: what worked before the switch must work after it.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

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
    Echo(Ipv4Addr, u16),
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

/// One ICMP echo that may not be fragmented; the time until its answer.
pub fn echo(to: Ipv4Addr, size: u16, patience: Duration) -> io::Result<Duration> {
    let mut echo = Echo::open(to)?;
    let sent = Instant::now();
    echo.send(size)?;
    echo.wait(patience)?;
    Ok(sent.elapsed())
}

/// An ICMP socket that talks to one address.
#[derive(Debug)]
pub struct Echo {
    socket: Socket,
    to: Ipv4Addr,
    id: u16,
    sequence: u16,
}

impl Echo {
    /// Opens the socket in the calling thread's namespace.
    pub fn open(to: Ipv4Addr) -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
        // The header is ours, for its "don't fragment".
        socket.set_header_included_v4(true)?;
        // Not connected: that would fix the source address, and the address of the bridge goes with the bridge.
        // Distinct among the sockets of all threads and processes on the node that ask the same address now.
        let id = u16::try_from(std::os::fd::AsRawFd::as_raw_fd(&socket) & 0x3fff).unwrap_or_default()
            ^ u16::try_from(std::process::id() & 0x3ff).unwrap_or_default() << 6;
        Ok(Self { socket, to, id, sequence: 0 })
    }

    /// Sends one echo request of `size` bytes, IP header included; its sequence number.
    pub fn send(&mut self, size: u16) -> io::Result<u16> {
        self.sequence = self.sequence.wrapping_add(1);
        let packet = request(self.to, size, self.id, self.sequence);
        self.socket.send_to(&packet, &SocketAddrV4::new(self.to, 0).into())?;
        Ok(self.sequence)
    }

    /// Waits for the answer to any request of this socket; its sequence number.
    pub fn wait(&mut self, patience: Duration) -> io::Result<u16> {
        let end = Instant::now() + patience;
        let mut buffer = [0_u8; 2048];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.socket.set_read_timeout(Some(left))?;
            let length = match io::Read::read(&mut &self.socket, &mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error),
            };
            if let Some(sequence) = buffer.get(..length).and_then(|packet| reply(packet, self.to, self.id)) {
                return Ok(sequence);
            }
        }
    }
}

const IP_HEADER: u16 = 20;
const ICMP_HEADER: u16 = 8;

// The kernel fills in the IP header's checksum, source and identification.
fn request(to: Ipv4Addr, size: u16, id: u16, sequence: u16) -> Vec<u8> {
    let size = size.max(IP_HEADER + ICMP_HEADER);
    let mut icmp = vec![8, 0, 0, 0];
    icmp.extend(id.to_be_bytes());
    icmp.extend(sequence.to_be_bytes());
    icmp.resize(usize::from(size - IP_HEADER), 0);
    let sum = checksum(&icmp);
    if let Some(field) = icmp.get_mut(2..4) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
    let mut packet = vec![0x45, 0];
    packet.extend(size.to_be_bytes());
    // Identification 0, flags: don't fragment, TTL 64, ICMP, checksum 0, source 0.
    packet.extend([0, 0, 0x40, 0, 64, 1, 0, 0, 0, 0, 0, 0]);
    packet.extend(to.octets());
    packet.extend(icmp);
    packet
}

fn reply(packet: &[u8], from: Ipv4Addr, id: u16) -> Option<u16> {
    if packet.get(12..16)? != from.octets() {
        return None;
    }
    let header = usize::from(packet.first()? & 0x0f) * 4;
    let icmp = packet.get(header..)?;
    let number = |at: usize| Some(u16::from_be_bytes([*icmp.get(at)?, *icmp.get(at + 1)?]));
    (*icmp.first()? == 0 && number(4)? == id).then(|| number(6)).flatten()
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        let high = u32::from(pair.first().copied().unwrap_or_default());
        let low = u32::from(pair.get(1).copied().unwrap_or_default());
        sum += high << 8 | low;
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
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

/// The probes of a node: the node to its peers small and full size, the node to its pods, some pods to the peers and to the Service.
#[must_use]
pub fn plan(
    peers: &[IpAddr],
    mtu: u16,
    pods: &[(String, String, Vec<IpAddr>)],
    service: Option<SocketAddr>,
) -> Vec<Probe> {
    // Of a large cluster, some: each costs a packet, and the point is this node's own plumbing.
    const PEERS: usize = 12;
    const PODS: usize = 8;
    const SMALL: u16 = 84;
    let v4 = |address: &IpAddr| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    };
    let spread = (peers.len() / PEERS).max(1);
    let peers: Vec<Ipv4Addr> = peers.iter().step_by(spread).take(PEERS).filter_map(v4).collect();
    let mut probes = Vec::new();
    for peer in &peers {
        probes.push(Probe { from: From::Host, kind: Kind::Echo(*peer, SMALL) });
        probes.push(Probe { from: From::Host, kind: Kind::Echo(*peer, mtu) });
    }
    for (_, _, addresses) in pods {
        probes.extend(
            addresses.iter().filter_map(v4).map(|to| Probe { from: From::Host, kind: Kind::Echo(to, SMALL) }),
        );
    }
    for (name, netns, _) in pods.iter().step_by((pods.len() / PODS).max(1)).take(PODS) {
        let from = From::Pod(name.clone(), netns.clone());
        for peer in peers.iter().take(4) {
            probes.push(Probe { from: from.clone(), kind: Kind::Echo(*peer, mtu) });
        }
        probes.extend(service.map(|to| Probe { from: from.clone(), kind: Kind::Connect(to) }));
    }
    probes
}
