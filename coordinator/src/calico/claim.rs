//! Making networks blocks of a node, and taking them back.

use std::net::IpAddr;

use ipnet::IpNet;
use jiff::Timestamp;
use tracing::warn;

use super::block::{self, Owner};
use super::family::Family;
use super::ipam::{Error, Ipam, attributes};
use super::names;
use super::stock::{Stock, There};
use super::types::{BlockAffinity, BlockAffinitySpec, IPAMBlock};
use crate::api::{CONFLICT_RETRIES, found, post, read};

impl Ipam {
    /// Makes `blocks` blocks of `node`, and `tunnel` in one of them the address of its VXLAN device. What is so already isn't written
    /// again; a try that ended anywhere is completed by the next one.
    ///
    /// Calico makes an affinity that is pending, then the block, then confirms the affinity: two nodes may want the same block, and by
    /// what is pending it is known whose turn it is to tidy up. Here the block comes first, and an affinity is never there without it. A
    /// block is named by its network, so that only one can make it, and whoever finds that it is another's has made nothing. To end in
    /// between leaves a block without affinity: it is the node's, routed there, and gives no address out, for Calico's pod comes to the
    /// node only by its label, which is written after all of this.
    pub async fn claim(
        &self,
        node: &str,
        blocks: &[IpNet],
        tunnel: IpAddr,
        stock: &Stock,
    ) -> Result<(), Error> {
        if !blocks.iter().any(|cidr| cidr.contains(&tunnel)) {
            return Err(Error::NoBlock { address: tunnel, node: node.to_owned() });
        }
        self.claim_each(node, blocks, Some(tunnel), stock).await
    }

    /// The same for blocks without a device: those of more addresses of pods.
    pub async fn claim_more(&self, node: &str, blocks: &[IpNet]) -> Result<(), Error> {
        self.claim_each(node, blocks, None, &Stock::default()).await
    }

    async fn claim_each(
        &self,
        node: &str,
        blocks: &[IpNet],
        tunnel: Option<IpAddr>,
        stock: &Stock,
    ) -> Result<(), Error> {
        for cidr in blocks {
            let tunnel = tunnel.filter(|tunnel| cidr.contains(tunnel));
            let device = tunnel.map(|tunnel| (tunnel, device(node, Family::of(tunnel))));
            match stock.of_block(node, cidr, device.is_some()) {
                There::AsNeeded => {}
                there => {
                    let handle = stock.of_handle(node, Family::of_net(cidr));
                    self.block(node, cidr, device, there, handle).await?;
                }
            }
            match stock.of_affinity(node, cidr) {
                There::AsNeeded => {}
                there => self.affinity(node, cidr, there).await?,
            }
        }
        Ok(())
    }

    /// Sees that the block is there and the node's, with the address of the device.
    async fn block(
        &self,
        node: &str,
        cidr: &IpNet,
        device: Option<(IpAddr, Owner)>,
        mut there: There,
        handle: There,
    ) -> Result<(), Error> {
        let name = names::block(cidr);
        let what = format!("create block {cidr} of node {node}");
        for _ in 0..CONFLICT_RETRIES {
            let now = match std::mem::replace(&mut there, There::Perhaps) {
                There::No => None,
                _ => found(read(what.as_str(), self.blocks.get(&name)).await)?,
            };
            let written = match now {
                None => {
                    let sequence = u64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(0);
                    let mut fresh = block::fresh(cidr, node, sequence);
                    if let Some((address, owner)) = &device {
                        // As if made and then written once more; the handle first, as Calico has it.
                        block::assign(&mut fresh, *address, owner)?;
                        fresh.sequence_number = fresh.sequence_number.wrapping_add(1);
                        self.handle(&owner.handle, cidr, 1, handle).await?;
                    }
                    let fresh = IPAMBlock::new(&name, fresh);
                    self.writer.write(what.as_str(), self.blocks.create(&post(), &fresh)).await.map(|_| true)
                }
                Some(old) if old.spec.deleted => self.remove(&what, &self.blocks, &old).await.map(|()| false),
                Some(old) if old.spec.affinity.as_deref() == Some(&block::affinity(node)) => {
                    return match device {
                        Some(device) => self.assign_in(node, cidr, &[device]).await,
                        None => Ok(()),
                    };
                }
                Some(old) => {
                    let owner = old.spec.affinity.unwrap_or_else(|| "nobody".to_owned());
                    return Err(Error::NotOurs { block: cidr.to_string(), owner, node: node.to_owned() });
                }
            };
            match written {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) if error.is_conflict() || error.is_already_exists() || error.is_not_found() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Error::Contended(what))
    }

    /// Sees that the affinity is there and confirmed. The block must be the node's.
    async fn affinity(&self, node: &str, cidr: &IpNet, mut there: There) -> Result<(), Error> {
        let name = names::affinity(node, cidr);
        let what = format!("claim block {cidr} for node {node}");
        for _ in 0..CONFLICT_RETRIES {
            let now = match std::mem::replace(&mut there, There::Perhaps) {
                There::No => None,
                _ => found(read(what.as_str(), self.affinities.get(&name)).await)?,
            };
            let written = match now {
                None => {
                    let spec = BlockAffinitySpec {
                        cidr: cidr.to_string(),
                        node: node.to_owned(),
                        state: CONFIRMED.to_owned(),
                        deleted: "false".to_owned(),
                        kind: Some("host".to_owned()),
                        ..BlockAffinitySpec::default()
                    };
                    let mut affinity = BlockAffinity::new(&name, spec);
                    affinity.metadata.labels = Some(names::affinity_labels(node, Family::of_net(cidr)));
                    let post = post();
                    let create = self.affinities.create(&post, &affinity);
                    self.writer.write(what.as_str(), create).await.map(|_| true)
                }
                Some(old) if old.spec.deleted == "true" => {
                    self.remove(&what, &self.affinities, &old).await.map(|()| false)
                }
                Some(old) if old.spec.state == CONFIRMED => return Ok(()),
                Some(mut old) => {
                    CONFIRMED.clone_into(&mut old.spec.state);
                    let post = post();
                    let replace = self.affinities.replace(&name, &post, &old);
                    self.writer.write(what.as_str(), replace).await.map(|_| true)
                }
            };
            match written {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) if error.is_conflict() || error.is_already_exists() || error.is_not_found() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Error::Contended(what))
    }

    /// Takes a block back that [`Ipam::claim`] made and nobody uses any more, with the address of the VXLAN device in it.
    pub async fn disclaim(&self, node: &str, cidr: &IpNet) -> Result<(), Error> {
        let what = format!("take block {cidr} of node {node} back");
        let tunnel = names::tunnel_handle(node, Family::of_net(cidr));
        if let Some(block) = found(read(what.as_str(), self.blocks.get(&names::block(cidr))).await)? {
            let ours = block.spec.affinity.as_deref() == Some(&block::affinity(node));
            let handles = block.spec.attributes.iter().map(|attributes| attributes.handle_id.as_deref());
            if !ours || handles.into_iter().any(|handle| handle != Some(&tunnel)) {
                warn!(node, block = %cidr, "in use by others; left alone");
                return Ok(());
            }
            self.remove(&what, &self.blocks, &block).await?;
        }
        self.handle(&tunnel, cidr, 0, There::Perhaps).await?;
        if let Some(affinity) =
            found(read(what.as_str(), self.affinities.get(&names::affinity(node, cidr))).await)?
        {
            self.remove(&what, &self.affinities, &affinity).await?;
        }
        Ok(())
    }
}

/// The state of an affinity that counts.
pub(super) const CONFIRMED: &str = "confirmed";

/// Whose the address of the VXLAN device of `node` is.
fn device(node: &str, family: Family) -> Owner {
    let secondary = attributes(&[("node", node), ("type", family.tunnel_type())]);
    Owner { handle: names::tunnel_handle(node, family), secondary }
}

#[cfg(test)]
#[path = "claim_tests.rs"]
mod tests;
