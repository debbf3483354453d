//! Looks at the node, and only at what the decision asks of it in its state: an agent at rest costs next to nothing.

use std::path::Path;

use flannel_migration_protocol::{Network, NodeView, State};
use jiff::Timestamp;

use crate::decide::{Felix, Observed};
use crate::host::netlink::Socket;
use crate::host::{cni, connections, links, netns, process};
use crate::journal::Journal;
use crate::probe;
use crate::steps::Site;

/// Felix's health port where no grant tells another.
const HEALTH_PORT: u16 = 9099;

/// What the decision is about to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asked {
    /// Whether flanneld runs.
    flanneld: bool,
    /// Whether Felix is ready.
    ready: bool,
    /// And, if it isn't, whether it is gone.
    gone: bool,
}

impl Asked {
    fn of(state: State, network: Option<Network>, flannel_files: bool) -> Self {
        // A node that joined never had flannel.
        let joins = state == State::Flannel && network == Some(Network::Calico);
        Self {
            flanneld: joins
                || state == State::Prepared && network == Some(Network::None)
                || state == State::Calico && flannel_files,
            ready: joins || state == State::Verifying && network == Some(Network::Calico),
            gone: state == State::Reverting,
        }
    }
}

/// Looks. What isn't asked for is as if it weren't there.
#[must_use]
pub fn observe(view: NodeView, journal: &Journal, site: &Site, config_dir: &Path) -> Observed {
    let entry = &journal.entry;
    let configs = cni::configs(config_dir).unwrap_or_default();
    let flannels_config = configs.iter().any(cni::Config::is_flannels);
    let flannel_files = flannels_config || site.flannel_run.exists();
    let asked = Asked::of(entry.state, view.network.get().copied(), flannel_files);
    let port = entry.grant.as_ref().map_or(HEALTH_PORT, |grant| grant.calico.health_port);
    let felix = if (asked.ready || asked.gone) && probe::felix_ready(port) {
        Felix::Ready
    } else if asked.gone && (probe::felix_there(port) || runs(&["calico-node"])) {
        Felix::There
    } else {
        Felix::Gone
    };
    // Canal's pod is gone when its Felix is gone too.
    let canal = entry.grant.as_ref().is_some_and(|grant| grant.flannel.canal);
    let daemons: &[&str] =
        if canal && entry.state == State::Prepared { &["flanneld", "calico-node"] } else { &["flanneld"] };
    Observed {
        flanneld: asked.flanneld && runs(daemons),
        flannel_here: flannels_config || has_flannel_device(),
        flannel_files,
        felix,
        kept_in_use: !entry.kept.is_empty() && connections::any_from(&entry.kept),
        now: Timestamp::now(),
        view,
    }
}

fn runs(names: &[&str]) -> bool {
    !process::named(&process::all(), names, netns::own().unwrap_or_default()).is_empty()
}

fn has_flannel_device() -> bool {
    let links = Socket::open().and_then(|mut socket| links::links(&mut socket)).unwrap_or_default();
    let flannels = |name: &str| name.starts_with("flannel.") || name.starts_with("flannel-v6.");
    links.iter().any(|link| flannels(&link.name) && link.vxlan.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_at_rest_is_asked_nothing_and_a_node_in_change_what_it_waits_for() {
        let asked = |state, network| {
            let asked = Asked::of(state, network, false);
            (asked.flanneld, asked.ready, asked.gone)
        };
        assert_eq!(asked(State::Flannel, Some(Network::Flannel)), (false, false, false));
        assert_eq!(asked(State::Flannel, Some(Network::Calico)), (true, true, false), "it joins");
        assert_eq!(asked(State::Prepared, Some(Network::Flannel)), (false, false, false));
        assert_eq!(asked(State::Prepared, Some(Network::None)), (true, false, false));
        assert_eq!(asked(State::Verifying, Some(Network::None)), (false, false, false));
        assert_eq!(asked(State::Verifying, Some(Network::Calico)), (false, true, false));
        assert_eq!(asked(State::Calico, Some(Network::Calico)), (false, false, false));
        assert_eq!(asked(State::Reverting, Some(Network::None)), (false, false, true));
        assert!(Asked::of(State::Calico, Some(Network::Calico), true).flanneld, "flannel came back");
    }
}
