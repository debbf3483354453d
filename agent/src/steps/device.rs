//! flannel's VXLAN devices become Felix's by their names: Felix keeps a device whose attributes match. The index stays, and with it
//! routes, neighbours and forwarding entries.

use ipnet::Ipv4Net;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use tracing::warn;

use crate::host::links::{self, Link};
use crate::host::netlink::{Request, Socket};
use crate::host::saved::Saved;
use crate::host::{messages, messages6};
use crate::journal::{Captured, Device};
use crate::steps::{Error, peers};

/// Name that Felix gives its IPv4 VXLAN device.
pub const CALICO: &str = "vxlan.calico";
/// Name that Felix gives its IPv6 VXLAN device.
pub const CALICO_V6: &str = "vxlan-v6.calico";
const EBUSY: i32 = nix::errno::Errno::EBUSY as i32;

/// Calico's block size where a node's share of the pod network is larger; else the share is one block.
const BLOCK_PREFIX: u8 = 26;

/// flannel's devices, each with Felix's name of it.
pub fn all(captured: &Captured) -> impl Iterator<Item = (&Device, &'static str)> {
    [(&captured.device, CALICO)].into_iter().chain(captured.device6.iter().map(|device| (device, CALICO_V6)))
}

/// Renames flannel's devices to Felix's names, and routes the peers' Calico blocks beside flannel's routes to them.
///
/// Felix deletes the routes it doesn't know before it adds its own: without the blocks' routes, which it finds to be as
/// it wants them, every peer would be unreachable for that moment. For IPv6, see [`peers`].
pub fn take(captured: &Captured, live: bool) -> Result<(), Error> {
    for (device, name) in all(captured) {
        rename(device, &device.link.name, name, live)?;
    }
    if let Some(device) = &captured.device6
        && let Err(error) = peers::keep(device)
    {
        warn!(
            error = error.chain(),
            "IPv6 addresses of peers may be unreachable for the moment of Felix's start"
        );
    }
    let mut requests = Vec::new();
    for saved in &captured.device.routes {
        if let RouteNetlinkMessage::NewRoute(route) = saved.message()? {
            requests.extend(block_routes(&route));
        }
    }
    Ok(Socket::open()?.apply(&requests)?)
}

/// The routes to the blocks of what `route` leads to; none when it leads to one block or less.
fn block_routes(route: &RouteMessage) -> Vec<Request> {
    let destination = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
        _ => None,
    });
    let through_peer =
        route.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Gateway(_)));
    let network =
        destination.and_then(|address| Ipv4Net::new(address, route.header.destination_prefix_length).ok());
    let Some(network) = network.filter(|network| through_peer && network.prefix_len() < BLOCK_PREFIX) else {
        return Vec::new();
    };
    let blocks = network.subnets(BLOCK_PREFIX).into_iter().flatten();
    blocks
        .map(|block| {
            let mut route = route.clone();
            route.header.destination_prefix_length = block.prefix_len();
            for attribute in &mut route.attributes {
                if let RouteAttribute::Destination(destination) = attribute {
                    *destination = RouteAddress::Inet(block.network());
                }
            }
            Request {
                what: format!("route the block {block}"),
                message: RouteNetlinkMessage::NewRoute(route),
                flags: NLM_F_CREATE | NLM_F_REPLACE,
                accept: &[],
            }
        })
        .collect()
}

/// Renames them back, and makes everything that hung on them as it was. What is wrong with one doesn't keep the other.
pub fn give_back(captured: &Captured, live: bool) -> Result<(), Error> {
    let given: Vec<Result<(), Error>> =
        all(captured).map(|(device, name)| give_one_back(device, name, live)).collect();
    given.into_iter().collect::<Result<(), Error>>()?;
    if captured.device6.is_some() { peers::release() } else { Ok(()) }
}

fn give_one_back(device: &Device, name: &str, live: bool) -> Result<(), Error> {
    let mut socket = Socket::open()?;
    if find(&mut socket, device)?.is_none() {
        // Felix deletes its device when VXLAN is switched off in its configuration.
        make(&mut socket, &device.link, name)?;
    }
    rename(device, name, &device.link.name, live)?;
    tidy(&mut socket, device)?;
    socket.apply(&restores(device)?)?;
    let index = device.link.index;
    if name != CALICO_V6 || links::link_locals(&mut socket)?.contains_key(&index) {
        return Ok(());
    }
    // Felix takes every address but its own from its device, also the kernel's.
    let made = messages6::link_local(&device.link.mac);
    let requests: Vec<_> =
        made.into_iter().map(|address| messages6::add_link_local(address, index)).collect();
    Ok(socket.apply(&requests)?)
}

fn find(socket: &mut Socket, device: &Device) -> Result<Option<Link>, Error> {
    Ok(links::links(socket)?.into_iter().find(|link| {
        link.index == device.link.index && link.vxlan.as_ref().map(|vxlan| vxlan.vni) == vni(device)
    }))
}

fn vni(device: &Device) -> Option<u32> {
    device.link.vxlan.as_ref().map(|vxlan| vxlan.vni)
}

fn rename(device: &Device, from: &str, to: &str, live: bool) -> Result<(), Error> {
    let mut socket = Socket::open()?;
    let Some(link) = find(&mut socket, device)? else {
        return Err(Error::Unfit(
            "VxlanDeviceGone",
            format!("the VXLAN device #{} is gone", device.link.index),
        ));
    };
    let index = link.index;
    if link.name == to {
        if !link.up {
            // The way down, rename, up was cut short.
            let mut requests = vec![messages::up(index)];
            requests.extend(restores(device)?);
            socket.apply(&requests)?;
        }
        return Ok(());
    }
    if link.name != from {
        return Err(Error::Unfit(
            "VxlanDeviceRenamed",
            format!("the VXLAN device {from} is now called {}", link.name),
        ));
    }
    if live {
        match socket.apply(&[messages::rename(index, to)]) {
            Err(error) if error.errno() == Some(EBUSY) => {}
            other => return Ok(other?),
        }
    }
    // Setting it down takes routes and neighbours with it; all goes back in the same system call.
    let mut requests = vec![messages::down(index), messages::rename(index, to), messages::up(index)];
    requests.extend(restores(device)?);
    Ok(socket.apply(&requests)?)
}

fn restores(device: &Device) -> Result<Vec<Request>, Error> {
    let parts = [&device.addresses, &device.neighbours, &device.forwarding, &device.routes];
    let mut requests = Vec::new();
    for saved in parts.into_iter().flatten() {
        requests.extend(saved.restores()?);
    }
    Ok(requests)
}

// Routes of Felix's to peers replaced flannel's, or stand beside them: whatever was not captured goes.
fn tidy(socket: &mut Socket, device: &Device) -> Result<(), Error> {
    let index = device.link.index;
    let routes: Vec<Saved> = links::routes(socket, Some(index))?.iter().map(Saved::route).collect();
    let neighbours: Vec<Saved> =
        links::permanent_neighbours(socket, index)?.iter().map(Saved::neighbour).collect();
    let forwarding: Vec<Saved> = links::forwarding(socket, index)?.iter().map(Saved::neighbour).collect();
    let mut requests = Vec::new();
    for (present, captured) in
        [(routes, &device.routes), (neighbours, &device.neighbours), (forwarding, &device.forwarding)]
    {
        for saved in present.iter().filter(|saved| !captured.contains(saved)) {
            requests.push(saved.delete()?);
        }
    }
    // First what was captured, then away with the rest: no destination is without a route in between.
    socket.apply(&restores(device)?)?;
    Ok(socket.apply(&requests)?)
}

fn make(socket: &mut Socket, link: &Link, name: &str) -> Result<(), Error> {
    let request = messages::vxlan(link, name)
        .ok_or_else(|| Error::Unfit("CaptureUnreadable", "no VXLAN device was captured".into()))?;
    socket.apply(&[request, messages::up(link.index)])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::host::routes::via;

    fn blocks(destination: &str) -> Vec<String> {
        let route = via(destination.parse().unwrap(), Ipv4Addr::new(10, 244, 1, 0).into(), 3);
        let RouteNetlinkMessage::NewRoute(route) = route.message else { panic!("no route") };
        block_routes(&route).into_iter().map(|request| request.what).collect()
    }

    #[test]
    fn a_peer_is_routed_block_by_block_and_a_single_block_is_left_alone() {
        assert_eq!(blocks("10.244.1.0/24").len(), 4);
        assert_eq!(blocks("10.244.1.0/24").last().unwrap(), "route the block 10.244.1.192/26");
        assert_eq!(blocks("10.244.1.0/25").len(), 2);
        assert!(blocks("10.244.1.0/26").is_empty());
        assert!(blocks("10.244.1.0/27").is_empty());
    }
}
