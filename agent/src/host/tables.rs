//! Tables of the packet filter by their names, spoken to the kernel directly.
//!
//! `nft` reads much of what is there before it lists or deletes one table by its name, others' tables too. That takes long on a node with
//! many rules; and what a newer `nft` wrote, as that in Felix's or kube-proxy's image may be, an older one may not survive.

use std::fmt;
use std::time::Duration;

use rtnetlink::packet_core::{DefaultNla, Emitable as _, NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use crate::host::netlink::Error;

const ANSWER: Duration = Duration::from_secs(5);
const OPEN: &str = "open a packet filter socket";
const ENOENT: i32 = nix::errno::Errno::ENOENT as i32;
const EINVAL: i32 = nix::errno::Errno::EINVAL as i32;
const EOPNOTSUPP: i32 = nix::errno::Errno::EOPNOTSUPP as i32;

// include/uapi/linux/netfilter/nfnetlink.h and nf_tables.h
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// First of the kinds of messages.
pub(super) const NEW_TABLE: u16 = SUBSYSTEM << 8;
const GET_TABLE: u16 = NEW_TABLE | 1;
const DELETE_TABLE: u16 = NEW_TABLE | 2;
const FAMILY_ANY: u8 = 0;
const NLMSG_ERROR: u16 = 2;
const HEADER: usize = 16;
const NESTED: u16 = 1 << 15;

/// What a table's packets are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
    /// ARP.
    Arp,
    /// Those of single links.
    Netdev,
}

impl Family {
    const fn number(self) -> u8 {
        match self {
            Self::Ip => 2,
            Self::Arp => 3,
            Self::Netdev => 5,
            Self::Ip6 => 10,
        }
    }

    /// As `nft` names it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
            Self::Arp => "arp",
            Self::Netdev => "netdev",
        }
    }
}

/// Family and name of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name(pub Family, pub &'static str);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0.as_str(), self.1)
    }
}

/// Whether a table is there.
pub fn is_there(name: Name) -> Result<bool, Error> {
    let mut bytes = Vec::new();
    header(&mut bytes, GET_TABLE, NLM_F_ACK, 1, name.0.number(), &text(1, name.1));
    match exchange("look for a packet filter table", &bytes, 1) {
        // A kernel without nftables doesn't know what is asked.
        Err(error) if error.errno() == Some(EINVAL) => Ok(false),
        done => found(done),
    }
}

/// Deletes tables, those that are there, one after another.
pub fn delete(names: &[Name]) -> Result<(), Error> {
    names.iter().try_for_each(|name| {
        let done = transact("delete a packet filter table", name.0, &[delete_table(name.1)]);
        found(done).map(drop)
    })
}

// A kernel without nftables has no table.
fn found(done: Result<(), Error>) -> Result<bool, Error> {
    match done {
        Err(Error::Socket(OPEN, _)) => Ok(false),
        Err(error) if matches!(error.errno(), Some(ENOENT | EOPNOTSUPP)) => Ok(false),
        done => done.map(|()| true),
    }
}

/// One change, as the kernel wants it.
pub(super) struct Message {
    pub kind: u16,
    pub flags: u16,
    pub body: Vec<u8>,
}

pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let nla = DefaultNla::new(kind, value.to_vec());
    let mut bytes = vec![0; nla.buffer_len()];
    nla.emit(&mut bytes);
    bytes
}

pub(super) fn text(kind: u16, value: &str) -> Vec<u8> {
    attribute(kind, &[value.as_bytes(), &[0]].concat())
}

// Numbers are in the network's order here, unlike those of routing.
pub(super) fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

pub(super) fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &parts.concat())
}

pub(super) fn new_table(table: &str) -> Message {
    Message { kind: NEW_TABLE, flags: NLM_F_CREATE, body: text(1, table) }
}

pub(super) fn delete_table(table: &str) -> Message {
    Message { kind: DELETE_TABLE, flags: 0, body: text(1, table) }
}

pub(super) fn header(bytes: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, family: u8, body: &[u8]) {
    let length = u32::try_from(HEADER + 4 + body.len()).unwrap_or(u32::MAX);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    let resource = if family == FAMILY_ANY { SUBSYSTEM } else { 0 };
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(body);
}

/// All of it, or none.
pub(super) fn transact(what: &'static str, family: Family, messages: &[Message]) -> Result<(), Error> {
    let mut bytes = Vec::new();
    header(&mut bytes, BATCH_BEGIN, 0, 0, FAMILY_ANY, &[]);
    for (sequence, message) in (1..).zip(messages) {
        let flags = message.flags | NLM_F_ACK;
        header(&mut bytes, message.kind, flags, sequence, family.number(), &message.body);
    }
    header(&mut bytes, BATCH_END, 0, 0, FAMILY_ANY, &[]);
    exchange(what, &bytes, messages.len())
}

/// Sends messages, and waits until so many are answered.
fn exchange(what: &'static str, bytes: &[u8], messages: usize) -> Result<(), Error> {
    let mut socket = Socket::new(NETLINK_NETFILTER).map_err(|error| Error::Socket(OPEN, error))?;
    socket.bind_auto().map_err(|error| Error::Socket("bind a socket", error))?;
    socket.connect(&SocketAddr::new(0, 0)).map_err(|error| Error::Socket("connect a socket", error))?;
    socket.set_cap_ack(true).map_err(|error| Error::Socket("set a socket's option", error))?;
    socket2::SockRef::from(&socket)
        .set_read_timeout(Some(ANSWER))
        .map_err(|error| Error::Socket("set a socket's time limit", error))?;
    socket.send(bytes, 0).map_err(|error| Error::Socket("send", error))?;
    let mut answered = 0;
    while answered < messages {
        let (datagram, _) = socket.recv_from_full().map_err(|error| Error::Socket("receive", error))?;
        for code in answers(&datagram) {
            if code != 0 {
                let source = std::io::Error::from_raw_os_error(code.saturating_abs());
                return Err(Error::Refused { what: what.into(), source });
            }
            answered += 1;
        }
    }
    Ok(())
}

/// The error numbers of all answers in a datagram; 0 where all is well.
fn answers(datagram: &[u8]) -> Vec<i32> {
    let mut codes = Vec::new();
    let mut rest = datagram;
    while let Some((header, body)) = rest.split_at_checked(HEADER) {
        let length = header.first_chunk().map_or(0, |length| u32::from_ne_bytes(*length));
        let length = usize::try_from(length).unwrap_or(usize::MAX).max(HEADER);
        let kind = header.get(4..6).and_then(<[u8]>::first_chunk).map(|kind| u16::from_ne_bytes(*kind));
        if kind == Some(NLMSG_ERROR) {
            codes.extend(body.first_chunk().map(|code| i32::from_ne_bytes(*code)));
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    codes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_one_after_another_and_scraps_are_none() {
        let answer = |code: i32| {
            let mut bytes = 36_u32.to_ne_bytes().to_vec();
            bytes.extend(NLMSG_ERROR.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(code.to_ne_bytes());
            bytes.extend([0; 16]);
            bytes
        };
        assert_eq!(answers(&[answer(0), answer(-2)].concat()), [0, -2]);
        assert_eq!(answers(&answer(0)[..17]), Vec::<i32>::new());
        assert_eq!(answers(&[]), Vec::<i32>::new());
    }
}
