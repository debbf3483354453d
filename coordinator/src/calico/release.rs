//! Giving addresses back to Calico.

use ipnet::IpNet;
use kube::api::ListParams;
use tracing::warn;

use super::ipam::{Error, Ipam};
use super::{block, names};
use crate::api::{CONFLICT_RETRIES, found, post, read};

impl Ipam {
    /// Takes back all addresses of pods, and those kept, of a node that isn't Calico's any more; how many. The blocks stay the node's.
    pub async fn release_pods(&self, node: &str, blocks: &[IpNet]) -> Result<usize, Error> {
        let is_pod = |handle: &str| {
            handle.starts_with(&format!("{}.", names::CNI_NETWORK)) || handle == names::kept_handle(node)
        };
        let mut released = 0;
        for cidr in blocks {
            released += self.release_in(cidr, Some(node), is_pod).await?;
        }
        // All handles, not only those just released: an earlier try may have ended between block and handle.
        let what = format!("list IPAM handles of node {node}");
        for handle in read(what, self.handles.list(&ListParams::default())).await?.items {
            for cidr in blocks.iter().filter(|cidr| {
                is_pod(&handle.spec.handle_id) && handle.spec.block.contains_key(&cidr.to_string())
            }) {
                self.handle(&handle.spec.handle_id, cidr, 0).await?;
            }
        }
        Ok(released)
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
