//! Addresses that a node keeps for itself for a while: the bridge's, which connections from the node to its pods come from. Nobody else
//! may get them meanwhile.

use std::net::IpAddr;

use ipnet::IpNet;
use kube::api::ListParams;
use tracing::info;

use super::block::Owner;
use super::ipam::{Error, Ipam, attributes};
use super::names;
use crate::api::read;

impl Ipam {
    /// Reserves addresses for the node itself.
    pub async fn keep(&self, node: &str, blocks: &[IpNet], addresses: &[IpAddr]) -> Result<(), Error> {
        let secondary = attributes(&[("node", node), ("type", "bridgeAddress")]);
        let owner = Owner { handle: names::kept_handle(node), secondary };
        self.assign(node, blocks, addresses.iter().map(|address| (*address, owner.clone())).collect()).await
    }

    /// Gives all such addresses of all nodes back to Calico; also those that an earlier run left.
    pub async fn release_kept(&self) -> Result<(), Error> {
        let handles = read("list IPAM handles", self.handles.list(&ListParams::default())).await?.items;
        for handle in handles.iter().filter(|handle| handle.spec.handle_id.starts_with(names::KEPT)) {
            for cidr in handle.spec.block.keys().filter_map(|text| text.parse::<IpNet>().ok()) {
                self.release_in(&cidr, None, |other| other == handle.spec.handle_id).await?;
                self.handle(&handle.spec.handle_id, &cidr, 0).await?;
            }
            info!(step = "finish", handle = handle.spec.handle_id, "kept addresses are Calico's to give");
        }
        Ok(())
    }
}
