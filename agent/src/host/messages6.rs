//! Changes to addresses and neighbours that only IPv6 knows, as messages. Pure: nothing here talks to the kernel.

use std::net::Ipv6Addr;

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::host::netlink::Request;
use crate::host::saved::{EADDRNOTAVAIL, EEXIST};

const ENODEV: i32 = nix::errno::Errno::ENODEV as i32;

/// The link-local address that the kernel makes of a hardware address.
#[must_use]
pub fn link_local(mac: &[u8]) -> Option<Ipv6Addr> {
    made_of(mac, [0xff, 0xfe])
}

/// Another one of the same hardware address, that no kernel makes.
#[must_use]
pub fn another_link_local(mac: &[u8]) -> Option<Ipv6Addr> {
    made_of(mac, *b"fm")
}

fn made_of(mac: &[u8], middle: [u8; 2]) -> Option<Ipv6Addr> {
    let [one, two, three, four, five, six]: [u8; 6] = mac.try_into().ok()?;
    let [left, right] = middle;
    // The bit that says whether somebody administers it is turned round.
    let end = [one ^ 2, two, three, left, right, four, five, six];
    let start = [0xfe, 0x80, 0, 0, 0, 0, 0, 0];
    <[u8; 16]>::try_from([start, end].concat()).ok().map(Ipv6Addr::from)
}

fn link_local_message(address: Ipv6Addr, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    (message.header.family, message.header.prefix_len) = (AddressFamily::Inet6, 64);
    message.header.index = index;
    message.attributes =
        vec![AddressAttribute::Local(address.into()), AddressAttribute::Address(address.into())];
    message
}

/// Gives a link a link-local address, at once: nobody else on the link is asked whether it has it.
#[must_use]
pub fn add_link_local(address: Ipv6Addr, index: u32) -> Request {
    let mut message = link_local_message(address, index);
    message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    Request {
        what: format!("give #{index} the address {address}"),
        message: RouteNetlinkMessage::NewAddress(message),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        accept: &[EEXIST],
    }
}

/// Takes it away.
#[must_use]
pub fn delete_link_local(address: Ipv6Addr, index: u32) -> Request {
    Request {
        what: format!("take the address {address} from #{index}"),
        message: RouteNetlinkMessage::DelAddress(link_local_message(address, index)),
        flags: 0,
        accept: &[EADDRNOTAVAIL, ENODEV],
    }
}

fn proxy(address: Ipv6Addr, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Proxy;
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)));
    message
}

/// Lets a link answer for another's address. IPv6 has no answering for all of them, as IPv4 has.
#[must_use]
pub fn answer_for(address: Ipv6Addr, index: u32) -> Request {
    Request {
        what: format!("answer for {address} on #{index}"),
        message: RouteNetlinkMessage::NewNeighbour(proxy(address, index)),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        accept: &[EEXIST],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_local_address_is_made_as_the_kernel_makes_it() {
        let made = link_local(&[0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        assert_eq!(made, Some("fe80::5054:ff:fe12:3456".parse().unwrap()));
        assert_ne!(another_link_local(&[0x52, 0x54, 0, 0x12, 0x34, 0x56]), made);
        assert_eq!(link_local(&[1, 2, 3]), None);
    }
}
