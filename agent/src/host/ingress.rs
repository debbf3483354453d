//! A packet filter table at the ingress of links, spoken to the kernel directly: in the middle of a switch a start of `nft` would cost
//! more than all that it does there.

use std::time::Duration;

use rtnetlink::packet_core::{
    DefaultNla, Emitable as _, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST,
};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use crate::host::netlink::Error;

/// Most links that one chain can have (`NFT_NETDEVICE_MAX`).
const PER_CHAIN: usize = 256;
const ANSWER: Duration = Duration::from_secs(5);
const OPEN: &str = "open a packet filter socket";
const ENOENT: i32 = nix::errno::Errno::ENOENT as i32;
const EOPNOTSUPP: i32 = nix::errno::Errno::EOPNOTSUPP as i32;

// include/uapi/linux/netfilter/nfnetlink.h and nf_tables.h
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const DELETE_TABLE: u16 = NEW_TABLE | 2;
const NEW_CHAIN: u16 = NEW_TABLE | 3;
const NEW_RULE: u16 = NEW_TABLE | 6;
const FAMILY_ANY: u8 = 0;
const FAMILY_NETDEV: u8 = 5;
const NLMSG_ERROR: u16 = 2;
const HEADER: usize = 16;
const REGISTER: u32 = 1;
const NESTED: u16 = 1 << 15;

/// IPv4 and IPv6, as a packet says it.
const PROTOCOLS: [u16; 2] = [0x0800, 0x86dd];

/// Makes the table, in place of one that is there: what comes in on any of `links` of IPv4 or IPv6 goes out of the link `to`.
pub fn forward(table: &str, links: &[String], to: u32) -> Result<(), Error> {
    let mut messages = vec![new_table(table), delete_table(table), new_table(table)];
    for (number, links) in links.chunks(PER_CHAIN).enumerate() {
        let chain = format!("pods{number}");
        messages.push(new_chain(table, &chain, links));
        messages.extend(PROTOCOLS.map(|protocol| new_rule(table, &chain, protocol, to)));
    }
    transact("forward what comes in on the pods' links", &messages)
}

/// Deletes the table; whether there was one. A kernel without nftables has none.
pub fn delete(table: &str) -> Result<bool, Error> {
    match transact("delete the table at the pods' links", &[delete_table(table)]) {
        Err(Error::Socket(OPEN, _)) => Ok(false),
        Err(error) if matches!(error.errno(), Some(ENOENT | EOPNOTSUPP)) => Ok(false),
        done => done.map(|()| true),
    }
}

struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let nla = DefaultNla::new(kind, value.to_vec());
    let mut bytes = vec![0; nla.buffer_len()];
    nla.emit(&mut bytes);
    bytes
}

fn text(kind: u16, value: &str) -> Vec<u8> {
    attribute(kind, &[value.as_bytes(), &[0]].concat())
}

// Numbers are in the network's order here, unlike those of routing.
fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &parts.concat())
}

fn new_table(table: &str) -> Message {
    Message { kind: NEW_TABLE, flags: NLM_F_CREATE, body: text(1, table) }
}

fn delete_table(table: &str) -> Message {
    Message { kind: DELETE_TABLE, flags: 0, body: text(1, table) }
}

fn new_chain(table: &str, chain: &str, links: &[String]) -> Message {
    let links: Vec<Vec<u8>> = links.iter().map(|link| text(1, link)).collect();
    // Ingress, priority 0.
    let hook = nested(4, &[number(1, 0), number(2, 0), nested(4, &links)]);
    let accept = number(5, 1);
    let body = [text(1, table), text(3, chain), hook, accept, text(7, "filter")].concat();
    Message { kind: NEW_CHAIN, flags: NLM_F_CREATE, body }
}

fn new_rule(table: &str, chain: &str, protocol: u16, to: u32) -> Message {
    let expression = |name: &str, data: &[Vec<u8>]| nested(1, &[text(1, name), nested(2, data)]);
    let value = |bytes: &[u8]| attribute(1, bytes);
    let expressions = [
        // register = meta protocol
        expression("meta", &[number(1, REGISTER), number(2, 1)]),
        // register == protocol
        expression("cmp", &[number(1, REGISTER), number(2, 0), nested(3, &[value(&protocol.to_be_bytes())])]),
        // register = to; an index is in the host's order
        expression("immediate", &[number(1, REGISTER), nested(2, &[value(&to.to_ne_bytes())])]),
        expression("fwd", &[number(1, REGISTER)]),
    ];
    let body = [text(1, table), text(2, chain), nested(4, &expressions)].concat();
    Message { kind: NEW_RULE, flags: NLM_F_CREATE | NLM_F_APPEND, body }
}

fn header(bytes: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, family: u8, body: &[u8]) {
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
fn transact(what: &'static str, messages: &[Message]) -> Result<(), Error> {
    let mut socket = Socket::new(NETLINK_NETFILTER).map_err(|error| Error::Socket(OPEN, error))?;
    socket.bind_auto().map_err(|error| Error::Socket("bind a socket", error))?;
    socket.connect(&SocketAddr::new(0, 0)).map_err(|error| Error::Socket("connect a socket", error))?;
    socket.set_cap_ack(true).map_err(|error| Error::Socket("set a socket's option", error))?;
    socket2::SockRef::from(&socket)
        .set_read_timeout(Some(ANSWER))
        .map_err(|error| Error::Socket("set a socket's time limit", error))?;
    let mut bytes = Vec::new();
    header(&mut bytes, BATCH_BEGIN, 0, 0, FAMILY_ANY, &[]);
    for (sequence, message) in (1..).zip(messages) {
        header(&mut bytes, message.kind, message.flags | NLM_F_ACK, sequence, FAMILY_NETDEV, &message.body);
    }
    header(&mut bytes, BATCH_END, 0, 0, FAMILY_ANY, &[]);
    socket.send(&bytes, 0).map_err(|error| Error::Socket("send", error))?;
    let mut answered = 0;
    while answered < messages.len() {
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
    fn every_message_is_as_long_as_it_says_and_aligned() {
        let links: Vec<String> = (0..3).map(|number| format!("cali{number:011}")).collect();
        let mut bytes = Vec::new();
        for message in [new_table("t"), new_chain("t", "c", &links), new_rule("t", "c", 0x0800, 7)] {
            let from = bytes.len();
            header(&mut bytes, message.kind, message.flags, 1, FAMILY_NETDEV, &message.body);
            let said = u32::from_ne_bytes(*bytes[from..].first_chunk().unwrap());
            assert_eq!(usize::try_from(said).unwrap(), bytes.len() - from);
            assert_eq!(bytes.len() % 4, 0);
        }
        assert!(links.iter().all(|link| bytes.windows(link.len()).any(|part| part == link.as_bytes())));
    }

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
