//! Routes, neighbours and addresses kept for later: in words for people, and as the kernel's own message, so that
//! what is put back is what was there, whatever attributes it had.

use std::fmt::Write as _;

use rtnetlink::packet_core::{
    NLM_F_CREATE, NLM_F_REPLACE, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable,
};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use serde::{Deserialize, Serialize};

use crate::host::netlink::Request;

/// Text of a saved message that is none.
#[derive(Debug, thiserror::Error)]
#[error("the saved message {0:?} can't be read: {1}")]
pub struct Error(String, String);

/// A message of the kernel, saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// In words.
    pub text: String,
    /// Type of the message, `RTM_NEW*`.
    pub kind: u16,
    /// The message after the netlink header, in hexadecimal.
    pub bytes: String,
}

impl Saved {
    fn new(text: String, message: &RouteNetlinkMessage) -> Self {
        let mut bytes = vec![0; NetlinkSerializable::buffer_len(message)];
        message.serialize(&mut bytes);
        Self { text, kind: message.message_type(), bytes: hex::encode(bytes) }
    }

    /// Saves a route without what the kernel adds when it lists it.
    #[must_use]
    pub fn route(route: &RouteMessage) -> Self {
        let mut route = route.clone();
        route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
        // State of the next hop, not of the route: RTNH_F_DEAD, LINKDOWN.
        route.header.flags &= rtnetlink::packet_route::route::RouteFlags::Onlink;
        Self::new(words(&route), &RouteNetlinkMessage::NewRoute(route))
    }

    /// Saves a neighbour or FDB entry.
    #[must_use]
    pub fn neighbour(neighbour: &NeighbourMessage) -> Self {
        let mut neighbour = neighbour.clone();
        neighbour.attributes.retain(|attribute| {
            matches!(
                attribute,
                NeighbourAttribute::Destination(_)
                    | NeighbourAttribute::LinkLayerAddress(_)
                    | NeighbourAttribute::Vlan(_)
                    | NeighbourAttribute::Port(_)
                    | NeighbourAttribute::Vni(_)
                    | NeighbourAttribute::IfIndex(_)
            )
        });
        let mut text = String::from("neighbour");
        for attribute in &neighbour.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                    let _ = write!(text, " {address}");
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                    let _ = write!(text, " {address}");
                }
                NeighbourAttribute::LinkLayerAddress(mac) => {
                    let _ = write!(text, " {}", super::links::mac_text(mac));
                }
                _ => {}
            }
        }
        Self::new(text, &RouteNetlinkMessage::NewNeighbour(neighbour))
    }

    /// Saves an address.
    #[must_use]
    pub fn address(address: &AddressMessage) -> Self {
        let mut address = address.clone();
        address.attributes.retain(|attribute| {
            matches!(
                attribute,
                AddressAttribute::Address(_)
                    | AddressAttribute::Local(_)
                    | AddressAttribute::Label(_)
                    | AddressAttribute::Broadcast(_)
                    | AddressAttribute::Flags(_)
            )
        });
        let local = address.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(address.to_string()),
            _ => None,
        });
        let text = format!("address {}/{}", local.unwrap_or_default(), address.header.prefix_len);
        Self::new(text, &RouteNetlinkMessage::NewAddress(address))
    }

    /// The message.
    pub fn message(&self) -> Result<RouteNetlinkMessage, Error> {
        let failed = |why: String| Error(self.text.clone(), why);
        let bytes = hex::decode(&self.bytes).map_err(|error| failed(error.to_string()))?;
        let mut header = NetlinkHeader::default();
        header.message_type = self.kind;
        RouteNetlinkMessage::deserialize(&header, &bytes).map_err(|error| failed(error.to_string()))
    }

    /// The change that puts it back, over whatever is in its place.
    pub fn restore(&self) -> Result<Request, Error> {
        let message = self.message()?;
        // An address can't be replaced, only be there already; a bridge FDB entry and a route can.
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        Ok(Request { what: format!("restore {}", self.text), message, flags, accept: &[EEXIST] })
    }

    /// The same for what isn't at once as it was: of an IPv6 address the kernel would first ask around whether another has it, and
    /// would not use it meanwhile.
    pub fn restores(&self) -> Result<Vec<Request>, Error> {
        let plain = self.restore()?;
        let mut at_once = plain.clone();
        match &mut at_once.message {
            RouteNetlinkMessage::NewAddress(address) if address.header.family == AddressFamily::Inet6 => {
                address.attributes.retain(|attribute| !matches!(attribute, AddressAttribute::Flags(_)));
                address.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
                Ok(vec![at_once, plain])
            }
            _ => Ok(vec![plain]),
        }
    }

    /// The change that takes it away.
    pub fn delete(&self) -> Result<Request, Error> {
        let message = match self.message()? {
            RouteNetlinkMessage::NewRoute(route) => RouteNetlinkMessage::DelRoute(route),
            RouteNetlinkMessage::NewNeighbour(neighbour) => RouteNetlinkMessage::DelNeighbour(neighbour),
            RouteNetlinkMessage::NewAddress(address) => RouteNetlinkMessage::DelAddress(address),
            other => other,
        };
        Ok(Request {
            what: format!("delete {}", self.text),
            message,
            flags: 0,
            accept: &[ESRCH, ENOENT, EADDRNOTAVAIL],
        })
    }
}

/// "File exists".
pub const EEXIST: i32 = nix::errno::Errno::EEXIST as i32;
/// "No such process": the route isn't there.
pub const ESRCH: i32 = nix::errno::Errno::ESRCH as i32;
/// "No such file": the neighbour isn't there.
pub const ENOENT: i32 = nix::errno::Errno::ENOENT as i32;
/// The address isn't there.
pub const EADDRNOTAVAIL: i32 = nix::errno::Errno::EADDRNOTAVAIL as i32;

/// A route in words, about as `ip route` would put it.
#[must_use]
pub fn words(route: &RouteMessage) -> String {
    let mut destination = None;
    let mut rest = String::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                destination = Some(address.to_string());
            }
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
                destination = Some(address.to_string());
            }
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => {
                let _ = write!(rest, " via {address}");
            }
            RouteAttribute::Gateway(RouteAddress::Inet6(address)) => {
                let _ = write!(rest, " via {address}");
            }
            RouteAttribute::Oif(index) => {
                let _ = write!(rest, " dev #{index}");
            }
            _ => {}
        }
    }
    let length = route.header.destination_prefix_length;
    let any = if route.header.address_family == AddressFamily::Inet6 { "::" } else { "0.0.0.0" };
    format!("route {}/{length}{rest}", destination.as_deref().unwrap_or(any))
}
