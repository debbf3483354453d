//! What to do next with each node. Pure: from what is known and the time to actions, each with its reason.
//!
//! Everything is decided from the cluster's state alone, so that a coordinator that comes back after a crash decides as if it had never
//! been away, and so that doing nothing is always right while an action is still under way.

mod judge;
mod planner;
mod slots;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use flannel_migration_protocol::{Epoch, Goal, Network, NodeView, Request, Strategy};
use jiff::Timestamp;

use crate::args::Policy;
use crate::cluster::NodeFacts;
use judge::{Judgement, Standing, is_overdue, judge};
use slots::{Grants, Slots, rank};

pub use judge::back_off;
pub use planner::{Moment, Planner};
pub use slots::unavailable;

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

impl End {
    /// How a run ends in which there is nothing more to do.
    const fn of(request: Option<Request>) -> Option<Self> {
        match request {
            None => Some(Self::Migrated),
            // What comes after the last node can't be taken back.
            Some(Request::Pause) => None,
            Some(Request::Abort) => Some(Self::Aborted),
            Some(Request::Rollback) => Some(Self::RolledBack),
        }
    }
}

impl Plan {
    /// How the run ends; `None` while it doesn't.
    #[must_use]
    pub fn end(&self) -> Option<End> {
        let rests = self.actions.is_empty() && self.waiting.is_empty() && self.alarms.is_empty();
        End::of(self.request).filter(|_| rests)
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
    /// Steps that are under way, by node. The slot of a node whose lease is just being written is as good as used.
    pub busy: &'a BTreeMap<String, Step>,
    /// What an administrator asks of the whole cluster.
    pub request: Option<Request>,
}

/// Whether the step under way on a node writes its lease.
fn is_granting(busy: Option<&Step>) -> bool {
    matches!(busy, Some(Step::Grant { .. }))
}

/// Decides, looking at all nodes. Who decides again and again keeps a [`Planner`].
#[must_use]
pub fn plan(known: &Known<'_>, policy: &Policy, now: Timestamp) -> Plan {
    let mut plan = Plan { request: known.request, ..Plan::default() };
    let mut startable: Vec<(&Arc<NodeFacts>, Goal)> = Vec::new();
    let begun = known.nodes.iter().any(|node| !node.view.network.is_absent());
    let mut slots = Slots::default();
    for node in known.nodes {
        let busy = known.busy.get(&node.name);
        slots.count(node, is_granting(busy), true);
        let leased_for = known.leased_for.get(&node.name).copied();
        let standing = Standing { request: known.request, begun, overdue: is_overdue(leased_for, policy) };
        match judge(node, standing, policy, now) {
            Judgement::Do(step) => plan.actions.push(Action { node: node.name.clone(), step }),
            Judgement::Wait(reason, until) => {
                plan.waiting.push(Waiting { node: Arc::clone(node), reason, until });
            }
            Judgement::Alarm(reason, message) => {
                plan.alarms.push(Alarm { node: node.name.clone(), reason, message });
            }
            // What comes of the step under way is seen when it has ended.
            Judgement::Startable(_) if busy.is_some() => {}
            Judgement::Startable(goal) => startable.push((node, goal)),
            Judgement::Done => plan.done += 1,
            Judgement::Back => plan.back += 1,
        }
    }
    let mut grants = Grants::new(policy, known.nodes.len(), slots, !plan.alarms.is_empty());
    if grants.any_left() {
        startable.sort_by_key(|(node, _)| (rank(node, known.own), node.name.as_str()));
    }
    for (node, goal) in startable {
        match grants.next(node, goal) {
            Ok(step) => plan.actions.push(Action { node: node.name.clone(), step }),
            Err(reason) => plan.waiting.push(Waiting { node: Arc::clone(node), reason, until: None }),
        }
    }
    plan
}

#[cfg(test)]
mod tests;
