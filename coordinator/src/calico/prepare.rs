//! Calico's configuration for a cluster that flannel runs: the pool, Felix, and for each node its blocks, its tunnel address and its
//! annotations. Nothing is written that is so already.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use flannel_migration_protocol::Network;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt as _;
use kube::api::{Api, ListParams};
use serde_json::{Map, Value, json};
use tracing::{debug, info};

use super::announced::{self, FlannelNode};
use super::family::Family;
use super::ipam::{self, Ipam};
use super::layout::Layout;
use super::names;
use super::stock::Stock;
use super::types::{FelixConfiguration, FelixConfigurationSpec, IPPool, IpPoolSpec};
use crate::api::{self, CONFLICT_RETRIES, Writer, found, post, read};
use crate::cluster::{Node, NodeFacts};
use crate::preflight::Finding;
use crate::settings::Settings;

/// Why the cluster can't be prepared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call failed.
    #[error(transparent)]
    Api(#[from] api::Error),
    /// IPAM refused.
    #[error("prepare node {node}")]
    Ipam {
        /// The node.
        node: String,
        /// Why.
        #[source]
        source: ipam::Error,
    },
    /// What is there contradicts what is needed, and what uses it must not be disturbed.
    #[error("{0}")]
    Contradiction(Finding),
}

impl Error {
    /// `CamelCase`, for events.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Api(error) => error.reason(),
            Self::Ipam { source, .. } => source.reason(),
            Self::Contradiction(finding) => finding.reason,
        }
    }
}

/// The pools that are wanted, by name.
pub type Pools = BTreeMap<&'static str, IpPoolSpec>;

/// The pool that a network of flannel's becomes.
#[must_use]
pub fn pool(network: IpNet, block_size: u8, ip_masq: bool) -> IpPoolSpec {
    IpPoolSpec {
        cidr: network.trunc().to_string(),
        block_size: Some(block_size),
        nat_outgoing: Some(ip_masq),
        ipip_mode: Some("Never".to_owned()),
        vxlan_mode: Some("Always".to_owned()),
        node_selector: Some("all()".to_owned()),
        allowed_uses: Some(vec!["Workload".to_owned(), "Tunnel".to_owned()]),
        // Calico 3.30 and later default it so; older ones prune it.
        other: [("assignmentMode".to_owned(), json!("Automatic"))].into(),
        ..IpPoolSpec::default()
    }
}

/// Length of a pool's blocks.
#[must_use]
pub fn block_size_of(pool: &IpPoolSpec) -> u8 {
    let family = pool.cidr.parse().map_or(Family::V4, |cidr| Family::of_net(&cidr));
    pool.block_size.unwrap_or(family.block_size())
}

/// What makes an existing pool unusable.
#[must_use]
pub fn pool_differences(now: &IpPoolSpec, wanted: &IpPoolSpec) -> Vec<String> {
    let differs = |field: &str, now: String, wanted: String| {
        (now != wanted).then(|| format!("{field} is {now}, needed is {wanted}"))
    };
    [
        differs("cidr", now.cidr.clone(), wanted.cidr.clone()),
        differs("blockSize", block_size_of(now).to_string(), block_size_of(wanted).to_string()),
        differs(
            "natOutgoing",
            now.nat_outgoing.unwrap_or(false).to_string(),
            wanted.nat_outgoing.unwrap_or(false).to_string(),
        ),
        differs(
            "vxlanMode",
            now.vxlan_mode.clone().unwrap_or_else(|| "Never".into()),
            wanted.vxlan_mode.clone().unwrap_or_else(|| "Never".into()),
        ),
        differs("disabled", now.disabled.unwrap_or(false).to_string(), "false".to_owned()),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// What Felix's configuration must become; empty when it is so. `Null` removes a field.
#[must_use]
pub fn felix_changes(now: &FelixConfigurationSpec, settings: &Settings) -> Map<String, Value> {
    let facts = &settings.flannel_facts;
    let mut changes = Map::new();
    if now.vxlan_vni != Some(facts.vni) {
        changes.insert("vxlanVNI".to_owned(), facts.vni.into());
    }
    if now.vxlan_port != Some(facts.port) {
        changes.insert("vxlanPort".to_owned(), facts.port.into());
    }
    if now.vxlan_mtu != Some(facts.mtu) {
        changes.insert("vxlanMTU".to_owned(), facts.mtu.into());
    }
    // Never written by us; Calico's own controller leaves it behind when it is killed, and every Felix that starts then deletes
    // the VXLAN device.
    if now.vxlan_enabled == Some(false) {
        changes.insert("vxlanEnabled".to_owned(), Value::Null);
    }
    changes
}

/// Prepares what all nodes share. `in_use`: Calico runs on some node, so that nothing Felix reads may change under it.
pub async fn cluster(
    writer: &Writer,
    settings: &Settings,
    wanted: &Pools,
    in_use: bool,
) -> Result<(), Error> {
    let pools: Api<IPPool> = Api::all(writer.client.clone());
    let there = read("list Calico's pools", pools.list(&ListParams::default())).await?.items;
    for pool in &there {
        if let Some(finding) = pool_finding(&pool.name_any(), &pool.spec, wanted).into_iter().next() {
            return Err(Error::Contradiction(finding));
        }
    }
    for (name, spec) in wanted {
        if there.iter().any(|pool| pool.name_any() == *name) {
            continue;
        }
        let pool = IPPool::new(name, spec.clone());
        let created = writer.write("create Calico's pool", pools.create(&post(), &pool)).await;
        if created.is_ok() {
            info!(step = "pool", pool = name, cidr = spec.cidr, "Calico's pool made");
        }
        tolerate_existing(created)?;
    }
    felix(writer, settings, in_use).await?;
    veth_mtu(writer, settings).await
}

/// What makes a pool that is there stand in the way of those that are wanted.
#[must_use]
pub fn pool_finding(name: &str, pool: &IpPoolSpec, wanted: &Pools) -> Vec<Finding> {
    let object = format!("IPPool {name}");
    if let Some(wanted) = wanted.get(name) {
        let differences = pool_differences(pool, wanted);
        let differs = (!differences.is_empty()).then(|| {
            Finding::fatal(
                "PoolDiffers",
                object,
                differences.join("; "),
                "Delete the pool if nothing uses it (calicoctl delete ippool), or correct it",
            )
        });
        return differs.into_iter().collect();
    }
    let Ok(now) = pool.cidr.parse::<IpNet>() else { return Vec::new() };
    let networks = wanted.values().filter_map(|wanted| wanted.cidr.parse::<IpNet>().ok());
    let overlapped = networks.filter(|ours| now.contains(ours) || ours.contains(&now));
    let overlaps = |ours| {
        Finding::fatal(
            "PoolOverlaps",
            object.clone(),
            format!("its network {now} overlaps flannel's network {ours}"),
            "Delete the pool if nothing uses it (calicoctl delete ippool)",
        )
    };
    overlapped.map(overlaps).collect()
}

/// What must not be changed any more in Felix's configuration, because Calico runs with it.
#[must_use]
pub fn felix_finding(now: &FelixConfigurationSpec, settings: &Settings) -> Option<Finding> {
    let changes = felix_changes(now, settings);
    changes.keys().any(|key| key != "vxlanEnabled").then(|| {
        Finding::fatal(
            "FelixConfigurationDiffers",
            "FelixConfiguration default",
            format!("needed is {}, but Calico already runs with other values", Value::from(changes)),
            "Set these fields as the migrated nodes use them, or roll the migrated nodes back",
        )
    })
}

async fn felix(writer: &Writer, settings: &Settings, in_use: bool) -> Result<(), Error> {
    let felix: Api<FelixConfiguration> = Api::all(writer.client.clone());
    let what = "write Felix's configuration";
    for _ in 0..CONFLICT_RETRIES {
        let written = match found(read(what, felix.get(names::FELIX)).await)? {
            None => {
                let facts = &settings.flannel_facts;
                let spec = FelixConfigurationSpec {
                    vxlan_vni: Some(facts.vni),
                    vxlan_port: Some(facts.port),
                    vxlan_mtu: Some(facts.mtu),
                    ..FelixConfigurationSpec::default()
                };
                writer.write(what, felix.create(&post(), &FelixConfiguration::new(names::FELIX, spec))).await
            }
            Some(now) => {
                let changes = felix_changes(&now.spec, settings);
                if changes.is_empty() {
                    return Ok(());
                }
                if let Some(finding) = felix_finding(&now.spec, settings).filter(|_| in_use) {
                    return Err(Error::Contradiction(finding));
                }
                let patch =
                    json!({ "metadata": { "resourceVersion": now.resource_version() }, "spec": changes });
                writer.merge(what, &felix, names::FELIX, &patch).await
            }
        };
        match written {
            Ok(_) => {
                info!(step = "felix", "Felix's configuration takes over flannel's VNI, port and MTU");
                return Ok(());
            }
            Err(error) if error.is_conflict() || error.is_already_exists() => {
                debug!("Felix's configuration changed; looking again");
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(ipam::Error::Contended(what.to_owned()))
        .map_err(|source| Error::Ipam { node: "(all)".to_owned(), source })
}

/// Calico's pods get the same MTU that flannel's have.
async fn veth_mtu(writer: &Writer, settings: &Settings) -> Result<(), Error> {
    let Some(key) = &settings.calico.mtu_key else { return Ok(()) };
    let (namespace, name) = (&settings.calico.daemon_set.namespace, &settings.calico.config_map);
    let maps: Api<ConfigMap> = Api::namespaced(writer.client.clone(), namespace);
    let mtu = settings.calico_facts.mtu.to_string();
    let what = format!("set {key} in ConfigMap {namespace}/{name}");
    let map = read(what.as_str(), maps.get(name)).await?;
    if map.data.as_ref().and_then(|data| data.get(key)) == Some(&mtu) {
        return Ok(());
    }
    let patch = json!({ "metadata": { "resourceVersion": map.resource_version() }, "data": { key: mtu } });
    writer.merge(what, &maps, name, &patch).await?;
    info!(step = "mtu", mtu, "Calico's pods get flannel's MTU");
    Ok(())
}

/// Gives a node that Calico doesn't run on yet its blocks, those of its pods' addresses among them, and the addresses of its VXLAN
/// devices.
pub async fn blocks(
    writer: &Writer,
    node: &str,
    flannel: &FlannelNode,
    (layout, addresses): (&Layout, &BTreeSet<IpAddr>),
    stock: &Stock,
) -> Result<(), Error> {
    let ipam = Ipam::new(writer.clone());
    for vtep in flannel {
        let blocks = layout.blocks(&[vtep.network], addresses);
        let claimed = ipam.claim(node, &blocks, vtep.tunnel, stock).await;
        claimed.map_err(|source| Error::Ipam { node: node.to_owned(), source })?;
    }
    Ok(())
}

/// Prepares one node that flannel runs. Its label and its annotations are one write, after its blocks: from then on Calico leaves these
/// alone, which it takes from nodes without label when they are empty. What was written, if anything was.
pub async fn node(
    writer: &Writer,
    facts: &NodeFacts,
    flannel: &FlannelNode,
    needs: (&Layout, &BTreeSet<IpAddr>),
    stock: &Stock,
) -> Result<Option<NodeFacts>, Error> {
    blocks(writer, &facts.name, flannel, needs, stock).await?;
    let label = facts.view.network.is_absent().then_some(Network::Flannel);
    let Some(patch) = announced::patch(facts, flannel, label, Map::new()) else { return Ok(None) };
    let nodes: Api<Node> = Api::all(writer.client.clone());
    // Keys of Calico's, of which nothing else is a writer yet, and one of ours that isn't there: no precondition, so that a busy node
    // can't starve it.
    let what = format!("prepare node {}", facts.name);
    let written = api::found(writer.merge(what, &nodes, &facts.name, &patch).await)?;
    let tunnels: Vec<String> = flannel.iter().map(|vtep| vtep.tunnel.to_string()).collect();
    info!(node = facts.name, step = "prepare", tunnel = tunnels.join(","), "node prepared for Calico");
    Ok(written.as_ref().map(NodeFacts::from))
}

fn tolerate_existing<T>(result: api::Result<T>) -> api::Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(error) if error.is_already_exists() => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
#[path = "prepare_tests.rs"]
mod tests;
