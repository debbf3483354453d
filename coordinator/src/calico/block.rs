//! Giving out and taking back addresses of a block, as Calico's IPAM does it. Pure.
//!
//! Compare libcalico-go/lib/ipam/ipam_block.go. The sequence number stored with an allocation is the block's before the write.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::types::{Attributes, IpamBlockSpec};

/// Whose an address is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The handle by which it is released.
    pub handle: String,
    /// node, namespace, pod, timestamp, type.
    pub secondary: BTreeMap<String, String>,
}

/// Why an address can't be given out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not this block's.
    #[error("{address} is not in block {block}")]
    Outside {
        /// The address.
        address: IpAddr,
        /// The block.
        block: String,
    },
    /// Somebody else's.
    #[error("{address} belongs to {owner}")]
    Taken {
        /// The address.
        address: IpAddr,
        /// The other's handle.
        owner: String,
    },
    /// The object contradicts itself or its schema.
    #[error("block {block} is damaged: {why}")]
    Damaged {
        /// The block.
        block: String,
        /// How.
        why: String,
    },
}

/// A fresh block of a node. `sequence_number`: nanoseconds since 1970, so that a block made anew continues higher.
#[must_use]
pub fn fresh(cidr: &IpNet, node: &str, sequence_number: u64) -> IpamBlockSpec {
    let size = size(cidr);
    IpamBlockSpec {
        cidr: cidr.to_string(),
        affinity: Some(affinity(node)),
        allocations: vec![None; size],
        unallocated: (0..size).collect(),
        sequence_number,
        ..IpamBlockSpec::default()
    }
}

/// The affinity's text in a block.
#[must_use]
pub fn affinity(node: &str) -> String {
    format!("host:{node}")
}

fn size(cidr: &IpNet) -> usize {
    1_usize << (cidr.max_prefix_len() - cidr.prefix_len()).min(16)
}

/// The ordinal of an address in a block.
pub fn ordinal(block: &IpamBlockSpec, address: IpAddr) -> Result<usize, Error> {
    let outside = || Error::Outside { address, block: block.cidr.clone() };
    let cidr: IpNet = block.cidr.parse().map_err(|_| damaged(block, "its cidr can't be read"))?;
    if !cidr.contains(&address) {
        return Err(outside());
    }
    let distance = match (address, cidr.network()) {
        (IpAddr::V4(address), IpAddr::V4(base)) => u128::from(u32::from(address) - u32::from(base)),
        (IpAddr::V6(address), IpAddr::V6(base)) => u128::from(address) - u128::from(base),
        _ => return Err(outside()),
    };
    usize::try_from(distance)
        .ok()
        .filter(|ordinal| *ordinal < block.allocations.len())
        .ok_or_else(|| damaged(block, "it has too few allocations"))
}

fn damaged(block: &IpamBlockSpec, why: &str) -> Error {
    Error::Damaged { block: block.cidr.clone(), why: why.to_owned() }
}

/// Who has an address.
pub fn owner(block: &IpamBlockSpec, address: IpAddr) -> Result<Option<&Attributes>, Error> {
    let Some(index) = block.allocations.get(ordinal(block, address)?).copied().flatten() else {
        return Ok(None);
    };
    block.attributes.get(index).map(Some).ok_or_else(|| damaged(block, "an allocation has no attributes"))
}

/// Gives `address` to `owner`. `Ok(false)`: it has it already, and the block is unchanged.
pub fn assign(block: &mut IpamBlockSpec, address: IpAddr, new: &Owner) -> Result<bool, Error> {
    if let Some(attributes) = owner(block, address)? {
        let handle = attributes.handle_id.clone().unwrap_or_default();
        return if handle == new.handle { Ok(false) } else { Err(Error::Taken { address, owner: handle }) };
    }
    let ordinal = ordinal(block, address)?;
    let attributes = Attributes {
        handle_id: Some(new.handle.clone()),
        secondary: Some(new.secondary.clone()),
        ..Attributes::default()
    };
    let index = block.attributes.iter().position(|known| *known == attributes).unwrap_or_else(|| {
        block.attributes.push(attributes);
        block.attributes.len() - 1
    });
    if let Some(slot) = block.allocations.get_mut(ordinal) {
        *slot = Some(index);
    }
    block.unallocated.retain(|free| *free != ordinal);
    block.sequence_number_for_allocation.insert(ordinal.to_string(), block.sequence_number);
    Ok(true)
}

/// Takes back all addresses whose handle `goes`; the handles and how many addresses each had.
pub fn release(block: &mut IpamBlockSpec, goes: impl Fn(&str) -> bool) -> BTreeMap<String, i64> {
    let going: Vec<bool> = block
        .attributes
        .iter()
        .map(|attributes| attributes.handle_id.as_deref().is_some_and(&goes))
        .collect();
    let mut released = BTreeMap::new();
    // The attributes that stay, under their new index.
    let mut next = 0;
    let renumbered: Vec<Option<usize>> = going
        .iter()
        .map(|goes| {
            (!goes).then(|| {
                next += 1;
                next - 1
            })
        })
        .collect();
    for (ordinal, slot) in block.allocations.iter_mut().enumerate() {
        let Some(index) = *slot else { continue };
        *slot = renumbered.get(index).copied().flatten();
        if slot.is_none() {
            block.unallocated.push(ordinal);
            block.sequence_number_for_allocation.remove(&ordinal.to_string());
            let handle = block
                .attributes
                .get(index)
                .and_then(|attributes| attributes.handle_id.clone())
                .unwrap_or_default();
            *released.entry(handle).or_insert(0) += 1;
        }
    }
    let mut going = going.into_iter();
    block.attributes.retain(|_| !going.next().unwrap_or(false));
    released
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn owner_of(handle: &str) -> Owner {
        Owner { handle: handle.into(), secondary: BTreeMap::from([("node".to_owned(), "a".to_owned())]) }
    }

    fn block() -> IpamBlockSpec {
        fresh(&"10.244.1.0/26".parse().unwrap(), "a", 1000)
    }

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 244, 1, last])
    }

    /// What `calicoctl ipam check` and Calico's own code rely on.
    fn consistent(block: &IpamBlockSpec) {
        let mut free = block.unallocated.clone();
        free.sort_unstable();
        let expected: Vec<_> =
            (0..block.allocations.len()).filter(|ordinal| block.allocations[*ordinal].is_none()).collect();
        assert_eq!(free, expected);
        for (ordinal, slot) in block.allocations.iter().enumerate() {
            assert_eq!(
                slot.is_some(),
                block.sequence_number_for_allocation.contains_key(&ordinal.to_string())
            );
            assert!(slot.is_none_or(|index| index < block.attributes.len()));
        }
        for index in 0..block.attributes.len() {
            assert!(block.allocations.contains(&Some(index)), "attributes {index} belong to nobody");
        }
    }

    #[test]
    fn a_fresh_block_is_all_free() {
        let block = block();
        assert_eq!((block.allocations.len(), block.unallocated.len()), (64, 64));
        assert_eq!(block.affinity.as_deref(), Some("host:a"));
        consistent(&block);
    }

    #[test]
    fn the_tunnel_address_is_stored_as_calico_stores_it() {
        let mut block = block();
        assert_eq!(assign(&mut block, address(0), &owner_of("vxlan-tunnel-addr-a")), Ok(true));
        assert_eq!(block.allocations[0], Some(0));
        assert_eq!(block.unallocated, (1..64).collect::<Vec<_>>());
        assert_eq!(block.sequence_number_for_allocation["0"], 1000);
        consistent(&block);
    }

    #[test]
    fn assigning_twice_changes_nothing_and_anothers_address_is_refused() {
        let mut block = block();
        assert_eq!(assign(&mut block, address(5), &owner_of("x")), Ok(true));
        let before = block.clone();
        assert_eq!(assign(&mut block, address(5), &owner_of("x")), Ok(false));
        assert_eq!(
            assign(&mut block, address(5), &owner_of("y")),
            Err(Error::Taken { address: address(5), owner: "x".into() })
        );
        assert!(matches!(assign(&mut block, address(64), &owner_of("x")), Err(Error::Outside { .. })));
        assert_eq!(block, before);
    }

    #[test]
    fn a_damaged_block_is_an_error_and_not_a_panic() {
        let mut short = block();
        short.allocations.truncate(3);
        assert!(matches!(assign(&mut short, address(5), &owner_of("x")), Err(Error::Damaged { .. })));
        let mut dangling = block();
        dangling.allocations[5] = Some(7);
        assert!(matches!(owner(&dangling, address(5)), Err(Error::Damaged { .. })));
    }

    proptest! {
        #[test]
        fn giving_and_taking_keeps_a_block_consistent(steps in proptest::collection::vec((0u8..64, 0u8..6, any::<bool>()), 0..60)) {
            let mut block = block();
            for (last, owner, give) in steps {
                let handle = format!("h{owner}");
                if give {
                    let _ = assign(&mut block, address(last), &owner_of(&handle));
                } else {
                    let held = block.allocations.iter().flatten().filter(|index| block.attributes[**index].handle_id.as_ref() == Some(&handle)).count();
                    let released = release(&mut block, |id| id == handle);
                    prop_assert_eq!(released.get(&handle).copied().unwrap_or(0), i64::try_from(held).unwrap());
                }
                block.sequence_number += 1;
                consistent(&block);
            }
        }
    }
}
