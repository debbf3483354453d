//! Where the migration is, for people and machines: one value, composed of what the nodes say and what the coordinator has noted, which is
//! printed, watched, kept in a ConfigMap for dashboards and laid out in `docs/status.schema.json`.

pub mod board;
pub mod compose;
pub mod show;
pub mod text;

use std::fmt;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::args::Policy;
use crate::preflight::Finding;

pub use board::Board;
pub use compose::{Noted, compose};

/// What the whole cluster is at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// No coordinator has led yet.
    #[default]
    NotStarted,
    /// The cluster is examined; what is in the way is looked at again until it is gone.
    Preflight,
    /// Calico's objects and images are put in place; no node is disturbed.
    Prepare,
    /// Nodes are migrated.
    Roll,
    /// Every node is migrated; flannel and what the migration needed are removed.
    Finish,
    /// Calico runs every node, and flannel is gone.
    Complete,
    /// The coordinator gave up; `message` says why. The Job's next pod tries again.
    Failed,
}

impl Phase {
    /// All phases, in order.
    pub const ALL: [Self; 7] = [
        Self::NotStarted,
        Self::Preflight,
        Self::Prepare,
        Self::Roll,
        Self::Finish,
        Self::Complete,
        Self::Failed,
    ];

    /// As in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotStarted => "not-started",
            Self::Preflight => "preflight",
            Self::Prepare => "prepare",
            Self::Roll => "roll",
            Self::Finish => "finish",
            Self::Complete => "complete",
            Self::Failed => "failed",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where the migration is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// What the whole cluster is at.
    pub phase: Phase,
    /// Why, if the phase needs a reason; for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Who leads, if anybody does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coordinator: Option<Coordinator>,
    /// When a coordinator first led this migration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub started: Option<Timestamp>,
    /// When it was complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub ended: Option<Timestamp>,
    /// How nodes are taken through; absent while no coordinator has led.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyStatus>,
    /// How far it is.
    pub progress: Progress,
    /// All nodes that run Linux, by name.
    pub nodes: Vec<NodeStatus>,
    /// What a person must look at; no further node is started while there is any.
    #[serde(default)]
    pub alarms: Vec<AlarmStatus>,
    /// What the coordinator found in the way of the start, or worth knowing.
    #[serde(default)]
    pub findings: Vec<FindingStatus>,
}

/// The coordinator that leads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Coordinator {
    /// Its pod.
    pub identity: String,
    /// Its version; empty when it isn't known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// When it last renewed its leadership, by its clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub renewed: Option<Timestamp>,
}

/// How nodes are taken through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyStatus {
    /// `drain` or `in-place`.
    pub strategy: String,
    /// Nodes at a time: a number, or a per cent.
    pub max_unavailable: String,
    /// Nodes that may fail after they were changed before no further one is started.
    pub max_failures: u32,
    /// Bound of a node's evictions, in seconds.
    pub drain_timeout_seconds: u64,
    /// Bound of a node's switch and verification, in seconds.
    pub node_budget_seconds: u64,
}

impl From<&Policy> for PolicyStatus {
    fn from(policy: &Policy) -> Self {
        Self {
            strategy: policy.strategy.to_string(),
            max_unavailable: policy.max_unavailable.to_string(),
            max_failures: policy.max_failures,
            drain_timeout_seconds: policy.drain_timeout.as_secs(),
            node_budget_seconds: policy.node_budget.as_secs(),
        }
    }
}

/// How far the migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// Nodes that are Calico's, verified and back at work.
    pub done: usize,
    /// All nodes.
    pub total: usize,
    /// Seconds until the last node is done, if those to come take as long as those that are done did. Absent while none is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remaining_seconds: Option<u64>,
}

/// One node. What its keys don't say is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct NodeStatus {
    /// Its name.
    pub node: String,
    /// The network label: `flannel`, `none` or `calico`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// The agent's state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// What the agent does or waits for within the state.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub step: String,
    /// When the state was entered, by the node's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub since: Option<Timestamp>,
    /// How its pods are dealt with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<String>,
    /// The epoch of the lease in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<u64>,
    /// Pods that were taken over with their address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adopted: Option<usize>,
    /// Pods that were evicted for the switch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evicted: Option<usize>,
    /// When its last lease was granted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub leased_at: Option<Timestamp>,
    /// When it was migrated and back at work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub migrated_at: Option<Timestamp>,
    /// Whether its kubelet reports it ready.
    pub ready: bool,
    /// Whether it is cordoned, by whomever.
    pub cordoned: bool,
    /// Whether the administrator holds it back.
    pub paused: bool,
    /// Why the state is what it is, what went wrong last, or what is waited for; `CamelCase`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// In words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// What it waits for, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
    /// Not tried again before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub retry_after: Option<Timestamp>,
}

/// What a person must look at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AlarmStatus {
    /// The node.
    pub node: String,
    /// `CamelCase`, stable.
    pub reason: String,
    /// What, and what to do.
    pub message: String,
}

/// What is in the way of the start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FindingStatus {
    /// `fatal`, `blocking`, `holds-node` or `warning`.
    pub severity: String,
    /// `CamelCase`, stable.
    pub reason: String,
    /// What it is about.
    pub object: String,
    /// What was found.
    pub found: String,
    /// What to do.
    pub remedy: String,
}

impl From<&Finding> for FindingStatus {
    fn from(finding: &Finding) -> Self {
        Self {
            severity: finding.severity.to_string(),
            reason: finding.reason.to_owned(),
            object: finding.object.clone(),
            found: finding.found.clone(),
            remedy: finding.remedy.clone(),
        }
    }
}
