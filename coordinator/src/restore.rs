//! The end of a rollback of the whole cluster: what was prepared for Calico is taken back, and flannel's pods need no label any more.
//! Each step looks first, so that it can be repeated at any point. The agents' keys stay the agents'.

use std::collections::BTreeSet;

use flannel_migration_protocol::keys;
use ipnet::IpNet;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams};
use serde_json::{Map, Value, json};
use tracing::info;

use crate::api::{Result, Writer, found, read};
use crate::calico::prepare::Pools;
use crate::calico::stock::Stock;
use crate::calico::types::{FelixConfiguration, IPPool};
use crate::calico::{ipam, names, prepare};
use crate::cluster::Node;
use crate::node::{Error, Steps};
use crate::{images, selectors};

/// Keys of the coordinator's on nodes.
const NODE_KEYS: [&str; 5] = [keys::NETWORK, keys::LEASE, keys::GRANT, keys::CORDONED, keys::FAILURES];

// Also Calico's, that it wrote there.
fn is_taken_back(key: &str) -> bool {
    NODE_KEYS.contains(&key) || names::ON_NODES.contains(&key)
}

/// Takes everything back. Every node must be flannel's.
pub async fn restore(steps: &Steps, pools: &Pools) -> Result<(), Error> {
    let writer = &steps.writer;
    images::remove(writer, &steps.settings.calico.daemon_set.namespace).await?;
    selectors::free_flannel(writer, &steps.settings.flannel.daemon_set).await?;
    calico(steps, pools).await?;
    let ipam = ipam::Ipam::new(writer.clone());
    // Those of IPv6 are where the pods' addresses were.
    let stock =
        if steps.settings.dual_stack() { Stock::read(&writer.client).await? } else { Stock::default() };
    let there = stock.by_node(steps.settings.networks());
    // Last, and each node's label after its blocks: by the labels a coordinator that comes back knows that this isn't over.
    for node in steps.nodes.all().iter() {
        let more = there.get(node.name.as_str()).into_iter().flatten().copied();
        let blocks: BTreeSet<IpNet> = steps.blocks(node).into_iter().chain(more).collect();
        ipam.release_pods(&node.name, &node.pod_cidrs, &[]).await?;
        for block in &blocks {
            ipam.disclaim(&node.name, block).await?;
        }
        clean(writer, &node.name).await?;
    }
    info!(step = "restore", "the cluster is flannel's as before; what Calico was given is taken back");
    Ok(())
}

async fn clean(writer: &Writer, node: &str) -> Result<()> {
    let nodes: Api<Node> = Api::all(writer.client.clone());
    let what = format!("clean node {node}");
    let Some(now) = found(read(what.as_str(), nodes.get(node)).await)? else { return Ok(()) };
    let gone = |present: &mut dyn Iterator<Item = &String>| -> Map<String, Value> {
        present.filter(|key| is_taken_back(key)).map(|key| (key.clone(), Value::Null)).collect()
    };
    let (labels, annotations) = (gone(&mut now.labels().keys()), gone(&mut now.annotations().keys()));
    if labels.is_empty() && annotations.is_empty() {
        return Ok(());
    }
    let patch = json!({ "metadata": { "labels": labels, "annotations": annotations } });
    found(writer.merge(what, &nodes, node, &patch).await)?;
    Ok(())
}

/// The pools and Felix's VXLAN settings, as far as they are what the preparation makes.
async fn calico(steps: &Steps, wanted: &Pools) -> Result<()> {
    let writer = &steps.writer;
    let pools: Api<IPPool> = Api::all(writer.client.clone());
    for (name, wanted) in wanted {
        let pool = found(read("read Calico's pool", pools.get(name)).await)?;
        if pool.is_some_and(|pool| prepare::pool_differences(&pool.spec, wanted).is_empty()) {
            let params = DeleteParams::default();
            found(writer.write("delete Calico's pool", pools.delete(name, &params)).await)?;
        }
    }
    let felix: Api<FelixConfiguration> = Api::all(writer.client.clone());
    let what = "take Felix's VXLAN settings back";
    let Some(now) = found(read(what, felix.get(names::FELIX)).await)? else { return Ok(()) };
    let facts = &steps.settings.flannel_facts;
    let ours = [
        ("vxlanVNI", now.spec.vxlan_vni == Some(facts.vni)),
        ("vxlanPort", now.spec.vxlan_port == Some(facts.port)),
        ("vxlanMTU", now.spec.vxlan_mtu == Some(facts.mtu)),
    ];
    let gone: Map<String, Value> =
        ours.into_iter().filter(|(_, ours)| *ours).map(|(key, _)| (key.to_owned(), Value::Null)).collect();
    if !gone.is_empty() {
        writer.merge(what, &felix, names::FELIX, &json!({ "spec": gone })).await?;
    }
    Ok(())
}
