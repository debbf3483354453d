//! The plan, kept up to date: only nodes that have changed, and those that time may have changed, are judged again. What a look costs is
//! what has changed since the last, however large the cluster, but where slots are free and nodes are held all the same; what comes of it
//! is what [`super::plan`] would decide.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use flannel_migration_protocol::{Epoch, Goal, Request};
use jiff::Timestamp;

use super::judge::{Judgement, Standing, is_overdue, judge, lease_limit};
use super::slots::{Grants, Rank, Slots, rank, tally};
use super::{Action, Alarm, End, Step, Waiting, is_granting};
use crate::args::Policy;
use crate::cluster::NodeFacts;

/// When it is, by two clocks.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// By the wall clock, which may jump.
    pub wall: Timestamp,
    /// By this process's own clock, since any moment: only durations are compared.
    pub own: Duration,
}

/// The plan of a run.
#[derive(Clone, Debug)]
pub struct Planner {
    policy: Policy,
    own: Option<String>,
    request: Option<Request>,
    begun: bool,
    nodes: BTreeMap<String, Judged>,
    /// What has changed since the last look. None: the node is gone.
    changed: BTreeMap<String, Option<Arc<NodeFacts>>>,
    busy: BTreeMap<String, Step>,
    /// The lease of each node that has one, and since when it has been seen in force, by the own clock.
    leases: BTreeMap<String, (Epoch, Duration)>,
    /// When leases are overdue that aren't yet.
    limits: BTreeSet<(Duration, String)>,
    sorted: Sorted,
}

#[derive(Clone, Debug)]
struct Judged {
    node: Arc<NodeFacts>,
    /// None until the look under way has come to it.
    judgement: Option<Judgement>,
}

/// The nodes by what is to become of them, and how many.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Sorted {
    /// With a step to be started.
    due: BTreeSet<String>,
    waiting: BTreeSet<String>,
    alarms: BTreeSet<String>,
    /// At rest, those that come first first.
    startable: BTreeSet<(Rank, String)>,
    /// At rest after a failure: when they are tried again depends on the wall clock.
    failed: BTreeSet<String>,
    labelled: usize,
    slots: Slots,
    done: usize,
}

impl Planner {
    /// Knows no nodes yet. `own`: the coordinator's node, which comes last.
    #[must_use]
    pub fn new(policy: &Policy, own: Option<&str>) -> Self {
        Self {
            policy: policy.clone(),
            own: own.map(ToOwned::to_owned),
            request: None,
            begun: false,
            nodes: BTreeMap::new(),
            changed: BTreeMap::new(),
            busy: BTreeMap::new(),
            leases: BTreeMap::new(),
            limits: BTreeSet::new(),
            sorted: Sorted::default(),
        }
    }

    /// A node may have changed. None: it is gone. It counts from the next look on.
    pub fn see(&mut self, name: String, node: Option<Arc<NodeFacts>>) {
        self.changed.insert(name, node);
    }

    /// These are all nodes: others are gone.
    pub fn see_all(&mut self, nodes: &[Arc<NodeFacts>]) {
        self.changed = self.nodes.keys().map(|name| (name.clone(), None)).collect();
        self.changed.extend(nodes.iter().map(|node| (node.name.clone(), Some(Arc::clone(node)))));
    }

    /// Judges again what may have changed. `request`: what an administrator asks of the whole cluster.
    pub fn look(&mut self, request: Option<Request>, at: Moment) {
        let mut again = BTreeSet::new();
        for (name, node) in std::mem::take(&mut self.changed) {
            self.sort(&name, false);
            self.nodes.remove(&name);
            self.note_lease(&name, node.as_ref().and_then(|node| node.view.lease.get()).copied(), at.own);
            if let Some(node) = node {
                self.nodes.insert(name.clone(), Judged { node, judgement: None });
                self.sort(&name, true);
                again.insert(name);
            }
        }
        let begun = self.sorted.labelled > 0;
        if (self.request, self.begun) != (request, begun) {
            (self.request, self.begun) = (request, begun);
            again.extend(self.nodes.keys().cloned());
        }
        while self.limits.first().is_some_and(|(limit, _)| *limit < at.own) {
            again.extend(self.limits.pop_first().map(|(_, name)| name));
        }
        again.extend(self.sorted.failed.iter().cloned());
        for name in again {
            self.sort(&name, false);
            self.judge(&name, at);
            self.sort(&name, true);
        }
    }

    fn note_lease(&mut self, node: &str, lease: Option<Epoch>, now: Duration) {
        let before = self.leases.get(node).copied();
        if before.map(|(epoch, _)| epoch) == lease {
            return;
        }
        let limit = lease_limit(&self.policy);
        if let Some((_, since)) = before {
            self.leases.remove(node);
            self.limits.remove(&(since + limit, node.to_owned()));
        }
        if let Some(epoch) = lease {
            self.leases.insert(node.to_owned(), (epoch, now));
            self.limits.insert((now + limit, node.to_owned()));
        }
    }

    fn judge(&mut self, name: &str, at: Moment) {
        let overdue = is_overdue(self.leased_for(name, at.own), &self.policy);
        let standing = Standing { request: self.request, begun: self.begun, overdue };
        if let Some(judged) = self.nodes.get_mut(name) {
            judged.judgement = Some(judge(&judged.node, standing, &self.policy, at.wall));
        }
    }

    /// Sorts a node in, or, with `more` false, out again.
    fn sort(&mut self, name: &str, more: bool) {
        let Some(Judged { node, judgement }) = self.nodes.get(name) else { return };
        let (sorted, step) = (&mut self.sorted, self.busy.get(name));
        sorted.slots.count(node, is_granting(step), more);
        tally(&mut sorted.labelled, !node.view.network.is_absent(), more);
        let tried = matches!(judgement, Some(Judgement::Startable(_) | Judgement::Wait(_, Some(_))));
        if tried && !node.view.failures.is_absent() {
            put(&mut sorted.failed, name.to_owned(), more);
        }
        let list = match judgement {
            Some(Judgement::Do(_)) if step.is_none() => &mut sorted.due,
            Some(Judgement::Wait(..)) => &mut sorted.waiting,
            Some(Judgement::Alarm(..)) => &mut sorted.alarms,
            Some(Judgement::Done) => {
                tally(&mut sorted.done, true, more);
                return;
            }
            Some(Judgement::Startable(_)) if step.is_none() => {
                let ranked = (rank(node, self.own.as_deref()), name.to_owned());
                put(&mut sorted.startable, ranked, more);
                return;
            }
            _ => return,
        };
        put(list, name.to_owned(), more);
    }

    /// The steps to be started, in this order; they are under way from now on.
    pub fn start(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        for name in &self.sorted.due {
            if let Some(Judged { judgement: Some(Judgement::Do(step)), .. }) = self.nodes.get(name) {
                actions.push(Action { node: name.clone(), step: step.clone() });
            }
        }
        let trouble = !self.sorted.alarms.is_empty();
        let mut grants = Grants::new(&self.policy, self.nodes.len(), self.sorted.slots, trouble);
        for (_, name) in &self.sorted.startable {
            if !grants.any_left() {
                break;
            }
            let Some((node, goal)) = self.startable(name) else { continue };
            if let Ok(step) = grants.next(node, goal) {
                actions.push(Action { node: name.clone(), step });
            }
        }
        for Action { node, step } in &actions {
            self.sort(node, false);
            self.busy.insert(node.clone(), step.clone());
            self.sort(node, true);
        }
        actions
    }

    fn startable(&self, name: &str) -> Option<(&NodeFacts, Goal)> {
        match self.nodes.get(name)? {
            Judged { node, judgement: Some(Judgement::Startable(goal)) } => Some((node, *goal)),
            _ => None,
        }
    }

    /// A node's step has ended, whatever came of it.
    pub fn ended(&mut self, node: &str) {
        self.sort(node, false);
        self.busy.remove(node);
        self.sort(node, true);
    }

    /// Steps under way, by node.
    #[must_use]
    pub const fn busy(&self) -> &BTreeMap<String, Step> {
        &self.busy
    }

    /// How many nodes there are.
    #[must_use]
    pub fn total(&self) -> usize {
        self.nodes.len()
    }

    /// How many of them are Calico's, verified and back at work.
    #[must_use]
    pub const fn done(&self) -> usize {
        self.sorted.done
    }

    /// What is asked of the whole cluster, as of the last look.
    #[must_use]
    pub const fn request(&self) -> Option<Request> {
        self.request
    }

    /// Trouble, by node.
    #[must_use]
    pub fn alarms(&self) -> Vec<Alarm> {
        let alarm = |name: &String| match &self.nodes.get(name)?.judgement {
            Some(Judgement::Alarm(reason, message)) => {
                Some(Alarm { node: name.clone(), reason, message: message.clone() })
            }
            _ => None,
        };
        self.sorted.alarms.iter().filter_map(alarm).collect()
    }

    /// Nodes that are waited for, but for those at rest that wait for others.
    pub fn waiting(&self) -> impl Iterator<Item = Waiting> {
        self.sorted.waiting.iter().filter_map(|name| match self.nodes.get(name)? {
            Judged { node, judgement: Some(Judgement::Wait(reason, until)) } => {
                Some(Waiting { node: Arc::clone(node), reason, until: *until })
            }
            _ => None,
        })
    }

    /// When to look again if nothing changes before.
    #[must_use]
    pub fn until(&self) -> Option<Timestamp> {
        let until = |name: &String| match self.nodes.get(name)?.judgement {
            Some(Judgement::Wait(_, until)) => until,
            _ => None,
        };
        self.sorted.failed.iter().filter_map(until).min()
    }

    /// For how long a node's lease has been seen in force.
    #[must_use]
    pub fn leased_for(&self, node: &str, now: Duration) -> Option<Duration> {
        self.leases.get(node).map(|(_, since)| now.saturating_sub(*since))
    }

    /// How the run ends; `None` while it doesn't.
    #[must_use]
    pub fn end(&self) -> Option<End> {
        let Sorted { due, waiting, alarms, startable, .. } = &self.sorted;
        let none = [due, waiting, alarms].into_iter().all(BTreeSet::is_empty) && startable.is_empty();
        End::of(self.request).filter(|_| none && self.busy.is_empty())
    }
}

fn put<T: Ord>(list: &mut BTreeSet<T>, item: T, more: bool) {
    if more {
        list.insert(item);
    } else {
        list.remove(&item);
    }
}
