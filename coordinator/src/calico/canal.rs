//! Canal: Calico's Felix runs beside flanneld in one pod, for policies only. It must not take over VXLAN while flanneld has it, and
//! its pool becomes the pool of the flannel network.

use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams};
use serde_json::json;
use tracing::info;

use super::names;
use super::prepare::{Pools, block_size_of, pool_differences};
use super::types::{FelixConfiguration, FelixConfigurationSpec, IPPool, IpPoolSpec};
use crate::api::{Result, Writer, found, post, read};

/// Annotation on a node's `FelixConfiguration`: VXLAN is switched off in it by the migration.
const HELD: &str = "flannel-migration/held";

/// Keeps Felix from making a VXLAN device on a node that is flannel's: the pool is VXLAN's soon, and flannel's device has the same
/// network identifier and port. A node's own configuration weighs more than the cluster's.
pub async fn hold(writer: &Writer, node: &str) -> Result<()> {
    let felix: Api<FelixConfiguration> = Api::all(writer.client.clone());
    let (name, what) = (names::felix_of(node), format!("keep Felix on node {node} from VXLAN"));
    match found(read(what.as_str(), felix.get(&name)).await)? {
        None => {
            let spec =
                FelixConfigurationSpec { vxlan_enabled: Some(false), ..FelixConfigurationSpec::default() };
            let mut held = FelixConfiguration::new(&name, spec);
            held.annotations_mut().insert(HELD.to_owned(), "true".to_owned());
            writer.write(what, felix.create(&post(), &held)).await?;
        }
        Some(now) if now.spec.vxlan_enabled == Some(false) => {}
        Some(now) => {
            let patch = json!({
                "metadata": { "resourceVersion": now.resource_version(), "annotations": { HELD: "true" } },
                "spec": { "vxlanEnabled": false },
            });
            writer.merge(what, &felix, &name, &patch).await?;
        }
    }
    Ok(())
}

/// Undoes [`hold`], before Calico's own pod comes to the node.
pub async fn release(writer: &Writer, node: &str) -> Result<()> {
    let felix: Api<FelixConfiguration> = Api::all(writer.client.clone());
    let (name, what) = (names::felix_of(node), format!("let Felix on node {node} have VXLAN"));
    let Some(now) = found(read(what.as_str(), felix.get(&name)).await)? else { return Ok(()) };
    if !now.annotations().contains_key(HELD) {
        return Ok(());
    }
    if is_ours_alone(&now.spec) {
        found(writer.write(what, felix.delete(&name, &DeleteParams::default())).await)?;
    } else {
        let patch = json!({
            "metadata": { "resourceVersion": now.resource_version(), "annotations": { HELD: null } },
            "spec": { "vxlanEnabled": null },
        });
        writer.merge(what, &felix, &name, &patch).await?;
    }
    Ok(())
}

fn is_ours_alone(spec: &FelixConfigurationSpec) -> bool {
    let ours = FelixConfigurationSpec { vxlan_enabled: Some(false), ..FelixConfigurationSpec::default() };
    *spec == ours
}

/// What becomes of the default pool that Canal made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It is as it must be.
    Stays,
    /// Network and block size fit; the rest can be changed.
    Changes,
    /// Network or block size can't be changed. Canal's pods have their addresses from host-local, so that nothing is in it.
    Goes,
}

fn fate(now: &IpPoolSpec, wanted: &IpPoolSpec) -> Fate {
    let never = |mode: &Option<String>| mode.as_deref().is_none_or(|mode| mode.is_empty() || mode == "Never");
    if now.cidr != wanted.cidr || block_size_of(now) != block_size_of(wanted) {
        Fate::Goes
    } else if pool_differences(now, wanted).is_empty() && never(&now.ipip_mode) {
        Fate::Stays
    } else {
        Fate::Changes
    }
}

/// Makes Canal's default pool the one that is needed, or makes room for it. Only while Calico runs nowhere by itself.
pub async fn pool(writer: &Writer, wanted: &Pools) -> Result<()> {
    let Some(wanted) = wanted.get(names::POOL) else { return Ok(()) };
    let pools: Api<IPPool> = Api::all(writer.client.clone());
    let what = "take over Canal's pool";
    let Some(now) = found(read(what, pools.get(names::POOL)).await)? else { return Ok(()) };
    match fate(&now.spec, wanted) {
        Fate::Stays => return Ok(()),
        Fate::Changes => {
            let patch = json!({
                "metadata": { "resourceVersion": now.resource_version() },
                "spec": {
                    "ipipMode": wanted.ipip_mode, "vxlanMode": wanted.vxlan_mode, "natOutgoing": wanted.nat_outgoing,
                    "nodeSelector": wanted.node_selector, "allowedUses": wanted.allowed_uses, "disabled": null,
                },
            });
            writer.merge(what, &pools, names::POOL, &patch).await?;
        }
        Fate::Goes => {
            found(writer.write(what, pools.delete(names::POOL, &DeleteParams::default())).await)?;
        }
    }
    info!(
        step = "pool",
        pool = names::POOL,
        was = now.spec.cidr,
        cidr = wanted.cidr,
        "Canal's pool taken over"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calico::prepare;

    #[test]
    fn canals_pool_is_changed_where_it_can_be_and_replaced_where_it_cannot() {
        let wanted = prepare::pool("10.244.0.0/16".parse().unwrap(), 26, true);
        assert_eq!(fate(&wanted, &wanted), Fate::Stays);
        let policy_only = IpPoolSpec {
            cidr: wanted.cidr.clone(),
            ipip_mode: Some("Always".to_owned()),
            nat_outgoing: Some(true),
            ..IpPoolSpec::default()
        };
        assert_eq!(fate(&policy_only, &wanted), Fate::Changes);
        assert_eq!(
            fate(&IpPoolSpec { ipip_mode: Some("Always".to_owned()), ..wanted.clone() }, &wanted),
            Fate::Changes
        );
        assert_eq!(
            fate(&IpPoolSpec { cidr: "192.168.0.0/16".to_owned(), ..wanted.clone() }, &wanted),
            Fate::Goes
        );
        assert_eq!(fate(&IpPoolSpec { block_size: Some(27), ..wanted.clone() }, &wanted), Fate::Goes);
    }

    #[test]
    fn a_configuration_with_settings_of_others_is_kept() {
        let ours = FelixConfigurationSpec { vxlan_enabled: Some(false), ..FelixConfigurationSpec::default() };
        assert!(is_ours_alone(&ours));
        let shared = FelixConfigurationSpec { vxlan_port: Some(4789), ..ours };
        assert!(!is_ours_alone(&shared));
    }
}
