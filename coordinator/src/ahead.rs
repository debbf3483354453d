//! IPv6 addresses of pods on nodes that flannel still runs: a migrated node has a route to one only through the block that holds it, and
//! a node's share is too large to be made blocks as a whole. So pods are followed, and where their addresses come near the end of what a
//! node was given, it is given more.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::pin;
use std::time::Duration;

use futures::StreamExt as _;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, ObjectMeta};
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt as _, watcher};
use serde::Deserialize;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::api::{Result, chain};
use crate::calico::family::Family;
use crate::calico::ipam::{self, Ipam};
use crate::calico::layout::Layout;
use crate::calico::stock::Stock;
use crate::cluster::{NodeFacts, WATCH_SECONDS, pauses};
use crate::node::Steps;
use crate::pages;
use crate::preflight::nodes::untouched;

/// After a call that failed.
const RETRY: Duration = Duration::from_secs(2);

/// A Pod as far as it is read here.
#[derive(Clone, Debug, Default, Deserialize, kube::Resource)]
#[resource(inherit = Pod)]
struct Addressed {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    node_name: Option<String>,
    host_network: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Status {
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
}

#[derive(Clone, Debug, Deserialize)]
struct PodIp {
    ip: String,
}

impl Addressed {
    /// Its node, and its IPv6 addresses there; none without any.
    fn on(&self) -> Option<(&str, Vec<IpAddr>)> {
        let node = self.spec.node_name.as_deref().filter(|_| self.spec.host_network != Some(true))?;
        let all = self.status.pod_ips.iter().flatten().filter_map(|pod_ip| pod_ip.ip.parse().ok());
        let v6: Vec<IpAddr> = all.filter(IpAddr::is_ipv6).collect();
        (!v6.is_empty()).then_some((node, v6))
    }
}

/// The IPv6 addresses of all pods, by node.
pub async fn addresses(client: &Client) -> Result<BTreeMap<String, BTreeSet<IpAddr>>> {
    let mut seen = Seen::default();
    pages::each::<Pod, Addressed>(client, "list pods", |pod| seen.take(&pod)).await?;
    Ok(seen.addresses)
}

/// What was seen, and what was done about it.
#[derive(Debug, Default)]
struct Seen {
    addresses: BTreeMap<String, BTreeSet<IpAddr>>,
    /// Nodes of which something new was seen.
    pending: BTreeSet<String>,
    claimed: BTreeMap<String, BTreeSet<IpNet>>,
}

impl Seen {
    fn take(&mut self, pod: &Addressed) {
        let Some((node, addresses)) = pod.on() else { return };
        let known = self.addresses.entry(node.to_owned()).or_default();
        let before = known.len();
        known.extend(addresses);
        if known.len() > before {
            self.pending.insert(node.to_owned());
        }
    }

    /// Takes the blocks that nodes have for what they were given.
    fn know(&mut self, stock: &Stock, networks: &[IpNet]) {
        for (node, blocks) in stock.by_node(networks) {
            self.claimed.insert(node.to_owned(), blocks.into_iter().collect());
        }
    }

    /// The blocks that a node lacks.
    fn lacking(&self, node: &NodeFacts, layout: &Layout) -> Vec<IpNet> {
        let waits = !node.view.network.is_absent() && untouched(node);
        let Some(addresses) = self.addresses.get(&node.name).filter(|_| waits) else { return Vec::new() };
        let shares: Vec<IpNet> =
            node.pod_cidrs.iter().copied().filter(|share| Family::of_net(share) == Family::V6).collect();
        let mut blocks = layout.blocks(&shares, addresses);
        let claimed = self.claimed.get(&node.name);
        blocks.retain(|block| claimed.is_none_or(|claimed| !claimed.contains(block)));
        blocks
    }
}

/// Follows all pods of a cluster of both families.
pub async fn follow(steps: &Steps) -> Infallible {
    if !steps.settings.dual_stack() {
        return std::future::pending().await;
    }
    let (client, ipam) = (steps.writer.client.clone(), Ipam::new(steps.writer.clone()));
    let config = watcher::Config::default().timeout(WATCH_SECONDS);
    let mut events = pin!(watcher(Api::<Addressed>::all(client.clone()), config).backoff(pauses()));
    let mut seen = Seen::default();
    // What was prepared isn't looked at again one by one.
    if let Ok(stock) = Stock::read(&client).await {
        seen.know(&stock, steps.settings.networks());
    }
    let mut listed = false;
    loop {
        let failed = listed && !seen.pending.is_empty();
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(Event::InitApply(pod) | Event::Apply(pod))) => seen.take(&pod),
                Some(Ok(Event::InitDone)) => listed = true,
                Some(Ok(Event::Init | Event::Delete(_))) => {}
                Some(Err(error)) => debug!(error = chain(&error), "watch of all pods interrupted"),
                None => return std::future::pending().await,
            },
            () = sleep(RETRY), if failed => {}
        }
        if listed
            && !seen.pending.is_empty()
            && let Err(error) = claim(steps, &ipam, &mut seen).await
        {
            warn!(step = "ahead", error = chain(&error), "blocks not given; tried again");
        }
    }
}

async fn claim(steps: &Steps, ipam: &Ipam, seen: &mut Seen) -> std::result::Result<(), ipam::Error> {
    while let Some(name) = seen.pending.first().cloned() {
        if let Some(node) = steps.nodes.get(&name) {
            let blocks = seen.lacking(&node, &steps.layout);
            ipam.claim_more(&name, &blocks).await?;
            if !blocks.is_empty() {
                info!(
                    node = name,
                    step = "ahead",
                    blocks = blocks.len(),
                    "blocks for IPv6 addresses of pods"
                );
            }
            seen.claimed.entry(name.clone()).or_default().extend(blocks);
        }
        seen.pending.remove(&name);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use flannel_migration_protocol::{Field, Network};
    use serde_json::json;

    use super::*;

    fn pod(node: &str, host: bool, ips: &[&str]) -> Addressed {
        let ips: Vec<_> = ips.iter().map(|ip| json!({ "ip": ip })).collect();
        serde_json::from_value(json!({
            "metadata": { "name": "p", "resourceVersion": "7" },
            "spec": { "nodeName": node, "hostNetwork": host, "containers": [] },
            "status": { "phase": "Running", "podIPs": ips },
        }))
        .unwrap()
    }

    fn node(network: Field<Network>) -> NodeFacts {
        let mut node = NodeFacts {
            name: "a".into(),
            pod_cidrs: vec!["10.244.1.0/24".parse().unwrap(), "fd00:10:244:1::/64".parse().unwrap()],
            ..NodeFacts::default()
        };
        node.view.network = network;
        node
    }

    #[test]
    fn only_ipv6_addresses_of_pods_with_a_network_of_their_own_count() {
        assert_eq!(pod("a", false, &["10.244.1.5"]).on(), None);
        assert_eq!(pod("a", true, &["172.16.0.1", "fd00:172::1"]).on(), None);
        let both = pod("a", false, &["10.244.1.5", "fd00:10:244:1::5"]);
        assert_eq!(both.on(), Some(("a", vec!["fd00:10:244:1::5".parse().unwrap()])));
        let early: Addressed = serde_json::from_value(json!({ "metadata": { "name": "p" } })).unwrap();
        assert_eq!(early.on(), None);
    }

    #[test]
    fn a_node_is_given_what_it_lacks_while_flannel_runs_it_and_only_once() {
        let shares = node(Field::Absent).pod_cidrs;
        let networks = ["10.244.0.0/16".parse().unwrap(), "fd00:10:244::/56".parse().unwrap()];
        let layout = Layout::new(&networks, shares.iter());
        let flannels = node(Field::Present(Network::Flannel));
        let mut seen = Seen::default();
        assert!(seen.lacking(&flannels, &layout).is_empty());
        seen.take(&pod("a", false, &["10.244.1.5", "fd00:10:244:1::5"]));
        seen.take(&pod("a", false, &["10.244.1.5", "fd00:10:244:1::5"]));
        assert_eq!(seen.pending.len(), 1);
        let lacking = seen.lacking(&flannels, &layout);
        assert_eq!(lacking.len(), 4, "of IPv6 only");
        seen.claimed.insert("a".into(), lacking.into_iter().collect());
        seen.take(&pod("a", false, &["fd00:10:244:1::51"]));
        let more: Vec<String> = seen.lacking(&flannels, &layout).iter().map(ToString::to_string).collect();
        assert_eq!(more, ["fd00:10:244:1::100/122"]);
        for other in [Field::Absent, Field::Present(Network::None), Field::Present(Network::Calico)] {
            assert!(seen.lacking(&node(other), &layout).is_empty());
        }
    }
}
