//! The way to the peers' IPv6 addresses while Felix takes over.
//!
//! Felix deletes the routes on its device that it doesn't know, flannel's to each peer among them, before it adds its own, to the peers'
//! Calico blocks. In IPv4 these are few and known beforehand. A node's part of the IPv6 network has 2^58 blocks: which of them are a peer's is
//! known to Calico alone, and while a peer is still flannel's its pods get addresses of blocks that are nobody's yet.
//!
//! So flannel's routes stay as they are in a table of our own, which the kernel asks before the main one, and which Felix doesn't look at.
//! They lead where Felix's do: to the peer's tunnel address. They go with the migration's end, when all pods' blocks are known, or when
//! the node goes back.

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::RouteMessage;

use crate::host::netlink::Socket;
use crate::host::saved::words;
use crate::host::{links, routes};
use crate::journal::Device;
use crate::steps::Error;

/// Number of the table, that nobody else uses ("flmg").
pub const TABLE: u32 = super::bridge::GROUP;
/// Just before the main table.
const PRIORITY: u32 = 32765;

/// Keeps the routes to the peers, whatever happens to those on the device.
pub fn keep(device: &Device) -> Result<(), Error> {
    let mut socket = Socket::open()?;
    let mut requests = Vec::new();
    // As they are now: peers may have come and gone since the node was examined.
    for route in links::routes(&mut socket, Some(device.link.index))? {
        if leads_to_peer(&route) {
            let what = format!("keep the {}", words(&route));
            requests.push(routes::add(what, routes::in_table(&route, TABLE)));
        }
    }
    // Asked for only when all is there.
    requests.push(routes::add_rule(TABLE, PRIORITY));
    Ok(socket.apply(&requests)?)
}

fn leads_to_peer(route: &RouteMessage) -> bool {
    route.header.address_family == AddressFamily::Inet6 && links::gateway(route).is_some()
}

/// Lets them go.
pub fn release() -> Result<(), Error> {
    let mut socket = Socket::open()?;
    socket.apply(&[routes::delete_rule(TABLE, PRIORITY)])?;
    let kept = links::table(&mut socket, AddressFamily::Inet6, TABLE)?;
    let requests: Vec<_> = kept.into_iter().map(|route| routes::delete(words(&route), route)).collect();
    Ok(socket.apply(&requests)?)
}
