//! Changes to routes, and to which tables of them are asked, as messages. Pure: nothing here talks to the kernel.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::host::netlink::Request;
use crate::host::saved::{EEXIST, ENOENT, ESRCH};

const EAFNOSUPPORT: i32 = nix::errno::Errno::EAFNOSUPPORT as i32;

/// Adds a route, or replaces the one in its place.
#[must_use]
pub fn add(what: String, message: RouteMessage) -> Request {
    Request {
        what,
        message: RouteNetlinkMessage::NewRoute(message),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        accept: &[EEXIST],
    }
}

fn on_link(destination: IpAddr, index: u32) -> RouteMessage {
    let mut message = match destination {
        IpAddr::V4(address) => RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(address, 32).build(),
        IpAddr::V6(address) => {
            RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(address, 128).build()
        }
    };
    message.header.scope = RouteScope::Link;
    message.header.protocol = RouteProtocol::Boot;
    message.attributes.push(RouteAttribute::Oif(index));
    message
}

/// A host route straight out of a link, as Calico's plugin and Felix make it.
#[must_use]
pub fn add_on_link(destination: IpAddr, index: u32) -> Request {
    add(format!("route {destination} out of #{index}"), on_link(destination, index))
}

/// Takes that route away.
#[must_use]
pub fn delete_on_link(destination: IpAddr, index: u32) -> Request {
    let mut message = on_link(destination, index);
    // Felix may have replaced it by its own, of another protocol.
    message.header.protocol = RouteProtocol::Unspec;
    Request {
        what: format!("delete the route to {destination} out of #{index}"),
        message: RouteNetlinkMessage::DelRoute(message),
        flags: 0,
        accept: &[ESRCH],
    }
}

/// Replaces a route by one to the same destination through another gateway on the same link.
#[must_use]
pub fn via(destination: IpNet, gateway: IpAddr, index: u32) -> Request {
    let message = through(destination, gateway, index);
    add(format!("route {destination} via {gateway} out of #{index}"), message)
}

/// Takes that route away.
#[must_use]
pub fn delete_via(destination: IpNet, gateway: IpAddr, index: u32) -> Request {
    Request {
        what: format!("delete the route to {destination} via {gateway} out of #{index}"),
        message: RouteNetlinkMessage::DelRoute(through(destination, gateway, index)),
        flags: 0,
        accept: &[ESRCH],
    }
}

fn through(destination: IpNet, gateway: IpAddr, index: u32) -> RouteMessage {
    let (given, length) = (destination.prefix_len() > 0, destination.prefix_len());
    let mut message = match gateway {
        IpAddr::V4(gateway) => {
            let builder = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway);
            match destination {
                IpNet::V4(net) if given => builder.destination_prefix(net.network(), length).build(),
                _ => builder.build(),
            }
        }
        IpAddr::V6(gateway) => {
            let builder = RouteMessageBuilder::<Ipv6Addr>::new().gateway(gateway);
            match destination {
                IpNet::V6(net) if given => builder.destination_prefix(net.network(), length).build(),
                _ => builder.build(),
            }
        }
    };
    message.header.protocol = RouteProtocol::Boot;
    message.attributes.push(RouteAttribute::Oif(index));
    message
}

/// A route as it is in another table.
#[must_use]
pub fn in_table(route: &RouteMessage, number: u32) -> RouteMessage {
    let mut route = route.clone();
    route.header.table = RouteHeader::RT_TABLE_UNSPEC;
    route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::Table(_)));
    route.attributes.push(RouteAttribute::Table(number));
    route
}

/// Deletes a route as it was listed.
#[must_use]
pub fn delete(what: String, route: RouteMessage) -> Request {
    Request { what, message: RouteNetlinkMessage::DelRoute(route), flags: 0, accept: &[ESRCH] }
}

fn rule(table: u32, priority: u32) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![RuleAttribute::Priority(priority), RuleAttribute::Table(table)];
    message
}

/// Asks a table for every IPv6 route, at this place among the tables.
#[must_use]
pub fn add_rule(table: u32, priority: u32) -> Request {
    Request {
        what: format!("ask the table {table:#x}"),
        message: RouteNetlinkMessage::NewRule(rule(table, priority)),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        accept: &[EEXIST],
    }
}

/// Asks it no more.
#[must_use]
pub fn delete_rule(table: u32, priority: u32) -> Request {
    Request {
        what: format!("ask the table {table:#x} no more"),
        message: RouteNetlinkMessage::DelRule(rule(table, priority)),
        flags: 0,
        accept: &[ENOENT, EAFNOSUPPORT],
    }
}
