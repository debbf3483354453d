//! The protocol under faults: simulated agents and two coordinators, whose decisions and patches are the programs' own, over an object
//! store, with crashes between any two writes, late watches and writes, lost leadership, reboots, clock jumps, keys spoilt by hand, and
//! an administrator who changes his mind.
//!
//! `MODEL_SCHEDULES=100000 cargo test --profile bed -p flannel-migration-coordinator --test model` runs that many schedules;
//! `MODEL_SEED=n` repeats one, which a failure names, and prints every version of every node.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test ends by panicking"
)]

#[path = "model/grant.rs"]
mod grant;
#[path = "model/leader.rs"]
mod leader;
#[path = "model/node.rs"]
mod node;
#[path = "model/random.rs"]
mod random;
#[path = "model/store.rs"]
mod store;

use flannel_migration_agent::journal::{Entry, Journal};
use flannel_migration_coordinator::args::{Cli, Policy};
use flannel_migration_coordinator::plan::End;
use flannel_migration_protocol::{Request, State, keys};
use jiff::Timestamp;

use leader::{DURATION, Leader, Lease};
use node::{Faults, Node};
use random::Random;
use store::Store;

/// Schedules when nobody says how many: some seconds.
const SCHEDULES: u64 = 1_000;
/// Steps of a schedule with faults, and most steps that everything may take to come to rest without.
const STEPS: usize = 260;
const REST: usize = 6_000;

struct World {
    random: Random,
    store: Store,
    nodes: Vec<Node>,
    leaders: Vec<Leader>,
    lease: Lease,
    request: Option<Request>,
    policy: Policy,
    max: usize,
    /// Milliseconds since the start, by no one's clock.
    now: u64,
    /// How far each wall clock is off, in seconds: the coordinators', then the nodes'.
    off: Vec<i64>,
    partitioned: Option<(usize, u64)>,
    /// A key was changed by a hand that isn't its writer's: the count of slots may be wrong, the hosts may not.
    tampered: bool,
}

impl World {
    fn new(seed: u64, fresh: &Entry) -> Self {
        let mut random = Random(seed);
        let names: Vec<String> = (1..=2 + random.below(3)).map(|i| format!("n{i}")).collect();
        let max = 1 + random.below(2);
        let policy = <Cli as clap::Parser>::parse_from([
            "coordinator",
            "--max-unavailable",
            &max.to_string(),
            "--max-failures",
            "100",
        ])
        .options
        .policy;
        Self {
            store: Store::new(&names, number("MODEL_SEED").is_some()),
            nodes: names.iter().map(|name| Node::new(name, fresh)).collect(),
            leaders: (0..2).map(Leader::new).collect(),
            lease: Lease::default(),
            request: None,
            policy,
            max,
            now: 0,
            off: vec![0; 2 + names.len()],
            partitioned: None,
            tampered: false,
            random,
        }
    }

    fn wall(&self, whose: usize) -> Timestamp {
        let at = 1_000_000 + i64::try_from(self.now / 1000).unwrap() + self.off[whose];
        Timestamp::from_second(at).unwrap()
    }

    fn step(&mut self, faults: Option<Faults>) {
        let calm = Faults { crash: 0, failure: 0, lost_write: 0 };
        self.now += self.random.next() % if faults.is_some() { 1500 } else { 200 };
        let (nodes, leaders) = (self.nodes.len(), self.leaders.len());
        match self.random.below(10) {
            0..4 => {
                let i = self.random.below(nodes);
                let wall = self.wall(2 + i);
                self.nodes[i].watch(&self.store, &mut self.random);
                if faults.is_none() {
                    self.nodes[i].catch_up(&self.store);
                }
                self.nodes[i].step(&mut self.store, wall, faults.unwrap_or(calm), &mut self.random);
            }
            4..9 => {
                let i = self.random.below(leaders);
                let wall = self.wall(i);
                let partitioned = self.partitioned.is_some_and(|(who, until)| who == i && self.now < until);
                if faults.is_none() {
                    self.leaders[i].catch_up(&self.store);
                    self.leaders[i].calm = true;
                }
                self.leaders[i].step(
                    &mut self.lease,
                    &mut self.store,
                    &self.policy,
                    self.request,
                    self.now,
                    wall,
                    partitioned,
                    &mut self.random,
                );
            }
            _ => {
                let i = self.random.below(nodes);
                self.nodes[i].follow(&self.store);
            }
        }
        if faults.is_some() {
            self.trouble();
        }
        self.check();
    }

    /// What happens to machines, clocks and people.
    fn trouble(&mut self) {
        let i = self.random.below(self.nodes.len());
        let name = self.nodes[i].name.clone();
        match self.random.below(600) {
            0..8 => {
                let who = self.random.below(2);
                self.leaders[who].crash(&mut self.store, &mut self.random);
            }
            8..12 => {
                self.partitioned =
                    Some((self.random.below(2), self.now + self.random.next() % (3 * DURATION)));
            }
            12..16 => self.nodes[i].reboot(&self.store),
            16..20 => {
                let who = self.random.below(self.off.len());
                self.off[who] = i64::try_from(self.random.below(7200)).unwrap() - 3600;
            }
            20..26 => {
                self.request =
                    [None, None, Some(Request::Pause), Some(Request::Abort), Some(Request::Rollback)]
                        [self.random.below(5)];
            }
            26..30 => self.store.edit(&name, |node| node.ready = !node.ready),
            30..33 => {
                let asked = ["pause", "abort", "rollback"][self.random.below(3)];
                self.store
                    .edit(&name, |node| drop(node.annotations.insert(keys::REQUEST.into(), asked.into())));
            }
            33..36 => self.store.edit(&name, |node| drop(node.annotations.remove(keys::REQUEST))),
            36 => {
                self.tampered = true;
                let key = [keys::LEASE, keys::STATE, keys::NETWORK][self.random.below(3)];
                self.store.edit(&name, |node| drop(node.labels.insert(key.into(), "nonsense".into())));
            }
            37 => {
                self.tampered = true;
                self.store.edit(&name, |node| {
                    node.labels.remove(keys::LEASE);
                    node.annotations.remove(keys::GRANT);
                });
            }
            38 => self
                .store
                .edit(&name, |node| drop(node.annotations.insert(keys::FAILURES.into(), "{".into()))),
            _ => {}
        }
    }

    fn check(&self) {
        // Invariant 1. A slot that was free when it was given stays counted whatever its node's readiness does later.
        let used = self.nodes.iter().filter(|node| self.store.now(&node.name).view().slot_used()).count();
        assert!(self.tampered || used <= self.max, "{used} slots used of {}", self.max);
        let changing =
            self.nodes.iter().filter(|node| !node.disk.state.at_rest() && node.is_changed()).count();
        assert!(
            self.tampered || changing <= self.max,
            "{changing} hosts between two networks, allowed are {}",
            self.max
        );
        for node in &self.nodes {
            node.check();
        }
    }

    /// A person corrects what a person spoilt, as the alarms say; the agents correct their own.
    fn repair(&mut self) {
        self.partitioned = None;
        self.off.fill(0);
        for node in &self.nodes {
            let view = self.store.now(&node.name).view().clone();
            self.store.edit(&node.name, |object| {
                object.ready = true;
                object.annotations.remove(keys::REQUEST);
                for malformed in view.malformed() {
                    object.annotations.remove(malformed.key);
                    if malformed.key == keys::NETWORK {
                        object
                            .labels
                            .insert(keys::NETWORK.into(), if node.felix { "calico" } else { "none" }.into());
                    } else {
                        object.labels.remove(malformed.key);
                    }
                }
            });
            let view = self.store.now(&node.name).view().clone();
            let lost = view.granted().is_none() && !node.disk.state.at_rest();
            let mismatch = view.granted().is_none() && !(view.lease.is_absent() && view.grant.is_absent());
            if let Some(grant) = node.disk.grant.as_ref().filter(|_| lost) {
                self.store.edit(&node.name, |object| {
                    object.labels.insert(keys::LEASE.into(), grant.epoch.to_string());
                    object.annotations.insert(keys::GRANT.into(), serde_json::to_string(grant).unwrap());
                });
            } else if mismatch {
                self.store.edit(&node.name, |object| {
                    object.labels.remove(keys::LEASE);
                    object.annotations.remove(keys::GRANT);
                });
            }
        }
    }

    /// Invariant 4: without further faults everything comes to rest where it was asked to be, but for what is stuck.
    fn settle(&mut self) {
        self.repair();
        for _ in 0..REST {
            self.step(None);
            let stuck = self.nodes.iter().any(|node| node.disk.state == State::Stuck);
            let rested = self.nodes.iter().all(|node| {
                let view = self.store.now(&node.name).view();
                node.disk.state == State::Stuck || node.disk.state.at_rest() && view.lease.is_absent()
            });
            let ended = self.leaders.iter().any(|leader| leader.end() == Some(wanted(self.request)));
            if rested && (stuck || self.request == Some(Request::Pause) || ended) {
                return;
            }
        }
        let states: Vec<_> = self
            .nodes
            .iter()
            .map(|node| {
                (node.name.clone(), node.disk.state, node.disk.epoch, self.store.now(&node.name).clone())
            })
            .collect();
        panic!(
            "no rest; {:?} is asked: {states:#?}\n{:#?}",
            self.request,
            self.leaders.iter().map(|leader| &leader.planner).collect::<Vec<_>>()
        );
    }
}

fn wanted(request: Option<Request>) -> End {
    match request {
        None | Some(Request::Pause) => End::Migrated,
        Some(Request::Abort) => End::Aborted,
        Some(Request::Rollback) => End::RolledBack,
    }
}

fn schedule(seed: u64, fresh: &Entry) {
    let mut world = World::new(seed, fresh);
    let faults = Faults { crash: 40, failure: 60, lost_write: 60 };
    for _ in 0..STEPS {
        world.step(Some(faults));
    }
    world.settle();
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{variable}={text:?} is no number")))
}

#[test]
fn whatever_fails_whenever_the_protocols_invariants_hold_and_every_node_comes_to_rest() {
    let directory = tempfile::tempdir().unwrap();
    let fresh = Journal::open(directory.path(), "n").unwrap().entry;
    let seeds: Vec<u64> = match number("MODEL_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("MODEL_SCHEDULES").unwrap_or(SCHEDULES)).collect(),
    };
    for seed in &seeds {
        let outcome = std::panic::catch_unwind(|| schedule(*seed, &fresh));
        assert!(outcome.is_ok(), "schedule {seed} broke a promise; again with MODEL_SEED={seed}");
    }
    eprintln!("{} schedules", seeds.len());
}
