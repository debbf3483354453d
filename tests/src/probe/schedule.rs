//! When probes are due, and how well the prober itself keeps to that. Pure.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The prober's own resolution: what it can't see because it did not run. A tick is one turn of a part of the flows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resolution {
    /// Ticks that were due.
    pub ticks: u64,
    /// Ticks handled more than one interval late.
    pub late_ticks: u64,
    /// Probes left out because the next one of their flow was due already; they count neither as sent nor as lost.
    pub skipped_probes: u64,
    /// The latest tick, in milliseconds.
    pub max_late_ms: f64,
    /// Whether the prober's thread runs with real-time priority.
    pub realtime: bool,
    /// Processor time of the prober's thread as a share of one core, in per cent.
    pub cpu_percent: f64,
}

/// Absolute ticks: the flows are dealt into groups, one group every `step`, so that packets don't leave in one burst
/// and each flow still has its turn exactly once an interval.
#[derive(Clone, Debug)]
pub struct Schedule {
    step: Duration,
    groups: u64,
    done: u64,
}

/// The ticks that are due at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    /// Groups whose turn it is, each once.
    pub groups: Vec<u64>,
    /// Groups whose turn was missed, once for each.
    pub skipped: Vec<u64>,
    /// How late the oldest tick is.
    pub lateness: Duration,
    /// Number of ticks that are more than one interval late.
    pub late: u64,
}

/// No group comes closer upon another than this.
const STEP: Duration = Duration::from_millis(2);

impl Schedule {
    /// A schedule in which every flow has its turn once an interval.
    #[must_use]
    pub fn new(interval: Duration) -> Self {
        let groups = u64::try_from(interval.as_nanos() / STEP.as_nanos()).unwrap_or(1).max(1);
        let step = interval / u32::try_from(groups).unwrap_or(1);
        Self { step, groups, done: 0 }
    }

    /// Time from one tick to the next.
    #[must_use]
    pub fn step(&self) -> Duration {
        self.step
    }

    /// The group of a flow.
    #[must_use]
    pub fn group_of(&self, flow: usize) -> u64 {
        flow as u64 % self.groups
    }

    /// Takes the ticks that are due at `now`, counted from the schedule's start.
    pub fn take(&mut self, now: Duration) -> Option<Due> {
        let due = u64::try_from(now.as_nanos() / self.step.as_nanos().max(1)).unwrap_or(u64::MAX);
        let first = self.done + 1;
        if due < first {
            return None;
        }
        self.done = due;
        let cycle = due.saturating_sub(self.groups) + 1;
        let group = |tick: u64| tick % self.groups;
        let lateness = now.saturating_sub(self.at(first));
        let interval = self.at(self.groups);
        let late = if lateness > interval {
            (first..=due).take_while(|tick| now.saturating_sub(self.at(*tick)) > interval).count() as u64
        } else {
            0
        };
        Some(Due {
            groups: (first.max(cycle)..=due).map(group).collect(),
            skipped: (first..cycle.max(first)).map(group).collect(),
            lateness,
            late,
        })
    }

    fn at(&self, tick: u64) -> Duration {
        self.step.saturating_mul(u32::try_from(tick).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    #[test]
    fn every_flow_has_its_turn_once_an_interval() {
        let mut schedule = Schedule::new(ms(20));
        let mut turns = [0; 60];
        for now in 0..=20_000_u64 {
            for group in
                schedule.take(Duration::from_micros(now * 100)).into_iter().flat_map(|due| due.groups)
            {
                for (flow, turns) in turns.iter_mut().enumerate() {
                    *turns += u64::from(schedule.group_of(flow) == group);
                }
            }
        }
        assert_eq!(turns, [100; 60]);
    }

    #[test]
    fn a_stall_skips_turns_and_says_how_late_it_was() {
        let mut schedule = Schedule::new(ms(20));
        assert_eq!(schedule.take(ms(2)).unwrap().groups, [1]);
        let due = schedule.take(ms(74)).unwrap();
        assert_eq!(due.groups.len(), 10, "each group once");
        assert_eq!(due.skipped.len(), 26);
        assert_eq!(due.lateness, ms(70));
        assert_eq!(due.late, 25, "ticks due at 4..=52 ms");
        assert_eq!(schedule.take(ms(75)), None);
    }

    #[test]
    fn ticks_do_not_drift() {
        let mut schedule = Schedule::new(ms(10));
        for tick in 1..=10_000_u64 {
            let due = schedule.take(ms(tick * 2) + Duration::from_micros(900)).unwrap();
            assert_eq!(due.lateness, Duration::from_micros(900));
            assert!(due.skipped.is_empty());
        }
    }
}
