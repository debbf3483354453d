//! Slots: which nodes use one, and who is given the free ones.

use flannel_migration_protocol::{Epoch, Goal};

use super::Step;
use crate::args::Policy;
use crate::cluster::NodeFacts;

/// What is in the way of further leases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Slots {
    used: usize,
    control_planes: usize,
    /// Nodes that failed after they had been changed.
    touched: usize,
}

impl Slots {
    /// Counts a node, or, with `more` false, takes it out again. `granting`: its lease is just being written.
    pub(super) fn count(&mut self, node: &NodeFacts, granting: bool, more: bool) {
        let uses = unavailable(node) || granting;
        tally(&mut self.used, uses, more);
        tally(&mut self.control_planes, uses && node.control_plane, more);
        tally(&mut self.touched, node.view.failures.get().is_some_and(|failures| failures.touched), more);
    }
}

/// Counts one up, or down, that is counted.
pub(super) const fn tally(count: &mut usize, counted: bool, more: bool) {
    match (counted, more) {
        (false, _) => {}
        (true, true) => *count += 1,
        (true, false) => *count -= 1,
    }
}

/// Whether a node counts against max-unavailable: its slot is used, or its kubelet doesn't report it ready. One node counts once.
#[must_use]
pub fn unavailable(node: &NodeFacts) -> bool {
    node.view.slot_used() || !node.ready
}

/// Who comes first: workers before control planes, the coordinator's own node last, nodes that failed before after those that didn't;
/// else by name.
pub(super) type Rank = (bool, bool, bool);

/// A node's rank. `own`: the coordinator's node.
pub(super) fn rank(node: &NodeFacts, own: Option<&str>) -> Rank {
    (own == Some(node.name.as_str()), node.control_plane, !node.view.failures.is_absent())
}

/// Gives leases out, to one node after another in the order of their ranks: as many as there are free slots, control planes one at a time.
/// Trouble elsewhere stops migrations, not what an administrator asks for.
pub(super) struct Grants<'a> {
    policy: &'a Policy,
    slots: Slots,
    max: usize,
    trouble: bool,
}

impl<'a> Grants<'a> {
    /// `nodes`: how many there are. `trouble`: a person is needed somewhere.
    pub(super) fn new(policy: &'a Policy, nodes: usize, slots: Slots, trouble: bool) -> Self {
        Self { policy, slots, max: policy.max_unavailable.of(nodes), trouble }
    }

    /// Whether there is a slot yet. Without one it doesn't matter who would be the first.
    pub(super) const fn any_left(&self) -> bool {
        self.slots.used < self.max
    }

    /// The lease of the next one; otherwise why it waits.
    pub(super) fn next(&mut self, node: &NodeFacts, goal: Goal) -> Result<Step, &'static str> {
        let migrate = goal == Goal::Migrate;
        let stop = self.slots.touched >= usize::try_from(self.policy.max_failures).unwrap_or(usize::MAX);
        if self.trouble && migrate {
            return Err("HeldByAlarm");
        }
        if stop && migrate && node.view.failures.is_absent() {
            return Err("TooManyFailures");
        }
        if !self.any_left() {
            return Err("NoFreeSlot");
        }
        if node.control_plane && self.slots.control_planes > 0 {
            return Err("OneControlPlaneAtATime");
        }
        self.slots.used += 1;
        self.slots.control_planes += usize::from(node.control_plane);
        let epoch = node.view.last_epoch().map_or(Epoch::FIRST, Epoch::next);
        let strategy = node.view.strategy.get().copied().unwrap_or(self.policy.strategy);
        Ok(Step::Grant { epoch, goal, strategy })
    }
}
