//! The pods' links go from the bridge to Calico's shape: a host end with its own route, a pod end that sends everything to its host.
//!
//! No packet needs to be lost, because at every moment each packet finds a way:
//!
//! 1. [`prepare`]: each host end gets Felix's name and the bridge's hardware address (which all pods know as their gateway's),
//!    and the kernel is told the pod's hardware address on it. None of it matters to a port of a bridge.
//! 2. [`route`]: inside each pod, everything goes to the gateway, also what is for a pod on the same bridge. The bridge's own
//!    address answers, and the host routes it back through the bridge. No pod needs another pod's hardware address any more.
//! 3. [`leave_bridge`]: each host end first gets a route to its pod, which works while it still is a port of the bridge (the
//!    neighbour is known), and then leaves the bridge. What comes from the pod is routed before and after, and takes the
//!    [`detour`] in between; the reverse path is checked loosely on all ways meanwhile.
//!
//! A pod's IPv6 goes the same way. Its gateway is the link-local address of its own host end, as Calico's plugin makes it, so that the bridge,
//! which has another, can't redirect it; the pod is told the hardware address, and nobody is asked for it. While its host still sends it
//! back to the bridge that it came from, the pod accepts no redirect: the kernel makes one for each such packet and has no setting against it,
//! and TCP takes it from whomever it comes. Whoever is redirected sends straight to the other pod's hardware address, for good.
//!
//! The way back is the same in reverse. A kernel before 6.2 renames only links that are down: there each host end gets its name
//! outside the bridge, where nothing is to be learned anew when it is up again, and what meets it in that moment is lost.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::host::messages::Conf;
use crate::host::netlink::{self, Request, Socket};
use crate::host::netns;
use crate::host::sysctl::{self, Table};
use crate::host::{links, messages, messages6, routes};
use crate::inventory::{Pod, Setting};
use crate::journal::Captured;
use crate::steps::{Error, detour};

/// Gateway of every pod in Calico.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// How long a bridge may take to send, from its first port on.
const OPERATING: Duration = Duration::from_secs(1);
const ANY_V4: IpNet = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0));
const ANY_V6: IpNet = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0));
/// Whether a link's owner lets itself be redirected.
pub const REDIRECTS: &str = "accept_redirects";
const EBUSY: i32 = nix::errno::Errno::EBUSY as i32;
const LOOSE: (Conf, u32) = (Conf::RpFilter, 2);

/// What is set on each host end: what Calico's plugin sets (`configureSysctls`), and loose reverse path checks while it moves. And none
/// waits before it answers for others.
const HOST_END: [(Conf, u32); 4] =
    [(Conf::ProxyArp, 1), (Conf::Forwarding, 1), (Conf::RouteLocalnet, 1), LOOSE];

/// What is set on the bridge while pods move: it answers for the gateway and for pods that have left.
const BRIDGE: [(Conf, u32); 2] = [(Conf::ProxyArp, 1), LOOSE];

/// What Felix sets on each host end for IPv6. None of it is needed before: what a pod sends it sends to its host.
const FELIXS: [&str; 3] = ["proxy_ndp", "forwarding", "accept_ra"];

/// The present values of what will be set on a host end.
pub fn host_end_settings(interface: &str, v6: bool) -> Result<Vec<Setting>, Error> {
    let mut found = settings(interface, &HOST_END)?;
    found.extend(settings_v6(interface, v6, &FELIXS)?);
    Ok(found)
}

/// The present values of what will be set on the bridge, and of what a bridge that is made anew hasn't got.
pub fn bridge_settings(interface: &str, v6: bool) -> Result<Vec<Setting>, Error> {
    let mut found = settings(interface, &BRIDGE)?;
    found.extend(settings_v6(interface, v6, &["accept_ra"])?);
    Ok(found)
}

fn settings_v6(interface: &str, v6: bool, keys: &[&str]) -> Result<Vec<Setting>, Error> {
    keys.iter()
        .filter(|_| v6)
        .map(|key| {
            let value = sysctl::read(Table::Conf6, interface, key)?;
            Ok(Setting { table: Table::Conf6, key: (*key).to_owned(), value })
        })
        .collect()
}

fn settings(interface: &str, wanted: &[(Conf, u32)]) -> Result<Vec<Setting>, Error> {
    let files =
        wanted.iter().map(|(conf, _)| (Table::Conf4, conf.key())).chain([(Table::Neigh4, "proxy_delay")]);
    files
        .map(|(table, key)| {
            let value = sysctl::read(table, interface, key)?;
            Ok(Setting { table, key: key.to_owned(), value })
        })
        .collect()
}

/// Sets what the bridge and the host ends need while pods are on their way, in either direction.
pub fn loosen(socket: &mut Socket, captured: &Captured) -> Result<(), Error> {
    let mut requests = Vec::new();
    if let Some(bridge) = &captured.bridge {
        requests.extend(configured(bridge.link.index, &BRIDGE));
    }
    let present = present(socket, captured)?;
    requests.extend(present.iter().map(|(pod, _)| messages::configure(pod.index, &[LOOSE])));
    Ok(socket.apply(&requests)?)
}

fn configured(index: u32, settings: &[(Conf, u32)]) -> [Request; 2] {
    [messages::configure(index, settings), messages::answer_at_once(index)]
}

// Pods whose host end is there, with its present name. A pod that was deleted meanwhile took its link along.
fn present<'a>(socket: &mut Socket, captured: &'a Captured) -> Result<Vec<(&'a Pod, String)>, Error> {
    let links = links::links(socket)?;
    let is = |link: &links::Link, pod: &Pod| {
        link.index == pod.index && link.kind == "veth" && (link.name == pod.veth || link.name == pod.cali)
    };
    Ok(captured
        .pods
        .iter()
        .filter_map(|pod| links.iter().find(|link| is(link, pod)).map(|link| (pod, link.name.clone())))
        .collect())
}

/// Step 1. No effect on traffic.
pub fn prepare(captured: &Captured, live: bool) -> Result<(), Error> {
    let Some(bridge) = &captured.bridge else { return Ok(()) };
    let mut socket = Socket::open()?;
    let present = present(&mut socket, captured)?;
    // Else the bridge would take the lowest address of its ports, and change its own when a port leaves.
    let mut requests = vec![messages::mac(bridge.link.index, &bridge.link.mac)];
    requests.extend(configured(bridge.link.index, &BRIDGE));
    for (pod, _) in &present {
        requests.extend(configured(pod.index, &HOST_END));
        requests.push(messages::mac(pod.index, &bridge.link.mac));
        requests.extend(made_link_local(pod));
        // On the bridge too, which forgot them with its address. What a pod answers to a question of IPv6 would take the detour as well, to
        // a link that hasn't asked.
        requests.extend(neighbours(pod, pod.index).chain(neighbours(pod, bridge.link.index)));
    }
    if live {
        requests.extend(
            present
                .iter()
                .filter(|(pod, name)| *name != pod.cali)
                .map(|(pod, _)| messages::rename(pod.index, &pod.cali)),
        );
    }
    renamed(socket.batch(&requests)?)
}

// A kernel that can't rename them now does it while they are out of the bridge.
fn renamed(failures: Vec<netlink::Error>) -> Result<(), Error> {
    failures.into_iter().find(|error| error.errno() != Some(EBUSY)).map_or(Ok(()), |error| Err(error.into()))
}

/// Step 1, undone.
pub fn unprepare(captured: &Captured) -> Result<(), Error> {
    let mut socket = Socket::open()?;
    let present = present(&mut socket, captured)?;
    let mut requests = Vec::new();
    for (pod, name) in &present {
        if *name != pod.veth {
            // It never left the bridge, so that this kernel renamed it live.
            requests.push(messages::rename(pod.index, &pod.veth));
        }
        requests.push(messages::mac(pod.index, &pod.mac));
        requests.extend(pod.adopted.ip.iter().map(|ip| messages::delete_neighbour(*ip, pod.index)));
        if let Some(v6) = pod.v6.as_ref().filter(|v6| v6.made) {
            requests.push(messages6::delete_link_local(v6.next_hop, pod.index));
        }
    }
    socket.apply(&requests)?;
    for (pod, _) in &present {
        for setting in &pod.settings {
            sysctl::write(setting.table, &pod.veth, &setting.key, &setting.value)?;
        }
    }
    if let Some(bridge) = &captured.bridge {
        for setting in &bridge.settings {
            sysctl::write(setting.table, &bridge.link.name, &setting.key, &setting.value)?;
        }
    }
    Ok(())
}

// Outside the bridge. Setting a link down forgets its neighbours and routes.
fn rename(
    socket: &mut Socket,
    pods: &[(&Pod, String)],
    to: fn(&Pod) -> &str,
    bridge_mac: &[u8],
    live: bool,
) -> Result<(), Error> {
    let asked: Vec<_> = pods.iter().filter(|(pod, name)| name != to(pod)).collect();
    if live {
        let requests: Vec<_> = asked.iter().map(|(pod, _)| messages::rename(pod.index, to(pod))).collect();
        let failures = socket.batch(&requests)?;
        if failures.is_empty() {
            return Ok(());
        }
        renamed(failures)?;
    }
    for (pod, name) in pods {
        let mut requests = Vec::new();
        if name != to(pod) {
            requests.extend([messages::down(pod.index), messages::rename(pod.index, to(pod))]);
        }
        // The kernel forgets the link-local address, and makes it anew of the hardware address.
        requests.extend(pod.v6.as_ref().map(|_| messages::mac(pod.index, &pod.mac)));
        // Also for one that a crash left down.
        requests.push(messages::up(pod.index));
        requests.extend(pod.v6.as_ref().map(|_| messages::mac(pod.index, bridge_mac)));
        requests.extend(made_link_local(pod));
        requests.extend(neighbours(pod, pod.index));
        requests.extend(host_routes(pod, routes::add_on_link));
        socket.apply(&requests)?;
    }
    Ok(())
}

fn made_link_local(pod: &Pod) -> Option<Request> {
    pod.v6.as_ref().filter(|v6| v6.made).map(|v6| messages6::add_link_local(v6.next_hop, pod.index))
}

fn neighbours(pod: &Pod, index: u32) -> impl Iterator<Item = Request> {
    pod.adopted.ip.iter().map(move |ip| messages::add_neighbour(*ip, &pod.inner_mac, index))
}

// Does it in each pod's namespace; a pod that was deleted meanwhile has none.
fn inside(captured: &Captured, work: impl Fn(&Pod) -> Result<(), Error> + Sync) -> Result<(), Error> {
    let namespace = |pod: &Pod| Some(netns::host_path(&pod.netns)).filter(|path| path.exists());
    netns::each(&captured.pods, namespace, work)
}

/// Lets pods be redirected as before, once nobody redirects them any more.
pub fn accept_redirects(captured: &Captured) -> Result<(), Error> {
    if captured.pods.iter().all(|pod| pod.v6.is_none()) {
        return Ok(());
    }
    inside(captured, |pod| redirects(pod, true))
}

// In the pod's namespace.
fn redirects(pod: &Pod, accepted: bool) -> Result<(), Error> {
    let Some(v6) = &pod.v6 else { return Ok(()) };
    let Some(before) = &v6.accept_redirects else { return Ok(()) };
    let value = if accepted { before } else { "0" };
    Ok(sysctl::write(Table::Conf6, &v6.interface, REDIRECTS, value)?)
}

/// Step 2. Pods send everything to their gateway.
pub fn route(captured: &Captured) -> Result<(), Error> {
    let Some(bridge) = &captured.bridge else { return Ok(()) };
    inside(captured, |pod| {
        redirects(pod, false)?;
        Ok(Socket::open()?.apply(&route_requests(pod, &bridge.link.mac)?)?)
    })
}

fn route_requests(pod: &Pod, gateway_mac: &[u8]) -> Result<Vec<Request>, Error> {
    let gateway = IpAddr::V4(GATEWAY);
    let mut requests = vec![
        messages::add_permanent_neighbour(gateway, gateway_mac, pod.inner_index),
        routes::add_on_link(gateway, pod.inner_index),
        routes::via(ANY_V4, gateway, pod.inner_index),
    ];
    if let Some(v6) = &pod.v6 {
        let gateway = v6.next_hop.into();
        requests.push(messages::add_permanent_neighbour(gateway, gateway_mac, pod.inner_index));
        requests.push(routes::via(ANY_V6, gateway, pod.inner_index));
    }
    // The default route was replaced, not added: its deletion finds nothing. Those through a gateway go before the one that
    // makes the gateway reachable.
    for route in by_gateway(pod, true)?.into_iter().chain(by_gateway(pod, false)?) {
        requests.push(route.delete()?);
    }
    Ok(requests)
}

fn by_gateway(pod: &Pod, with: bool) -> Result<Vec<crate::host::saved::Saved>, Error> {
    use rtnetlink::packet_route::RouteNetlinkMessage::NewRoute;
    let mut found = Vec::new();
    for saved in &pod.routes {
        if let NewRoute(route) = saved.message()?
            && links::gateway(&route).is_some() == with
        {
            found.push(saved.clone());
        }
    }
    Ok(found)
}

/// Step 2, undone.
pub fn unroute(captured: &Captured) -> Result<(), Error> {
    let Some(bridge) = &captured.bridge else { return Ok(()) };
    inside(captured, |pod| {
        let mut requests = Vec::new();
        for gateway in
            pod.gateway.into_iter().chain(pod.v6.as_ref().and_then(|v6| v6.gateway).map(IpAddr::V6))
        {
            requests.push(messages::add_neighbour(gateway, &bridge.link.mac, pod.inner_index));
        }
        for route in by_gateway(pod, false)?.into_iter().chain(by_gateway(pod, true)?) {
            requests.push(route.restore()?);
        }
        requests.push(routes::delete_on_link(GATEWAY.into(), pod.inner_index));
        requests.push(messages::delete_neighbour(GATEWAY.into(), pod.inner_index));
        if let Some(v6) = &pod.v6 {
            // The old default route was put beside it if it has another metric.
            requests.push(routes::delete_via(ANY_V6, v6.next_hop.into(), pod.inner_index));
            requests.push(messages::delete_neighbour(v6.next_hop.into(), pod.inner_index));
        }
        Socket::open()?.apply(&requests)?;
        redirects(pod, true)
    })
}

/// Step 3. Host ends leave the bridge.
pub fn leave_bridge(captured: &Captured, live: bool) -> Result<(), Error> {
    let Some(bridge) = &captured.bridge else { return Ok(()) };
    let mut socket = Socket::open()?;
    let leaving = present(&mut socket, captured)?;
    let mut requests = Vec::new();
    for (pod, _) in &leaving {
        requests.extend(host_routes(pod, routes::add_on_link));
        requests.push(messages::leave(pod.index));
    }
    detour::around(&names(&leaving), &bridge.link, || socket.apply(&requests))?;
    rename(&mut socket, &leaving, |pod| &pod.cali, &bridge.link.mac, live)?;
    // Felix sets these as it wants them; until then, as strict as they were.
    let mut strict = Vec::new();
    for (pod, _) in &leaving {
        for setting in pod.settings.iter().filter(|setting| setting.key == Conf::RpFilter.key()) {
            let value = setting.value.parse().map_err(|_| {
                let why = format!("rp_filter of {} was {:?}", pod.name(), setting.value);
                Error::Unfit("CaptureUnreadable", why)
            })?;
            strict.push(messages::configure(pod.index, &[(Conf::RpFilter, value)]));
        }
    }
    Ok(socket.apply(&strict)?)
}

/// Step 3, undone.
pub fn join_bridge(captured: &Captured, live: bool) -> Result<(), Error> {
    let Some(bridge) = &captured.bridge else { return Ok(()) };
    if captured.pods.iter().any(|pod| pod.v6.is_some()) {
        inside(captured, |pod| redirects(pod, false))?;
    }
    let mut socket = Socket::open()?;
    loosen(&mut socket, captured)?;
    let present_before = present(&mut socket, captured)?;
    rename(&mut socket, &present_before, |pod| &pod.veth, &bridge.link.mac, live)?;
    let joining = present(&mut socket, captured)?;
    let (mut join, mut unroute) = (Vec::new(), Vec::new());
    for (pod, _) in &joining {
        join.push(messages::mac(pod.index, &bridge.link.mac));
        // A new hardware address forgets the neighbours. On the bridge, a question that met a port that wasn't ready yet would be
        // repeated after a second only.
        join.extend(neighbours(pod, pod.index).chain(neighbours(pod, bridge.link.index)));
        join.push(messages::join(pod.index, bridge.link.index));
        join.push(messages::port(pod.index, pod.port));
        unroute.extend(host_routes(pod, routes::delete_on_link));
    }
    detour::around(&names(&joining), &bridge.link, || {
        socket.apply(&join)?;
        if !joining.is_empty() {
            wait_until_operating(&mut socket, bridge.link.index)?;
        }
        socket.apply(&unroute)
    })?;
    Ok(())
}

// A bridge has a carrier with its first port, and sends a moment later. A bridge that never does is used all the same: the pods'
// other way is taken from them only now, and what is wrong with it shows in the verification.
fn wait_until_operating(socket: &mut Socket, bridge: u32) -> Result<(), netlink::Error> {
    let started = Instant::now();
    while !links::operates(socket, bridge)? && started.elapsed() < OPERATING {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn names(pods: &[(&Pod, String)]) -> Vec<String> {
    pods.iter().map(|(_, name)| name.clone()).collect()
}

fn host_routes(pod: &Pod, request: fn(IpAddr, u32) -> Request) -> Vec<Request> {
    pod.adopted.ip.iter().map(|address| request(*address, pod.index)).collect()
}
