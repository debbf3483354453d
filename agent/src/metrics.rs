//! The agent's figures.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use flannel_migration_protocol::State;
use flannel_migration_telemetry::{CountCalls, build};
use jiff::Timestamp;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::journal::Entry;

/// Prefix of every name.
pub const PREFIX: &str = "flannel_migration_agent";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByState {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByReason {
    reason: String,
}

/// All of them.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Calls to the API server.
    pub calls: CountCalls,
    state: Family<ByState, Gauge>,
    since: Gauge,
    epoch: Gauge,
    adopted: Gauge,
    to_evict: Gauge,
    losses: Counter,
    failures: Family<ByReason, Counter>,
    errors: Counter,
    durations: Family<ByState, Histogram, fn() -> Histogram>,
    /// The state that was last seen, and since when.
    last: Arc<Mutex<Option<(State, Timestamp)>>>,
}

impl Metrics {
    /// Registers them.
    #[must_use]
    pub fn registered(registry: &mut Registry) -> Self {
        // From 10 ms, for a switch, to 11 minutes, for evictions that are waited for.
        let seconds: fn() -> Histogram = || Histogram::new(exponential_buckets(0.01, 2.0, 17));
        let this = Self {
            calls: CountCalls::registered(registry),
            state: Family::default(),
            since: Gauge::default(),
            epoch: Gauge::default(),
            adopted: Gauge::default(),
            to_evict: Gauge::default(),
            losses: Counter::default(),
            failures: Family::default(),
            errors: Counter::default(),
            durations: Family::new_with_constructor(seconds),
            last: Arc::default(),
        };
        build::register(registry, env!("CARGO_PKG_VERSION"));
        registry.register("state", "1 for the state that the node is in", this.state.clone());
        registry.register_with_unit(
            "state_entered_timestamp",
            "When the state was entered, since the epoch",
            Unit::Seconds,
            this.since.clone(),
        );
        registry.register("epoch", "The lease that was last worked on; 0: none", this.epoch.clone());
        registry.register("pods_adopted", "Pods that are taken over now", this.adopted.clone());
        registry.register("pods_to_evict", "Pods that are to be made anew", this.to_evict.clone());
        registry.register(
            "verification_losses",
            "Probes that worked before the switch and were not answered after it",
            this.losses.clone(),
        );
        registry.register("failures", "Attempts that failed, by reason", this.failures.clone());
        registry.register("step_errors", "Steps that failed and are tried again", this.errors.clone());
        registry.register_with_unit(
            "state_duration",
            "How long the node was in each state that it has left",
            Unit::Seconds,
            this.durations.clone(),
        );
        this
    }

    /// What the journal says now. To be called at each change of the state: how long the last one lasted is counted by it.
    pub fn see(&self, entry: &Entry) {
        let last =
            self.last.lock().unwrap_or_else(PoisonError::into_inner).replace((entry.state, entry.since));
        if let Some((before, since)) = last.filter(|(before, _)| *before != entry.state) {
            self.entered(
                before,
                Duration::try_from(entry.since.duration_since(since)).unwrap_or_default(),
                entry,
            );
        }
        for state in State::ALL {
            let is = i64::from(state == entry.state);
            self.state.get_or_create(&ByState { state: state.as_str() }).set(is);
        }
        let count = |length: usize| i64::try_from(length).unwrap_or(i64::MAX);
        self.since.set(entry.since.as_second());
        self.epoch.set(entry.epoch.map_or(0, |epoch| i64::try_from(epoch.get()).unwrap_or(i64::MAX)));
        self.adopted.set(count(entry.adopted().unwrap_or_default().len()));
        self.to_evict.set(count(entry.to_evict().len()));
    }

    fn entered(&self, before: State, lasted: Duration, now: &Entry) {
        self.durations.get_or_create(&ByState { state: before.as_str() }).observe(lasted.as_secs_f64());
        // Neither a lease that was taken back nor the journal that a finished migration leaves is a failure.
        let given_up =
            now.state == State::Flannel && !["LeaseWithdrawn", "NotStarted"].contains(&now.reason.as_str());
        if matches!(now.state, State::Reverting | State::Stuck) || given_up {
            self.failures.get_or_create(&ByReason { reason: now.reason.clone() }).inc();
        }
    }

    /// So many probes were not answered.
    pub fn lost(&self, probes: usize) {
        self.losses.inc_by(u64::try_from(probes).unwrap_or(u64::MAX));
    }

    /// A step failed.
    pub fn step_failed(&self) {
        self.errors.inc();
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn a_lease_that_was_taken_back_is_no_failure() {
        let mut registry = Registry::with_prefix(PREFIX);
        let metrics = Metrics::registered(&mut registry);
        let directory = tempfile::tempdir().unwrap();
        let journal = crate::journal::Journal::open(directory.path(), "n").unwrap();
        let at = |state, reason: &str| Entry { state, reason: reason.into(), ..journal.entry.clone() };
        for (state, reason) in [
            (State::Flannel, "RpFilterNotStrict"),
            (State::Prepared, "Prepared"),
            (State::Flannel, "LeaseWithdrawn"),
            (State::Preparing, "Preparing"),
            (State::Flannel, "RpFilterNotStrict"),
            (State::Flannel, "RpFilterNotStrict"),
            (State::Switching, "Switching"),
            (State::Calico, "Migrated"),
            (State::Flannel, "NotStarted"),
            (State::Calico, "Migrated"),
        ] {
            metrics.see(&at(state, reason));
        }
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        let failures: Vec<&str> = text.lines().filter(|line| line.contains("failures_total{")).collect();
        assert_eq!(failures, ["flannel_migration_agent_failures_total{reason=\"RpFilterNotStrict\"} 1"]);
        assert!(text.contains("state_duration_seconds_count{state=\"switching\"} 1\n"), "{text}");
        assert!(text.contains("flannel_migration_agent_state{state=\"calico\"} 1\n"), "{text}");
        assert!(text.contains("flannel_migration_agent_state{state=\"flannel\"} 0\n"), "{text}");
    }
}
