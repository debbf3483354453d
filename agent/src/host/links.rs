//! What the kernel says about links, addresses, routes and neighbours.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{
    InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoVxlan, LinkAttribute, LinkExtentMask, LinkFlags,
    LinkInfo, LinkMessage, State,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteType};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use serde::{Deserialize, Serialize};

use crate::host::netlink::{Error, Socket};

const MAIN: u32 = 254;

/// A link's facts, as far as a switch needs them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Kind, `veth`, `bridge`, `vxlan`; empty for hardware.
    #[serde(default)]
    pub kind: String,
    /// Hardware address.
    #[serde(default)]
    pub mac: Vec<u8>,
    /// MTU in bytes.
    #[serde(default)]
    pub mtu: u32,
    /// Whether it is administratively up.
    #[serde(default)]
    pub up: bool,
    /// The group it is in; not captured.
    #[serde(skip)]
    pub group: u32,
    /// The bridge it is a port of.
    #[serde(default)]
    pub master: Option<u32>,
    /// Index of a veth's other end, in that end's namespace.
    #[serde(default)]
    pub peer: Option<u32>,
    /// Facts of a VXLAN device.
    #[serde(default)]
    pub vxlan: Option<Vxlan>,
    /// Facts of a bridge's port.
    #[serde(default)]
    pub port: Option<Port>,
}

/// A VXLAN device's facts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vxlan {
    /// Network identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// Outer source address.
    pub local: Option<IpAddr>,
    /// Index of the interface below.
    pub parent: Option<u32>,
    /// Whether it learns addresses from traffic.
    pub learning: bool,
}

/// What a bridge's port is set to, where it differs by the runtime's configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Sends frames back where they came from.
    pub hairpin: bool,
    /// May not talk to other isolated ports.
    pub isolated: bool,
}

/// Hardware address as people write it.
#[must_use]
pub fn mac_text(mac: &[u8]) -> String {
    mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// All links of the socket's namespace.
pub fn links(socket: &mut Socket) -> Result<Vec<Link>, Error> {
    Ok(dump(socket)?
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(message) => Some(link(message)),
            _ => None,
        })
        .collect())
}

// Without the counters, which are the greater part of an answer.
fn dump(socket: &mut Socket) -> Result<Vec<RouteNetlinkMessage>, Error> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    socket.dump(RouteNetlinkMessage::GetLink(message))
}

/// Whether a link sends. One that has just got its carrier drops all until the kernel's own work has seen to it.
pub fn operates(socket: &mut Socket, index: u32) -> Result<bool, Error> {
    Ok(dump(socket)?.iter().any(|message| match message {
        RouteNetlinkMessage::NewLink(message) => {
            message.header.index == index && message.attributes.contains(&LinkAttribute::OperState(State::Up))
        }
        _ => false,
    }))
}

fn link(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        up: message.header.flags.contains(LinkFlags::Up),
        ..Link::default()
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(mac) => link.mac = mac,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Group(group) => link.group = group,
            LinkAttribute::Controller(index) => link.master = Some(index).filter(|index| *index != 0),
            LinkAttribute::Link(index) => link.peer = Some(index),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    link_info(&mut link, info);
                }
            }
            _ => {}
        }
    }
    link
}

fn link_info(link: &mut Link, info: LinkInfo) {
    match info {
        LinkInfo::Kind(InfoKind::Veth) => link.kind = "veth".into(),
        LinkInfo::Kind(InfoKind::Bridge) => link.kind = "bridge".into(),
        LinkInfo::Kind(InfoKind::Vxlan) => link.kind = "vxlan".into(),
        LinkInfo::Kind(kind) => link.kind = kind.to_string(),
        LinkInfo::Data(InfoData::Vxlan(infos)) => {
            let mut vxlan = Vxlan::default();
            for info in infos {
                match info {
                    InfoVxlan::Id(vni) => vxlan.vni = vni,
                    InfoVxlan::Port(port) => vxlan.port = port,
                    InfoVxlan::Local(address) => vxlan.local = Some(address.into()),
                    InfoVxlan::Local6(address) => vxlan.local = Some(address.into()),
                    InfoVxlan::Link(index) => vxlan.parent = Some(index),
                    InfoVxlan::Learning(learning) => vxlan.learning = learning,
                    _ => {}
                }
            }
            link.vxlan = Some(vxlan);
        }
        LinkInfo::PortData(InfoPortData::BridgePort(infos)) => {
            let mut port = Port::default();
            for info in infos {
                match info {
                    InfoBridgePort::HairpinMode(on) => port.hairpin = on,
                    InfoBridgePort::Isolated(on) => port.isolated = on,
                    _ => {}
                }
            }
            link.port = Some(port);
        }
        _ => {}
    }
}

/// Addresses of one link that people or programs gave it; not the kernel's own link-local ones.
pub fn addresses(socket: &mut Socket, index: u32) -> Result<Vec<AddressMessage>, Error> {
    let found = socket.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    Ok(found
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(message) if message.header.index == index => Some(message),
            _ => None,
        })
        .filter(|message| address_of(message).is_none_or(|net| !link_local(net.addr())))
        .collect())
}

fn link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.segments().first().is_some_and(|first| first & 0xffc0 == 0xfe80))
}

/// Address and prefix of an address message.
#[must_use]
pub fn address_of(message: &AddressMessage) -> Option<IpNet> {
    let mut found = None;
    for attribute in &message.attributes {
        match attribute {
            // Of a point-to-point link, `Address` is the other end and `Local` is ours.
            AddressAttribute::Local(address) => return IpNet::new(*address, message.header.prefix_len).ok(),
            AddressAttribute::Address(address) => found = Some(*address),
            _ => {}
        }
    }
    IpNet::new(found?, message.header.prefix_len).ok()
}

/// Link-local IPv6 addresses, by the links' indices.
pub fn link_locals(socket: &mut Socket) -> Result<BTreeMap<u32, Ipv6Addr>, Error> {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet6;
    let found = socket.dump(RouteNetlinkMessage::GetAddress(message))?;
    Ok(found
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(message) => Some(message),
            _ => None,
        })
        .filter_map(|message| match address_of(&message)?.addr() {
            IpAddr::V6(address) if link_local(address.into()) => Some((message.header.index, address)),
            _ => None,
        })
        .collect())
}

/// Unicast and blackhole routes of both families in the main table, without the kernel's own to link-local addresses; of one link, if
/// given.
pub fn routes(socket: &mut Socket, index: Option<u32>) -> Result<Vec<RouteMessage>, Error> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        found.extend(table(socket, family, MAIN)?);
    }
    found.retain(|route| {
        matches!(route.header.kind, RouteType::Unicast | RouteType::BlackHole)
            && (index.is_none() || oif(route) == index)
            && destination(route).is_none_or(|net| !link_local(net.addr()))
    });
    Ok(found)
}

/// Routes of one table.
pub fn table(socket: &mut Socket, family: AddressFamily, number: u32) -> Result<Vec<RouteMessage>, Error> {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    let found = socket.dump(RouteNetlinkMessage::GetRoute(message))?;
    Ok(found
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewRoute(message) => Some(message),
            _ => None,
        })
        // A kernel without a family lists the others'. What it learnt of a route's MTU is listed beside the route.
        .filter(|route| route.header.address_family == family && table_of(route) == number)
        .filter(|route| !route.header.flags.contains(RouteFlags::Cloned))
        .collect())
}

fn table_of(route: &RouteMessage) -> u32 {
    let named = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(number) => Some(*number),
        _ => None,
    });
    named.unwrap_or_else(|| route.header.table.into())
}

/// Index of the link a route goes out of.
#[must_use]
pub fn oif(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

/// Destination of a route.
#[must_use]
pub fn destination(route: &RouteMessage) -> Option<IpNet> {
    let address = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => Some(ip(address)),
        _ => None,
    });
    let any = match route.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        _ => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    IpNet::new(address.unwrap_or(Some(any))?, route.header.destination_prefix_length).ok()
}

/// Gateway of a route.
#[must_use]
pub fn gateway(route: &RouteMessage) -> Option<IpAddr> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(address) => ip(address),
        _ => None,
    })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

/// Permanent neighbours of one link: those a program wrote, not those the kernel learnt.
pub fn permanent_neighbours(socket: &mut Socket, index: u32) -> Result<Vec<NeighbourMessage>, Error> {
    let mut found = neighbours(socket, index, AddressFamily::Inet)?;
    found.extend(neighbours(socket, index, AddressFamily::Inet6)?);
    Ok(found)
}

/// FDB entries of one VXLAN device.
pub fn forwarding(socket: &mut Socket, index: u32) -> Result<Vec<NeighbourMessage>, Error> {
    neighbours(socket, index, AddressFamily::Bridge)
}

fn neighbours(
    socket: &mut Socket,
    index: u32,
    family: AddressFamily,
) -> Result<Vec<NeighbourMessage>, Error> {
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    let found = socket.dump(RouteNetlinkMessage::GetNeighbour(message))?;
    Ok(found
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewNeighbour(message) => Some(message),
            _ => None,
        })
        .filter(|message| message.header.ifindex == index && message.header.family == family)
        .filter(|message| message.header.state == NeighbourState::Permanent)
        .collect())
}

/// The address of a neighbour.
#[must_use]
pub fn neighbour_address(message: &NeighbourMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some((*address).into()),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some((*address).into()),
        _ => None,
    })
}
