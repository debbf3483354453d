//! Which pods of the node can be taken over under their processes' feet, and which must be evicted first. Pure: decided
//! from libcni's records, the kernel's links and the Pod list, each checked against the others.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};

use flannel_migration_protocol::{Adopted, Evict};
use ipnet::IpNet;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::RouteMessage;
use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};

use crate::host::cni::Attachment;
use crate::host::links::{self, Link, Port};
use crate::host::messages6;
use crate::host::saved::Saved;
use crate::host::sysctl::Table;
use crate::steps::pods;

/// A Pod of this node, as the API server knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
    /// Addresses; empty until the kubelet has reported them.
    pub addresses: Vec<IpAddr>,
    /// Its containers have ended for good.
    pub finished: bool,
}

/// What the kernel says inside a sandbox.
#[derive(Clone, Debug, Default)]
pub struct Inside {
    /// The pod's link.
    pub link: Link,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// Routes out of it, main table.
    pub routes: Vec<RouteMessage>,
    /// Whether there are links beside it and the loopback that are up.
    pub more_links: bool,
    /// Its `accept_redirects` of IPv6; none without IPv6.
    pub accept_redirects: Option<String>,
}

/// Everything the decision is made from.
#[derive(Debug)]
pub struct Facts<'a> {
    /// Names of flannel's CNI networks.
    pub networks: &'a [String],
    /// libcni's records of all networks.
    pub attachments: &'a [Attachment],
    /// The node's links.
    pub links: &'a [Link],
    /// The bridge of flannel's pods; `None` when it isn't there.
    pub bridge: Option<&'a Link>,
    /// Whether pods have Calico's links already (Canal).
    pub canal: bool,
    /// Whether flannel carries IPv6 too.
    pub dual: bool,
    /// The links' own link-local addresses, by index.
    pub link_locals: &'a BTreeMap<u32, Ipv6Addr>,
    /// By sandbox; none for a sandbox whose namespace is gone.
    pub inside: &'a HashMap<String, Inside>,
    /// Pods of the node; `None` when the API server couldn't be asked, then every pod on record is taken as existing.
    pub pods: Option<&'a [Known]>,
}

/// A pod that is taken over, with all that is needed to change it and to undo it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// The pod and its addresses, as they are reported.
    pub adopted: Adopted,
    /// Path of its network namespace.
    pub netns: String,
    /// Host end: index.
    pub index: u32,
    /// Host end: name that the bridge plugin gave.
    pub veth: String,
    /// Host end: name that Felix expects.
    pub cali: String,
    /// Host end: hardware address.
    pub mac: Vec<u8>,
    /// Host end: settings as a port of the bridge.
    pub port: Port,
    /// Host end: kernel settings that are changed, as they were.
    #[serde(default)]
    pub settings: Vec<Setting>,
    /// Pod's end: index.
    pub inner_index: u32,
    /// Pod's end: hardware address.
    pub inner_mac: Vec<u8>,
    /// Pod's gateway on the bridge.
    pub gateway: Option<IpAddr>,
    /// Its IPv6 part; none of a pod with IPv4 only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v6: Option<V6>,
    /// Pod's routes out of its link.
    pub routes: Vec<Saved>,
    /// Whether ports of the host lead to it.
    pub host_ports: bool,
}

/// What IPv6 needs more of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct V6 {
    /// Name of the pod's end of the link.
    pub interface: String,
    /// Its `accept_redirects`.
    pub accept_redirects: Option<String>,

    /// The pod's gateway on the bridge.
    pub gateway: Option<Ipv6Addr>,
    /// The host end's link-local address: the pod's gateway in Calico.
    pub next_hop: Ipv6Addr,
    /// Whether the host end hasn't got it, and is given it.
    pub made: bool,
}

impl Pod {
    /// `namespace/name`, for people.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.adopted.namespace, self.adopted.pod)
    }
}

/// One kernel setting of an interface, as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Where.
    pub table: Table,
    /// Which.
    pub key: String,
    /// Its value.
    pub value: String,
}

/// The answer for the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Pods to take over.
    pub adopt: Vec<Pod>,
    /// Pods to evict before.
    pub evict: Vec<Evict>,
    /// Sandboxes that nobody needs: their Pod or their namespace is gone.
    pub ignored: Vec<String>,
    /// Ports of the bridge that no record explains: a pod in the making, or somebody else's.
    pub strangers: Vec<String>,
}

/// Name of a pod's host interface in Calico: libcalico-go's `VethNameForWorkload`.
#[must_use]
pub fn interface_name(namespace: &str, pod: &str) -> String {
    let digest = hex::encode(Sha1::digest(format!("{namespace}.{pod}")));
    format!("cali{}", digest.get(..11).unwrap_or_default())
}

/// Decides for every attachment to flannel's network.
#[must_use]
pub fn take(facts: &Facts) -> Inventory {
    let mut inventory = Inventory::default();
    let mut explained = Vec::new();
    let mut by_name: BTreeMap<(String, String), Vec<Result<Pod, Evict>>> = BTreeMap::new();
    for attachment in
        facts.attachments.iter().filter(|attachment| facts.networks.contains(&attachment.network))
    {
        let Some(inside) = facts.inside.get(&attachment.sandbox) else {
            // A namespace that isn't named can't be seen to be gone.
            if attachment.netns.is_empty() && exists(facts.pods, attachment) {
                let name = (attachment.namespace.clone(), attachment.pod.clone());
                by_name.entry(name).or_default().push(Err(evict(attachment, "NamespaceUnknown")));
            } else {
                inventory.ignored.push(attachment.sandbox.clone());
            }
            continue;
        };
        let host = facts.links.iter().find(|link| Some(link.index) == inside.link.peer);
        explained.extend(host.map(|link| link.index));
        if !exists(facts.pods, attachment) {
            inventory.ignored.push(attachment.sandbox.clone());
            continue;
        }
        let answer = decide(facts, attachment, inside, host).map_err(|reason| evict(attachment, reason));
        by_name.entry((attachment.namespace.clone(), attachment.pod.clone())).or_default().push(answer);
    }
    for ((namespace, pod), mut answers) in by_name {
        match (answers.pop(), answers.is_empty()) {
            (Some(Ok(pod)), true) => inventory.adopt.push(pod),
            (Some(Err(evict)), true) => inventory.evict.push(evict),
            // Both would get the same interface name. The kubelet is replacing the sandbox; it may settle by itself.
            (Some(Ok(Pod { adopted: Adopted { uid, .. }, .. }) | Err(Evict { uid, .. })), false) => {
                inventory.evict.push(Evict { namespace, pod, uid, reason: "TwoSandboxes".into() });
            }
            (None, _) => {}
        }
    }
    if let Some(bridge) = facts.bridge {
        let strangers = facts.links.iter().filter(|link| link.master == Some(bridge.index));
        inventory.strangers =
            strangers.filter(|link| !explained.contains(&link.index)).map(|link| link.name.clone()).collect();
    }
    inventory
}

fn evict(attachment: &Attachment, reason: &str) -> Evict {
    Evict {
        namespace: attachment.namespace.clone(),
        pod: attachment.pod.clone(),
        uid: attachment.uid.clone(),
        reason: reason.into(),
    }
}

fn exists(pods: Option<&[Known]>, attachment: &Attachment) -> bool {
    pods.is_none_or(|pods| {
        pods.iter().any(|pod| {
            pod.namespace == attachment.namespace
                && pod.name == attachment.pod
                && (attachment.uid.is_empty() || pod.uid == attachment.uid)
                && !pod.finished
        })
    })
}

fn decide(
    facts: &Facts,
    attachment: &Attachment,
    inside: &Inside,
    host: Option<&Link>,
) -> Result<Pod, &'static str> {
    let others = facts.attachments.iter().filter(|other| other.sandbox == attachment.sandbox);
    if inside.more_links
        || others.filter(|other| other.network != "cni-loopback" && other.interface != "lo").count() > 1
    {
        return Err("MoreInterfaces");
    }
    if attachment.namespace.is_empty() || attachment.pod.is_empty() {
        return Err("NotAPod");
    }
    // The bandwidth plugin derives the name of its device from the network's name, so that Calico's could not remove it.
    // Canal's network has the same name.
    if attachment.shaped && !facts.canal {
        return Err("BandwidthShaped");
    }
    let cali = interface_name(&attachment.namespace, &attachment.pod);
    let host = host.filter(|link| link.kind == "veth");
    let host = if facts.canal {
        host.filter(|link| link.name == cali).ok_or("NotCalicosLink")?
    } else {
        let bridge = facts.bridge.ok_or("NoBridge")?;
        host.filter(|link| link.master == Some(bridge.index)).ok_or("NotOnTheBridge")?
    };
    let mut addresses: Vec<IpAddr> = inside.addresses.iter().map(IpNet::addr).collect();
    let mut recorded: Vec<IpAddr> = attachment.addresses.iter().map(IpNet::addr).collect();
    addresses.sort_unstable();
    recorded.sort_unstable();
    if addresses != recorded {
        return Err("AddressesChanged");
    }
    let six = match addresses.as_slice() {
        [IpAddr::V4(_)] => false,
        [IpAddr::V4(_), IpAddr::V6(_)] if facts.dual => true,
        _ => return Err("UnexpectedAddresses"),
    };
    let next_hop = if six { Some(next_hop(facts, host).ok_or("NoLinkLocalAddress")?) } else { None };
    // Canal's pods have Calico's gateways, on-link, and nothing else to reach.
    let gateways = if facts.canal {
        [Some(pods::GATEWAY.into()), next_hop.map(|(address, _)| address.into())]
            .into_iter()
            .flatten()
            .collect()
    } else {
        attachment.gateways.clone()
    };
    let routes =
        || inside.routes.iter().filter(|route| six || route.header.address_family == AddressFamily::Inet);
    let known = |route: &RouteMessage| match links::gateway(route) {
        Some(address) => gateways.contains(&address),
        // On-link: only the subnet's own route.
        None => links::destination(route).is_some_and(|net| {
            inside.addresses.iter().any(|own| own.trunc() == net)
                || facts.canal && gateways.contains(&net.addr())
        }),
    };
    let default = |v4: bool| {
        let is = |net: IpNet| net.prefix_len() == 0 && net.addr().is_ipv4() == v4;
        routes().any(|route| links::destination(route).is_some_and(is))
    };
    if !routes().all(known) || !default(true) || six && !default(false) {
        return Err("RoutesChanged");
    }
    let v6 = next_hop.map(|(next_hop, made)| V6 {
        interface: attachment.interface.clone(),
        accept_redirects: inside.accept_redirects.clone(),
        gateway: gateways.iter().find_map(|gateway| match gateway {
            IpAddr::V6(address) => Some(*address),
            IpAddr::V4(_) => None,
        }),
        next_hop,
        made,
    });
    Ok(Pod {
        adopted: Adopted {
            sandbox: attachment.sandbox.clone(),
            ip: addresses,
            namespace: attachment.namespace.clone(),
            pod: attachment.pod.clone(),
            uid: attachment.uid.clone(),
        },
        netns: attachment.netns.clone(),
        index: host.index,
        veth: host.name.clone(),
        cali,
        mac: host.mac.clone(),
        port: host.port.unwrap_or_default(),
        settings: Vec::new(),
        inner_index: inside.link.index,
        inner_mac: inside.link.mac.clone(),
        gateway: gateways.iter().copied().find(IpAddr::is_ipv4),
        v6,
        routes: routes().map(Saved::route).collect(),
        host_ports: attachment.host_ports,
    })
}

// The host end's link-local address, and whether it must be given it. Where it is the bridge's too (whose hardware address is that of its
// first port) it needs another: a pod would believe the bridge that others on it are to be sent to without their host.
fn next_hop(facts: &Facts, host: &Link) -> Option<(Ipv6Addr, bool)> {
    let bridges = |address: &Ipv6Addr| {
        facts.bridge.is_some_and(|bridge| {
            facts.link_locals.get(&bridge.index) == Some(address)
                || messages6::link_local(&bridge.mac).as_ref() == Some(address)
        })
    };
    match facts.link_locals.get(&host.index) {
        Some(own) if !bridges(own) => Some((*own, false)),
        _ => messages6::another_link_local(&host.mac).map(|made| (made, true)),
    }
}

#[cfg(test)]
#[path = "inventory_tests.rs"]
mod tests;
