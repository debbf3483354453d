//! Writing addresses into blocks, and handles: read, compare, write with the version that was read.

use std::collections::BTreeMap;
use std::net::IpAddr;

use flannel_migration_protocol::Adopted;
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use ipnet::IpNet;
use jiff::Timestamp;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, Preconditions};
use tracing::debug;

use super::block::{self, Owner};
use super::stock::There;
use super::types::{BlockAffinity, IPAMBlock, IPAMHandle, IpamHandleSpec};
use super::{kept, names};
use crate::api::{self, CONFLICT_RETRIES, Writer, found, post, read};

/// A node's pods have a handle each.
const HANDLES_AT_ONCE: usize = 8;

/// Why IPAM can't be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call failed.
    #[error(transparent)]
    Api(#[from] api::Error),
    /// A block doesn't allow it.
    #[error(transparent)]
    Block(#[from] block::Error),
    /// A block of the node's network is another's.
    #[error("block {block} belongs to {owner}, not to {node}")]
    NotOurs {
        /// The block.
        block: String,
        /// The other's affinity.
        owner: String,
        /// The node.
        node: String,
    },
    /// Nothing prepared holds the address.
    #[error("no block of node {node} holds {address}")]
    NoBlock {
        /// The address.
        address: IpAddr,
        /// The node.
        node: String,
    },
    /// Somebody else writes all the time.
    #[error("{0} keeps changing")]
    Contended(String),
}

impl Error {
    /// `CamelCase`, for events.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Api(error) => error.reason(),
            Self::Block(block::Error::Taken { .. }) => "AddressTaken",
            Self::Block(_) => "BlockUnusable",
            Self::NotOurs { .. } => "BlockOfAnotherNode",
            Self::NoBlock { .. } => "AddressOutsideBlocks",
            Self::Contended(_) => "Contended",
        }
    }
}

/// Calico's IPAM.
#[derive(Clone)]
pub struct Ipam {
    pub(super) writer: Writer,
    pub(super) blocks: Api<IPAMBlock>,
    pub(super) affinities: Api<BlockAffinity>,
    pub(super) handles: Api<IPAMHandle>,
}

impl Ipam {
    /// Through this client.
    #[must_use]
    pub fn new(writer: Writer) -> Self {
        let client = writer.client.clone();
        Self {
            writer,
            blocks: Api::all(client.clone()),
            affinities: Api::all(client.clone()),
            handles: Api::all(client),
        }
    }

    /// Deletes an object as it was read: also one whose deletion somebody else began by marking it, as Calico's readers do.
    pub(super) async fn remove<K>(&self, what: &str, api: &Api<K>, object: &K) -> api::Result<()>
    where
        K: kube::Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
    {
        let preconditions = Preconditions { uid: object.uid(), resource_version: object.resource_version() };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        found(self.writer.write(what, api.delete(&object.name_any(), &params)).await)?;
        Ok(())
    }

    /// Registers addresses of adopted pods as Calico's CNI plugin would have, so that CNI DEL releases them, and reserves those that the
    /// node keeps for itself: one write for each block that holds any.
    pub async fn register(
        &self,
        node: &str,
        blocks: &[IpNet],
        pods: &[Adopted],
        kept: &[IpAddr],
    ) -> Result<(), Error> {
        let timestamp = go_time(Timestamp::now());
        let of_pods = pods.iter().flat_map(|pod| {
            let secondary = attributes(&[
                ("namespace", &pod.namespace),
                ("node", node),
                ("pod", &pod.pod),
                ("timestamp", &timestamp),
            ]);
            let owner = Owner { handle: names::pod_handle(&pod.sandbox), secondary };
            pod.ip.iter().map(move |address| (*address, owner.clone()))
        });
        let kept = kept.iter().map(|address| (*address, kept::owner(node)));
        self.assign(node, blocks, of_pods.chain(kept).collect()).await
    }

    /// Gives addresses to their owners, one write per block; what is given already isn't written again.
    async fn assign(&self, node: &str, blocks: &[IpNet], wanted: Vec<(IpAddr, Owner)>) -> Result<(), Error> {
        let mut by_block: BTreeMap<IpNet, Vec<(IpAddr, Owner)>> = BTreeMap::new();
        for (address, owner) in wanted {
            let block = blocks
                .iter()
                .find(|block| block.contains(&address))
                .ok_or_else(|| Error::NoBlock { address, node: node.to_owned() })?;
            by_block.entry(*block).or_default().push((address, owner));
        }
        for (cidr, wanted) in by_block {
            self.assign_in(node, &cidr, &wanted).await?;
        }
        Ok(())
    }

    pub(super) async fn assign_in(
        &self,
        node: &str,
        cidr: &IpNet,
        wanted: &[(IpAddr, Owner)],
    ) -> Result<(), Error> {
        let what = format!("register {} addresses in block {cidr} of node {node}", wanted.len());
        for _ in 0..CONFLICT_RETRIES {
            let mut object = read(what.as_str(), self.blocks.get(&names::block(cidr))).await?;
            if object.spec.affinity.as_deref() != Some(&block::affinity(node)) {
                let owner = object.spec.affinity.unwrap_or_else(|| "nobody".to_owned());
                return Err(Error::NotOurs { block: cidr.to_string(), owner, node: node.to_owned() });
            }
            let mut changed = false;
            let mut handles = BTreeMap::new();
            for (address, owner) in wanted {
                let new = block::assign(&mut object.spec, *address, owner)?;
                changed |= new;
                // Who gets an address now had none before, as a rule.
                handles.insert(&owner.handle, if new { There::No } else { There::Perhaps });
            }
            // Handles before the block, as Calico has it; with what the block will hold, so that a repetition counts nothing twice.
            let writes = handles.into_iter().map(|(handle, there)| {
                let count = count(&object, handle);
                async move { self.handle(handle, cidr, count, there).await }
            });
            stream::iter(writes.collect::<Vec<_>>())
                .buffer_unordered(HANDLES_AT_ONCE)
                .try_collect::<()>()
                .await?;
            if !changed {
                return Ok(());
            }
            object.spec.sequence_number = object.spec.sequence_number.wrapping_add(1);
            match self
                .writer
                .write(what.as_str(), self.blocks.replace(&names::block(cidr), &post(), &object))
                .await
            {
                Ok(_) => return Ok(()),
                Err(error) if error.is_conflict() => debug!(block = %cidr, "block changed; looking again"),
                Err(error) => return Err(error.into()),
            }
        }
        Err(Error::Contended(what))
    }

    /// Sets how many addresses a handle has in a block; none left: removes it.
    pub(super) async fn handle(
        &self,
        handle: &str,
        cidr: &IpNet,
        count: i64,
        mut there: There,
    ) -> Result<(), Error> {
        let name = names::handle(handle);
        let what = format!("write IPAM handle {handle}");
        for _ in 0..CONFLICT_RETRIES {
            let now = match std::mem::replace(&mut there, There::Perhaps) {
                There::No => None,
                _ => found(read(what.as_str(), self.handles.get(&name)).await)?,
            };
            let written = match now {
                None if count == 0 => return Ok(()),
                None => {
                    let block = BTreeMap::from([(cidr.to_string(), count)]);
                    let new = IPAMHandle::new(
                        &name,
                        IpamHandleSpec { handle_id: handle.to_owned(), block, ..IpamHandleSpec::default() },
                    );
                    self.writer.write(what.as_str(), self.handles.create(&post(), &new)).await.map(|_| true)
                }
                Some(old) if old.spec.deleted => {
                    self.remove(&what, &self.handles, &old).await.map(|()| false)
                }
                Some(old) if old.spec.block.get(&cidr.to_string()).copied().unwrap_or(0) == count => {
                    return Ok(());
                }
                Some(mut old) => {
                    if count == 0 {
                        old.spec.block.remove(&cidr.to_string());
                    } else {
                        old.spec.block.insert(cidr.to_string(), count);
                    }
                    if old.spec.block.is_empty() {
                        // At once: Calico marks it first, for its deletions know no version.
                        self.remove(&what, &self.handles, &old).await.map(|()| true)
                    } else {
                        let post = post();
                        let replace = self.handles.replace(&name, &post, &old);
                        self.writer.write(what.as_str(), replace).await.map(|_| true)
                    }
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
}

fn count(block: &IPAMBlock, handle: &str) -> i64 {
    let is = |index: &usize| {
        block
            .spec
            .attributes
            .get(*index)
            .is_some_and(|attributes| attributes.handle_id.as_deref() == Some(handle))
    };
    i64::try_from(block.spec.allocations.iter().flatten().filter(|index| is(index)).count())
        .unwrap_or(i64::MAX)
}

pub(super) fn attributes(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// Go's `time.Time.String()` of a time in UTC, which Calico's plugin stores.
fn go_time(time: Timestamp) -> String {
    let text = time.strftime("%Y-%m-%d %H:%M:%S.%9f").to_string();
    let text = text.trim_end_matches('0').trim_end_matches('.');
    format!("{text} +0000 UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_as_calicos_plugin_writes_them() {
        for (time, text) in [
            ("2026-01-02T03:04:05.123456789Z", "2026-01-02 03:04:05.123456789 +0000 UTC"),
            ("2026-01-02T03:04:05.120000000Z", "2026-01-02 03:04:05.12 +0000 UTC"),
            ("2026-01-02T03:04:50Z", "2026-01-02 03:04:50 +0000 UTC"),
        ] {
            assert_eq!(go_time(time.parse().unwrap()), text);
        }
    }
}
