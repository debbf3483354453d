//! Pods that Calico made, on a node that goes back to flannel.
//!
//! They aren't in the journal, and needn't be: each keeps its link, its address and the route to it, and is reached as before. What must
//! be seen to is that flannel's IPAM doesn't give their addresses to others, that their teardown finds the records it needs, and that
//! pods on the bridge, which think them their neighbours, are answered. They are reported, to be made anew when there is time.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};

use flannel_migration_protocol::Evict;
use serde_json::Value;

use crate::host::cni::{self, Attachment};
use crate::host::netlink::Socket;
use crate::host::sysctl::{self, Table};
use crate::host::{files, links, messages6, netns};
use crate::journal::Journal;
use crate::steps::{self, Error, Op, Site};

/// Name of flannel's CNI network in all of its manifests; where the node's own is unknown.
const NETWORK: &str = "cbr0";

/// Why they are reported.
pub const REASON: &str = "MadeByCalico";

/// The pods that Calico made and that still live.
pub fn find(journal: &Journal, site: &Site) -> Result<Vec<Attachment>, Error> {
    let Some(grant) = &journal.entry.grant else { return Ok(Vec::new()) };
    let text = cni::render(grant, &site.node)?;
    let calico = serde_json::from_str::<Value>(&text).map_err(cni::Error::Json)?;
    let calico = calico.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
    // Those whose record was rewritten before a crash count as well.
    let networks = [calico, network(journal)];
    let taken_over = |sandbox: &str| {
        journal
            .entry
            .captured
            .iter()
            .flat_map(|captured| &captured.pods)
            .any(|pod| pod.adopted.sandbox == sandbox)
    };
    let mut found = cni::attachments(&site.results)?;
    found.retain(|attachment| {
        networks.contains(&attachment.network)
            && !taken_over(&attachment.sandbox)
            && netns::host_path(&attachment.netns).exists()
    });
    Ok(found)
}

/// Those that Calico's plugin has made since `before` was found.
pub fn late(journal: &Journal, site: &Site, before: &[Attachment]) -> Result<Vec<Attachment>, Error> {
    let flannels = network(journal);
    let mut found = find(journal, site)?;
    found.retain(|guest| {
        guest.network != flannels && before.iter().all(|other| other.sandbox != guest.sandbox)
    });
    Ok(found)
}

/// As it is reported.
#[must_use]
pub fn named(guest: &Attachment) -> Evict {
    Evict {
        namespace: guest.namespace.clone(),
        pod: guest.pod.clone(),
        uid: guest.uid.clone(),
        reason: REASON.to_owned(),
    }
}

fn network(journal: &Journal) -> String {
    let captured = journal.entry.captured.iter().flat_map(|captured| &captured.configs);
    let mut names = captured.map(|config| &config.network).filter(|name| !name.is_empty());
    names.next().cloned().unwrap_or_else(|| NETWORK.to_owned())
}

/// Where flannel's records are: still beside the journal, or back in their place.
struct Records {
    reservations: PathBuf,
    delegates: PathBuf,
    results: PathBuf,
}

impl Records {
    fn of(journal: &Journal, site: &Site, network: &str) -> Self {
        if journal.progress(Op::RemoveFiles).is_some() {
            let aside = journal.directory().join("aside");
            Self {
                reservations: aside.join(format!("networks-{network}")),
                delegates: aside.join("cni-flannel"),
                results: aside.join("results"),
            }
        } else {
            Self {
                reservations: site.cni_state.join("networks").join(network),
                delegates: site.cni_state.join("flannel"),
                results: site.results.clone(),
            }
        }
    }
}

/// Makes flannel's records say who is there now: pods that ended meanwhile are forgotten, `guests` are known, and their addresses theirs.
pub fn reserve(journal: &Journal, site: &Site, guests: &[Attachment]) -> Result<(), Error> {
    let network = network(journal);
    let records = Records::of(journal, site, &network);
    let captured = journal.entry.captured.iter().flat_map(|captured| &captured.pods);
    let alive: BTreeSet<&str> = captured
        .filter(|pod| netns::host_path(&pod.netns).exists())
        .map(|pod| pod.adopted.sandbox.as_str())
        .chain(guests.iter().map(|guest| guest.sandbox.as_str()))
        .collect();
    for name in files::names(&records.reservations)? {
        let path = records.reservations.join(&name);
        if name.parse::<IpAddr>().is_ok() && !alive.contains(owner(&path)?.as_str()) {
            files::remove(&path)?;
        }
    }
    let mut delegate = None;
    for name in files::names(&records.delegates)? {
        let path = records.delegates.join(&name);
        delegate = files::read(&path)?.or(delegate);
        if !alive.contains(name.as_str()) {
            files::remove(&path)?;
        }
    }
    for name in files::names(&records.results)? {
        let sandbox = name.strip_prefix(&format!("{network}-")).and_then(|rest| rest.split('-').next());
        if sandbox.is_some_and(|sandbox| !alive.contains(sandbox)) {
            files::remove(&records.results.join(&name))?;
        }
    }
    admit(&records, site, &network, delegate.as_deref(), guests)
}

/// The same for guests that came late; nothing is forgotten, for flannel's plugin may be at work again.
pub fn reserve_late(journal: &Journal, site: &Site, guests: &[Attachment]) -> Result<(), Error> {
    let network = network(journal);
    let records = Records::of(journal, site, &network);
    let mut delegate = None;
    for name in files::names(&records.delegates)? {
        delegate = files::read(&records.delegates.join(&name))?.or(delegate);
    }
    admit(&records, site, &network, delegate.as_deref(), guests)
}

fn admit(
    records: &Records,
    site: &Site,
    network: &str,
    delegate: Option<&str>,
    guests: &[Attachment],
) -> Result<(), Error> {
    for guest in guests {
        for address in &guest.addresses {
            let text = format!("{}\r\n{}", guest.sandbox, guest.interface);
            std::fs::create_dir_all(&records.reservations)
                .map_err(|error| unfit(&records.reservations, &error))?;
            files::write(&records.reservations.join(address.addr().to_string()), text.as_bytes(), 0o644)?;
        }
        if let Some(delegate) = delegate {
            files::write(&records.delegates.join(&guest.sandbox), delegate.as_bytes(), 0o600)?;
        }
        rename_record(site, guest, network)?;
    }
    Ok(())
}

fn unfit(path: &Path, error: &std::io::Error) -> Error {
    Error::Unfit("FileFailed", format!("can't make {}: {error}", path.display()))
}

/// Whose an address is: the first line of host-local's file.
fn owner(path: &Path) -> Result<String, Error> {
    let text = files::read(path)?.unwrap_or_default();
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// libcni finds what it tears down by the network's name. The new record is there before the old one goes.
fn rename_record(site: &Site, guest: &Attachment, network: &str) -> Result<(), Error> {
    if guest.network == network {
        return Ok(());
    }
    let name = |network: &str| site.results.join(format!("{network}-{}-{}", guest.sandbox, guest.interface));
    let old = name(&guest.network);
    let Some(mut record) = files::read(&old)?.and_then(|text| serde_json::from_str::<Value>(&text).ok())
    else {
        return Ok(());
    };
    if let Some(record) = record.as_object_mut() {
        record.insert("networkName".into(), network.into());
    }
    files::write(&name(network), record.to_string().as_bytes(), 0o600)?;
    Ok(files::remove(&old)?)
}

/// Pods on the bridge ask there for the guests' hardware addresses, for all are of one subnet: the host answers in their stead.
pub fn connect(journal: &Journal, guests: &[Attachment]) -> Result<(), Error> {
    let bridge = journal.entry.captured.as_ref().and_then(|captured| captured.bridge.as_ref());
    let (Some(bridge), false) = (bridge, guests.is_empty()) else { return Ok(()) };
    // The undoing has made it, unless the node was rebooted in between.
    steps::bridge::make_anew(bridge)?;
    let name = &bridge.link.name;
    sysctl::write(Table::Conf4, name, "proxy_arp", "1")?;
    sysctl::write(Table::Neigh4, name, "proxy_delay", "0")?;
    let addresses: Vec<Ipv6Addr> = guests
        .iter()
        .flat_map(|guest| &guest.addresses)
        .filter_map(|net| match net.addr() {
            IpAddr::V6(address) => Some(address),
            IpAddr::V4(_) => None,
        })
        .collect();
    if addresses.is_empty() {
        return Ok(());
    }
    sysctl::write(Table::Conf6, name, "proxy_ndp", "1")?;
    sysctl::write(Table::Neigh6, name, "proxy_delay", "0")?;
    let mut socket = Socket::open()?;
    let present = links::links(&mut socket)?;
    let Some(link) = present.iter().find(|link| link.name == *name) else { return Ok(()) };
    let requests: Vec<_> =
        addresses.into_iter().map(|address| messages6::answer_for(address, link.index)).collect();
    Ok(socket.apply(&requests)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(root: &Path) -> Site {
        Site {
            node: "n".into(),
            results: root.join("cni/results"),
            cni_state: root.join("cni"),
            flannel_run: root.join("run"),
            rename_live: true,
        }
    }

    fn guest(sandbox: &str, addresses: &[&str]) -> Attachment {
        Attachment {
            sandbox: sandbox.into(),
            network: "k8s-pod-network".into(),
            interface: "eth0".into(),
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            ..Attachment::default()
        }
    }

    #[test]
    fn a_guest_keeps_its_address_and_what_ended_meanwhile_is_forgotten() {
        let root = tempfile::tempdir().unwrap();
        let site = site(root.path());
        let journal = Journal::open(&root.path().join("journal"), "n").unwrap();
        let reservations = site.cni_state.join("networks/cbr0");
        let delegates = site.cni_state.join("flannel");
        for directory in [&reservations, &delegates, &site.results] {
            std::fs::create_dir_all(directory).unwrap();
        }
        std::fs::write(reservations.join("10.244.1.2"), "dead\r\neth0").unwrap();
        std::fs::write(reservations.join("last_reserved_ip.0"), "10.244.1.2").unwrap();
        std::fs::write(reservations.join("fd00:10:244:1::2"), "dead\r\neth0").unwrap();
        std::fs::write(reservations.join("last_reserved_ip.1"), "fd00:10:244:1::2").unwrap();
        std::fs::write(delegates.join("dead"), "{\"type\":\"bridge\"}").unwrap();
        std::fs::write(site.results.join("cbr0-dead-eth0"), "{}").unwrap();
        let record = r#"{"containerId":"g","networkName":"k8s-pod-network"}"#;
        std::fs::write(site.results.join("k8s-pod-network-g-eth0"), record).unwrap();

        // Twice: a crash may come in between.
        for _ in 0..2 {
            reserve(&journal, &site, &[guest("g", &["10.244.1.2/32", "fd00:10:244:1::9/128"])]).unwrap();
            assert_eq!(owner(&reservations.join("10.244.1.2")).unwrap(), "g");
            assert_eq!(owner(&reservations.join("fd00:10:244:1::9")).unwrap(), "g");
            let names = ["10.244.1.2", "fd00:10:244:1::9", "last_reserved_ip.0", "last_reserved_ip.1"];
            assert_eq!(files::names(&reservations).unwrap(), names);
            assert_eq!(files::names(&delegates).unwrap(), ["g"]);
            assert_eq!(files::names(&site.results).unwrap(), ["cbr0-g-eth0"]);
        }
        let text = files::read(&site.results.join("cbr0-g-eth0")).unwrap().unwrap();
        assert!(text.contains(r#""networkName":"cbr0""#), "{text}");
    }

    #[test]
    fn a_guest_that_comes_late_is_known_and_nothing_of_flannels_is_forgotten() {
        let root = tempfile::tempdir().unwrap();
        let site = site(root.path());
        let journal = Journal::open(&root.path().join("journal"), "n").unwrap();
        let reservations = site.cni_state.join("networks/cbr0");
        for directory in [&reservations, &site.results] {
            std::fs::create_dir_all(directory).unwrap();
        }
        std::fs::write(reservations.join("10.244.1.3"), "flannels-new\r\neth0").unwrap();
        std::fs::write(site.results.join("cbr0-flannels-new-eth0"), "{}").unwrap();
        std::fs::write(site.results.join("k8s-pod-network-g-eth0"), r#"{"containerId":"g"}"#).unwrap();
        reserve_late(&journal, &site, &[guest("g", &["10.244.1.2/32"])]).unwrap();
        assert_eq!(files::names(&reservations).unwrap(), ["10.244.1.2", "10.244.1.3"]);
        assert_eq!(files::names(&site.results).unwrap(), ["cbr0-flannels-new-eth0", "cbr0-g-eth0"]);
    }
}
