//! flannel's packet filter rules, in every place where flannel may have put them.

use crate::host::iptables::{self, Owner, WORLDS};
use crate::host::{nft, tables};
use crate::journal::{Captured, Journal};
use crate::steps::Error;

/// Whose rules flannel's are on this node.
#[must_use]
pub fn flannel(journal: &Journal, captured: &Captured) -> Owner {
    let networks = journal.entry.grant.iter().flat_map(|grant| grant.flannel.networks.clone()).collect();
    // The VXLAN device's address is the first of the node's part of the network, the bridge's the second, with the prefix.
    let subnets = captured
        .bridge
        .iter()
        .flat_map(|bridge| &bridge.addresses)
        .filter_map(|address| address.text.strip_prefix("address "))
        .filter_map(|net| net.parse::<ipnet::IpNet>().ok())
        .map(|net| net.trunc())
        .collect();
    Owner::Flannel { networks, subnets }
}

/// Captures what flannel has put there.
pub fn capture(owner: &Owner, captured: &mut Captured) -> Result<(), Error> {
    captured.rules.clear();
    for world in WORLDS {
        if let Some(save) = iptables::save(world)? {
            let rules = iptables::owned(&save, owner);
            if !rules.is_empty() {
                captured.rules.insert(world.to_owned(), rules);
            }
        }
    }
    captured.tables.clear();
    for name in nft::FLANNEL {
        if tables::is_there(name)? {
            captured.tables.push(nft::list(name)?);
        }
    }
    captured.policies.clear();
    for name in nft::FELIX {
        if tables::is_there(name)? {
            captured.policies.push(name.to_string());
        }
    }
    Ok(())
}

/// Removes what is there now, which may be more than was captured.
pub fn remove(journal: &Journal, captured: &Captured) -> Result<(), Error> {
    let owner = flannel(journal, captured);
    for world in WORLDS {
        if let Some(save) = iptables::save(world)? {
            iptables::restore(world, &iptables::removal(&iptables::owned(&save, &owner)))?;
        }
    }
    Ok(tables::delete(&nft::FLANNEL)?)
}

/// Puts back what was captured.
pub fn put_back(captured: &Captured) -> Result<(), Error> {
    for (world, rules) in &captured.rules {
        let save = iptables::save(world)?.unwrap_or_default();
        let here = Owner::Flannel { networks: Vec::new(), subnets: Vec::new() };
        let mut present = iptables::owned(&save, &here);
        // Rules without chain and comment are told by their text, which was captured.
        for table in rules {
            let lines: Vec<&str> = table_lines(&save, &table.table);
            let there: Vec<String> =
                table.outside.iter().filter(|rule| lines.contains(&rule.as_str())).cloned().collect();
            match present.iter_mut().find(|other| other.table == table.table) {
                Some(other) => other.outside = there,
                None if there.is_empty() => {}
                None => present.push(iptables::Rules {
                    table: table.table.clone(),
                    outside: there,
                    ..iptables::Rules::default()
                }),
            }
        }
        iptables::restore(world, &iptables::restoration(rules, &present))?;
    }
    Ok(nft::restore(&captured.tables)?)
}

fn table_lines<'a>(save: &'a str, table: &str) -> Vec<&'a str> {
    let header = format!("*{table}");
    save.lines().skip_while(|line| **line != header).take_while(|line| *line != "COMMIT").collect()
}

/// Removes what Felix left behind, so that a node that goes back has nothing of Calico's: chains of its iptables mode, tables of its
/// nftables mode. Both may be there: which mode it is in, it decides anew at each start.
pub fn remove_calicos() -> Result<(), Error> {
    for world in WORLDS {
        if let Some(save) = iptables::save(world)? {
            iptables::restore(world, &iptables::removal(&iptables::owned(&save, &Owner::Calico)))?;
        }
    }
    Ok(tables::delete(&nft::FELIX)?)
}

/// The same in Canal, whose own Felix goes on: only tables go that it didn't have. If it is older or in another mode, it neither keeps
/// them up to date nor removes them, and they would drop what comes from nodes and pods that they don't know.
pub fn remove_calicos_from_canal(captured: &Captured) -> Result<(), Error> {
    let strange = |name: &tables::Name| !captured.policies.contains(&name.to_string());
    let strange: Vec<_> = nft::FELIX.into_iter().filter(strange).collect();
    Ok(tables::delete(&strange)?)
}
