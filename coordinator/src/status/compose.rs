//! From what the nodes say and what the coordinator has noted to one [`Status`]. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use flannel_migration_protocol::{Network, State};
use jiff::Timestamp;

use super::{AlarmStatus, Coordinator, FindingStatus, NodeStatus, Phase, PolicyStatus, Progress, Status};
use crate::args::Policy;
use crate::cluster::NodeFacts;
use crate::plan::{Known, Waiting, plan, unavailable};

/// What the nodes don't say: the coordinator notes it, and reads it back from its ConfigMap after a restart. Nothing is decided by it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Noted {
    /// The phase.
    pub phase: Phase,
    /// Why.
    pub message: String,
    /// Who leads.
    pub coordinator: Option<Coordinator>,
    /// Since when.
    pub started: Option<Timestamp>,
    /// Until when.
    pub ended: Option<Timestamp>,
    /// How nodes are taken through.
    pub policy: Option<PolicyStatus>,
    /// By node.
    pub nodes: BTreeMap<String, NodeNoted>,
    /// What is in the way.
    pub findings: Vec<FindingStatus>,
}

/// What a node doesn't say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeNoted {
    /// When its last lease was granted.
    pub leased_at: Option<Timestamp>,
    /// When it was migrated.
    pub migrated_at: Option<Timestamp>,
    /// How.
    pub strategy: Option<String>,
    /// Pods taken over.
    pub adopted: Option<usize>,
    /// Pods evicted.
    pub evicted: Option<usize>,
}

impl From<&Status> for Noted {
    fn from(status: &Status) -> Self {
        let nodes = status.nodes.iter().map(|node| {
            let noted = NodeNoted {
                leased_at: node.leased_at,
                migrated_at: node.migrated_at,
                strategy: node.strategy.clone(),
                adopted: node.adopted,
                evicted: node.evicted,
            };
            (node.node.clone(), noted)
        });
        Self {
            phase: status.phase,
            message: status.message.clone(),
            coordinator: status.coordinator.clone(),
            started: status.started,
            ended: status.ended,
            policy: status.policy.clone(),
            nodes: nodes.collect(),
            findings: status.findings.clone(),
        }
    }
}

/// Composes. `policy` is what the coordinator works by.
#[must_use]
pub fn compose(
    nodes: &[Arc<NodeFacts>],
    own: Option<&str>,
    noted: &Noted,
    policy: &Policy,
    now: Timestamp,
) -> Status {
    // Clocks of machines are compared here, which is good enough for showing.
    let leased = nodes.iter().filter(|node| !node.view.lease.is_absent());
    let leased_for: BTreeMap<String, Duration> = leased
        .filter_map(|node| {
            let leased_at = noted.nodes.get(&node.name)?.leased_at?;
            Some((node.name.clone(), Duration::try_from(now.duration_since(leased_at)).ok()?))
        })
        .collect();
    let rolling = noted.phase == Phase::Roll;
    let busy = BTreeMap::new();
    let known = Known { nodes, own, leased_for: &leased_for, busy: &busy, request: None };
    let planned = plan(&known, policy, now);
    let waiting: BTreeMap<&str, &Waiting> = if rolling {
        planned.waiting.iter().map(|waiting| (waiting.node.name.as_str(), waiting)).collect()
    } else {
        BTreeMap::new()
    };
    let ways = Ways::of(nodes);
    let mut rows: Vec<NodeStatus> = nodes
        .iter()
        .map(|node| row(node, noted, waiting.get(node.name.as_str()).copied(), &ways, policy))
        .collect();
    rows.sort_by(|a, b| a.node.cmp(&b.node));
    let done = nodes.iter().filter(|node| is_done(node)).count();
    Status {
        phase: noted.phase,
        message: noted.message.clone(),
        coordinator: noted.coordinator.clone(),
        started: noted.started,
        ended: noted.ended,
        policy: noted.policy.clone(),
        progress: Progress {
            done,
            total: nodes.len(),
            remaining_seconds: remaining(nodes, noted, policy, now),
        },
        nodes: rows,
        alarms: planned
            .alarms
            .iter()
            .map(|alarm| AlarmStatus {
                node: alarm.node.clone(),
                reason: alarm.reason.to_owned(),
                message: alarm.message.clone(),
            })
            .collect(),
        findings: noted.findings.clone(),
    }
}

/// Calico's and back at work. After the end the labels are gone, and the agent's condition says it.
fn is_done(node: &NodeFacts) -> bool {
    let view = &node.view;
    let labelled = view.state.get() == Some(&State::Calico) && view.network.get() == Some(&Network::Calico);
    let unlabelled = view.state.is_absent() && view.network.is_absent() && node.migrated;
    view.lease.is_absent() && (labelled || unlabelled)
}

fn row(
    node: &NodeFacts,
    noted: &Noted,
    waiting: Option<&Waiting>,
    ways: &Ways<'_>,
    policy: &Policy,
) -> NodeStatus {
    let view = &node.view;
    let (report, failure) = (view.report.get(), view.failures.get());
    let own = noted.nodes.get(&node.name).cloned().unwrap_or_default();
    let unlabelled = view.state.is_absent() && view.network.is_absent() && node.migrated;
    let calico = || unlabelled.then(|| "calico".to_owned());
    // What the agent says of the lease in force is news; otherwise what went wrong last is what matters.
    let (reason, message) = match (failure, report) {
        (Some(failure), _) if view.lease.is_absent() => (failure.reason.clone(), failure.message.clone()),
        (_, Some(report)) => (report.reason.clone(), report.message.clone()),
        (Some(failure), None) => (failure.reason.clone(), failure.message.clone()),
        (None, None) => Default::default(),
    };
    let strategy = view
        .granted()
        .map(|grant| grant.strategy)
        .map(|strategy| strategy.to_string())
        .or(own.strategy)
        .or_else(|| view.strategy.get().map(ToString::to_string))
        .unwrap_or_else(|| policy.strategy.to_string());
    NodeStatus {
        node: node.name.clone(),
        network: view.network.get().map(ToString::to_string).or_else(calico),
        state: view.state.get().map(ToString::to_string).or_else(calico),
        step: report.map(|report| report.step.clone()).unwrap_or_default(),
        since: report.map(|report| report.since).or(own.migrated_at),
        strategy: (noted.phase != Phase::NotStarted).then_some(strategy),
        lease: view.lease.get().map(|lease| lease.get()),
        adopted: view.adopted.get().map(Vec::len).or(own.adopted),
        evicted: own.evicted,
        leased_at: own.leased_at,
        migrated_at: own.migrated_at,
        ready: node.ready,
        cordoned: node.unschedulable,
        paused: view.paused,
        reason,
        message,
        waiting_for: waiting.map(|waiting| words(waiting, ways)),
        retry_after: failure.filter(|_| view.lease.is_absent()).map(|failure| failure.retry_after),
    }
}

/// So many nodes in the way are named; with hundreds in change and thousands waiting, all names for each would be most of the status.
const NAMED: usize = 5;

/// Nodes that can be in the way of others, by name.
struct Way<'a> {
    all: BTreeSet<&'a str>,
    /// In words, for a node that isn't one of them: thousands may wait for the same.
    for_others: String,
}

impl Way<'_> {
    fn words(&self, waiting: &str) -> String {
        if self.all.contains(waiting) {
            list_of(self.all.iter().filter(|name| **name != waiting), self.all.len() - 1)
        } else {
            self.for_others.clone()
        }
    }
}

fn list_of<'a>(names: impl Iterator<Item = &'a &'a str>, count: usize) -> String {
    let names = names.take(NAMED).copied().collect::<Vec<_>>().join(", ");
    match count {
        0 => String::new(),
        _ if count > NAMED => format!(" ({names} and {} more)", count - NAMED),
        _ => format!(" ({names})"),
    }
}

/// Who can be in the way of others.
struct Ways<'a> {
    in_change: Way<'a>,
    control_planes: Way<'a>,
    stuck: Way<'a>,
    failed: Way<'a>,
}

impl<'a> Ways<'a> {
    fn of(nodes: &'a [Arc<NodeFacts>]) -> Self {
        let named = |holds: &dyn Fn(&NodeFacts) -> bool| -> Way<'a> {
            let all: BTreeSet<&'a str> =
                nodes.iter().filter(|node| holds(node)).map(|node| node.name.as_str()).collect();
            let for_others = list_of(all.iter(), all.len());
            Way { all, for_others }
        };
        Self {
            in_change: named(&unavailable),
            control_planes: named(&|node| node.control_plane && unavailable(node)),
            stuck: named(&|node| node.view.state.get() == Some(&State::Stuck)),
            failed: named(&|node| !node.view.failures.is_absent()),
        }
    }
}

/// What a node waits for, in words that name who is in the way.
fn words(waiting: &Waiting, ways: &Ways<'_>) -> String {
    let who = |way: &Way<'_>| way.words(&waiting.node.name);
    match waiting.reason {
        "NoFreeSlot" => format!("a free slot{}", who(&ways.in_change)),
        "OneControlPlaneAtATime" => {
            format!("the other control plane{}", who(&ways.control_planes))
        }
        "HeldByAlarm" => {
            format!("a person to look at{}", who(&ways.stuck))
        }
        "TooManyFailures" => {
            format!("failures to be looked at{}", who(&ways.failed))
        }
        "Paused" => "the label flannel-migration/pause to be removed".to_owned(),
        "NodeNotReady" => "its kubelet to be ready".to_owned(),
        "RetryLater" => "the next attempt".to_owned(),
        "AgentToAnswer" | "AgentSilent" => "its agent to answer".to_owned(),
        "NodePreparing" => "its agent to examine it".to_owned(),
        "FlannelLeaving" => "flannel's pod to leave".to_owned(),
        "NodeSwitching" => "its agent to switch it".to_owned(),
        "NodeVerifying" => "Calico to be ready and verified with traffic".to_owned(),
        "NodeReverting" => "its agent to undo the switch".to_owned(),
        "AgentToRollBack" => "its agent to begin the rollback".to_owned(),
        "LeaseWithdrawn" => "its agent to see that the lease is gone".to_owned(),
        "JoinedNodeStarting" => "Calico to be ready on it".to_owned(),
        other => other.to_owned(),
    }
}

/// Seconds until the last node is done, by what those that are done took.
fn remaining(nodes: &[Arc<NodeFacts>], noted: &Noted, policy: &Policy, now: Timestamp) -> Option<u64> {
    if noted.phase != Phase::Roll {
        return None;
    }
    let took = |from: Timestamp, to: Timestamp| u64::try_from(to.duration_since(from).as_secs()).unwrap_or(0);
    let finished: Vec<u64> =
        noted.nodes.values().filter_map(|node| Some(took(node.leased_at?, node.migrated_at?))).collect();
    let count = u64::try_from(finished.len()).ok().filter(|count| *count > 0)?;
    let mean = finished.iter().sum::<u64>().div_ceil(count);
    let open: Vec<&Arc<NodeFacts>> = nodes.iter().filter(|node| !is_done(node)).collect();
    let running = open.iter().filter(|node| node.view.slot_used());
    let longest = running
        .map(|node| {
            let leased = noted.nodes.get(&node.name).and_then(|node| node.leased_at);
            leased.map_or(mean, |leased| mean.saturating_sub(took(leased, now)))
        })
        .max();
    let waiting = open.iter().filter(|node| !node.view.slot_used()).count();
    let slots = policy.max_unavailable.of(nodes.len());
    let rounds = u64::try_from(waiting.div_ceil(slots)).unwrap_or(u64::MAX);
    Some(longest.unwrap_or(0).saturating_add(mean.saturating_mul(rounds)))
}

#[cfg(test)]
#[path = "compose_tests.rs"]
mod tests;
