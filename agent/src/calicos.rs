//! What calico-node leaves on a node that goes back to flannel, and that goes with it.

use std::path::Path;

use rtnetlink::packet_route::route::RouteType;

use crate::host::netlink::Socket;
use crate::host::saved::Saved;
use crate::host::{command, files, links, messages};
use crate::journal::Journal;
use crate::steps::{Error, Op, device, rules};

/// Protocol number by which Felix marks its routes.
const FELIX: u8 = 80;

/// Removes what is in flannel's way, before anything is undone.
///
/// Felix's blackhole routes for the node's blocks are narrower than the bridge's route: pods that are back on the bridge would be
/// unreachable. And a VXLAN device of Felix's own making can't stand beside flannel's, for one kernel has no two of one VNI and port; Felix
/// has made one where a reboot took the renamed one away, and on nodes that never had flannel.
pub fn make_way(journal: &Journal) -> Result<(), Error> {
    let ours = journal.progress(Op::RenameDevice).and(journal.entry.captured.as_ref());
    let ours: Vec<u32> =
        ours.into_iter().flat_map(device::all).map(|(device, _)| device.link.index).collect();
    let mut socket = Socket::open()?;
    let present = links::links(&mut socket)?;
    let strange = |link: &&links::Link| {
        [device::CALICO, device::CALICO_V6].contains(&link.name.as_str()) && !ours.contains(&link.index)
    };
    let mut requests: Vec<_> =
        present.iter().filter(strange).map(|link| messages::delete(link.index)).collect();
    for route in links::routes(&mut socket, None)? {
        let felixs = u8::from(route.header.protocol) == FELIX;
        if felixs && route.header.kind == RouteType::BlackHole {
            requests.push(Saved::route(&route).delete()?);
        }
    }
    Ok(socket.apply(&requests)?)
}

/// Removes Felix's rules, tables and sets, and what Calico's installer put beside the CNI configs.
///
/// Routes to pods that Calico made stay: they are what those pods have until they are deleted. In Canal the policies' rules were there
/// before, and go on.
pub fn remove(journal: &Journal) -> Result<(), Error> {
    match &journal.entry.captured {
        Some(captured) if captured.canal => rules::remove_calicos_from_canal(captured)?,
        _ => {
            rules::remove_calicos()?;
            remove_sets();
        }
    }
    let Some(grant) = &journal.entry.grant else { return Ok(()) };
    let directory = Path::new(&grant.flannel.cni_conf_dir);
    files::remove(&directory.join("calico-kubeconfig"))?;
    if journal.entry.captured.is_none() {
        // Nothing says what was there before: this node was Calico's from the start. flannel's pod brings its own config.
        files::remove(&directory.join(&grant.calico.cni_conf_name))?;
    }
    Ok(())
}

/// Sets of addresses that Felix's rules referred to. A set that can't be deleted does nothing by itself.
fn remove_sets() {
    let removed = command::run("ipset", &["list", "-n"], "").and_then(|listed| {
        let destroy = |set| ["destroy ", set, "\n"];
        let script: String = felix_sets(&listed).flat_map(destroy).collect();
        if script.is_empty() { Ok(String::new()) } else { command::run("ipset", &["restore"], &script) }
    });
    if let Err(error) = removed {
        tracing::warn!(error = error.to_string(), "Calico's sets of addresses stay");
    }
}

fn felix_sets(listed: &str) -> impl Iterator<Item = &str> {
    listed.lines().map(str::trim).filter(|set| set.starts_with("cali40") || set.starts_with("cali60"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sets_of_felix_are_its_own() {
        let sets: Vec<&str> =
            felix_sets("cali40masq-ipam-pools\nKUBE-CLUSTER-IP\ncali60this-host\ncalipso\n").collect();
        assert_eq!(sets, ["cali40masq-ipam-pools", "cali60this-host"]);
    }
}
