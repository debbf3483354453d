//! A way around the moment in which a port that joins or leaves a bridge drops what its pod sends.
//!
//! A leaving port is stopped first and handed back to its host last; in between, the kernel waits for all processors
//! (`del_nbp` in `net/bridge/br_if.c`), for milliseconds on a big machine. A joining one (`br_add_if`) is the bridge's before it forwards.
//! What a pod sends meanwhile would be dropped.
//!
//! The kernel asks a link's ingress hook before it asks the bridge. A rule there forwards what pods send to a pair of links whose other
//! end is the host's, which routes it: the bridge isn't asked. Rules come and go at once for all ports, and lose nothing.

use std::net::Ipv4Addr;

use crate::host::links::{self, Link};
use crate::host::messages::Conf;
use crate::host::netlink::Socket;
use crate::host::tables::{self, Family, Name};
use crate::host::{ingress, messages};
use crate::steps::{Error, chain};

// Calico never takes the node's own address from links of such names.
const ENTRANCE: &str = "vethdetour0";
const EXIT: &str = "vethdetour1";
const TABLE: &str = "flannel-migration";
/// IPv4's dummy address (RFC 7600): the kernel checks where packets come from only on a link that has an address, and drops all else.
const EXIT_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);
/// The exit routes what comes from any pod; it is the way back for none, so that only a loose check can pass.
const EXIT_SETTINGS: [(Conf, u32); 2] = [(Conf::RpFilter, 2), (Conf::Forwarding, 1)];

/// Does work on the ports while what their pods send takes the detour. A host that can't have one (a kernel without nftables' `fwd`) does the work all the same; the pods' senders then repeat the packets of that moment.
///
/// The detour's links stay: what is under way on them would be lost with them. [`remove`] takes them away later.
pub fn around<T>(ports: &[String], bridge: &Link, work: impl FnOnce() -> T) -> T {
    if let Err(error) = open(ports, bridge) {
        tracing::warn!(
            error = chain(&error),
            "no detour: packets that pods send while their port changes may be lost"
        );
    }
    let done = work();
    if let Err(error) = close() {
        tracing::warn!(error = chain(&error), "the detour isn't closed");
    }
    done
}

fn open(ports: &[String], bridge: &Link) -> Result<(), Error> {
    if ports.is_empty() {
        return Ok(());
    }
    let mut socket = Socket::open()?;
    socket.apply(&[messages::pair(ENTRANCE, EXIT)])?;
    let (entrance, exit) = pair(&mut socket)?
        .ok_or_else(|| Error::Unfit("NoDetour", format!("{ENTRANCE} is another's link")))?;
    // Pods send to the bridge's hardware address; with another, the exit would take it for somebody else's.
    socket.apply(&[
        messages::configure(exit, &EXIT_SETTINGS),
        messages::mac(exit, &bridge.mac),
        messages::mtu(exit, bridge.mtu),
        messages::mtu(entrance, bridge.mtu),
        messages::add_address(EXIT_ADDRESS.into(), exit),
        // In this order: a link whose other end is up sends at once.
        messages::up(exit),
        messages::up(entrance),
    ])?;
    Ok(ingress::forward(TABLE, ports, entrance)?)
}

/// Takes the detour away, if it is there; also one that a crash left open.
pub fn remove() -> Result<(), Error> {
    close()?;
    let mut socket = Socket::open()?;
    let pair = pair(&mut socket)?;
    Ok(pair.map_or(Ok(()), |(entrance, _)| socket.apply(&[messages::delete(entrance)]))?)
}

/// Closes it, also one that a crash left open; its links stay.
pub fn close() -> Result<(), Error> {
    Ok(tables::delete(&[Name(Family::Netdev, TABLE)])?)
}

/// Index of the link whose deletion takes both away, among all that are there.
#[must_use]
pub fn entrance(all: &[Link]) -> Option<u32> {
    ends(all).map(|(entrance, _)| entrance)
}

fn pair(socket: &mut Socket) -> Result<Option<(u32, u32)>, Error> {
    Ok(ends(&links::links(socket)?))
}

// Indices of the entrance and the exit; `None` when they aren't there.
fn ends(all: &[Link]) -> Option<(u32, u32)> {
    let find = |name| all.iter().find(|link| link.name == name && link.kind == "veth");
    let (entrance, exit) = (find(ENTRANCE), find(EXIT));
    entrance
        .zip(exit)
        .filter(|(entrance, exit)| entrance.peer == Some(exit.index))
        .map(|(entrance, exit)| (entrance.index, exit.index))
}
