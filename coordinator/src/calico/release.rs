//! Giving addresses back to Calico.

use std::collections::BTreeSet;

use ipnet::IpNet;
use serde::Deserialize;
use tracing::warn;

use super::ipam::{Error, Ipam};
use super::stock::There;
use super::types::{IPAMHandle, IpamHandleSpec};
use super::{block, names};
use crate::api::{CONFLICT_RETRIES, found, post, read};
use crate::pages;

impl Ipam {
    /// Takes back all addresses of pods, and those kept, in the `shares` of a node that isn't Calico's any more; how many. The blocks stay
    /// the node's.
    ///
    /// `blocks` are looked at in any case, and all that handles name. These are written before blocks and taken back after, so that they
    /// name every block that holds an address.
    pub async fn release_pods(&self, node: &str, shares: &[IpNet], blocks: &[IpNet]) -> Result<usize, Error> {
        let is_pod = |handle: &str| {
            handle.starts_with(&format!("{}.", names::CNI_NETWORK)) || handle == names::kept_handle(node)
        };
        let within = |text: &String| {
            let cidr = text.parse::<IpNet>().ok();
            cidr.filter(|cidr| shares.iter().any(|share| share.contains(cidr)))
        };
        let theirs = |handle: &IpamHandleSpec| {
            is_pod(&handle.handle_id) && handle.block.keys().any(|cidr| within(cidr).is_some())
        };
        let handles = self.handles_that(theirs).await?;
        let named = handles.iter().flat_map(|handle| handle.block.keys().filter_map(within));
        let blocks: BTreeSet<IpNet> = named.chain(blocks.iter().copied()).collect();
        let mut released = 0;
        for cidr in &blocks {
            released += self.release_in(cidr, Some(node), is_pod).await?;
        }
        for handle in &handles {
            for cidr in handle.block.keys().filter_map(within) {
                self.handle(&handle.handle_id, &cidr, 0, There::Perhaps).await?;
            }
        }
        Ok(released)
    }

    /// The handles of which that holds.
    pub(super) async fn handles_that(
        &self,
        holds: impl Fn(&IpamHandleSpec) -> bool,
    ) -> Result<Vec<IpamHandleSpec>, Error> {
        #[derive(Deserialize)]
        struct Handle {
            spec: IpamHandleSpec,
        }
        let mut handles = Vec::new();
        let take = |handle: Handle| handles.extend(Some(handle.spec).filter(|spec| holds(spec)));
        pages::each::<IPAMHandle, _>(&self.writer.client, "list IPAM handles", take).await?;
        Ok(handles)
    }

    /// Frees the addresses of a block whose handles are `theirs`; how many. With `node`, only while the block is that node's.
    pub(super) async fn release_in(
        &self,
        cidr: &IpNet,
        node: Option<&str>,
        theirs: impl Fn(&str) -> bool,
    ) -> Result<usize, Error> {
        let (name, what) = (names::block(cidr), format!("release addresses of block {cidr}"));
        for _ in 0..CONFLICT_RETRIES {
            let Some(mut object) = found(read(what.as_str(), self.blocks.get(&name)).await)? else {
                return Ok(0);
            };
            if let Some(node) = node
                && object.spec.affinity.as_deref() != Some(&block::affinity(node))
            {
                warn!(node, block = %cidr, "not this node's block; left alone");
                return Ok(0);
            }
            let gone = block::release(&mut object.spec, &theirs).len();
            if gone == 0 {
                return Ok(0);
            }
            object.spec.sequence_number = object.spec.sequence_number.wrapping_add(1);
            match self.writer.write(what.as_str(), self.blocks.replace(&name, &post(), &object)).await {
                Ok(_) => return Ok(gone),
                Err(error) if error.is_conflict() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Error::Contended(what))
    }
}
