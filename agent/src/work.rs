//! What each decision does to the host and to the journal. Blocking: links and files are quick, and a step must end once begun.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use flannel_migration_protocol::{Grant, State};
use rtnetlink::packet_route::RouteNetlinkMessage;
use tracing::{info, warn};

use crate::host::netlink::Socket;
use crate::host::saved::Saved;
use crate::host::{cni, connections, files, links, netns, process, sysctl};
use crate::inventory::{Inventory, Known};
use crate::journal::{self, Captured, Journal};
use crate::probe::{self, From, Kind, Peers, Probe};
use crate::steps::{self, Error, Op, Site, bridge, capture, device, peers};
use crate::{calicos, guests, policies};

const RP_FILTER: &str = "net.ipv4.conf.all.rp_filter";
/// How long plugins that were started with flannel's config may take to end, and a pod in the making to be on record.
const SETTLE: Duration = Duration::from_secs(15);
/// How long no such plugin must have been seen. A runtime that has just read the old config may yet start one.
const QUIET: Duration = Duration::from_millis(100);
/// Plugins of flannel's chain, by their executables.
const PLUGINS: [&str; 5] = ["flannel", "bridge", "portmap", "host-local", "bandwidth"];
/// Those of Calico's.
const CALICOS_PLUGINS: [&str; 4] = ["calico", "calico-ipam", "portmap", "bandwidth"];
/// Those of Canal's chain.
const CANALS_PLUGINS: [&str; 4] = ["calico", "portmap", "host-local", "bandwidth"];

/// Examines the node, and leaves the journal in `prepared` or, with the reason, in `flannel`.
pub fn prepare(
    journal: &mut Journal,
    site: &Site,
    grant: &Grant,
    known: Option<&[Known]>,
) -> Result<(), Error> {
    match examine(journal, site, grant, known) {
        Ok((captured, inventory)) => {
            let adopt = inventory.adopt.len();
            let message = format!("{adopt} pods can be adopted, {} must be evicted", inventory.evict.len());
            let baseline = probe::measure(&probes(&captured, grant));
            info!(
                step = "examine",
                adopt,
                evict = inventory.evict.len(),
                ignored = inventory.ignored.len(),
                probes = baseline.worked.len(),
                unanswered = baseline.failed.len(),
                "examined"
            );
            journal.entry.captured = Some(captured);
            journal.entry.evict = inventory.evict;
            journal.entry.baseline = baseline;
            journal.enter(State::Prepared, "Prepared", &message)?;
        }
        Err(error) => {
            warn!(reason = error.reason(), error = error.chain(), "not fit");
            journal.entry.captured = None;
            journal.entry.evict.clear();
            journal.enter(State::Flannel, error.reason(), &error.chain())?;
        }
    }
    Ok(())
}

fn examine(
    journal: &Journal,
    site: &Site,
    grant: &Grant,
    known: Option<&[Known]>,
) -> Result<(Captured, Inventory), Error> {
    let filter = sysctl::named(RP_FILTER)?;
    if filter != "1" {
        return Err(Error::Unfit(
            "RpFilterNotStrict",
            format!("{RP_FILTER} is {filter}; Calico needs 1: sysctl -w {RP_FILTER}=1, and in /etc/sysctl.d"),
        ));
    }
    if !grant.flannel.networks.iter().any(|network| network.addr().is_ipv4()) {
        return Err(Error::Unfit(
            "NoIPv4Network",
            "flannel carries IPv6 only; IPv4, or both, can be migrated".into(),
        ));
    }
    capture::capture(journal, grant, site, known)
}

fn probes(captured: &Captured, grant: &Grant) -> Vec<Probe> {
    let peers: Vec<Peers> = device::all(captured)
        .map(|(device, _)| Peers {
            addresses: addresses(&device.neighbours),
            mtu: u16::try_from(grant.flannel.mtu.min(device.link.mtu)).unwrap_or(1400),
        })
        .collect();
    let pods: Vec<_> =
        captured.pods.iter().map(|pod| (pod.name(), pod.netns.clone(), pod.adopted.ip.clone())).collect();
    probe::plan(&peers, &pods, grant.calico.kube_service_address.parse().ok())
}

fn addresses(neighbours: &[Saved]) -> Vec<IpAddr> {
    neighbours
        .iter()
        .filter_map(|saved| match saved.message() {
            Ok(RouteNetlinkMessage::NewNeighbour(message)) => links::neighbour_address(&message),
            _ => None,
        })
        .collect()
}

/// First half of the switch: no more pods come to flannel's network after it.
pub fn close_flannel(journal: &mut Journal, site: &Site) -> Result<(), Error> {
    if journal.progress(Op::RenameDevice).is_some() {
        return Ok(());
    }
    steps::apply(journal, site, Op::SwapConfig)?;
    let canal = journal.entry.captured.as_ref().is_some_and(|captured| captured.canal);
    let plugins: &[&str] = if canal { &CANALS_PLUGINS } else { &PLUGINS };
    if !quiet(plugins) {
        let why = format!("plugins of flannel's CNI config still run after {SETTLE:?}");
        return Err(Error::Unfit("PluginsBusy", why));
    }
    Ok(())
}

/// Waits until none of these plugins runs any more; whether that came in time.
fn quiet(plugins: &[&str]) -> bool {
    let own = netns::own().unwrap_or_default();
    let (started, mut busy) = (Instant::now(), Instant::now());
    while busy.elapsed() < QUIET {
        if !process::named(&process::all(), plugins, own).is_empty() {
            busy = Instant::now();
        }
        if started.elapsed() > SETTLE {
            return false;
        }
        // Processes that aren't our children, and that aren't there yet, give no event.
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// Second half: with a last look at the pods, all the rest.
pub fn switch(journal: &mut Journal, site: &Site, known: Option<&[Known]>) -> Result<(), Error> {
    if journal.progress(Op::RenameDevice).is_none() {
        let mut captured = journal.entry.captured.clone().ok_or(Error::NotCaptured)?;
        let started = Instant::now();
        let inventory = loop {
            let inventory = capture::refresh(&mut captured, site, known)?;
            if inventory.strangers.is_empty() || started.elapsed() > SETTLE {
                break inventory;
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        if let Some(pod) = inventory.evict.first() {
            let why =
                format!("{}/{} can't be adopted and wasn't evicted ({})", pod.namespace, pod.pod, pod.reason);
            return Err(Error::Unfit("PodNotAdoptable", why));
        }
        if !inventory.strangers.is_empty() {
            let why = format!("{} on the bridge belong to no pod on record", inventory.strangers.join(", "));
            return Err(Error::Unfit("UnknownPort", why));
        }
        journal.entry.captured = Some(captured);
        journal.write()?;
    }
    let started = Instant::now();
    steps::apply_all(journal, site, &Op::SWITCH)?;
    let pods = journal.entry.captured.as_ref().map_or(0, |captured| captured.pods.len());
    journal.entry.kept = journal.entry.captured.as_ref().map_or(Ok(Vec::new()), bridge::addresses)?;
    info!(step = "switch", pods, took_ms = started.elapsed().as_millis(), "switched");
    Ok(journal.enter(State::Verifying, "Switched", "")?)
}

/// After a failure in the switch: everything back, to `flannel` or, if that fails, `stuck`.
pub fn back_out(journal: &mut Journal, site: &Site, error: &Error) -> Result<(), Error> {
    warn!(reason = error.reason(), error = error.chain(), "the switch failed; it is undone");
    undo(journal, site, error.reason(), &error.chain())
}

/// Undoes the switch; reason and message say why.
pub fn undo(journal: &mut Journal, site: &Site, reason: &str, message: &str) -> Result<(), Error> {
    let met_calico = journal.progress(Op::RemoveRules).is_some() || journal.entry.state == State::Reverting;
    let mut guests = Vec::new();
    if met_calico {
        guests = guests::find(journal, site)?;
        guests::reserve(journal, site, &guests)?;
        calicos::make_way(journal)?;
    }
    if let Err(mut failures) = steps::undo(journal, site) {
        // No person is needed for what is only not noted: it is undone when it can be.
        if let Some(at) = failures.iter().position(|(_, error)| matches!(error, Error::Journal(_))) {
            return Err(failures.swap_remove(at).1);
        }
        let failures: Vec<String> =
            failures.iter().map(|(op, error)| format!("{}: {}", op.as_str(), error.chain())).collect();
        let directory = journal.directory().display().to_string();
        let advice = format!(
            "{message}; and it can't be undone: {}. Drain the node and reboot it, remove {directory}, then restart the agent: \
             kubectl drain {node} --ignore-daemonsets --delete-emptydir-data",
            failures.join("; "),
            node = site.node,
        );
        return Ok(journal.enter(State::Stuck, "UndoFailed", &advice)?);
    }
    if met_calico {
        // Those that Calico's plugin was just making, after a boot above all, are guests as well.
        if !quiet(&CALICOS_PLUGINS) {
            warn!(step = "undo", "plugins of Calico's CNI config still run after {SETTLE:?}");
        }
        let late = guests::late(journal, site, &guests)?;
        guests::reserve_late(journal, site, &late)?;
        guests.extend(late);
        calicos::remove(journal)?;
        guests::connect(journal, &guests)?;
    }
    journal.entry.evict = guests.iter().map(guests::named).collect();
    journal.entry.captured = None;
    journal.entry.switched = None;
    journal.entry.kept.clear();
    Ok(journal.enter(State::Flannel, reason, message)?)
}

/// Removes what flannel left, and verifies; returns how many probes were lost. None: the node is Calico's. Else not yet; the journal says
/// which.
pub fn verify(journal: &mut Journal, site: &Site) -> Result<usize, Error> {
    steps::apply_all(journal, site, &Op::CLEAN)?;
    if let Some(captured) = &journal.entry.captured {
        let present = Socket::open().and_then(|mut socket| links::links(&mut socket))?;
        for (device, name) in device::all(captured) {
            if !present.iter().any(|link| link.index == device.link.index && link.name == name) {
                warn!(device = name, "Felix has made its VXLAN device anew");
            }
        }
    }
    let baseline = expected(journal)?;
    let missing = probe::missing(&baseline);
    if missing.is_empty() {
        info!(step = "verify", probes = baseline.worked.len(), "everything that worked before works");
        journal.entry.switched = None;
        journal.enter(State::Calico, "Migrated", "the node's network is Calico's, verified with traffic")?;
        return Ok(0);
    }
    let names: Vec<String> = missing.iter().take(8).map(ToString::to_string).collect();
    let message = format!(
        "{} of {} probes that worked before aren't answered: {}",
        missing.len(),
        baseline.worked.len(),
        names.join("; ")
    );
    warn!(message, "verification");
    journal.enter(State::Verifying, "TrafficMissing", &message)?;
    Ok(missing.len())
}

// Less what can't be expected any more: pods that are gone, and pods whose own policy may forbid what flannel couldn't.
fn expected(journal: &Journal) -> Result<probe::Baseline, Error> {
    let mut baseline = journal.entry.baseline.clone();
    let Some(captured) = &journal.entry.captured else { return Ok(baseline) };
    let restricted = policies::restricted()?;
    let here = |address: IpAddr| {
        captured.pods.iter().any(|pod| pod.adopted.ip.contains(&address) && probe::alive(&pod.netns))
    };
    let was_pod = |address: IpAddr| {
        let mut peers = device::all(captured).flat_map(|(device, _)| &device.neighbours);
        peers.all(|peer| !peer.text.contains(&format!(" {address} ")))
    };
    baseline.worked.retain(|probe| match (&probe.from, &probe.kind) {
        (From::Host, Kind::Echo(to, _)) => here(*to) || !was_pod(*to),
        (From::Host, Kind::Connect(_)) => true,
        (From::Pod(_, netns), _) => captured
            .pods
            .iter()
            .find(|pod| pod.netns == *netns)
            .is_some_and(|pod| probe::alive(netns) && !restricted.contains(&pod.cali)),
    });
    Ok(baseline)
}

/// Lets the addresses go that the node kept. What still uses them is cut, and said.
pub fn let_go(journal: &mut Journal) -> Result<(), Error> {
    let cut = connections::peers_of(&journal.entry.kept);
    if !cut.is_empty() {
        warn!(
            step = "let-go",
            connections = cut.join(", "),
            "the node's own connections to its pods are cut: they outlived KEEP_CONNECTIONS"
        );
    }
    bridge::let_go(&journal.entry.kept)?;
    info!(step = "let-go", "the bridge's address is free");
    journal.entry.kept.clear();
    Ok(journal.write()?)
}

/// Lets the routes go that led to the peers' pods until all were Calico's.
pub fn forget_peers(journal: &Journal) -> Result<(), Error> {
    let dual = journal.entry.captured.as_ref().is_some_and(|captured| captured.device6.is_some());
    if dual { peers::release() } else { Ok(()) }
}

/// Removes files of flannel's that came back to a node that is Calico's.
pub fn sweep(site: &Site, config_dir: &Path) -> Result<(), Error> {
    for config in cni::configs(config_dir)?.iter().filter(|config| config.is_flannels()) {
        warn!(step = "sweep", file = %config.path.display(), "flannel's CNI config came back; removed");
        files::remove(&config.path)?;
    }
    Ok(files::remove_tree(&site.flannel_run)?)
}

/// After a reboot, what was changed in the kernel is gone by itself: only files can be undone, and Calico goes on by itself.
pub fn after_boot(journal: &mut Journal, site: &Site) -> Result<(), Error> {
    let boot = journal::boot()?;
    if journal.entry.boot == boot {
        return Ok(());
    }
    let first = journal.entry.boot.is_empty();
    journal.entry.boot = boot;
    // The loopback is new.
    journal.entry.kept.clear();
    if first {
        return Ok(());
    }
    // What was captured is of links and pods that are no more: another lease looks anew.
    if matches!(journal.entry.state, State::Preparing | State::Prepared) {
        journal.entry.captured = None;
        journal.entry.evict.clear();
        let why = "the node was rebooted before its switch";
        return Ok(journal.enter(State::Flannel, "Rebooted", why)?);
    }
    if journal.entry.progress.is_empty() && journal.entry.state != State::Switching {
        return Ok(());
    }
    journal.entry.progress.retain(|(op, _)| op.outlives_the_kernel());
    // No pod lives on that was taken over; its address isn't to be registered any more.
    if let Some(captured) =
        journal.entry.captured.as_mut().filter(|_| journal.entry.state == State::Verifying)
    {
        captured.pods.clear();
    }
    journal.write()?;
    // In `reverting` Calico's pod may have come back with the boot: that is waited for, as without one.
    if matches!(journal.entry.state, State::Switching | State::Stuck) {
        undo(journal, site, "Rebooted", "the node was rebooted in the middle of its switch")?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "work_tests.rs"]
mod tests;
