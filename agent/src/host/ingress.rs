//! A packet filter table at the ingress of links, spoken to the kernel directly: in the middle of a switch a start of `nft` would cost
//! more than all that it does there.

use rtnetlink::packet_core::{NLM_F_APPEND, NLM_F_CREATE};

use crate::host::netlink::Error;
use crate::host::tables::{
    Family, Message, NEW_TABLE, attribute, delete_table, nested, new_table, number, text, transact,
};

/// Most links that one chain can have (`NFT_NETDEVICE_MAX`).
const PER_CHAIN: usize = 256;

// include/uapi/linux/netfilter/nf_tables.h
const NEW_CHAIN: u16 = NEW_TABLE | 3;
const NEW_RULE: u16 = NEW_TABLE | 6;
const REGISTER: u32 = 1;

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
    transact("forward what comes in on the pods' links", Family::Netdev, &messages)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::tables::header;

    #[test]
    fn every_message_is_as_long_as_it_says_and_aligned() {
        let links: Vec<String> = (0..3).map(|number| format!("cali{number:011}")).collect();
        let mut bytes = Vec::new();
        for message in [new_table("t"), new_chain("t", "c", &links), new_rule("t", "c", 0x0800, 7)] {
            let from = bytes.len();
            header(&mut bytes, message.kind, message.flags, 1, 0, &message.body);
            let said = u32::from_ne_bytes(*bytes[from..].first_chunk().unwrap());
            assert_eq!(usize::try_from(said).unwrap(), bytes.len() - from);
            assert_eq!(bytes.len() % 4, 0);
        }
        assert!(links.iter().all(|link| bytes.windows(link.len()).any(|part| part == link.as_bytes())));
    }
}
