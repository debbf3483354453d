//! The coordinator's figures.

use std::sync::Arc;
use std::time::Duration;

use flannel_migration_protocol::State;
use flannel_migration_telemetry::{CountCalls, build};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::status::{Phase, Status};

/// Prefix of every name.
pub const PREFIX: &str = "flannel_migration";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByState {
    state: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPhase {
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByNode {
    node: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByReason {
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByStep {
    step: &'static str,
}

/// All of them. Copies count together.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Calls to the API server.
    pub calls: CountCalls,
    families: Arc<Families>,
}

#[derive(Debug)]
struct Families {
    phase: Family<ByPhase, Gauge>,
    nodes: Family<ByState, Gauge>,
    done: Gauge,
    total: Gauge,
    leases: Family<ByNode, Gauge>,
    alarms: Family<ByReason, Gauge>,
    findings: Family<ByReason, Gauge>,
    leading: Gauge,
    adopted: Counter,
    evicted: Counter,
    failures: Family<ByReason, Counter>,
    step_errors: Family<ByReason, Counter>,
    steps: Family<ByStep, Histogram, fn() -> Histogram>,
    node: Histogram,
}

impl Metrics {
    /// Registers them.
    #[must_use]
    pub fn registered(registry: &mut Registry) -> Self {
        // From 50 ms to 27 minutes: a step may wait for evictions.
        let seconds = || Histogram::new(exponential_buckets(0.05, 2.0, 16));
        let this = Families {
            phase: Family::default(),
            nodes: Family::default(),
            done: Gauge::default(),
            total: Gauge::default(),
            leases: Family::default(),
            alarms: Family::default(),
            findings: Family::default(),
            leading: Gauge::default(),
            adopted: Counter::default(),
            evicted: Counter::default(),
            failures: Family::default(),
            step_errors: Family::default(),
            steps: Family::new_with_constructor(seconds),
            node: seconds(),
        };
        build::register(registry, env!("CARGO_PKG_VERSION"));
        registry.register("phase", "1 for the phase that the migration is in", this.phase.clone());
        registry.register("nodes", "Nodes by their agents' state", this.nodes.clone());
        registry.register("nodes_done", "Nodes that are migrated and back at work", this.done.clone());
        registry.register("nodes_known", "Nodes that are to be migrated in all", this.total.clone());
        registry.register_with_unit(
            "lease_granted_timestamp",
            "When the lease in force was granted, since the epoch, by node",
            Unit::Seconds,
            this.leases.clone(),
        );
        registry.register("alarms", "What a person must look at, by reason", this.alarms.clone());
        registry.register("findings", "What is in the way of the start, by reason", this.findings.clone());
        registry.register("leading", "Whether this coordinator leads", this.leading.clone());
        registry.register("pods_adopted", "Pods taken over with their address", this.adopted.clone());
        registry.register("pods_evicted", "Pods evicted for a switch", this.evicted.clone());
        registry.register("node_failures", "Attempts at nodes that failed, by reason", this.failures.clone());
        registry.register(
            "step_errors",
            "Steps that were not completed and are decided anew, by reason",
            this.step_errors.clone(),
        );
        registry.register_with_unit(
            "step_duration",
            "How long the coordinator's steps took",
            Unit::Seconds,
            this.steps.clone(),
        );
        registry.register_with_unit(
            "node_duration",
            "From a node's lease to its return to work",
            Unit::Seconds,
            this.node.clone(),
        );
        Self { calls: CountCalls::registered(registry), families: Arc::new(this) }
    }

    /// What is seen now.
    pub fn see(&self, status: &Status, leading: bool) {
        let figures = &self.families;
        for phase in Phase::ALL {
            figures
                .phase
                .get_or_create(&ByPhase { phase: phase.as_str() })
                .set(i64::from(phase == status.phase));
        }
        let known = State::ALL.iter().map(|state| state.as_str()).chain(["none"]);
        for state in known {
            let here = |own: &Option<String>| own.as_deref().unwrap_or("none") == state;
            let count = status.nodes.iter().filter(|node| here(&node.state)).count();
            figures.nodes.get_or_create(&ByState { state: state.to_owned() }).set(number(count));
        }
        figures.done.set(number(status.progress.done));
        figures.total.set(number(status.progress.total));
        figures.leading.set(i64::from(leading));
        figures.leases.clear();
        for node in status.nodes.iter().filter(|node| node.lease.is_some()) {
            if let Some(at) = node.leased_at {
                figures.leases.get_or_create(&ByNode { node: node.node.clone() }).set(at.as_second());
            }
        }
        by_reason(&figures.alarms, status.alarms.iter().map(|alarm| &alarm.reason));
        let blocking = status
            .findings
            .iter()
            .filter(|finding| ["fatal", "blocking"].contains(&finding.severity.as_str()));
        by_reason(&figures.findings, blocking.map(|finding| &finding.reason));
    }

    /// A node was migrated.
    pub fn node_done(&self, took: Option<Duration>, adopted: usize) {
        self.families.adopted.inc_by(u64::try_from(adopted).unwrap_or(0));
        if let Some(took) = took {
            self.families.node.observe(took.as_secs_f64());
        }
    }

    /// Pods were evicted.
    pub fn pods_evicted(&self, count: usize) {
        self.families.evicted.inc_by(u64::try_from(count).unwrap_or(0));
    }

    /// An attempt at a node failed.
    pub fn node_failed(&self, reason: &str) {
        self.families.failures.get_or_create(&ByReason { reason: reason.to_owned() }).inc();
    }

    /// A step ended, with the reason if it wasn't completed.
    pub fn step_ended(&self, step: &'static str, took: Duration, error: Option<&'static str>) {
        self.families.steps.get_or_create(&ByStep { step }).observe(took.as_secs_f64());
        if let Some(reason) = error {
            self.families.step_errors.get_or_create(&ByReason { reason: reason.to_owned() }).inc();
        }
    }
}

fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn by_reason<'a>(family: &Family<ByReason, Gauge>, reasons: impl Iterator<Item = &'a String>) {
    family.clear();
    for reason in reasons {
        family.get_or_create(&ByReason { reason: reason.clone() }).inc();
    }
}
