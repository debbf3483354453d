//! What Calico's IPAM holds for the nodes already, read at once and page by page, instead of by several calls for each node.

use std::collections::BTreeMap;

use ipnet::IpNet;
use kube::Client;
use serde::Deserialize;

use super::claim::CONFIRMED;
use super::family::Family;
use super::types::{BlockAffinity, BlockAffinitySpec, IPAMBlock, IPAMHandle, IpamBlockSpec, IpamHandleSpec};
use super::{block, names};
use crate::api::Result;
use crate::pages;

/// What is known of an object before it is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum There {
    /// It wasn't there: it is made without looking, which the API server refuses if it is there after all.
    No,
    /// It is as it must be: nothing is to be done.
    AsNeeded,
    /// It may be there, and may be otherwise: it is looked at.
    Perhaps,
}

/// What was there at one moment. Of one that was never read, everything may be there.
#[derive(Debug, Default)]
pub struct Stock {
    read: bool,
    /// By name, whether it is confirmed.
    affinities: BTreeMap<String, bool>,
    blocks: BTreeMap<IpNet, Block>,
    /// Of VXLAN devices: the only block with one address.
    handles: BTreeMap<String, Option<IpNet>>,
}

#[derive(Debug)]
struct Block {
    /// The node, if it is some node's and isn't being deleted.
    node: Option<String>,
    /// Whether its first address is that of the node's VXLAN device.
    device: bool,
}

#[derive(Deserialize)]
struct Named<S> {
    metadata: Metadata,
    spec: S,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
}

impl Stock {
    /// Reads it.
    pub async fn read(client: &Client) -> Result<Self> {
        let mut stock = Self { read: true, ..Self::default() };
        let take =
            |affinity: Named<BlockAffinitySpec>| stock.affinity(affinity.metadata.name, &affinity.spec);
        pages::each::<BlockAffinity, _>(client, "list Calico's block affinities", take).await?;
        let take = |block: Named<IpamBlockSpec>| stock.block(&block.spec);
        pages::each::<IPAMBlock, _>(client, "list Calico's blocks", take).await?;
        let take = |handle: Named<IpamHandleSpec>| stock.handle(handle.metadata.name, &handle.spec);
        pages::each::<IPAMHandle, _>(client, "list Calico's IPAM handles", take).await?;
        Ok(stock)
    }

    fn affinity(&mut self, name: String, spec: &BlockAffinitySpec) {
        self.affinities.insert(name, spec.state == CONFIRMED && spec.deleted != "true");
    }

    fn block(&mut self, spec: &IpamBlockSpec) {
        let Ok(cidr) = spec.cidr.parse::<IpNet>() else { return };
        let affinity = spec.affinity.as_deref().and_then(|affinity| affinity.strip_prefix("host:"));
        let node = affinity.filter(|_| !spec.deleted).map(str::to_owned);
        let first = block::owner(spec, cidr.network()).ok().flatten();
        let device = node.as_deref().is_some_and(|node| {
            let handle = names::tunnel_handle(node, Family::of_net(&cidr));
            first.and_then(|first| first.handle_id.as_ref()) == Some(&handle)
        });
        self.blocks.insert(cidr, Block { node, device });
    }

    fn handle(&mut self, name: String, spec: &IpamHandleSpec) {
        if ![Family::V4, Family::V6].iter().any(|family| name.starts_with(family.tunnel())) {
            return;
        }
        let mut blocks = spec.block.iter().filter(|_| !spec.deleted);
        let only = match (blocks.next(), blocks.next()) {
            (Some((cidr, 1)), None) => cidr.parse().ok(),
            _ => None,
        };
        self.handles.insert(name, only);
    }

    fn there<T>(&self, found: Option<T>, as_needed: impl FnOnce(T) -> bool) -> There {
        match found.map(as_needed) {
            Some(true) => There::AsNeeded,
            None if self.read => There::No,
            Some(false) | None => There::Perhaps,
        }
    }

    /// The affinity of a block of `node`.
    #[must_use]
    pub fn of_affinity(&self, node: &str, cidr: &IpNet) -> There {
        self.there(self.affinities.get(&names::affinity(node, cidr)), |confirmed| *confirmed)
    }

    /// A block of `node`; with `device`, its first address must be that of the VXLAN device, and the device's handle must say so.
    #[must_use]
    pub fn of_block(&self, node: &str, cidr: &IpNet, device: bool) -> There {
        let handle = || self.handles.get(&device_of(node, Family::of_net(cidr))) == Some(&Some(*cidr));
        self.there(self.blocks.get(cidr), |block| {
            block.node.as_deref() == Some(node) && (!device || block.device && handle())
        })
    }

    /// The handle of a VXLAN device of `node`, as far as it isn't there.
    #[must_use]
    pub fn of_handle(&self, node: &str, family: Family) -> There {
        self.there(self.handles.get(&device_of(node, family)), |_| false)
    }

    /// The blocks of each node, as far as they are in one of these networks.
    #[must_use]
    pub fn by_node(&self, networks: &[IpNet]) -> BTreeMap<&str, Vec<IpNet>> {
        let mut nodes: BTreeMap<&str, Vec<IpNet>> = BTreeMap::new();
        for (cidr, block) in &self.blocks {
            let within = networks.iter().any(|network| network.contains(cidr));
            if let Some(node) = block.node.as_deref().filter(|_| within) {
                nodes.entry(node).or_default().push(*cidr);
            }
        }
        nodes
    }
}

/// The name of the handle of a VXLAN device.
fn device_of(node: &str, family: Family) -> String {
    names::handle(&names::tunnel_handle(node, family))
}

#[cfg(test)]
mod tests {
    use super::super::block::Owner;
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn affinity(state: &str, deleted: &str) -> BlockAffinitySpec {
        BlockAffinitySpec { state: state.into(), deleted: deleted.into(), ..BlockAffinitySpec::default() }
    }

    fn with_device(cidr: &IpNet, node: &str) -> IpamBlockSpec {
        let mut spec = block::fresh(cidr, node, 1);
        let owner =
            Owner { handle: names::tunnel_handle(node, Family::of_net(cidr)), secondary: BTreeMap::new() };
        block::assign(&mut spec, cidr.network(), &owner).unwrap();
        spec
    }

    fn handle(block: &[(&str, i64)]) -> IpamHandleSpec {
        let block = block.iter().map(|(cidr, count)| ((*cidr).to_owned(), *count)).collect();
        IpamHandleSpec { block, ..IpamHandleSpec::default() }
    }

    #[test]
    fn what_was_never_read_is_looked_at() {
        let (stock, cidr) = (Stock::default(), net("10.0.0.0/26"));
        assert_eq!(stock.of_affinity("a", &cidr), There::Perhaps);
        assert_eq!(
            (stock.of_block("a", &cidr, true), stock.of_handle("a", Family::V4)),
            (There::Perhaps, There::Perhaps)
        );
    }

    #[test]
    fn only_what_is_as_needed_is_left_alone_and_only_what_was_absent_is_made_unseen() {
        let cidr = net("10.0.0.0/26");
        let mut stock = Stock { read: true, ..Stock::default() };
        assert_eq!(stock.of_affinity("a", &cidr), There::No);
        assert_eq!(
            (stock.of_block("a", &cidr, false), stock.of_handle("a", Family::V4)),
            (There::No, There::No)
        );
        for (state, deleted, there) in [
            ("pending", "false", There::Perhaps),
            ("confirmed", "true", There::Perhaps),
            ("confirmed", "false", There::AsNeeded),
        ] {
            stock.affinity("a-10-0-0-0-26".into(), &affinity(state, deleted));
            assert_eq!(stock.of_affinity("a", &cidr), there, "{state} {deleted}");
        }
        stock.block(&block::fresh(&cidr, "a", 1));
        assert_eq!(stock.of_block("a", &cidr, false), There::AsNeeded);
        assert_eq!(stock.of_block("a", &cidr, true), There::Perhaps, "its device has no address");
        assert_eq!(stock.of_block("b", &cidr, false), There::Perhaps, "it is another's");
        stock.block(&IpamBlockSpec { deleted: true, ..block::fresh(&cidr, "a", 1) });
        assert_eq!(stock.of_block("a", &cidr, false), There::Perhaps);
        stock.block(&with_device(&cidr, "a"));
        for (block, there) in [
            (&[][..], There::Perhaps),
            (&[("10.0.0.0/26", 2)], There::Perhaps),
            (&[("10.0.0.0/26", 1), ("10.0.0.64/26", 1)], There::Perhaps),
            (&[("10.0.0.64/26", 1)], There::Perhaps),
            (&[("10.0.0.0/26", 1)], There::AsNeeded),
        ] {
            stock.handle("vxlan-tunnel-addr-a".into(), &handle(block));
            assert_eq!(stock.of_block("a", &cidr, true), there, "{block:?}");
            assert_eq!(stock.of_handle("a", Family::V4), There::Perhaps);
        }
        assert_eq!(stock.of_block("a", &cidr, false), There::AsNeeded);
    }

    #[test]
    fn devices_of_both_families_have_handles_of_their_own() {
        let (v4, v6) = (net("10.0.0.0/26"), net("fd00::/122"));
        let mut stock = Stock { read: true, ..Stock::default() };
        stock.block(&with_device(&v4, "a"));
        stock.block(&with_device(&v6, "a"));
        stock.block(&block::fresh(&net("fd00::40/122"), "b", 1));
        stock.handle("vxlan-tunnel-addr-a".into(), &handle(&[("10.0.0.0/26", 1)]));
        assert_eq!(stock.of_block("a", &v4, true), There::AsNeeded);
        assert_eq!(
            (stock.of_block("a", &v6, true), stock.of_handle("a", Family::V6)),
            (There::Perhaps, There::No)
        );
        stock.handle("vxlan-v6-tunnel-addr-a".into(), &handle(&[("fd00::/122", 1)]));
        assert_eq!(stock.of_block("a", &v6, true), There::AsNeeded);
        let blocks = stock.by_node(&[net("fd00::/56")]);
        assert_eq!(blocks, BTreeMap::from([("a", vec![v6]), ("b", vec![net("fd00::40/122")])]));
    }
}
