//! A coordinator: its decisions and patches are the real ones; its watch, its tasks and its leadership are simulated.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use flannel_migration_coordinator::args::Policy;
use flannel_migration_coordinator::cluster::NodeFacts;
use flannel_migration_coordinator::patch;
use flannel_migration_coordinator::plan::{End, Known, Plan, Step, back_off, plan};
use flannel_migration_protocol::{
    CalicoFacts, Epoch, FlannelFacts, Goal, Grant, Network, Request, State, Writer,
};
use jiff::Timestamp;
use serde_json::Value;

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
    leased: BTreeMap<String, (Epoch, u64)>,
    tasks: BTreeMap<String, Task>,
    /// No more budgets are in the way of evictions.
    pub calm: bool,
    pub last: Option<Plan>,
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
            leased: BTreeMap::new(),
            tasks: BTreeMap::new(),
            calm: false,
            last: None,
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

    fn bound(&self, now: u64) -> Option<u64> {
        self.until.filter(|until| now + MARGIN < *until)
    }

    /// Takes or renews the leadership. `partitioned`: can't reach the API server.
    fn lead(&mut self, lease: &mut Lease, store: &Store, now: u64, partitioned: bool) {
        if self.until.is_some_and(|until| until <= now) {
            // Its tasks end with it.
            self.until = None;
            self.tasks.clear();
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
                self.until = None;
                self.tasks.clear();
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
            self.leased.clear();
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
        self.last.as_ref().filter(|_| self.tasks.is_empty()).and_then(Plan::end)
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
        for node in &nodes {
            match node.view.lease.get() {
                Some(epoch) if self.leased.get(&node.name).is_none_or(|(known, _)| known != epoch) => {
                    self.leased.insert(node.name.clone(), (*epoch, now));
                }
                Some(_) => {}
                None => drop(self.leased.remove(&node.name)),
            }
        }
        let leased_for = self
            .leased
            .iter()
            .map(|(node, (_, since))| (node.clone(), Duration::from_millis(now - since)))
            .collect();
        let granting = self.tasks.iter().filter(|(_, task)| matches!(task.step, Step::Grant { .. }));
        let granting = granting.map(|(node, _)| node.clone()).collect();
        let known = Known { nodes: &nodes, own: None, leased_for: &leased_for, granting: &granting, request };
        let plan = plan(&known, policy, wall);
        for action in &plan.actions {
            let task = Task { step: action.step.clone(), stage: Stage::Read, written: 0 };
            self.tasks.entry(action.node.clone()).or_insert(task);
        }
        self.last = Some(plan);
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
                patch::granted(now, &grant(*epoch, self.fence, *goal))
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
            Step::Settle => patch::settled(now, answered(State::Calico)?),
            Step::Relabel(network) => patch::relabelled(now, *network),
            Step::Register | Step::Enrol => None,
        }
    }
}

fn grant(epoch: Epoch, fence: u64, goal: Goal) -> Grant {
    Grant {
        epoch,
        fence,
        goal,
        strategy: flannel_migration_protocol::Strategy::InPlace,
        budget_seconds: 120,
        keep_seconds: 0,
        flannel: FlannelFacts {
            networks: vec![],
            vni: 1,
            port: 8472,
            mtu: 1450,
            cni_conf_dir: String::new(),
            canal: false,
        },
        calico: CalicoFacts {
            cni_conf_name: String::new(),
            cni_conf_template: String::new(),
            mtu: 1450,
            health_port: 9099,
            kube_service_address: String::new(),
        },
    }
}
