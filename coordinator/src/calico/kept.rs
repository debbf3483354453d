//! Addresses that a node keeps for itself for a while: the bridge's, which connections from the node to its pods come from. Nobody else
//! may get them meanwhile.

use ipnet::IpNet;
use tracing::info;

use super::block::Owner;
use super::ipam::{Error, Ipam, attributes};
use super::names;
use super::stock::There;

/// Whose the addresses are that `node` keeps for itself.
pub(super) fn owner(node: &str) -> Owner {
    let secondary = attributes(&[("node", node), ("type", "bridgeAddress")]);
    Owner { handle: names::kept_handle(node), secondary }
}

impl Ipam {
    /// Gives all such addresses of all nodes back to Calico; also those that an earlier run left.
    pub async fn release_kept(&self) -> Result<(), Error> {
        for handle in self.handles_that(|handle| handle.handle_id.starts_with(names::KEPT)).await? {
            for cidr in handle.block.keys().filter_map(|text| text.parse::<IpNet>().ok()) {
                self.release_in(&cidr, None, |other| other == handle.handle_id).await?;
                self.handle(&handle.handle_id, &cidr, 0, There::Perhaps).await?;
            }
            info!(step = "finish", handle = handle.handle_id, "kept addresses are Calico's to give");
        }
        Ok(())
    }
}
