//! ICMP echoes that may not be fragmented, of both families.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

/// One ICMP echo that may not be fragmented; the time until its answer.
pub fn echo(to: IpAddr, size: u16, patience: Duration) -> io::Result<Duration> {
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
    to: IpAddr,
    id: u16,
    sequence: u16,
}

impl Echo {
    /// Opens the socket in the calling thread's namespace.
    pub fn open(to: IpAddr) -> io::Result<Self> {
        let socket = if to.is_ipv4() {
            let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
            // The header is ours, for its "don't fragment".
            socket.set_header_included_v4(true)?;
            socket
        } else {
            let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
            nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Ipv6DontFrag, &true)?;
            socket
        };
        // Not connected: that would fix the source address, and the address of the bridge goes with the bridge.
        // Distinct among the sockets of all threads and processes on the node that ask the same address now.
        let id = u16::try_from(std::os::fd::AsRawFd::as_raw_fd(&socket) & 0x3fff).unwrap_or_default()
            ^ u16::try_from(std::process::id() & 0x3ff).unwrap_or_default() << 6;
        Ok(Self { socket, to, id, sequence: 0 })
    }

    /// Sends one echo request of `size` bytes, IP header included; its sequence number.
    pub fn send(&mut self, size: u16) -> io::Result<u16> {
        self.sequence = self.sequence.wrapping_add(1);
        let packet = match self.to {
            IpAddr::V4(to) => request_v4(to, size, self.id, self.sequence),
            IpAddr::V6(to) => request_v6(to, size, self.id, self.sequence),
        };
        self.socket.send_to(&packet, &SocketAddr::new(self.to, 0).into())?;
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
            let answered = buffer.get(..length).and_then(|packet| match self.to {
                IpAddr::V4(to) => reply_v4(packet, to, self.id),
                IpAddr::V6(to) => reply_v6(packet, to, self.id),
            });
            if let Some(sequence) = answered {
                return Ok(sequence);
            }
        }
    }
}

const IPV4_HEADER: u16 = 20;
const IPV6_HEADER: u16 = 40;
const ICMP_HEADER: u16 = 8;
const ADDRESS: u16 = 16;

// The kernel fills in the IP header's checksum, source and identification.
fn request_v4(to: Ipv4Addr, size: u16, id: u16, sequence: u16) -> Vec<u8> {
    let size = size.max(IPV4_HEADER + ICMP_HEADER);
    let mut icmp = icmp(8, id, sequence);
    icmp.resize(usize::from(size - IPV4_HEADER), 0);
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

// The kernel makes header and checksum. What is asked is sent along: a router's first address is its network's as well, and the answer to
// that may come from another of its addresses.
fn request_v6(to: Ipv6Addr, size: u16, id: u16, sequence: u16) -> Vec<u8> {
    let mut icmp = icmp(128, id, sequence);
    icmp.extend(to.octets());
    icmp.resize(usize::from(size.max(IPV6_HEADER + ICMP_HEADER + ADDRESS) - IPV6_HEADER), 0);
    icmp
}

fn icmp(kind: u8, id: u16, sequence: u16) -> Vec<u8> {
    let mut icmp = vec![kind, 0, 0, 0];
    icmp.extend(id.to_be_bytes());
    icmp.extend(sequence.to_be_bytes());
    icmp
}

fn reply_v4(packet: &[u8], from: Ipv4Addr, id: u16) -> Option<u16> {
    if packet.get(12..16)? != from.octets() {
        return None;
    }
    let header = usize::from(packet.first()? & 0x0f) * 4;
    sequence(packet.get(header..)?, 0, id)
}

fn reply_v6(icmp: &[u8], asked: Ipv6Addr, id: u16) -> Option<u16> {
    if icmp.get(8..24)? != asked.octets() {
        return None;
    }
    sequence(icmp, 129, id)
}

fn sequence(icmp: &[u8], kind: u8, id: u16) -> Option<u16> {
    let number = |at: usize| Some(u16::from_be_bytes([*icmp.get(at)?, *icmp.get(at + 1)?]));
    (*icmp.first()? == kind && number(4)? == id).then(|| number(6)).flatten()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_as_long_as_asked_for_and_its_answer_is_known_again() {
        let four = Ipv4Addr::new(10, 244, 2, 0);
        let mut packet = request_v4(four, 84, 7, 9);
        assert_eq!(packet.len(), 84);
        packet[12..16].copy_from_slice(&four.octets());
        assert_eq!(reply_v4(&packet, four, 7), None, "a request is no answer");
        packet[20] = 0;
        assert_eq!(reply_v4(&packet, four, 7), Some(9));
        assert_eq!(reply_v4(&packet, Ipv4Addr::LOCALHOST, 7), None);

        let six: Ipv6Addr = "fd00:10:244:2::".parse().unwrap();
        let mut packet = request_v6(six, 1430, 7, 9);
        assert_eq!(packet.len() + usize::from(IPV6_HEADER), 1430);
        assert_eq!(reply_v6(&packet, six, 7), None, "a request is no answer");
        packet[0] = 129;
        assert_eq!(reply_v6(&packet, six, 7), Some(9));
        assert_eq!((reply_v6(&packet, six, 8), reply_v6(&packet, Ipv6Addr::LOCALHOST, 7)), (None, None));
    }
}
