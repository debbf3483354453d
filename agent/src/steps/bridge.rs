//! flannel's bridge.

use std::net::IpAddr;

use rtnetlink::packet_route::RouteNetlinkMessage;

use crate::host::netlink::Socket;
use crate::host::{links, messages};
use crate::journal::{Bridge, Captured};
use crate::steps::{Error, detour, pods};

const LOOPBACK: &str = "lo";
/// Group of the links that are deleted together, a number that nobody else uses ("flmg").
pub const GROUP: u32 = 0x666c_6d67;

/// The bridge's addresses: what connections from the node itself to its pods come from.
pub fn addresses(captured: &Captured) -> Result<Vec<IpAddr>, Error> {
    let mut found = Vec::new();
    for address in captured.bridge.iter().flat_map(|bridge| &bridge.addresses) {
        if let RouteNetlinkMessage::NewAddress(message) = address.message()? {
            found.extend(links::address_of(&message).map(|network| network.addr()));
        }
    }
    Ok(found)
}

/// Deletes the bridge, and the detour with it, before Calico comes and looks at the node's links. The bridge's address, the pods' old
/// gateway, becomes the loopback's, where no new connection comes from it.
pub fn delete(captured: &Captured) -> Result<(), Error> {
    let Some(bridge) = &captured.bridge else { return Ok(()) };
    detour::close()?;
    let mut socket = Socket::open()?;
    let present = links::links(&mut socket)?;
    let mut gone = Vec::new();
    // By name alone the kernel would delete a link of any kind.
    let ours = |link: &&links::Link| link.index == bridge.link.index && link.kind == "bridge";
    if let Some(link) = present.iter().find(ours) {
        let ports: Vec<&str> = present
            .iter()
            .filter(|port| {
                port.master == Some(link.index) && captured.pods.iter().any(|pod| pod.index == port.index)
            })
            .map(|port| port.name.as_str())
            .collect();
        if !ports.is_empty() {
            return Err(Error::Unfit(
                "BridgeInUse",
                format!("{} are still ports of {}", ports.join(", "), link.name),
            ));
        }
        keep(&mut socket, &present, captured)?;
        gone.push(link.index);
    }
    gone.extend(detour::entrance(&present));
    delete_links(&mut socket, &present, &gone)?;
    pods::accept_redirects(captured)
}

fn delete_links(socket: &mut Socket, present: &[links::Link], gone: &[u32]) -> Result<(), Error> {
    let free = present.iter().all(|link| link.group != GROUP || gone.contains(&link.index));
    if gone.len() > 1 && free && socket.batch(&messages::delete_together(gone, GROUP))?.is_empty() {
        return Ok(());
    }
    let requests: Vec<_> = gone.iter().map(|index| messages::delete(*index)).collect();
    Ok(socket.apply(&requests)?)
}

// Before the bridge goes: there is no instant in which the address isn't the node's.
fn keep(socket: &mut Socket, present: &[links::Link], captured: &Captured) -> Result<(), Error> {
    let Some(loopback) = present.iter().find(|link| link.name == LOOPBACK) else { return Ok(()) };
    let requests: Vec<_> = addresses(captured)?
        .into_iter()
        .map(|address| messages::add_address(address, loopback.index))
        .collect();
    Ok(socket.apply(&requests)?)
}

/// Lets the bridge's addresses go, from where [`delete`] put them.
pub fn let_go(addresses: &[IpAddr]) -> Result<(), Error> {
    let mut socket = Socket::open()?;
    let present = links::links(&mut socket)?;
    let Some(loopback) = present.iter().find(|link| link.name == LOOPBACK) else { return Ok(()) };
    let requests: Vec<_> =
        addresses.iter().map(|address| messages::delete_address(*address, loopback.index)).collect();
    Ok(socket.apply(&requests)?)
}

/// Makes the bridge as it was, with the settings it needs while pods return to it.
pub fn make(captured: &Captured) -> Result<(), Error> {
    let Some(bridge) = &captured.bridge else { return Ok(()) };
    let mut socket = Socket::open()?;
    if !links::links(&mut socket)?.iter().any(|link| link.index == bridge.link.index) {
        socket.apply(&[messages::bridge(&bridge.link)])?;
    }
    pods::loosen(&mut socket, captured)?;
    let mut requests = vec![messages::up(bridge.link.index)];
    for address in &bridge.addresses {
        requests.extend(address.restores()?);
    }
    socket.apply(&requests)?;
    let_go(&addresses(captured)?)
}

/// Makes the bridge where a boot took it, with another index, unless it is there.
pub fn make_anew(bridge: &Bridge) -> Result<(), Error> {
    let mut socket = Socket::open()?;
    let named = |socket: &mut Socket| -> Result<Option<u32>, Error> {
        let present = links::links(socket)?;
        Ok(present.iter().find(|link| link.name == bridge.link.name).map(|link| link.index))
    };
    if named(&mut socket)?.is_none() {
        socket.apply(&[messages::bridge(&links::Link { index: 0, ..bridge.link.clone() })])?;
    }
    let Some(index) = named(&mut socket)? else { return Ok(()) };
    let mut requests = vec![messages::up(index)];
    for saved in &bridge.addresses {
        for mut request in saved.restores()? {
            if let RouteNetlinkMessage::NewAddress(address) = &mut request.message {
                address.header.index = index;
            }
            requests.push(request);
        }
    }
    Ok(socket.apply(&requests)?)
}
