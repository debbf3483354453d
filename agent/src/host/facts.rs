//! What the coordinator judges before the node gets a lease. Only reads.

use std::path::Path;

use flannel_migration_protocol::host::{MOST_INTERFACES, MOST_PLUGINS};
use flannel_migration_protocol::{HostFacts, Interface, VxlanDevice};

use crate::host::links::{self, Link};
use crate::host::netlink::{Error, Socket};
use crate::host::sysctl;

/// Where the runtime looks for CNI plugins.
pub const PLUGINS: &str = "/opt/cni/bin";

/// Starts of the names of interfaces that Calico's autodetection never takes
/// (`DEFAULT_INTERFACES_TO_EXCLUDE` in its `node/pkg/lifecycle/startup/autodetection`).
const NEVER_TAKEN: [&str; 19] = [
    "docker",
    "cbr",
    "dummy",
    "podman",
    "virbr",
    "lxcbr",
    "veth",
    "lo",
    "br-",
    "cali",
    "tunl",
    "flannel",
    "kube-ipvs",
    "cni",
    "vxlan.calico",
    "vxlan-v6.calico",
    "wireguard.cali",
    "wg-v6.cali",
    "nodelocaldns",
];

/// Looks. What can't be read is left out, and so not judged.
#[must_use]
pub fn look(plugins: &Path) -> HostFacts {
    let mut facts = HostFacts {
        rp_filter: sysctl::named("net.ipv4.conf.all.rp_filter").ok().and_then(|value| value.parse().ok()),
        plugins: names(plugins),
        ..HostFacts::default()
    };
    if let Err(error) = network(&mut facts) {
        tracing::debug!(error = crate::steps::chain(&error), "links not read");
    }
    facts
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    names.truncate(MOST_PLUGINS);
    names
}

fn network(facts: &mut HostFacts) -> Result<(), Error> {
    let mut socket = Socket::open()?;
    let links = links::links(&mut socket)?;
    facts.vxlan = vxlan(&links);
    for link in links.iter().filter(|link| may_be_taken(&link.name)) {
        let addresses: Vec<_> =
            links::addresses(&mut socket, link.index)?.iter().filter_map(links::address_of).collect();
        if !addresses.is_empty() && facts.interfaces.len() < MOST_INTERFACES {
            facts.interfaces.push(Interface { name: link.name.clone(), addresses });
        }
    }
    Ok(())
}

fn vxlan(links: &[Link]) -> Vec<VxlanDevice> {
    let mut devices: Vec<VxlanDevice> = links
        .iter()
        .filter(|link| link.name.starts_with("flannel"))
        .filter_map(|link| {
            let vxlan = link.vxlan.as_ref()?;
            let (name, mac) = (link.name.clone(), links::mac_text(&link.mac));
            Some(VxlanDevice { name, vni: vxlan.vni, port: vxlan.port, mac, mtu: link.mtu })
        })
        .collect();
    devices.sort_by(|a, b| a.name.cmp(&b.name));
    devices
}

fn may_be_taken(name: &str) -> bool {
    !NEVER_TAKEN.iter().any(|start| name.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::links::Vxlan;

    #[test]
    fn flannels_devices_are_told_and_others_are_not() {
        let device = |name: &str| Link {
            name: name.into(),
            mac: vec![0x8e, 0x74, 0x9a, 0x30, 0x24, 1],
            mtu: 1450,
            vxlan: Some(Vxlan { vni: 1, port: 8472, ..Vxlan::default() }),
            ..Link::default()
        };
        let plain = Link { name: "flannel0".into(), ..Link::default() };
        let told = vxlan(&[device("flannel.1"), device("vxlan100"), plain, device("flannel-v6.1")]);
        let names: Vec<&str> = told.iter().map(|device| device.name.as_str()).collect();
        assert_eq!(names, ["flannel-v6.1", "flannel.1"]);
        assert_eq!(told[1].to_string(), "flannel.1 (VNI 1, port 8472, MAC 8e:74:9a:30:24:01, MTU 1450)");
    }

    #[test]
    fn interfaces_of_pods_bridges_and_tunnels_are_left_out_as_calico_leaves_them_out() {
        for name in ["lo", "veth12ab", "cni0", "flannel.1", "vxlan.calico", "docker0", "cali1234"] {
            assert!(!may_be_taken(name), "{name}");
        }
        for name in ["eth0", "ens3", "bond0", "br0"] {
            assert!(may_be_taken(name), "{name}");
        }
    }

    #[test]
    fn plugins_are_told_by_name_and_sorted() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["portmap", "bridge", ".hidden"] {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        assert_eq!(names(directory.path()), ["bridge", "portmap"]);
        assert!(names(&directory.path().join("nowhere")).is_empty());
    }
}
