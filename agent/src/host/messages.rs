//! Changes to links, addresses and neighbours as messages. Pure: nothing here talks to the kernel.

use std::net::IpAddr;

use rtnetlink::packet_core::{DefaultNla, Emitable as _, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressScope, CacheInfo,
};
use rtnetlink::packet_route::link::{AfSpecInet, AfSpecUnspec, InfoKind, LinkAttribute, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::neighbour_table::{
    NeighbourTableAttribute, NeighbourTableMessage, NeighbourTableParameter,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth};

use crate::host::links::{Link, Port, mac_text};
use crate::host::netlink::Request;
use crate::host::saved::{EEXIST, ENOENT};

const EADDRNOTAVAIL: i32 = nix::errno::Errno::EADDRNOTAVAIL as i32;
const ENODEV: i32 = nix::errno::Errno::ENODEV as i32;
const IFLA_INET_CONF: u16 = 1;
const NESTED: u16 = 1 << 15;

/// A kernel setting of a link for IPv4, by its number in a message (`include/uapi/linux/ip.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conf {
    /// Whether it forwards.
    Forwarding = 1,
    /// Whether it answers for others' addresses.
    ProxyArp = 3,
    /// How it checks where packets come from.
    RpFilter = 8,
    /// Whether it routes 127.0.0.0/8.
    RouteLocalnet = 26,
}

impl Conf {
    /// Its name in the file system.
    #[must_use]
    pub const fn key(self) -> &'static str {
        match self {
            Self::Forwarding => "forwarding",
            Self::ProxyArp => "proxy_arp",
            Self::RpFilter => "rp_filter",
            Self::RouteLocalnet => "route_localnet",
        }
    }
}

fn set(what: String, link: LinkMessage) -> Request {
    Request { what, message: RouteNetlinkMessage::SetLink(link), flags: 0, accept: &[] }
}

fn link(index: u32) -> LinkMessageBuilder<LinkUnspec> {
    LinkUnspec::new_with_index(index)
}

/// Renames a link; live only on kernels from 6.2.
#[must_use]
pub fn rename(index: u32, name: &str) -> Request {
    set(format!("rename #{index} to {name}"), link(index).name(name).build())
}

/// Sets a link up.
#[must_use]
pub fn up(index: u32) -> Request {
    set(format!("set #{index} up"), link(index).up().build())
}

/// Sets a link down.
#[must_use]
pub fn down(index: u32) -> Request {
    set(format!("set #{index} down"), link(index).down().build())
}

/// Gives a link a hardware address.
#[must_use]
pub fn mac(index: u32, mac: &[u8]) -> Request {
    set(format!("give #{index} the address {}", mac_text(mac)), link(index).address(mac.to_vec()).build())
}

/// Sets a link's MTU.
#[must_use]
pub fn mtu(index: u32, mtu: u32) -> Request {
    set(format!("give #{index} the MTU {mtu}"), link(index).mtu(mtu).build())
}

/// Changes settings of a link, as writing to their files would; of one that is gone, none.
#[must_use]
pub fn configure(index: u32, settings: &[(Conf, u32)]) -> Request {
    let mut values = Vec::new();
    for (conf, value) in settings {
        let nla = DefaultNla::new(*conf as u16, value.to_ne_bytes().to_vec());
        let mut bytes = vec![0; nla.buffer_len()];
        nla.emit(&mut bytes);
        values.extend(bytes);
    }
    let values = AfSpecInet::Other(DefaultNla::new(IFLA_INET_CONF | NESTED, values));
    let mut message = link(index).build();
    message.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet(vec![values])]));
    Request { accept: &[ENODEV], ..set(format!("set #{index} up for its part"), message) }
}

/// Lets a link answer for others' addresses without a delay.
#[must_use]
pub fn answer_at_once(index: u32) -> Request {
    let mut message = NeighbourTableMessage::default();
    message.header.family = AddressFamily::Inet;
    message.attributes = vec![
        NeighbourTableAttribute::Name("arp_cache".into()),
        NeighbourTableAttribute::Parms(vec![
            NeighbourTableParameter::Ifindex(index),
            NeighbourTableParameter::ProxyDelay(0),
        ]),
    ];
    Request {
        what: format!("let #{index} answer at once"),
        message: RouteNetlinkMessage::SetNeighbourTable(message),
        flags: 0,
        accept: &[ENOENT],
    }
}

/// Makes a pair of links, unless it is there.
#[must_use]
pub fn pair(name: &str, peer: &str) -> Request {
    Request {
        what: format!("make the links {name} and {peer}"),
        message: RouteNetlinkMessage::NewLink(LinkVeth::new(name, peer).build()),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        accept: &[EEXIST],
    }
}

/// Gives a link an address of its own that is never chosen as the source of anything: it has the scope of a link, or is one that IPv6
/// calls deprecated, and has no network.
#[must_use]
pub fn add_address(address: IpAddr, index: u32) -> Request {
    let mut message = address_message(address, index);
    if address.is_ipv6() {
        let mut deprecated = CacheInfo::default();
        (deprecated.ifa_preferred, deprecated.ifa_valid) = (0, u32::MAX);
        message.attributes.push(AddressAttribute::CacheInfo(deprecated));
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    Request {
        what: format!("give #{index} the address {address}"),
        message: RouteNetlinkMessage::NewAddress(message),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        accept: &[EEXIST],
    }
}

/// Takes that address away.
#[must_use]
pub fn delete_address(address: IpAddr, index: u32) -> Request {
    Request {
        what: format!("take the address {address} from #{index}"),
        message: RouteNetlinkMessage::DelAddress(address_message(address, index)),
        flags: 0,
        accept: &[EADDRNOTAVAIL],
    }
}

fn address_message(address: IpAddr, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    (message.header.family, message.header.prefix_len) =
        if address.is_ipv4() { (AddressFamily::Inet, 32) } else { (AddressFamily::Inet6, 128) };
    message.header.scope = AddressScope::Link;
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    message
}

/// Makes a link a port of a bridge.
#[must_use]
pub fn join(index: u32, bridge: u32) -> Request {
    set(format!("make #{index} a port of #{bridge}"), link(index).controller(bridge).build())
}

/// Takes a link out of its bridge.
#[must_use]
pub fn leave(index: u32) -> Request {
    set(format!("take #{index} out of its bridge"), link(index).nocontroller().build())
}

/// Sets a bridge's port as it was.
#[must_use]
pub fn port(index: u32, port: Port) -> Request {
    use rtnetlink::packet_route::link::InfoBridgePort::{HairpinMode, Isolated};
    let mut builder = LinkBridgePort::new(index).append_info_data(HairpinMode(port.hairpin));
    if port.isolated {
        builder = builder.append_info_data(Isolated(true));
    }
    Request {
        what: format!("set the bridge port #{index}"),
        message: RouteNetlinkMessage::NewLink(builder.build()),
        flags: 0,
        accept: &[],
    }
}

/// Makes a bridge as it was: index, name, hardware address, MTU; down, without addresses.
#[must_use]
pub fn bridge(bridge: &Link) -> Request {
    let link = LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(InfoKind::Bridge)
        .index(bridge.index)
        .name(bridge.name.clone())
        .address(bridge.mac.clone())
        .mtu(bridge.mtu)
        .build();
    Request {
        what: format!("make the bridge {}", bridge.name),
        message: RouteNetlinkMessage::NewLink(link),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        accept: &[],
    }
}

/// Deletes a link.
#[must_use]
pub fn delete(index: u32) -> Request {
    Request {
        what: format!("delete the link #{index}"),
        message: RouteNetlinkMessage::DelLink(link(index).build()),
        flags: 0,
        accept: &[ENODEV],
    }
}

/// Deletes links all at once, by way of a group that no other link is in: the kernel waits for each deletion until nobody uses what is
/// deleted, and so waits once.
#[must_use]
pub fn delete_together(indices: &[u32], group: u32) -> Vec<Request> {
    let grouped = |mut message: LinkMessage| {
        message.attributes.push(LinkAttribute::Group(group));
        message
    };
    let join = |index: &u32| set(format!("put #{index} into a group"), grouped(link(*index).build()));
    let mut requests: Vec<Request> = indices.iter().map(join).collect();
    requests.push(Request {
        what: format!("delete the links {indices:?}"),
        message: RouteNetlinkMessage::DelLink(grouped(LinkMessage::default())),
        flags: 0,
        accept: &[],
    });
    requests
}

fn neighbour_message(address: IpAddr, mac: &[u8], index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    let (family, destination) = match address {
        IpAddr::V4(address) => (AddressFamily::Inet, NeighbourAddress::Inet(address)),
        IpAddr::V6(address) => (AddressFamily::Inet6, NeighbourAddress::Inet6(address)),
    };
    message.header.family = family;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Reachable;
    message.attributes.push(NeighbourAttribute::Destination(destination));
    if !mac.is_empty() {
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    }
    message
}

/// Tells the kernel a neighbour's hardware address, as if it had just answered.
#[must_use]
pub fn add_neighbour(address: IpAddr, mac: &[u8], index: u32) -> Request {
    Request {
        what: format!("know {address} as {} on #{index}", mac_text(mac)),
        message: RouteNetlinkMessage::NewNeighbour(neighbour_message(address, mac, index)),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        accept: &[],
    }
}

/// Tells the kernel a neighbour's hardware address for good: it is never asked for, nor forgotten when the link loses its carrier.
#[must_use]
pub fn add_permanent_neighbour(address: IpAddr, mac: &[u8], index: u32) -> Request {
    let mut message = neighbour_message(address, mac, index);
    message.header.state = NeighbourState::Permanent;
    Request {
        what: format!("know {address} as {} on #{index} for good", mac_text(mac)),
        message: RouteNetlinkMessage::NewNeighbour(message),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        accept: &[],
    }
}

/// Forgets a neighbour.
#[must_use]
pub fn delete_neighbour(address: IpAddr, index: u32) -> Request {
    Request {
        what: format!("forget {address} on #{index}"),
        message: RouteNetlinkMessage::DelNeighbour(neighbour_message(address, &[], index)),
        flags: 0,
        accept: &[ENOENT],
    }
}

/// Makes a VXLAN device as it was, down; `None` when the link isn't one.
#[must_use]
pub fn vxlan(link: &Link, name: &str) -> Option<Request> {
    use rtnetlink::packet_route::link::{InfoData, InfoVxlan};
    let facts = link.vxlan.as_ref()?;
    let mut infos =
        vec![InfoVxlan::Id(facts.vni), InfoVxlan::Port(facts.port), InfoVxlan::Learning(facts.learning)];
    match facts.local {
        Some(IpAddr::V4(address)) => infos.push(InfoVxlan::Local(address)),
        Some(IpAddr::V6(address)) => infos.push(InfoVxlan::Local6(address)),
        None => {}
    }
    infos.extend(facts.parent.map(InfoVxlan::Link));
    let message = LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(InfoKind::Vxlan)
        .index(link.index)
        .name(name.to_owned())
        .address(link.mac.clone())
        .mtu(link.mtu)
        .set_info_data(InfoData::Vxlan(infos))
        .build();
    Some(Request {
        what: format!("make the VXLAN device {name}"),
        message: RouteNetlinkMessage::NewLink(message),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        accept: &[],
    })
}
