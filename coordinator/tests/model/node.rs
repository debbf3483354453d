//! One node: its kernel, whose changes survive the agent's process but not a reboot; its disk, which survives both; and the agent, whose
//! decisions are the real ones.

use std::collections::BTreeSet;

use flannel_migration_agent::decide::{Felix, Next, Observed, decide};
use flannel_migration_agent::journal::{Captured, Entry, Progress};
use flannel_migration_agent::steps::Op;
use flannel_migration_protocol::{Epoch, Goal, Grant, Network, NodeView, Report, State, Writer, keys};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::random::Random;
use super::store::Store;

/// How faults are dealt out to a node, per mille of its steps.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    pub crash: u64,
    pub failure: u64,
    pub lost_write: u64,
}

pub struct Node {
    pub name: String,
    /// What the disk holds. Everything the agent knows after a crash.
    pub disk: Entry,
    /// Operations whose change is in the kernel.
    pub changed: BTreeSet<Op>,
    pub flanneld: bool,
    pub felix: bool,
    alive: bool,
    /// Index of the version last seen; `None` before the first.
    seen: Option<usize>,
    /// A write that the API server may still take, after the agent has given up on it; and of which version.
    late: Option<(Value, u64)>,
    pub begun: Option<Epoch>,
}

impl Node {
    pub fn new(name: &str, entry: &Entry) -> Self {
        Self {
            name: name.to_owned(),
            disk: entry.clone(),
            changed: BTreeSet::new(),
            flanneld: true,
            felix: false,
            alive: true,
            seen: None,
            late: None,
            begun: None,
        }
    }

    /// The DaemonSets' pods follow the network label, some time later.
    pub fn follow(&mut self, store: &Store) {
        let network = store.now(&self.name).view().network.get().copied();
        self.flanneld = network == Some(Network::Flannel);
        self.felix = network == Some(Network::Calico);
    }

    pub fn watch(&mut self, store: &Store, random: &mut Random) {
        let newest = store.nodes[&self.name].len() - 1;
        let from = self.seen.unwrap_or(0);
        self.seen = Some(from + random.below(newest - from + 1));
    }

    pub fn catch_up(&mut self, store: &Store) {
        self.seen = Some(store.nodes[&self.name].len() - 1);
    }

    pub fn crash(&mut self) {
        self.alive = false;
        self.seen = None;
    }

    /// What was in the kernel is gone; files are not.
    pub fn reboot(&mut self, store: &Store) {
        self.crash();
        self.changed.retain(|op| matches!(op, Op::SwapConfig | Op::RemoveFiles));
        self.disk.progress.retain(|(op, _)| matches!(op, Op::SwapConfig | Op::RemoveFiles));
        self.follow(store);
        if matches!(self.disk.state, State::Switching | State::Stuck) {
            self.undo();
        }
    }

    fn undo(&mut self) {
        self.changed.clear();
        self.disk.progress.clear();
        self.disk.captured = None;
        self.disk.switched = None;
        self.enter(State::Flannel, "Undone");
    }

    fn enter(&mut self, state: State, reason: &str) {
        assert!(self.disk.state.may_become(state), "{} -> {state} ({reason})", self.disk.state);
        self.disk.state = state;
        reason.clone_into(&mut self.disk.reason);
    }

    fn begin(&mut self, grant: &Grant) {
        // Invariant 2: never an epoch again that was begun, or one before it.
        assert!(
            self.begun.is_none_or(|begun| begun < grant.epoch)
                || self.begun == self.disk.epoch && self.begun == Some(grant.epoch)
        );
        assert!(self.disk.fence <= grant.fence, "a lower fence was obeyed");
        self.begun = Some(grant.epoch);
        self.disk.epoch = Some(grant.epoch);
        self.disk.fence = grant.fence;
        self.disk.switched = None;
        self.disk.grant = Some(grant.clone());
    }

    /// One step of the agent: as much as happens between two moments at which it may die.
    pub fn step(&mut self, store: &mut Store, wall: Timestamp, faults: Faults, random: &mut Random) {
        if !self.alive {
            self.alive = true;
            return;
        }
        if let Some((late, expected)) = self.late.take_if(|_| random.chance(300)) {
            store.merge(Writer::Agent, &self.name, Some(expected), &late);
        }
        let view = match self.seen {
            Some(seen) => store.nodes[&self.name][seen].view().clone(),
            None => NodeView::default(),
        };
        let felix = if self.felix { Felix::Ready } else { Felix::Gone };
        let observed = Observed {
            view: view.clone(),
            flanneld: self.flanneld,
            flannel_here: true,
            flannel_files: false,
            kept_in_use: false,
            felix,
            now: wall,
        };
        let next = decide(&self.disk, &observed);
        if self.seen.is_none() && !(next == Next::Switch && self.disk.state == State::Switching) {
            return;
        }
        self.act(next, wall, faults, random);
        if random.chance(faults.crash) {
            self.crash();
            return;
        }
        self.publish(store, &view, faults, random);
    }

    fn act(&mut self, next: Next, wall: Timestamp, faults: Faults, random: &mut Random) {
        match next {
            Next::Wait(_) => {}
            Next::Prepare(grant) => {
                if self.disk.state != State::Preparing || self.disk.epoch != Some(grant.epoch) {
                    assert_eq!(grant.goal, Goal::Migrate);
                    self.begin(&grant);
                    // From `prepared` of an earlier lease it is the same node again, with nothing changed.
                    self.disk.state = State::Flannel;
                    self.enter(State::Preparing, "Preparing");
                } else if random.chance(faults.failure) {
                    self.enter(State::Flannel, "NotFit");
                } else {
                    self.disk.captured = Some(Captured::default());
                    self.enter(State::Prepared, "Prepared");
                }
            }
            Next::Withdraw => {
                self.disk.captured = None;
                self.enter(State::Flannel, "LeaseWithdrawn");
            }
            Next::Switch if self.disk.state == State::Prepared => {
                self.disk.switched = Some(wall);
                self.enter(State::Switching, "Switching");
            }
            Next::Switch => match self.unfinished(&Op::SWITCH) {
                Some(_) if random.chance(faults.failure) => self.back_out(random),
                Some(op) => self.apply(op),
                None => self.enter(State::Verifying, "Switched"),
            },
            Next::Verify => match self.unfinished(&Op::CLEAN) {
                Some(op) => self.apply(op),
                None if random.chance(faults.failure) => self.enter(State::Verifying, "TrafficMissing"),
                None => {
                    self.disk.switched = None;
                    self.enter(State::Calico, "Migrated");
                }
            },
            Next::Revert(reason, _) => self.enter(State::Reverting, reason),
            Next::RollBack(grant) => {
                self.begin(&grant);
                self.enter(State::Reverting, "RollbackGranted");
            }
            Next::Undo => {
                assert!(!self.felix, "undone under Felix");
                self.back_out(random);
            }
            Next::Answer(grant) => {
                self.begin(&grant);
            }
            Next::Join | Next::Sweep | Next::LetGo | Next::Finish => {
                panic!("{next:?} in a cluster that flannel runs")
            }
        }
    }

    /// One operation undone at a time would be more states than there are: a crash within is covered by each operation's own idempotence.
    fn back_out(&mut self, random: &mut Random) {
        if random.chance(5) {
            self.enter(State::Stuck, "UndoFailed");
        } else {
            self.undo();
        }
    }

    fn unfinished(&self, ops: &[Op]) -> Option<Op> {
        ops.iter().copied().find(|op| !self.disk.progress.contains(&(*op, Progress::Done)))
    }

    /// First noted, then changed, then noted as done; the agent may die between any two.
    fn apply(&mut self, op: Op) {
        let noted = self.disk.progress.contains(&(op, Progress::Begun));
        if !noted {
            self.disk.progress.push((op, Progress::Begun));
        } else if self.changed.insert(op) {
            // Invariant 3: durable before changed.
            assert!(
                self.disk.captured.is_some()
                    && matches!(self.disk.state, State::Switching | State::Verifying)
            );
            assert!(!self.flanneld || self.disk.state != State::Switching, "switched under flanneld");
        } else {
            self.disk.progress.retain(|(other, _)| *other != op);
            self.disk.progress.push((op, Progress::Done));
        }
    }

    fn publish(&mut self, store: &mut Store, view: &NodeView, faults: Faults, random: &mut Random) {
        let report = Report {
            epoch: self.disk.epoch,
            state: self.disk.state,
            step: String::new(),
            since: Timestamp::UNIX_EPOCH,
            reason: self.disk.reason.clone(),
            message: String::new(),
            evict: Vec::new(),
            host: None,
        };
        if view.state.get() == Some(&self.disk.state) && view.report.get() == Some(&report) {
            return;
        }
        let adopted = matches!(self.disk.state, State::Verifying | State::Calico | State::Reverting)
            .then(|| "[]".to_owned());
        let patch = json!({ "metadata": {
            "labels": { keys::STATE: self.disk.state.as_str() },
            "annotations": { keys::REPORT: json!(report).to_string(), keys::ADOPTED: adopted },
        } });
        let Some(expected) = self.seen.map(|seen| store.nodes[&self.name][seen].version) else { return };
        if random.chance(faults.lost_write) {
            self.late = Some((patch, expected));
        } else {
            store.merge(Writer::Agent, &self.name, Some(expected), &patch);
        }
    }

    /// Whether anything on the host is changed.
    pub fn is_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// What the state promises about the host.
    pub fn check(&self) {
        match self.disk.state {
            State::Flannel | State::Preparing | State::Prepared => {
                assert!(
                    !self.is_changed(),
                    "{}: {} with {:?} changed",
                    self.name,
                    self.disk.state,
                    self.changed
                );
            }
            State::Verifying | State::Calico => {
                let files = |op: &&Op| matches!(op, Op::SwapConfig);
                assert!(
                    Op::SWITCH.iter().filter(files).all(|op| self.changed.contains(op)),
                    "{}: {}",
                    self.name,
                    self.disk.state
                );
            }
            State::Switching | State::Reverting | State::Stuck => {}
        }
    }
}
