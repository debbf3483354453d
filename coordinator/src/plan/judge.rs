//! What is to be done with one node, whatever the others are at.

use std::time::Duration;

use flannel_migration_protocol::{Goal, Network, NodeView, Request, State};
use jiff::Timestamp;

use super::{FLANNEL_LEAVING, Step, asked};
use crate::args::Policy;
use crate::cluster::NodeFacts;

/// What is to become of one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Judgement {
    Do(Step),
    Wait(&'static str, Option<Timestamp>),
    Alarm(&'static str, String),
    /// At rest, and may be granted a lease to there.
    Startable(Goal),
    /// Calico's.
    Done,
    /// flannel's, as it is to be.
    Back,
}

/// What counts beside the node itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Standing {
    /// What an administrator asks of the whole cluster.
    pub(super) request: Option<Request>,
    /// Whether any node carries a network label.
    pub(super) begun: bool,
    /// Whether the node's lease has been in force for too long.
    pub(super) overdue: bool,
}

/// How long a lease may be in force before a person is to look.
pub(super) fn lease_limit(policy: &Policy) -> Duration {
    policy.drain_timeout + policy.node_budget * 2
}

/// Whether a lease that has been in force for so long is overdue.
pub(super) fn is_overdue(leased_for: Option<Duration>, policy: &Policy) -> bool {
    leased_for.is_some_and(|age| age > lease_limit(policy))
}

/// Judges one node.
pub(super) fn judge(node: &NodeFacts, standing: Standing, policy: &Policy, now: Timestamp) -> Judgement {
    let view = &node.view;
    if let Some(malformed) = view.malformed().first() {
        return Judgement::Alarm("KeyUnreadable", format!("{malformed}; correct or remove it"));
    }
    if view.state.get() == Some(&State::Stuck) {
        let why = view.report.get().map_or("its agent gave no reason", |report| report.message.as_str());
        return Judgement::Alarm("NodeStuck", why.to_owned());
    }
    if view.lease.is_absent() {
        without_lease(node, standing, now)
    } else {
        with_lease(node, standing, policy)
    }
}

fn with_lease(node: &NodeFacts, standing: Standing, policy: &Policy) -> Judgement {
    let view = &node.view;
    let Some(grant) = view.granted() else {
        return Judgement::Alarm(
            "GrantMismatch",
            "lease and grant differ; restore the grant annotation, or remove both once the node is at rest"
                .to_owned(),
        );
    };
    let wait = |reason| {
        if standing.overdue {
            let state = view.state.get().map_or("no state".to_owned(), ToString::to_string);
            Judgement::Alarm(
                "LeaseOverdue",
                format!(
                    "{state} for longer than {} s ({reason}); look at the node's agent",
                    lease_limit(policy).as_secs()
                ),
            )
        } else {
            Judgement::Wait(reason, None)
        }
    };
    let Some(state) = view.answered() else { return wait("AgentToAnswer") };
    let network = view.network.get().copied();
    let unwanted = matches!(asked(view, standing.request), Some(Request::Abort | Request::Rollback));
    match (state, grant.goal) {
        (State::Preparing | State::Prepared, _) if unwanted && network == Some(Network::Flannel) => {
            Judgement::Do(Step::CallOff)
        }
        (State::Preparing, _) => wait("NodePreparing"),
        (State::Prepared, _) if network == Some(Network::Flannel) => Judgement::Do(Step::Clear),
        (State::Prepared, _) => wait(FLANNEL_LEAVING),
        (State::Switching, _) => wait("NodeSwitching"),
        (State::Verifying, _) if network == Some(Network::Calico) => wait("NodeVerifying"),
        (State::Verifying, _) => Judgement::Do(Step::Register),
        (State::Calico, Goal::Migrate) => Judgement::Do(Step::Settle),
        (State::Calico, Goal::Rollback) => wait("AgentToRollBack"),
        (State::Reverting, _) if network == Some(Network::None) => wait("NodeReverting"),
        (State::Reverting, _) => Judgement::Do(Step::Retreat),
        (State::Flannel, _) => Judgement::Do(Step::GiveBack),
        (State::Stuck, _) => wait("NodeStuck"),
    }
}

fn without_lease(node: &NodeFacts, standing: Standing, now: Timestamp) -> Judgement {
    let view = &node.view;
    let asked = asked(view, standing.request);
    let ending = matches!(standing.request, Some(Request::Abort | Request::Rollback));
    let Some(network) = view.network.get().copied() else {
        // Before anything was begun, or when it is taken back, flannel needs no label.
        let left = standing.request == Some(Request::Rollback) || ending && !standing.begun;
        return if left && view.state.get() != Some(&State::Calico) {
            Judgement::Back
        } else {
            Judgement::Do(Step::Enrol)
        };
    };
    match view.state.get() {
        None if ending && network == Network::Flannel => Judgement::Back,
        None => Judgement::Wait("AgentSilent", None),
        Some(State::Calico) if network == Network::Calico => match (asked, standing.request) {
            (Some(Request::Rollback), _) => startable(node, view, Goal::Rollback, now),
            (Some(Request::Pause), Some(Request::Rollback)) => Judgement::Wait("Paused", None),
            (Some(Request::Abort), Some(Request::Rollback)) => Judgement::Wait("Aborted", None),
            _ => Judgement::Done,
        },
        Some(State::Calico) => Judgement::Do(Step::Relabel(Network::Calico)),
        Some(State::Flannel) => match network {
            Network::Flannel if ending => Judgement::Back,
            Network::Flannel => match asked {
                None => startable(node, view, Goal::Migrate, now),
                Some(Request::Pause) => Judgement::Wait("Paused", None),
                Some(Request::Abort) => Judgement::Wait("Aborted", None),
                Some(Request::Rollback) => Judgement::Wait("RolledBack", None),
            },
            // A node that joined after flannel's selector was set: its agent has yet to see Calico there.
            Network::Calico => Judgement::Wait("JoinedNodeStarting", None),
            Network::None => Judgement::Do(Step::Relabel(Network::Flannel)),
        },
        Some(State::Preparing | State::Prepared) => Judgement::Wait("LeaseWithdrawn", None),
        Some(state @ (State::Switching | State::Verifying | State::Reverting | State::Stuck)) => {
            Judgement::Alarm(
                "LeaseLost",
                format!("{state} without a lease: somebody removed it; restore lease and grant"),
            )
        }
    }
}

fn startable(node: &NodeFacts, view: &NodeView, goal: Goal, now: Timestamp) -> Judgement {
    if !node.ready {
        return Judgement::Wait("NodeNotReady", None);
    }
    match view.failures.get() {
        // Further away than the pause is long: the clock that it was noted by was wrong, or was put back since.
        Some(failures) if now + back_off(failures.count) < failures.retry_after => Judgement::Startable(goal),
        Some(failures) if failures.retry_after > now => {
            Judgement::Wait("RetryLater", Some(failures.retry_after))
        }
        _ => Judgement::Startable(goal),
    }
}

/// How long a node isn't tried again after so many failures in a row.
#[must_use]
pub fn back_off(failures: u32) -> Duration {
    const FIRST: Duration = Duration::from_secs(10);
    const LONGEST: Duration = Duration::from_mins(5);
    FIRST.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(LONGEST)
}
