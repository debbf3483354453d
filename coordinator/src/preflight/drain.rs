//! What is in the way of the strategy `drain`: pods that may not leave, or have nowhere to go.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use flannel_migration_protocol::Strategy;
use k8s_openapi::api::core::v1::{
    Container, Node, NodeSelectorRequirement, NodeSelectorTerm, NodeSpec, NodeStatus, Pod, PodSpec,
    PodStatus, Taint, Toleration,
};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt as _;
use kube::api::ObjectMeta;
use kube::core::{Selector, SelectorExt as _};

use super::quantity::{Room, Takes as _};
use super::{Finding, Severity};
use crate::cluster::NodeFacts;
use crate::discover::FlannelDaemon;
use crate::drain::must_leave;

/// What runs where; read only if some node is to be drained.
#[derive(Clone, Debug, Default)]
pub struct Workloads {
    /// All nodes.
    pub nodes: Vec<Node>,
    /// All pods.
    pub pods: Vec<Pod>,
    /// All disruption budgets.
    pub budgets: Vec<PodDisruptionBudget>,
}

/// A node without what isn't looked at, which is most of it.
#[must_use]
pub fn trimmed_node(node: Node) -> Node {
    let allocatable = node.status.and_then(|status| status.allocatable);
    Node {
        metadata: ObjectMeta {
            name: node.metadata.name,
            labels: node.metadata.labels,
            ..ObjectMeta::default()
        },
        spec: node.spec.map(|spec| NodeSpec {
            taints: spec.taints,
            unschedulable: spec.unschedulable,
            ..NodeSpec::default()
        }),
        status: Some(NodeStatus { allocatable, ..NodeStatus::default() }),
    }
}

/// A pod without what isn't looked at, which is most of it.
#[must_use]
pub fn trimmed_pod(mut pod: Pod) -> Pod {
    pod.metadata.managed_fields = None;
    pod.spec = pod.spec.map(|spec| PodSpec {
        node_name: spec.node_name,
        host_network: spec.host_network,
        node_selector: spec.node_selector,
        affinity: spec.affinity,
        tolerations: spec.tolerations,
        containers: spec
            .containers
            .into_iter()
            .map(|container| Container {
                name: container.name,
                resources: container.resources,
                ..Container::default()
            })
            .collect(),
        ..PodSpec::default()
    });
    pod.status = pod.status.map(|status| PodStatus {
        phase: status.phase,
        conditions: status.conditions,
        ..PodStatus::default()
    });
    pod
}

/// Nodes that are to be drained. `strategy` is that of nodes without one of their own.
fn drained(nodes: &[Arc<NodeFacts>], strategy: Strategy) -> BTreeSet<&str> {
    nodes
        .iter()
        .filter(|node| super::nodes::untouched(node))
        .filter(|node| node.view.strategy.get().copied().unwrap_or(strategy) == Strategy::Drain)
        .map(|node| node.name.as_str())
        .collect()
}

/// Canal is migrated in place only.
pub fn canal(
    daemon: &FlannelDaemon,
    nodes: &[Arc<NodeFacts>],
    strategy: Strategy,
    findings: &mut Vec<Finding>,
) {
    if daemon.canal && !drained(nodes, strategy).is_empty() {
        findings.push(Finding::fatal(
            "CanalNotDrained",
            format!("DaemonSet {}", daemon.daemon_set),
            "Calico runs in flannel's pods (Canal), and nodes are to be drained",
            "Use STRATEGY=in-place: Canal's nodes are migrated in place only",
        ));
    }
}

/// All of it. `strategy` is that of nodes without one of their own.
pub fn rules(
    workloads: &Workloads,
    nodes: &[Arc<NodeFacts>],
    strategy: Strategy,
    findings: &mut Vec<Finding>,
) {
    let drained = drained(nodes, strategy);
    if drained.is_empty() {
        return;
    }
    if let [only] = nodes {
        findings.push(Finding::warning(
            "SingleNode",
            format!("Node {}", only.name),
            "it is the only node: pods that a drain evicts have nowhere to go until it is migrated",
            "Use STRATEGY=in-place, which lets pods run on, or add a node",
        ));
    }
    let leaving: Vec<&Pod> = workloads
        .pods
        .iter()
        .filter(|pod| node_of(pod).is_some_and(|node| drained.contains(node)))
        .filter(|pod| must_leave(pod, Strategy::Drain, false) && pod.metadata.deletion_timestamp.is_none())
        .collect();
    findings.extend(workloads.budgets.iter().filter_map(|budget| forbids(budget, &leaving)));
    if nodes.len() > 1 {
        nowhere(workloads, &leaving, findings);
    }
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

fn forbids(budget: &PodDisruptionBudget, leaving: &[&Pod]) -> Option<Finding> {
    let status = budget.status.as_ref()?;
    if status.disruptions_allowed > 0 || status.expected_pods == 0 {
        return None;
    }
    let selector: Selector = budget.spec.as_ref()?.selector.clone()?.try_into().ok()?;
    let namespace = budget.namespace();
    let pods: Vec<String> = leaving
        .iter()
        .filter(|pod| pod.namespace() == namespace && selector.matches(pod.labels()))
        .filter(|pod| is_protected(pod, budget))
        .map(|pod| pod.name_any())
        .collect();
    let (first, more) = (pods.first()?, pods.len() - 1);
    let pods = if more > 0 { format!("{first} and {more} more") } else { first.clone() };
    let mut finding = Finding::holds_node(
        "BudgetForbidsEviction",
        format!("PodDisruptionBudget {}/{}", namespace.unwrap_or_default(), budget.name_any()),
        format!(
            "it allows no eviction of pod {pods}: {} of {} pods are healthy, {} must be",
            status.current_healthy, status.expected_pods, status.desired_healthy
        ),
        "Run more or healthy replicas, let the budget allow one eviction, or use STRATEGY=in-place",
    );
    // One that would allow an eviction if all its pods were healthy may do so in a moment, as after its pods were started.
    if status.expected_pods > status.desired_healthy {
        finding.severity = Severity::Warning;
    }
    Some(finding)
}

/// Whether the API server asks the budget before it evicts the pod: not for one that never ran, nor, mostly, for one that isn't ready
/// (its `pkg/registry/core/pod/storage/eviction.go`).
fn is_protected(pod: &Pod, budget: &PodDisruptionBudget) -> bool {
    let Some(status) = &pod.status else { return false };
    if status.phase.as_deref() != Some("Running") {
        return false;
    }
    let mut conditions = status.conditions.iter().flatten();
    let ready = conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True");
    let always = budget
        .spec
        .as_ref()
        .is_some_and(|spec| spec.unhealthy_pod_eviction_policy.as_deref() == Some("AlwaysAllow"));
    let healthy = budget
        .status
        .as_ref()
        .is_some_and(|status| status.desired_healthy > 0 && status.current_healthy >= status.desired_healthy);
    ready || !(always || healthy)
}

/// One finding for each controller whose pods fit nowhere.
fn nowhere(workloads: &Workloads, leaving: &[&Pod], findings: &mut Vec<Finding>) {
    let mut free: BTreeMap<String, Room> =
        workloads.nodes.iter().map(|node| (node.name_any(), Room::of(node))).collect();
    for pod in &workloads.pods {
        let finished = pod
            .status
            .as_ref()
            .and_then(|status| status.phase.as_deref())
            .is_some_and(|phase| matches!(phase, "Succeeded" | "Failed"));
        if let Some(room) = node_of(pod).and_then(|node| free.get_mut(node))
            && !finished
        {
            room.take(&pod.needs());
        }
    }
    let mut told = BTreeSet::new();
    for pod in leaving {
        let (Some(spec), Some(home)) = (&pod.spec, node_of(pod)) else { continue };
        let needs = pod.needs();
        let fits = |node: &&Node| {
            node.name_any() != home
                && admits(node, spec)
                && free.get(&node.name_any()).is_some_and(|room| room.holds(&needs))
        };
        if workloads.nodes.iter().any(|node| fits(&node)) {
            continue;
        }
        let namespace = pod.namespace().unwrap_or_default();
        let owner = pod
            .owner_references()
            .iter()
            .find(|owner| owner.controller == Some(true))
            .map_or_else(|| pod.name_any(), |owner| format!("{} {}", owner.kind, owner.name));
        if told.insert((namespace.clone(), owner.clone())) {
            findings.push(Finding::warning(
                "PodFitsNowhere",
                format!("Pod {namespace}/{}", pod.name_any()),
                format!("no other node takes it ({owner}): it waits until node {home} is migrated"),
                "Let its selectors, tolerations or requests allow another node, or use STRATEGY=in-place",
            ));
        }
    }
}

/// Whether a node takes a pod, as far as selectors, affinity and taints go.
fn admits(node: &Node, spec: &PodSpec) -> bool {
    let labels = node.labels();
    let selected = spec.node_selector.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required = affinity.and_then(|it| it.required_during_scheduling_ignored_during_execution.as_ref());
    let wanted = required.is_none_or(|terms| terms.node_selector_terms.iter().any(|term| meets(node, term)));
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let tolerated = taints
        .iter()
        .filter(|taint| taint.effect != "PreferNoSchedule" && !passing(taint))
        .all(|taint| spec.tolerations.iter().flatten().any(|toleration| tolerates(toleration, taint)));
    let cordoned = node.spec.as_ref().is_some_and(|spec| spec.unschedulable == Some(true));
    selected && wanted && tolerated && !cordoned
}

/// Taints that say how a node is right now, not what it is for.
fn passing(taint: &Taint) -> bool {
    matches!(taint.key.as_str(), "node.kubernetes.io/not-ready" | "node.kubernetes.io/unreachable")
}

fn meets(node: &Node, term: &NodeSelectorTerm) -> bool {
    let name = node.name_any();
    let field = |requirement: &NodeSelectorRequirement| {
        holds(requirement, (requirement.key == "metadata.name").then_some(&name))
    };
    term.match_expressions.iter().flatten().all(|it| holds(it, node.labels().get(&it.key)))
        && term.match_fields.iter().flatten().all(field)
}

fn holds(requirement: &NodeSelectorRequirement, value: Option<&String>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let number = |text: &String| text.parse::<i64>().ok();
    let compare = |wanted: fn(&i64, &i64) -> bool| {
        value
            .and_then(number)
            .zip(values.first().and_then(number))
            .is_some_and(|(is, limit)| wanted(&is, &limit))
    };
    match requirement.operator.as_str() {
        "In" => value.is_some_and(|value| values.contains(value)),
        "NotIn" => value.is_none_or(|value| !values.contains(value)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(i64::gt),
        "Lt" => compare(i64::lt),
        _ => false,
    }
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let key = toleration.key.as_deref().unwrap_or_default();
    let effect = toleration.effect.as_deref().unwrap_or_default();
    let exists = toleration.operator.as_deref() == Some("Exists");
    (key.is_empty() && exists || key == taint.key)
        && (effect.is_empty() || effect == taint.effect)
        && (exists
            || toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default())
}

#[cfg(test)]
#[path = "drain_tests.rs"]
mod tests;
