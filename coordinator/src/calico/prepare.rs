//! Calico's configuration for a cluster that flannel runs: the pool, Felix, and for each node its blocks, its tunnel address and its
//! annotations. Nothing is written that is so already.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::ResourceExt as _;
use kube::api::{Api, ListParams};
use serde_json::{Map, Value, json};
use tracing::{debug, info};

use super::ipam::{self, Ipam};
use super::names;
use super::types::{FelixConfiguration, FelixConfigurationSpec, IPPool, IpPoolSpec};
use crate::api::{self, CONFLICT_RETRIES, Writer, found, post, read};
use crate::cluster::NodeFacts;
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

/// The pool that the flannel network becomes.
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

/// What makes an existing pool unusable.
#[must_use]
pub fn pool_differences(now: &IpPoolSpec, wanted: &IpPoolSpec) -> Vec<String> {
    let differs = |field: &str, now: String, wanted: String| {
        (now != wanted).then(|| format!("{field} is {now}, needed is {wanted}"))
    };
    [
        differs("cidr", now.cidr.clone(), wanted.cidr.clone()),
        differs(
            "blockSize",
            now.block_size.unwrap_or(26).to_string(),
            wanted.block_size.unwrap_or(26).to_string(),
        ),
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

/// What flannel says about a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlannelNode {
    /// The node's IPv4 pod network.
    pub network: IpNet,
    /// Address of its VXLAN device: the network's first.
    pub tunnel: IpAddr,
    /// MAC address of its VXLAN device, as flannel writes it.
    pub mac: String,
    /// The address other nodes send to.
    pub public: Ipv4Addr,
}

/// Reads what flannel's annotations say about a node.
pub fn flannel_node(node: &NodeFacts, prefix: &str, network: IpNet) -> Result<FlannelNode, Finding> {
    let object = || format!("Node {}", node.name);
    let not_annotated = |what: &str| {
        Finding::blocking(
            "NodeNotAnnotatedByFlannel",
            object(),
            format!("annotation {prefix}/{what}"),
            "See to it that flannel's pod runs on the node; it writes the annotations when it starts",
        )
    };
    let own = node.pod_cidrs.iter().copied().find(|cidr| matches!(cidr, IpNet::V4(_))).ok_or_else(|| {
        Finding::blocking(
            "NodeWithoutPodCidr",
            object(),
            "it has no IPv4 podCIDR",
            "Let the controller manager allocate node CIDRs",
        )
    })?;
    if !network.contains(&own) {
        return Err(Finding::fatal(
            "PodCidrOutsideNetwork",
            object(),
            format!("its podCIDR {own} is not in flannel's network {network}"),
            "Correct flannel's network or the node's podCIDR",
        ));
    }
    let annotation = |name: &str| node.annotations.get(&format!("{prefix}/{name}"));
    let backend = annotation("backend-type").ok_or_else(|| not_annotated("backend-type is missing"))?;
    if backend != "vxlan" {
        return Err(Finding::fatal(
            "BackendNotVxlan",
            object(),
            format!("flannel's backend there is {backend}"),
            "Only flannel's vxlan backend can be migrated; change net-conf.json and restart flannel first",
        ));
    }
    let data = annotation("backend-data").ok_or_else(|| not_annotated("backend-data is missing"))?;
    let mac = serde_json::from_str::<Map<String, Value>>(data)
        .ok()
        .and_then(|data| {
            data.into_iter()
                .find(|(key, _)| key.eq_ignore_ascii_case("VtepMAC"))
                .and_then(|(_, mac)| mac.as_str().map(str::to_owned))
        })
        .filter(|mac| {
            mac.split(':').filter(|byte| byte.len() == 2 && u8::from_str_radix(byte, 16).is_ok()).count() == 6
        })
        .ok_or_else(|| not_annotated(&format!("backend-data holds no VtepMAC: {data}")))?;
    let public = annotation("public-ip").ok_or_else(|| not_annotated("public-ip is missing"))?;
    let public = public
        .split('/')
        .next()
        .and_then(|address| address.parse().ok())
        .ok_or_else(|| not_annotated(&format!("public-ip is no IPv4 address: {public}")))?;
    Ok(FlannelNode { network: own.trunc(), tunnel: own.network(), mac, public })
}

/// The address that flannel announced for a node.
#[must_use]
pub fn public_address(node: &NodeFacts, prefix: &str) -> Option<Ipv4Addr> {
    node.annotations.get(&format!("{prefix}/public-ip"))?.split('/').next()?.parse().ok()
}

/// A node that never had flannel: what Calico will be there. The MAC address is made from the name, as Felix makes it: locally
/// administered, and the same at each try.
pub fn joined_node(node: &NodeFacts, network: IpNet) -> Result<FlannelNode, Finding> {
    use sha2::Digest as _;
    let missing = |what: &str| {
        Finding::blocking(
            "JoinedNodeIncomplete",
            format!("Node {}", node.name),
            what,
            "It is looked at again when the node changes",
        )
    };
    let own = node
        .pod_cidrs
        .iter()
        .copied()
        .find(|cidr| network.contains(cidr))
        .ok_or_else(|| missing("it has no podCIDR in flannel's network"))?;
    let public = node.address.ok_or_else(|| missing("it has no IPv4 InternalIP"))?;
    let hash = sha2::Sha256::digest(node.name.as_bytes());
    let mac = hash.iter().take(5).fold("66".to_owned(), |mac, byte| format!("{mac}:{byte:02x}"));
    Ok(FlannelNode { network: own.trunc(), tunnel: own.network(), mac, public })
}

/// A node as flannel announces it to its peers.
#[must_use]
pub fn flannel_annotations(node: &FlannelNode, settings: &Settings) -> Map<String, Value> {
    let prefix = &settings.flannel.annotation_prefix;
    let data = json!({ "VNI": settings.flannel_facts.vni, "VtepMAC": node.mac }).to_string();
    [
        ("backend-type", "vxlan".to_owned()),
        ("backend-data", data),
        ("public-ip", node.public.to_string()),
        ("kube-subnet-manager", "true".to_owned()),
    ]
    .into_iter()
    .map(|(name, value)| (format!("{prefix}/{name}"), value.into()))
    .collect()
}

/// What a node's annotations must become; empty when they are so.
#[must_use]
pub fn annotation_changes(node: &NodeFacts, flannel: &FlannelNode) -> Map<String, Value> {
    let now = |key: &str| node.annotations.get(key).map(String::as_str);
    let mut changes = Map::new();
    let tunnel = flannel.tunnel.to_string();
    if now(names::TUNNEL_ADDRESS) != Some(&tunnel) {
        changes.insert(names::TUNNEL_ADDRESS.to_owned(), tunnel.into());
    }
    if now(names::TUNNEL_MAC) != Some(&flannel.mac) {
        changes.insert(names::TUNNEL_MAC.to_owned(), flannel.mac.clone().into());
    }
    // Calico detects the prefix length itself later; the address is what counts.
    let public = flannel.public.to_string();
    if now(names::NODE_ADDRESS).and_then(|address| address.split('/').next()) != Some(&public) {
        changes.insert(names::NODE_ADDRESS.to_owned(), format!("{public}/32").into());
    }
    changes
}

/// Prepares what all nodes share. `in_use`: Calico runs on some node, so that nothing Felix reads may change under it.
pub async fn cluster(
    writer: &Writer,
    settings: &Settings,
    wanted: &IpPoolSpec,
    in_use: bool,
) -> Result<(), Error> {
    let pools: Api<IPPool> = Api::all(writer.client.clone());
    for pool in read("list Calico's pools", pools.list(&ListParams::default())).await?.items {
        if let Some(finding) = pool_finding(&pool.name_any(), &pool.spec, wanted) {
            return Err(Error::Contradiction(finding));
        }
    }
    if found(read("read Calico's pool", pools.get(names::POOL)).await)?.is_none() {
        let pool = IPPool::new(names::POOL, wanted.clone());
        let created = writer.write("create Calico's pool", pools.create(&post(), &pool)).await;
        if created.is_ok() {
            info!(step = "pool", pool = names::POOL, cidr = wanted.cidr, "Calico's pool made");
        }
        tolerate_existing(created)?;
    }
    felix(writer, settings, in_use).await?;
    veth_mtu(writer, settings).await
}

/// What makes a pool that is there stand in the way of the one that is wanted.
#[must_use]
pub fn pool_finding(name: &str, pool: &IpPoolSpec, wanted: &IpPoolSpec) -> Option<Finding> {
    let object = format!("IPPool {name}");
    if name == names::POOL {
        let differences = pool_differences(pool, wanted);
        return (!differences.is_empty()).then(|| {
            Finding::fatal(
                "PoolDiffers",
                object,
                differences.join("; "),
                "Delete the pool if nothing uses it (calicoctl delete ippool), or correct it",
            )
        });
    }
    let (now, ours) = (pool.cidr.parse::<IpNet>().ok()?, wanted.cidr.parse::<IpNet>().ok()?);
    (now.contains(&ours) || ours.contains(&now)).then(|| {
        Finding::fatal(
            "PoolOverlaps",
            object,
            format!("its network {now} overlaps flannel's network {ours}"),
            "Delete the pool if nothing uses it (calicoctl delete ippool)",
        )
    })
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

/// Prepares one node that Calico doesn't run on yet.
pub async fn node(
    writer: &Writer,
    facts: &NodeFacts,
    flannel: &FlannelNode,
    block_size: u8,
) -> Result<(), Error> {
    let of_node = |source: ipam::Error| Error::Ipam { node: facts.name.clone(), source };
    let ipam = Ipam::new(writer.clone());
    let blocks = names::blocks(&flannel.network, block_size);
    for cidr in &blocks {
        ipam.claim(&facts.name, cidr).await.map_err(of_node)?;
    }
    ipam.assign_tunnel(&facts.name, &blocks, flannel.tunnel).await.map_err(of_node)?;
    let changes = annotation_changes(facts, flannel);
    if !changes.is_empty() {
        let nodes: Api<Node> = Api::all(writer.client.clone());
        let what = format!("annotate node {}", facts.name);
        // Keys of Calico's, of which nothing else is a writer yet: no precondition, so that a busy node can't starve it.
        writer.merge(what, &nodes, &facts.name, &json!({ "metadata": { "annotations": changes } })).await?;
        info!(node = facts.name, step = "prepare", tunnel = %flannel.tunnel, "node prepared for Calico");
    }
    Ok(())
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
