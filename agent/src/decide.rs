//! What to do next on this node. Pure.

use flannel_migration_protocol::{Epoch, Field, Goal, Grant, Network, NodeView, State};
use jiff::{SignedDuration, Timestamp};

use crate::journal::Entry;

/// What Felix is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Felix {
    /// Neither its process nor its health endpoint is there.
    Gone,
    /// It is there.
    There,
    /// It says that it is ready.
    Ready,
}

/// What the decision is made from, beside the journal.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own about the host")]
pub struct Observed {
    /// The node's keys.
    pub view: NodeView,
    /// Whether flanneld runs on this node.
    pub flanneld: bool,
    /// Whether flannel has left traces on this node: its config or its device.
    pub flannel_here: bool,
    /// Whether files of flannel's are there: its CNI config, or what its pod is given on the host.
    pub flannel_files: bool,
    /// Felix.
    pub felix: Felix,
    /// Whether a connection uses an address that the node keeps.
    pub kept_in_use: bool,
    /// The time.
    pub now: Timestamp,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing yet; what is waited for, for people.
    Wait(&'static str),
    /// Examine the node for this lease.
    Prepare(Box<Grant>),
    /// The lease is gone, and nothing was changed.
    Withdraw,
    /// Change the host, or go on with it.
    Switch,
    /// Remove what flannel left, and verify.
    Verify,
    /// Begin the way back: reason and message.
    Revert(&'static str, String),
    /// Begin the way back that this lease asks for.
    RollBack(Box<Grant>),
    /// Undo the switch.
    Undo,
    /// Answer a lease that asks for what is already so.
    Answer(Box<Grant>),
    /// A node that never had flannel is Calico's.
    Join,
    /// Let the kept addresses go.
    LetGo,
    /// Somebody put flannel back: away with its files.
    Sweep,
    /// The migration has ended: leave nothing behind.
    Finish,
}

/// Decides.
#[must_use]
pub fn decide(entry: &Entry, observed: &Observed) -> Next {
    let view = &observed.view;
    let network = view.network.get().copied();
    let newer = view.granted().filter(|grant| Some(grant.epoch) > entry.epoch && grant.fence >= entry.fence);
    match entry.state {
        State::Flannel => match newer {
            Some(grant) if grant.goal == Goal::Migrate => Next::Prepare(Box::new(grant.clone())),
            Some(grant) => Next::Answer(Box::new(grant.clone())),
            None if joined(observed) => Next::Join,
            None => Next::Wait("waiting for a lease"),
        },
        State::Preparing | State::Prepared if leased(view) != entry.epoch => match (&view.lease, newer) {
            (_, Some(grant)) if grant.goal == Goal::Migrate => Next::Prepare(Box::new(grant.clone())),
            // What can't be read doesn't act, in either direction.
            (Field::Malformed(_), _) => Next::Wait("the lease can't be read"),
            _ => Next::Withdraw,
        },
        State::Preparing => match view.granted() {
            Some(grant) => Next::Prepare(Box::new(grant.clone())),
            None => Next::Wait("the grant can't be read"),
        },
        State::Prepared if network != Some(Network::None) => {
            Next::Wait("waiting for the coordinator to clear the node")
        }
        State::Prepared if observed.flanneld => Next::Wait("waiting for flanneld to end"),
        State::Prepared | State::Switching => Next::Switch,
        State::Verifying => verifying(entry, observed),
        State::Calico => match newer {
            Some(grant) if grant.goal == Goal::Rollback => Next::RollBack(Box::new(grant.clone())),
            Some(grant) => Next::Answer(Box::new(grant.clone())),
            None if ended(view) => Next::Finish,
            None if observed.flannel_files && observed.flanneld => {
                Next::Wait("waiting for flanneld to end again")
            }
            None if observed.flannel_files => Next::Sweep,
            None if !entry.kept.is_empty() && (!observed.kept_in_use || keep_ended(entry, observed.now)) => {
                Next::LetGo
            }
            None if !entry.kept.is_empty() => {
                Next::Wait("waiting for the node's own connections to its pods")
            }
            None => Next::Wait("done"),
        },
        // Both in one version of the node: once it says `reverting`, the coordinator lets no Calico come any more. Before, what is seen of
        // its label may be out of date.
        State::Reverting if network != Some(Network::None) || view.state.get() != Some(&State::Reverting) => {
            Next::Wait("waiting for the coordinator to take Calico away")
        }
        State::Reverting if observed.felix != Felix::Gone => Next::Wait("waiting for calico-node to end"),
        State::Reverting => Next::Undo,
        State::Stuck => Next::Wait("a person is needed"),
    }
}

fn keep_ended(entry: &Entry, now: Timestamp) -> bool {
    let keep = entry.grant.as_ref().map_or(0, |grant| grant.keep_seconds);
    let keep = SignedDuration::from_secs(i64::try_from(keep).unwrap_or(i64::MAX));
    entry.since.checked_add(keep).is_ok_and(|end| now > end)
}

fn leased(view: &NodeView) -> Option<Epoch> {
    view.lease.get().copied()
}

fn joined(observed: &Observed) -> bool {
    observed.view.lease.is_absent()
        && observed.view.network.get() == Some(&Network::Calico)
        && !observed.flannel_here
        && !observed.flanneld
        && observed.felix == Felix::Ready
}

fn ended(view: &NodeView) -> bool {
    view.network.is_absent() && view.lease.is_absent() && view.grant.is_absent()
}

/// When the node must have left the states between the two networks.
#[must_use]
pub fn deadline(entry: &Entry) -> Option<Timestamp> {
    let budget = entry.grant.as_ref()?.budget_seconds;
    let budget = SignedDuration::from_secs(i64::try_from(budget).unwrap_or(i64::MAX));
    entry.switched?.checked_add(budget).ok()
}

fn verifying(entry: &Entry, observed: &Observed) -> Next {
    if deadline(entry).is_some_and(|deadline| observed.now > deadline) {
        let message =
            if entry.message.is_empty() { "Calico didn't become ready in time" } else { &entry.message };
        return Next::Revert("BudgetExceeded", message.to_owned());
    }
    if observed.view.network.get() != Some(&Network::Calico) {
        return Next::Wait("waiting for the coordinator to register the pods' addresses and let Calico come");
    }
    if observed.felix != Felix::Ready {
        return Next::Wait("waiting for Felix to be ready");
    }
    Next::Verify
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
