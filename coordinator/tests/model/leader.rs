//! A coordinator: its decisions and patches are the real ones; its watch, its tasks and its leadership are simulated.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use flannel_migration_coordinator::args::Policy;
use flannel_migration_coordinator::cluster::NodeFacts;
use flannel_migration_coordinator::patch;
use flannel_migration_coordinator::plan::{End, Known, Moment, Planner, Step, back_off, plan};
use flannel_migration_protocol::{Epoch, Goal, Grant, Network, Request, State, Strategy, Writer};
use jiff::Timestamp;
use serde_json::Value;

use super::grant::grant;
use super::random::Random;
use super::store::Store;

/// As in the program: how long a lease holds, and how long before its end no write starts any more.
pub const DURATION: u64 = 15_000;
const MARGIN: u64 = 3_000;

/// The coordination Lease, and when it was last renewed.
#[derive(Clone, Debug, Default)]
pub struct Lease {
    holder: Option<usize>,
    transitions: u64,
    renewals: u64,
}

/// What a task does next.
#[derive(Clone, Debug)]
enum Stage {
    Read,
    /// A write is on its way: what, for which version, and since when nothing of it may count any more.
    Write {
        patch: Value,
        expected: u64,
        until: u64,
    },
}

#[derive(Clone, Debug)]
struct Task {
    step: Step,
    stage: Stage,
    /// Writes of this step that are done.
    written: usize,
}

pub struct Leader {
    id: usize,
    alive: bool,
    /// Until when this process may lead, by the true time; it knows it by its own monotonic clock.
    until: Option<u64>,
    fence: u64,
    observed: (u64, u64),
    seen: BTreeMap<String, usize>,
    wrote: BTreeMap<String, u64>,
    tasks: BTreeMap<String, Task>,
    /// No more budgets are in the way of evictions.
    pub calm: bool,
    /// What it has decided by since it leads, and the version of each node that it was shown last.
    pub planner: Option<(Planner, BTreeMap<String, u64>)>,
}

impl Leader {
    pub fn new(id: usize) -> Self {
        Self {
            id,
            alive: true,
            until: None,
            fence: 0,
            observed: (0, 0),
            seen: BTreeMap::new(),
            wrote: BTreeMap::new(),
            tasks: BTreeMap::new(),
            calm: false,
            planner: None,
        }
    }

    /// Ends as by a kill: nothing is released, and what was on its way may still arrive until the lease's end.
    pub fn crash(&mut self, store: &mut Store, random: &mut Random) {
        for (node, task) in std::mem::take(&mut self.tasks) {
            if let Stage::Write { patch, expected, .. } = task.stage
                && random.chance(500)
            {
                store.merge(Writer::Coordinator, &node, Some(expected), &patch);
            }
        }
        *self = Self { alive: false, observed: self.observed, ..Self::new(self.id) };
    }

    /// Its tasks end with its leadership.
    fn depose(&mut self) {
        self.until = None;
        self.tasks.clear();
        self.planner = None;
    }

    fn bound(&self, now: u64) -> Option<u64> {
        self.until.filter(|until| now + MARGIN < *until)
    }

    /// Takes or renews the leadership. `partitioned`: can't reach the API server.
    fn lead(&mut self, lease: &mut Lease, store: &Store, now: u64, partitioned: bool) {
        if self.until.is_some_and(|until| until <= now) {
            self.depose();
        }
        if partitioned {
            return;
        }
        if self.observed.0 != lease.renewals {
            self.observed = (lease.renewals, now);
        }
        if self.until.is_some() {
            if lease.holder == Some(self.id) {
                lease.renewals += 1;
                self.until = Some(now + DURATION);
            } else {
                self.depose();
            }
        } else if lease.holder.is_none() || now - self.observed.1 >= DURATION {
            lease.holder = Some(self.id);
            lease.transitions += 1;
            lease.renewals += 1;
            self.until = Some(now + DURATION);
            self.fence = lease.transitions;
            // The list that a watch begins with is what the API server has then.
            self.seen = store.nodes.iter().map(|(name, history)| (name.clone(), history.len() - 1)).collect();
            self.wrote.clear();
            self.planner = None;
        }
    }

    /// One step: the leadership, then either a look at everything or one stage of one task.
    #[allow(clippy::too_many_arguments, reason = "the world is what it is")]
    pub fn step(
        &mut self,
        lease: &mut Lease,
        store: &mut Store,
        policy: &Policy,
        request: Option<Request>,
        now: u64,
        wall: Timestamp,
        partitioned: bool,
        random: &mut Random,
    ) {
        if !self.alive {
            self.alive = true;
            return;
        }
        self.lead(lease, store, now, partitioned);
        if self.until.is_none() || partitioned {
            return;
        }
        for (name, seen) in &mut self.seen {
            let newest = store.nodes[name].len() - 1;
            *seen += random.below(newest - *seen + 1);
        }
        if !self.tasks.is_empty() && random.chance(700) {
            let names: Vec<&String> = self.tasks.keys().collect();
            let name = names[random.below(names.len())].clone();
            self.go_on(&name, store, request, now, wall, random);
            if let Some((planner, _)) = self.planner.as_mut().filter(|_| !self.tasks.contains_key(&name)) {
                planner.ended(&name);
            }
        } else {
            self.look(store, policy, request, now, wall);
        }
    }

    pub fn catch_up(&mut self, store: &Store) {
        for (name, seen) in &mut self.seen {
            *seen = store.nodes[name].len() - 1;
        }
    }

    pub fn end(&self) -> Option<End> {
        self.planner.as_ref().and_then(|(planner, _)| planner.end())
    }

    /// The newest of what was seen and what was written, as the program keeps them.
    fn facts(&self, store: &Store) -> Vec<Arc<NodeFacts>> {
        self.seen
            .iter()
            .map(|(name, seen)| {
                let history = &store.nodes[name];
                let wrote = self.wrote.get(name).copied().unwrap_or(0);
                let seen = &history[*seen];
                let object = if wrote > seen.version {
                    history.iter().find(|object| object.version == wrote).unwrap()
                } else {
                    seen
                };
                Arc::new(object.facts(name))
            })
            .collect()
    }

    fn look(&mut self, store: &Store, policy: &Policy, request: Option<Request>, now: u64, wall: Timestamp) {
        let nodes = self.facts(store);
        let (planner, shown) =
            self.planner.get_or_insert_with(|| (Planner::new(policy, None), BTreeMap::new()));
        for node in &nodes {
            let version = node.version.parse().unwrap();
            if shown.insert(node.name.clone(), version) != Some(version) {
                planner.see(node.name.clone(), Some(Arc::clone(node)));
            }
        }
        let own = Duration::from_millis(now);
        planner.look(request, Moment { wall, own });
        // What looks at what has changed decides as what looks at everything does.
        let leased_for =
            nodes.iter().filter_map(|node| Some((node.name.clone(), planner.leased_for(&node.name, own)?)));
        let leased_for = leased_for.collect();
        let busy = planner.busy().clone();
        let known = Known { nodes: &nodes, own: None, leased_for: &leased_for, busy: &busy, request };
        let mut plan = plan(&known, policy, wall);
        assert_eq!((planner.done(), planner.alarms()), (plan.done, plan.alarms.clone()));
        assert_eq!(planner.end(), plan.end().filter(|_| busy.is_empty()));
        plan.actions.retain(|action| !busy.contains_key(&action.node));
        let actions = planner.start();
        assert_eq!(actions, plan.actions);
        for action in actions {
            let task = Task { step: action.step, stage: Stage::Read, written: 0 };
            assert!(self.tasks.insert(action.node, task).is_none());
        }
    }

    fn go_on(
        &mut self,
        name: &str,
        store: &mut Store,
        request: Option<Request>,
        now: u64,
        wall: Timestamp,
        random: &mut Random,
    ) {
        let Some(mut task) = self.tasks.remove(name) else { return };
        match task.stage {
            Stage::Read => {
                let object = store.now(name);
                let wanted = self.patch(&task, &object.facts(name), request, wall, random);
                let Some(bound) = self.bound(now) else { return };
                if let Some(patch) = wanted {
                    task.stage = Stage::Write { patch, expected: object.version, until: bound };
                    self.tasks.insert(name.to_owned(), task);
                }
            }
            Stage::Write { ref patch, expected, until } => {
                if now < until && store.merge(Writer::Coordinator, name, Some(expected), patch) {
                    self.wrote.insert(name.to_owned(), store.now(name).version);
                    task.written += 1;
                }
                task.stage = Stage::Read;
                self.tasks.insert(name.to_owned(), task);
            }
        }
    }

    /// What the step's effects write, by the functions that the program writes with.
    fn patch(
        &self,
        task: &Task,
        now: &NodeFacts,
        request: Option<Request>,
        wall: Timestamp,
        random: &mut Random,
    ) -> Option<Value> {
        let answered = |state: State| {
            let view = &now.view;
            (view.answered() == Some(state)).then(|| view.granted().map(|grant| grant.epoch)).flatten()
        };
        let failure = |epoch: Epoch, touched: bool| {
            let mut failure = patch::failure(&now.view, epoch, touched, "R", "m");
            failure.retry_after = wall + back_off(failure.count);
            Some(failure)
        };
        match &task.step {
            Step::Grant { epoch, goal, strategy: _ } => {
                let strategy = Strategy::InPlace;
                let grant = Grant { fence: self.fence, strategy, keep_seconds: 0, ..grant(*epoch, *goal) };
                patch::granted(now, &grant)
            }
            Step::CallOff => patch::withdrawn(now, now.view.granted()?.epoch, None),
            Step::Clear if task.written == 0 => patch::cordoned(now, answered(State::Prepared)?, true)
                .or_else(|| {
                    patch::cleared(now, answered(State::Prepared)?)
                        .filter(|_| now.view.network.get() != Some(&Network::None))
                }),
            Step::Clear => {
                let epoch = answered(State::Prepared)?;
                if now.view.network.get() != Some(&Network::Flannel) {
                    return None;
                }
                if !self.calm && random.chance(100) {
                    return patch::withdrawn(now, epoch, failure(epoch, false));
                }
                let unwanted = matches!(request, Some(Request::Abort | Request::Rollback));
                if unwanted { patch::withdrawn(now, epoch, None) } else { patch::cleared(now, epoch) }
            }
            Step::Register if task.written == 0 => patch::registered(now, answered(State::Verifying)?),
            Step::Retreat => patch::retreated(now),
            Step::GiveBack => {
                let epoch = answered(State::Flannel)?;
                let migrate = now.view.granted()?.goal == Goal::Migrate;
                let touched = now.view.network.get() != Some(&Network::Flannel);
                if migrate {
                    return patch::given_back(now, epoch, failure(epoch, touched));
                }
                patch::returned(now, epoch).or_else(|| patch::given_back(now, epoch, None))
            }
            Step::Settle => {
                let epoch = answered(State::Calico)?;
                patch::reopened(now, epoch).or_else(|| patch::settled(now, epoch))
            }
            Step::Relabel(network) => patch::relabelled(now, *network),
            Step::Register | Step::Enrol => None,
        }
    }
}
