//! How flannel's networks are divided into Calico's blocks, and which of these a node needs. Pure.
//!
//! A node's share of an IPv4 network is covered by blocks. Its share of an IPv6 network, a /64 as a rule, holds more blocks than anybody
//! can write: it gets the first, those that hold an address of its pods, and some ahead. host-local gives addresses one after the other,
//! so that pods to come have addresses in these, or right behind.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::family::Family;
use super::prepare::{self, Pools};

/// So many blocks behind the last one in use are the node's already.
const AHEAD: u128 = 3;
/// An IPv6 share of at most so many blocks is covered as well.
const COVERED: u128 = 64;

/// One of flannel's networks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The network.
    pub network: IpNet,
    /// Length of Calico's blocks in it.
    pub block_size: u8,
}

/// flannel's networks, IPv4 first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// One for each family.
    pub parts: Vec<Part>,
}

impl Layout {
    /// Of these networks, whose shares are the nodes' `shares`: no block is larger than the smallest share, as Calico's own migration has
    /// it.
    #[must_use]
    pub fn new<'a>(networks: &[IpNet], shares: impl Iterator<Item = &'a IpNet>) -> Self {
        let shares: Vec<&IpNet> = shares.collect();
        let part = |network: &IpNet| {
            let lens =
                shares.iter().filter(|share| network.contains(**share)).map(|share| share.prefix_len());
            let usual = Family::of_net(network).block_size();
            Part { network: network.trunc(), block_size: lens.max().unwrap_or(usual).max(usual) }
        };
        Self { parts: networks.iter().map(part).collect() }
    }

    /// The pools that the networks become, by name.
    #[must_use]
    pub fn pools(&self, ip_masq: bool) -> Pools {
        let pool = |part: &Part| {
            let name = Family::of_net(&part.network).pool();
            (name, prepare::pool(part.network, part.block_size, ip_masq))
        };
        self.parts.iter().map(pool).collect()
    }

    /// Length of the blocks in a share; none if it is of none of the networks.
    #[must_use]
    pub fn block_size(&self, share: &IpNet) -> Option<u8> {
        self.parts.iter().find(|part| part.network.contains(share)).map(|part| part.block_size)
    }

    /// The blocks that a node needs in its `shares` whose pods have these addresses.
    #[must_use]
    pub fn blocks(&self, shares: &[IpNet], addresses: &BTreeSet<IpAddr>) -> Vec<IpNet> {
        let blocks = shares.iter().filter_map(|share| {
            Some(needed(&share.trunc(), self.block_size(share)?, addresses.iter().copied()))
        });
        blocks.flatten().collect()
    }

    /// The block that holds an address of one of these shares.
    #[must_use]
    pub fn block_of(&self, shares: &[IpNet], address: IpAddr) -> Option<IpNet> {
        let share = shares.iter().find(|share| share.contains(&address))?;
        IpNet::new(address, self.block_size(share)?).ok().map(|block| block.trunc())
    }
}

/// The blocks of a share: all of them if they can be written.
fn needed(share: &IpNet, block_size: u8, addresses: impl Iterator<Item = IpAddr>) -> Vec<IpNet> {
    let count = 1_u128.checked_shl(u32::from(block_size.saturating_sub(share.prefix_len())));
    if Family::of_net(share) == Family::V4 || count.is_some_and(|count| count <= COVERED) {
        return share.subnets(block_size).map(Iterator::collect).unwrap_or_default();
    }
    let bits = u32::from(share.max_prefix_len().saturating_sub(block_size));
    let number = |address: IpAddr| to_bits(address) >> bits;
    let first = number(share.network());
    let last = number(share.broadcast());
    let mut numbers: BTreeSet<u128> =
        addresses.filter(|address| share.contains(address)).map(number).collect();
    numbers.insert(first);
    let highest = numbers.last().copied().unwrap_or(first);
    numbers
        .extend((1..=AHEAD).filter_map(|ahead| highest.checked_add(ahead)).filter(|number| *number <= last));
    let net = |number: u128| IpNet::new(from_bits(share, number << bits), block_size).ok();
    numbers.into_iter().filter_map(net).collect()
}

fn to_bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn from_bits(like: &IpNet, bits: u128) -> IpAddr {
    match like {
        IpNet::V4(_) => IpAddr::from(std::net::Ipv4Addr::from_bits(u32::try_from(bits).unwrap_or(u32::MAX))),
        IpNet::V6(_) => IpAddr::from(std::net::Ipv6Addr::from_bits(bits)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn both() -> Layout {
        let shares = [net("10.244.1.0/24"), net("fd00:10:244:1::/64")];
        Layout::new(&[net("10.244.0.0/16"), net("fd00:10:244::/56")], shares.iter())
    }

    fn blocks(share: &str, addresses: &[&str]) -> Vec<String> {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        both().blocks(&[net(share)], &addresses).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn blocks_are_as_calicos_own_migration_makes_them() {
        let size = |network: &str, shares: &[&str]| {
            let shares: Vec<IpNet> = shares.iter().map(|share| net(share)).collect();
            Layout::new(&[net(network)], shares.iter()).parts[0].block_size
        };
        assert_eq!(size("10.0.0.0/16", &["10.0.0.0/24", "10.0.1.0/24"]), 26);
        assert_eq!(size("10.0.0.0/16", &["10.0.0.0/24", "10.0.1.0/27", "fd00::/64"]), 27);
        assert_eq!(size("10.0.0.0/16", &[]), 26);
        assert_eq!(size("fd00::/56", &["10.0.0.0/24", "fd00::/64"]), 122);
        assert_eq!(size("fd00::/112", &["fd00::/124"]), 124);
    }

    #[test]
    fn each_network_becomes_the_pool_that_calicos_own_migration_takes() {
        let pools = both().pools(true);
        assert_eq!(pools.keys().copied().collect::<Vec<_>>(), ["default-ipv4-ippool", "default-ipv6-ippool"]);
        let v6 = &pools["default-ipv6-ippool"];
        assert_eq!((v6.cidr.as_str(), v6.block_size), ("fd00:10:244::/56", Some(122)));
    }

    #[test]
    fn few_blocks_cover_a_nodes_share_exactly() {
        let four = ["10.244.1.0/26", "10.244.1.64/26", "10.244.1.128/26", "10.244.1.192/26"];
        assert_eq!(blocks("10.244.1.0/24", &["10.244.1.9"]), four);
        assert_eq!(blocks("10.244.1.0/27", &[]), [""; 0], "smaller than a block");
        assert_eq!(blocks("192.168.0.0/24", &[]), [""; 0], "of another network");
        assert_eq!(blocks("fd00:10:244:1::/120", &[]).len(), 4);
    }

    #[test]
    fn of_many_blocks_a_node_gets_the_first_those_in_use_and_some_ahead() {
        let share = "fd00:10:244:1::/64";
        let first = |number: u32| format!("fd00:10:244:1::{:x}/122", number * 64).replace("::0/", "::/");
        let listed = |numbers: &[u32]| numbers.iter().map(|number| first(*number)).collect::<Vec<_>>();
        assert_eq!(blocks(share, &[]), listed(&[0, 1, 2, 3]));
        assert_eq!(blocks(share, &["fd00:10:244:1::2"]), listed(&[0, 1, 2, 3]));
        let far = ["fd00:10:244:1::2", "fd00:10:244:1::1000", "fd00:10:244:2::7000", "10.244.1.5"];
        assert_eq!(blocks(share, &far), listed(&[0, 64, 65, 66, 67]));
        let end = "fd00:10:244:1:ffff:ffff:ffff:ffff";
        assert_eq!(blocks(share, &[end]), [&first(0), "fd00:10:244:1:ffff:ffff:ffff:ffc0/122"]);
    }

    #[test]
    fn the_block_of_an_address_is_of_the_share_that_holds_it() {
        let shares = [net("10.244.1.0/24"), net("fd00:10:244:1::/64")];
        let of =
            |address: &str| both().block_of(&shares, address.parse().unwrap()).map(|block| block.to_string());
        assert_eq!(of("10.244.1.77").as_deref(), Some("10.244.1.64/26"));
        assert_eq!(of("fd00:10:244:1::41").as_deref(), Some("fd00:10:244:1::40/122"));
        assert_eq!((of("10.244.2.1"), of("fe80::1")), (None, None));
    }

    proptest! {
        #[test]
        fn whatever_pods_have_is_in_a_block_and_so_is_what_comes_next(
            hosts in proptest::collection::vec(0_u64.., 0..20),
        ) {
            let share = net("fd00:10:244:1::/64");
            let address = |host: u64| IpAddr::from(std::net::Ipv6Addr::from_bits(to_bits(share.network()) | u128::from(host)));
            let addresses: BTreeSet<IpAddr> = hosts.iter().map(|host| address(*host)).collect();
            let blocks = both().blocks(&[share], &addresses);
            prop_assert!(blocks.len() <= hosts.len() + 4);
            prop_assert!(blocks.iter().all(|block| share.contains(block) && block.prefix_len() == 122));
            let held = |address: IpAddr| blocks.iter().any(|block| block.contains(&address));
            prop_assert!(held(share.network()), "the VXLAN device's");
            prop_assert!(addresses.iter().all(|address| held(*address)));
            // As many as a node may have pods, with what a restart of each takes.
            let highest = hosts.iter().copied().max().unwrap_or(0);
            for next in 1..=192 {
                prop_assert!(highest.checked_add(next).is_none_or(|next| held(address(next))));
            }
        }
    }
}
