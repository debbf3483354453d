//! What to do next with each node. Pure: from what is known and the time to actions, each with its reason.
//!
//! Everything is decided from the cluster's state alone, so that a coordinator that comes back after a crash decides as if it had never
//! been away, and so that doing nothing is always right while an action is still under way.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use flannel_migration_protocol::{Epoch, Goal, Network, NodeView, Request, State, Strategy};
use jiff::Timestamp;

use crate::args::Policy;
use crate::cluster::NodeFacts;

/// What to do with a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// It carries no network label yet: prepare it, then label it.
    Enrol,
    /// The network label doesn't say what the node is: correct it.
    Relabel(Network),
    /// Give it a lease.
    Grant {
        /// The lease's number.
        epoch: Epoch,
        /// Where to.
        goal: Goal,
        /// How.
        strategy: Strategy,
    },
    /// Take the lease back: nothing was changed yet, and it isn't wanted any more.
    CallOff,
    /// Evict what must leave before the switch, then let flannel's pod leave.
    Clear,
    /// Register the adopted addresses with Calico, then let Calico's pod come.
    Register,
    /// Let Calico's pod leave: the agent wants to undo the switch.
    Retreat,
    /// The node is back on flannel: put it back to work, and take the lease back.
    GiveBack,
    /// The node is Calico's, verified: put it back to work, and take the lease back.
    Settle,
}

impl Step {
    /// Its name, for figures.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Enrol => "enrol",
            Self::Relabel(_) => "relabel",
            Self::Grant { .. } => "grant",
            Self::CallOff => "call-off",
            Self::Clear => "clear",
            Self::Register => "register",
            Self::Retreat => "retreat",
            Self::GiveBack => "give-back",
            Self::Settle => "settle",
        }
    }
}

/// One step for one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Action {
    /// The node.
    pub node: String,
    /// The step.
    pub step: Step,
}

/// Why nothing is done with a node now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The node, as it was looked at. Thousands may wait: nothing is copied.
    pub node: Arc<NodeFacts>,
    /// `CamelCase`, stable.
    pub reason: &'static str,
    /// When it is looked at again if nothing changes before.
    pub until: Option<Timestamp>,
}

/// What a person must look at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Alarm {
    /// The node.
    pub node: String,
    /// `CamelCase`, stable.
    pub reason: &'static str,
    /// What and what to do.
    pub message: String,
}

/// What to do now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// To be started, in this order.
    pub actions: Vec<Action>,
    /// Nodes that are waited for.
    pub waiting: Vec<Waiting>,
    /// Trouble.
    pub alarms: Vec<Alarm>,
    /// Nodes that are Calico's, verified and put back to work.
    pub done: usize,
    /// Nodes that are flannel's, and are to be: by an abort or a rollback of the cluster.
    pub back: usize,
    /// What is asked of the whole cluster.
    pub request: Option<Request>,
}

/// How a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Every node is Calico's, verified and back at work.
    Migrated,
    /// Every node is at rest, on whatever network; by request.
    Aborted,
    /// Every node is flannel's again; by request.
    RolledBack,
}

impl Plan {
    /// How the run ends; `None` while it doesn't.
    #[must_use]
    pub fn end(&self) -> Option<End> {
        if !(self.actions.is_empty() && self.waiting.is_empty() && self.alarms.is_empty()) {
            return None;
        }
        match self.request {
            None => Some(End::Migrated),
            // What comes after the last node can't be taken back.
            Some(Request::Pause) => None,
            Some(Request::Abort) => Some(End::Aborted),
            Some(Request::Rollback) => Some(End::RolledBack),
        }
    }
}

/// What is asked of one node: what is on it comes before what is on the Job.
#[must_use]
pub fn asked(view: &NodeView, cluster: Option<Request>) -> Option<Request> {
    match view.request.get() {
        Some(own) => Some(*own),
        None if view.paused && cluster != Some(Request::Abort) => Some(Request::Pause),
        None => cluster,
    }
}

/// Why a node waits whose flannel pod is still there.
pub const FLANNEL_LEAVING: &str = "FlannelLeaving";

/// What is known.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// All nodes.
    pub nodes: &'a [Arc<NodeFacts>],
    /// The coordinator's own node; last.
    pub own: Option<&'a str>,
    /// For how long this coordinator has seen each node's lease in force. Only durations by its own clock are compared.
    pub leased_for: &'a BTreeMap<String, Duration>,
    /// Nodes whose lease is just being written: their slots are as good as used.
    pub granting: &'a BTreeSet<String>,
    /// What an administrator asks of the whole cluster.
    pub request: Option<Request>,
}

enum Next {
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

/// Decides.
#[must_use]
pub fn plan(known: &Known<'_>, policy: &Policy, now: Timestamp) -> Plan {
    let mut plan = Plan { request: known.request, ..Plan::default() };
    let mut startable: Vec<(&Arc<NodeFacts>, Goal)> = Vec::new();
    // Asked for each node that isn't labelled, answered once.
    let begun = known.nodes.iter().any(|node| !node.view.network.is_absent());
    let mut slots = Slots::default();
    for node in known.nodes {
        slots.count(node, known);
        match next(node, known, begun, policy, now) {
            Next::Do(step) => plan.actions.push(Action { node: node.name.clone(), step }),
            Next::Wait(reason, until) => {
                plan.waiting.push(Waiting { node: Arc::clone(node), reason, until });
            }
            Next::Alarm(reason, message) => {
                plan.alarms.push(Alarm { node: node.name.clone(), reason, message });
            }
            Next::Startable(goal) => startable.push((node, goal)),
            Next::Done => plan.done += 1,
            Next::Back => plan.back += 1,
        }
    }
    grant(known, policy, startable, slots, &mut plan);
    plan
}

/// What is in the way of further leases; counted while each node is looked at: to go through thousands once more costs as much.
#[derive(Clone, Copy, Default)]
struct Slots {
    used: usize,
    control_planes: usize,
    /// Nodes that failed after they had been changed.
    touched: usize,
}

impl Slots {
    fn count(&mut self, node: &NodeFacts, known: &Known<'_>) {
        if unavailable(node) || known.granting.contains(&node.name) {
            self.used += 1;
            self.control_planes += usize::from(node.control_plane);
        }
        self.touched += usize::from(node.view.failures.get().is_some_and(|failures| failures.touched));
    }
}

/// Gives leases out: as many as there are free slots, workers first, control planes one at a time, the own node last, nodes that failed
/// before after those that didn't. Trouble elsewhere stops migrations, not what an administrator asks for.
fn grant(
    known: &Known<'_>,
    policy: &Policy,
    mut startable: Vec<(&Arc<NodeFacts>, Goal)>,
    slots: Slots,
    plan: &mut Plan,
) {
    let Slots { mut used, mut control_planes, touched } = slots;
    let max = policy.max_unavailable.of(known.nodes.len());
    let stop = touched >= usize::try_from(policy.max_failures).unwrap_or(usize::MAX);
    // Without a free slot it doesn't matter who would be the first.
    if used < max {
        startable.sort_by(|(a, _), (b, _)| {
            let rank = |node: &NodeFacts| {
                let failed = !node.view.failures.is_absent();
                (known.own == Some(node.name.as_str()), node.control_plane, failed)
            };
            rank(a).cmp(&rank(b)).then_with(|| a.name.cmp(&b.name))
        });
    }
    let trouble = !plan.alarms.is_empty();
    for (node, goal) in startable {
        let migrate = goal == Goal::Migrate;
        let wait = if known.granting.contains(&node.name) {
            Some("LeaseUnderWay")
        } else if trouble && migrate {
            Some("HeldByAlarm")
        } else if stop && migrate && node.view.failures.is_absent() {
            Some("TooManyFailures")
        } else if used >= max {
            Some("NoFreeSlot")
        } else if node.control_plane && control_planes > 0 {
            Some("OneControlPlaneAtATime")
        } else {
            None
        };
        if let Some(reason) = wait {
            plan.waiting.push(Waiting { node: Arc::clone(node), reason, until: None });
            continue;
        }
        used += 1;
        control_planes += usize::from(node.control_plane);
        let epoch = node.view.last_epoch().map_or(Epoch::FIRST, Epoch::next);
        let strategy = node.view.strategy.get().copied().unwrap_or(policy.strategy);
        plan.actions.push(Action { node: node.name.clone(), step: Step::Grant { epoch, goal, strategy } });
    }
}

/// Whether a node counts against max-unavailable: its slot is used, or its kubelet doesn't report it ready. One node counts once.
fn unavailable(node: &NodeFacts) -> bool {
    node.view.slot_used() || !node.ready
}

fn next(node: &NodeFacts, known: &Known<'_>, begun: bool, policy: &Policy, now: Timestamp) -> Next {
    let view = &node.view;
    if let Some(malformed) = view.malformed().first() {
        return Next::Alarm("KeyUnreadable", format!("{malformed}; correct or remove it"));
    }
    if view.state.get() == Some(&State::Stuck) {
        let why = view.report.get().map_or("its agent gave no reason", |report| report.message.as_str());
        return Next::Alarm("NodeStuck", why.to_owned());
    }
    if view.lease.is_absent() {
        without_lease(node, known, begun, now)
    } else {
        with_lease(node, known, policy)
    }
}

fn with_lease(node: &NodeFacts, known: &Known<'_>, policy: &Policy) -> Next {
    let view = &node.view;
    let Some(grant) = view.granted() else {
        return Next::Alarm(
            "GrantMismatch",
            "lease and grant differ; restore the grant annotation, or remove both once the node is at rest"
                .to_owned(),
        );
    };
    let limit = policy.drain_timeout + policy.node_budget * 2;
    let overdue = known.leased_for.get(&node.name).is_some_and(|age| *age > limit);
    let wait = |reason| {
        if overdue {
            let state = view.state.get().map_or("no state".to_owned(), ToString::to_string);
            Next::Alarm(
                "LeaseOverdue",
                format!("{state} for longer than {} s ({reason}); look at the node's agent", limit.as_secs()),
            )
        } else {
            Next::Wait(reason, None)
        }
    };
    let Some(state) = view.answered() else { return wait("AgentToAnswer") };
    let network = view.network.get().copied();
    let unwanted = matches!(asked(view, known.request), Some(Request::Abort | Request::Rollback));
    match (state, grant.goal) {
        (State::Preparing | State::Prepared, _) if unwanted && network == Some(Network::Flannel) => {
            Next::Do(Step::CallOff)
        }
        (State::Preparing, _) => wait("NodePreparing"),
        (State::Prepared, _) if network == Some(Network::Flannel) => Next::Do(Step::Clear),
        (State::Prepared, _) => wait(FLANNEL_LEAVING),
        (State::Switching, _) => wait("NodeSwitching"),
        (State::Verifying, _) if network == Some(Network::Calico) => wait("NodeVerifying"),
        (State::Verifying, _) => Next::Do(Step::Register),
        (State::Calico, Goal::Migrate) => Next::Do(Step::Settle),
        (State::Calico, Goal::Rollback) => wait("AgentToRollBack"),
        (State::Reverting, _) if network == Some(Network::None) => wait("NodeReverting"),
        (State::Reverting, _) => Next::Do(Step::Retreat),
        (State::Flannel, _) => Next::Do(Step::GiveBack),
        (State::Stuck, _) => wait("NodeStuck"),
    }
}

fn without_lease(node: &NodeFacts, known: &Known<'_>, begun: bool, now: Timestamp) -> Next {
    let view = &node.view;
    let asked = asked(view, known.request);
    let ending = matches!(known.request, Some(Request::Abort | Request::Rollback));
    let Some(network) = view.network.get().copied() else {
        // Before anything was begun, or when it is taken back, flannel needs no label.
        let left = known.request == Some(Request::Rollback) || ending && !begun;
        return if left && view.state.get() != Some(&State::Calico) {
            Next::Back
        } else {
            Next::Do(Step::Enrol)
        };
    };
    match view.state.get() {
        None if ending && network == Network::Flannel => Next::Back,
        None => Next::Wait("AgentSilent", None),
        Some(State::Calico) if network == Network::Calico => match (asked, known.request) {
            (Some(Request::Rollback), _) => startable(node, view, Goal::Rollback, now),
            (Some(Request::Pause), Some(Request::Rollback)) => Next::Wait("Paused", None),
            (Some(Request::Abort), Some(Request::Rollback)) => Next::Wait("Aborted", None),
            _ => Next::Done,
        },
        Some(State::Calico) => Next::Do(Step::Relabel(Network::Calico)),
        Some(State::Flannel) => match network {
            Network::Flannel if ending => Next::Back,
            Network::Flannel => match asked {
                None => startable(node, view, Goal::Migrate, now),
                Some(Request::Pause) => Next::Wait("Paused", None),
                Some(Request::Abort) => Next::Wait("Aborted", None),
                Some(Request::Rollback) => Next::Wait("RolledBack", None),
            },
            // A node that joined after flannel's selector was set: its agent has yet to see Calico there.
            Network::Calico => Next::Wait("JoinedNodeStarting", None),
            Network::None => Next::Do(Step::Relabel(Network::Flannel)),
        },
        Some(State::Preparing | State::Prepared) => Next::Wait("LeaseWithdrawn", None),
        Some(state @ (State::Switching | State::Verifying | State::Reverting | State::Stuck)) => Next::Alarm(
            "LeaseLost",
            format!("{state} without a lease: somebody removed it; restore lease and grant"),
        ),
    }
}

fn startable(node: &NodeFacts, view: &NodeView, goal: Goal, now: Timestamp) -> Next {
    if !node.ready {
        return Next::Wait("NodeNotReady", None);
    }
    match view.failures.get() {
        // Further away than the pause is long: the clock that it was noted by was wrong, or was put back since.
        Some(failures) if now + back_off(failures.count) < failures.retry_after => Next::Startable(goal),
        Some(failures) if failures.retry_after > now => Next::Wait("RetryLater", Some(failures.retry_after)),
        _ => Next::Startable(goal),
    }
}

/// How long a node isn't tried again after so many failures in a row.
#[must_use]
pub fn back_off(failures: u32) -> Duration {
    const FIRST: Duration = Duration::from_secs(10);
    const LONGEST: Duration = Duration::from_mins(5);
    FIRST.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(LONGEST)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
